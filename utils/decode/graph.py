"""Replies on a GPU: a step of one token as a CUDA graph, which costs the CPU a single launch.

A 7B model with an adapter launches some 2,000 kernels a token, and the GPU waits for most of them. Here they
are fewer (layers.py, and for LLaMA-like models model.py) and start all at once. What is
captured has been compared with the model's own forward before, on the conversation at hand.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from utils.console import notice
from utils.decode.cuda_c import KernelError
from utils.decode.growing_cache import GrowingCache, crop_cache, is_next_token, keep_all
from utils.decode.model import WholeStep
from utils.decode.prompt_reader import PromptReader
from utils.decode.token_choice import TokenChoice
from utils.fast.graph_capture import CaptureError, capture_graph, round_to_power
from utils.fast.trials import shallow

SMALLEST_CAPACITY = 1024  # tokens
MAX_DIFFERENCE = 0.05  # of the logits, relative: attention over a longer buffer rounds otherwise
READ_AT_ONCE = 8  # tokens of a step that verifies proposals

FAILURES = (CaptureError, KernelError, torch.OutOfMemoryError)


class GraphDecoder:
    """Steps of a causal language model: one token after a DynamicCache is replayed, all else is plain.

    Keys and values of the conversation under way lie in buffers of fixed size, and the layers of its
    DynamicCache are views of them: it can be cropped, kept and read as ever. A conversation that another one
    displaces gets copies of its own. On a CPU the same steps run without a graph.

    Steps are asked for in two ways: by generate, through `forward`, which gets logits; and by loop.py,
    which leaves the token on the GPU: then the views wait until they are asked for (`publish`).
    """

    runs_ahead = True

    def __init__(
        self, base: PreTrainedModel, whole: WholeStep | None = None, reader: PromptReader | None = None
    ):
        self.base, self.reader = base, reader  # reader: None where the model's own forward reads prompts
        self.plain, self.config = base.forward, keep_all(base.config)
        self.whole = whole
        self.adapted = next((module for module in base.modules() if isinstance(module, BaseTunerLayer)), None)
        self.ids = {
            count: torch.zeros(1, count, dtype=torch.long, device=base.device) for count in (1, READ_AT_ONCE)
        }
        self.lengths = torch.zeros(1, dtype=torch.int32, device=base.device)
        self.stream = torch.cuda.Stream() if base.device.type == "cuda" else None
        self.buffers: Any = None  # a StaticCache, from the first conversation on
        self.rotations: Any = None  # of the positions in the buffers
        self.capacity = self.length = 0  # tokens that it has room for, tokens that it holds
        # Weak reference to the DynamicCache that the buffers belong to.
        self.owner: Callable[[], GrowingCache | None] = lambda: None
        # Whether the token that was chosen last in this conversation lies in ids[1].
        self.is_placed = False
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}  # by what it is -> its result
        self.choices: dict[Any, TokenChoice] = {}
        self.obstacle: str | None = None
        self.tried = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args or self.obstacle or torch.is_grad_enabled() or not is_next_token(**kwargs):
            return self.plain(*args, **kwargs)
        input_ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
        self.pause()
        length = cache.get_seq_length()
        try:
            self.prepare(input_ids, cache, 1)
            self.ids[1].copy_(input_ids)
            logits = self.replay("logits", self.run, 1)
        except FAILURES as error:
            self.give_up(error, cache, length)
            return self.plain(*args, **kwargs)
        self.publish()
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    # What loop.py asks for.

    def find_choice(self, config: GenerationConfig) -> TokenChoice:
        """The one that graphs were captured with; NotCovered where generate must do it."""
        choice = TokenChoice(self.base, config)
        return self.choices.setdefault(choice.key, choice)

    def make_cache(self) -> GrowingCache:
        return DynamicCache(config=self.config)

    def read(self, ids: torch.Tensor, cache: GrowingCache) -> torch.Tensor:
        if self.reader:
            return self.reader.read_into(cache, ids[0])
        flags = {"use_cache": True, "logits_to_keep": 1}
        return self.plain(input_ids=ids, past_key_values=cache, **flags).logits[:, -1]

    def holds(self, cache: GrowingCache) -> bool:
        return self.is_placed and self.owner() is cache

    def place(self, cache: GrowingCache, token: int) -> None:
        self.pause()
        self.ids[1].fill_(token)
        length = cache.get_seq_length()
        try:
            if self.obstacle is None:
                self.prepare(self.ids[1], cache, 1)
        except FAILURES as error:
            self.give_up(error, cache, length)
        self.owner, self.is_placed = weakref.ref(cache), True

    def advance(self, cache: GrowingCache, choice: TokenChoice) -> torch.Tensor:
        def choose(logits: torch.Tensor) -> torch.Tensor:
            token = choice.choose(logits[:, -1])
            self.ids[1].copy_(token)
            return token.clone()

        length = self.length
        try:
            if self.obstacle is None:
                if length == self.capacity:
                    self.publish()
                    self.load(cache, length + 1)
                    self.is_placed = True
                return self.replay(choice.key, lambda: choose(self.run()), 1)
        except FAILURES as error:
            self.give_up(error, cache, length)
            self.owner = weakref.ref(cache)
        return choose(self.read(self.ids[1], cache)[:, None])

    def verify(self, ids: list[int], cache: GrowingCache) -> list[int]:
        """In steps of a fixed number of tokens: what is missing is filled up, and forgotten."""
        self.pause()
        length = cache.get_seq_length()
        new = torch.tensor([ids], device=self.lengths.device)
        try:
            if self.obstacle is None:
                self.prepare(new[:, :1], cache, READ_AT_ONCE)
                self.ids[READ_AT_ONCE].fill_(ids[-1])
                self.ids[READ_AT_ONCE][:, : len(ids)] = new
                likeliest = self.replay("likeliest", lambda: self.run(READ_AT_ONCE).argmax(-1), READ_AT_ONCE)
                return likeliest[0, : len(ids)].tolist()
        except FAILURES as error:
            self.give_up(error, cache, length)
        return self.plain(input_ids=new, past_key_values=cache, use_cache=True).logits[0].argmax(-1).tolist()

    def cut(self, cache: GrowingCache, length: int) -> None:
        if self.has(cache):
            self.set_length(min(self.length, length))
            self.publish()
        self.is_placed = self.is_placed and self.owner() is not cache
        crop_cache(cache, length)

    # How it is done.

    def has(self, cache: GrowingCache) -> bool:
        """Whether `cache` lies in the buffers: reading a prompt moves it out."""
        is_owner: bool = self.owner() is cache
        if self.buffers is None or not is_owner:
            return False
        return cache.layers[0].keys.data_ptr() == self.buffers.layers[0].keys.data_ptr()

    def pause(self) -> None:
        """The conversation under way may be cropped and read from now on, and another one come."""
        if self.is_placed:
            self.publish()
            self.is_placed = False

    def prepare(self, input_ids: torch.Tensor, cache: GrowingCache, count: int) -> None:
        """Let the conversation lie in the buffers, with room for `count` tokens more."""
        if not self.tried:
            self.try_out(input_ids, cache)
        length = cache.get_seq_length()
        if not self.has(cache) or length + count > self.capacity:
            self.load(cache, length + count)
        elif length != self.length:  # cropped since
            self.set_length(length)

    def give_up(self, error: Exception, cache: GrowingCache, length: int) -> None:
        """Plain from now on; `cache` keeps its first `length` tokens."""
        self.obstacle = str(error).splitlines()[0]
        notice(f"replies: without CUDA graphs ({self.obstacle})")
        if self.has(cache):
            self.length = length
            self.publish()
        crop_cache(cache, length)
        # A cache that lies in the buffers may stay there: nothing else is written to them any more.
        self.owner, self.buffers, self.graphs = lambda: None, None, {}

    def try_out(self, input_ids: torch.Tensor, cache: GrowingCache) -> None:
        """Raises CaptureError where the buffers give other logits for this token than the growing cache.

        By the first layers, as rounding grows with depth.
        """
        length = cache.get_seq_length()
        with self.whole.shallow(self.base) if self.whole else shallow(self.base):
            expected = self.plain(input_ids=input_ids, past_key_values=cache, use_cache=True).logits.float()
            crop_cache(cache, length)
            self.load(cache, length + 1)
            self.ids[1].copy_(input_ids)
            fault = self.find_fault(expected, length)
            if fault and self.whole:
                notice(f"replies: by the model's own modules ({fault})")
                self.whole = None
                fault = self.find_fault(expected, length)
        if fault:
            raise CaptureError(fault)
        self.tried = True

    def find_fault(self, expected: torch.Tensor, length: int) -> str | None:
        """Why a step over the buffers is not the model's own; None if it is."""
        try:
            logits = self.run().float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the model's own code, which may take the cache for one that grows
            return f"a cache of fixed size: {error}"
        finally:
            self.set_length(length)
        is_near = (logits - expected).norm() <= MAX_DIFFERENCE * expected.norm()
        return None if is_near else "a cache of fixed size gives other logits"

    def run(self, count: int = 1) -> torch.Tensor:
        """Logits of the tokens in ids[count]  # [1, count, vocabulary]; the buffers grow by them."""
        if self.whole:
            caches = [(layer.keys, layer.values) for layer in self.buffers.layers[: len(self.whole.layers)]]
            return self.whole.run(self.ids[count], caches, self.rotations, self.lengths)
        return self.plain(input_ids=self.ids[count], past_key_values=self.buffers, use_cache=True).logits

    def replay(self, name: Any, run: Callable[[], torch.Tensor], count: int) -> torch.Tensor:
        """What `run` returns for a step of `count` tokens; captured when it first runs."""
        key = (name, self.adapted is None or not self.adapted.disable_adapters)
        if key in self.graphs:
            graph, result = self.graphs[key]
            graph.replay()
        elif self.stream is None:
            result = run()
        else:
            result = self.capture(key, run, self.stream)
        self.length += count
        return result

    def capture(self, key: Any, run: Callable[[], torch.Tensor], stream: torch.cuda.Stream) -> torch.Tensor:
        """This step, run eagerly, which warms up every kernel; the following ones are captured after it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = run()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            self.graphs[key] = capture_graph(run, stream, self.lengths.device)
        except CaptureError as error:  # every step is run like this one
            notice(f"replies: without CUDA graphs ({error})")
            self.stream = None
        return result

    def load(self, cache: GrowingCache, needed: int) -> None:
        """Copy the keys and values of `cache` into the buffers, which get room for `needed` tokens.

        New buffers are made where the old ones are too small. They are also made where the old ones are four
        times too large and nobody's conversation lies there any more: attention may read a buffer to its end.
        """
        length, wanted = cache.get_seq_length(), round_to_power(needed, SMALLEST_CAPACITY)
        is_too_large = self.owner() is None and 4 * wanted <= self.capacity
        self.release()
        if needed > self.capacity or is_too_large:
            self.buffers, self.graphs = None, {}  # the old ones go first
            self.buffers = StaticCache(config=self.config, max_cache_len=wanted)
            self.capacity = wanted
            for layer, buffer in zip(cache.layers, self.buffers.layers, strict=True):
                buffer.lazy_initialization(layer.keys, layer.values)
            if self.whole:
                self.rotations = self.whole.prepare_rotations(wanted)
        for layer, buffer in zip(cache.layers, self.buffers.layers, strict=True):
            buffer.keys[:, :, :length].copy_(layer.keys)
            buffer.values[:, :, :length].copy_(layer.values)
        self.owner = weakref.ref(cache)
        self.set_length(length)
        self.publish()

    def publish(self) -> None:
        """Let the layers of the conversation in the buffers show what is there."""
        cache = self.owner()
        if cache is not None and self.buffers is not None:
            for layer, buffer in zip(cache.layers, self.buffers.layers, strict=True):
                layer.keys = buffer.keys[:, :, : self.length]
                layer.values = buffer.values[:, :, : self.length]

    def release(self) -> None:
        """Copies of its own for the conversation that the buffers belong to."""
        cache = self.owner()
        if cache is not None and self.has(cache):
            self.pause()
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        self.owner, self.is_placed = lambda: None, False

    def set_length(self, length: int) -> None:
        self.length = length
        self.lengths.fill_(length)
        for buffer in self.buffers.layers:
            buffer.cumulative_length.fill_(length)
