"""Tokens and seconds of a run, all of its starts counted."""

import time
from collections.abc import Callable
from typing import Any

import torch


class TokenMeter:
    """Counts real (unpadded) tokens, and the time that training them takes.

    The count since the last log line stays on the device: reading it every step would wait for the GPU.
    """

    def __init__(self, device: torch.device, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]):
        self.sum_over_processes = sum_over_processes
        self.since_log = torch.zeros((), dtype=torch.long, device=device)
        self.at_step_start: torch.Tensor | None = None  # since_log before the step that runs now
        self.tokens = 0  # up to the last log line
        self.last_log_time: float | None = None  # the clock starts with the first step
        self.start_time, self.earlier_seconds = time.perf_counter(), 0.0

    def start(self) -> None:
        self.start_time = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of training, those of the starts that this one goes on from included."""
        return self.earlier_seconds + time.perf_counter() - self.start_time

    @property
    def all_tokens(self) -> int:
        return self.tokens + int(self.sum_over_processes(self.since_log).item())

    def begin_step(self) -> None:
        self.at_step_start = self.since_log.clone()

    def end_step(self) -> None:
        self.at_step_start = None

    def count(self, micro_batches: list[dict[str, Any]]) -> None:
        if self.last_log_time is None:
            self.last_log_time = time.perf_counter()
        for part in micro_batches:
            self.since_log += part["num_tokens"].to(self.since_log.device)

    def read_speed(self) -> float:
        """Tokens/s of all processes since the last call."""
        assert self.last_log_time is not None  # a step was counted
        tokens, now = int(self.sum_over_processes(self.since_log).item()), time.perf_counter()
        speed = round(tokens / (now - self.last_log_time), 1)
        self.tokens += tokens
        self.since_log.zero_()
        self.last_log_time = now
        return speed

    def leave_out(self, seconds: float) -> None:
        """Of the speed: an evaluation is no training time."""
        if self.last_log_time is not None:
            self.last_log_time += seconds

    def correct_runtime(self, logs: dict[str, float]) -> None:
        """The Trainer divides the steps of all starts by the time of the last one: take the time of all."""
        share = logs["train_runtime"] / self.seconds
        logs["train_runtime"] = round(self.seconds, 4)
        for name in ("train_samples_per_second", "train_steps_per_second"):
            logs[name] = round(logs[name] * share, 3)

    def state_dict(self) -> dict[str, Any]:
        """As it was after the last whole step."""
        since_log = self.since_log if self.at_step_start is None else self.at_step_start
        return {"tokens_since_log": since_log.item(), "tokens_seen": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.since_log += state["tokens_since_log"]
        self.tokens, self.earlier_seconds = state["tokens_seen"], state["seconds"]
