"""A reply under way: its tokens go from the thread that owns the model to whoever reads them."""

import math
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import GenerationConfig


class Reply:
    """What SharedDecoder.reply gives: read `tokens`, at any time `cancel`; then the figures are final.

    finish_reason: "" under way; then stop (a stop token, or `cancel("stop")`), length, time or cancelled.
    """

    def __init__(
        self, prompt: list[int], config: GenerationConfig, tuned: bool, seed: int, max_seconds: float | None
    ):
        self.prompt, self.config, self.tuned, self.seed = prompt, config, tuned, seed
        stops = config.eos_token_id
        self.stop_ids: list[int] = stops if isinstance(stops, list) else [] if stops is None else [stops]
        self.lookup = 0  # tokens guessed from the prompt, where the reply has the model for itself
        self.said: list[int] = []
        self.reused_tokens = 0  # of the prompt, read before
        self.start = time.perf_counter()
        self.first_token_seconds = self.seconds = 0.0
        self.deadline = math.inf if max_seconds is None else self.start + max_seconds
        self.finish_reason = ""
        self.error: Exception | None = None
        self.guard = threading.Lock()
        self.arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    @property
    def new_tokens(self) -> int:
        return len(self.said)

    @property
    def most(self) -> int:
        """Tokens that it may have."""
        return int(self.config.max_new_tokens)

    def tokens(self) -> Iterator[int]:
        """Each token when it is there, the stop token last where the reply comes to one.

        Closing the iterator cancels the reply. What went wrong in the decoder is raised here.
        """
        try:
            while (token := self.arrived.get()) is not None:
                yield token
        finally:
            self.cancel()
        if self.error:
            raise self.error

    def cancel(self, reason: str = "cancelled") -> None:
        """Its place is free as soon as the token under way is there; nothing comes after this."""
        self.end(reason)

    def end(self, reason: str, error: Exception | None = None) -> None:
        """The first end counts."""
        with self.guard:
            if not self.finish_reason:
                self.finish_reason, self.error = reason, error
                self.arrived.put(None)

    def is_over(self) -> bool:
        if time.perf_counter() > self.deadline:
            self.end("time")
        return bool(self.finish_reason)

    def add(self, token: int) -> bool:
        """Whether this was the last one."""
        with self.guard:
            if self.finish_reason:
                return True
            self.seconds = time.perf_counter() - self.start
            self.first_token_seconds = self.first_token_seconds or self.seconds
            self.said.append(token)
            self.arrived.put(token)
        if token in self.stop_ids:
            self.end("stop")
        elif len(self.said) >= self.most:
            self.end("length")
        return self.is_over()

    def describe(self) -> str:
        speed = self.new_tokens / self.seconds if self.seconds else 0.0
        return f"{self.new_tokens} tokens, {speed:.1f} tokens/s"


class AdapterSwitch:
    """The adapter on or off, for a model that replies with both."""

    def __init__(self, model: Any):
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # the second: modules_to_save
        self.layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
        self.tuned = True

    def turn(self, tuned: bool) -> None:
        if tuned != self.tuned:
            for layer in self.layers:
                layer.enable_adapters(tuned)
            self.tuned = tuned

    @contextmanager
    def turned(self, tuned: bool) -> Iterator[None]:
        before = self.tuned
        self.turn(tuned)
        try:
            yield
        finally:
            self.turn(before)


class OwnDraws:
    """A reply's own random numbers of torch's default generator, by its seed, whoever else draws from it."""

    def __init__(self, device: torch.device, seed: int):
        is_gpu = device.type == "cuda"
        self.generator = (
            torch.cuda.default_generators[device.index or 0] if is_gpu else torch.default_generator
        )
        self.state = torch.Generator(device).manual_seed(seed).get_state()

    @contextmanager
    def used(self) -> Iterator[None]:
        before = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            yield
        finally:
            self.state = self.generator.get_state()
            self.generator.set_state(before)
