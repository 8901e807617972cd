"""One model, several replies at once: each has the model for one token, then the next in line has it."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer


class ModelLock:
    """A lock in the order of arrival. Whoever holds it has the adapter as asked for: replies never mix."""

    def __init__(self, model: Any):
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.tuned = True
        self.guard = threading.Lock()
        self.held = False
        self.line: deque[threading.Event] = deque()

    @contextmanager
    def hold(self, tuned: bool) -> Iterator[None]:
        self.take(tuned)
        try:
            yield
        finally:
            self.leave()

    def pass_on(self, tuned: bool) -> None:
        """Let everyone who waits have a turn, then go on."""
        if self.line:
            self.leave()
            self.take(tuned)

    def take(self, tuned: bool) -> None:
        called = threading.Event()
        with self.guard:
            if self.held:
                self.line.append(called)
            else:
                self.held = True
                called.set()
        called.wait()
        self.set_adapter(tuned)

    def leave(self) -> None:
        with self.guard:
            if self.line:
                self.line.popleft().set()  # still held, by the next
            else:
                self.held = False

    def set_adapter(self, tuned: bool) -> None:
        if tuned != self.tuned:
            for layer in self.layers:
                layer.enable_adapters(tuned)
            self.tuned = tuned
