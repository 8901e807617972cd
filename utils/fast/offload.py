"""The layer inputs that checkpointing keeps, in the host's memory instead of the GPU's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from utils.console import notice
from utils.fast.memory import allocate_pinned, read_host_memory

checkpoint_layer = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
SMALLEST_WIDTH = 2048  # hidden_size from which a layer computes for longer than its input is copied


def keep(x: torch.Tensor) -> torch.Tensor:
    return x


class HostOffload:
    """Gradient checkpointing whose kept layer inputs wait in pinned host memory.

    Checkpointing keeps one input for each layer: for LLaMA-7B and 8,192 tokens 64 MB each, 2 GB in all. Here
    the input of layer i is copied to the host while layer i computes, and comes back while the backward pass
    is at layer i + 1. So the GPU holds two or three of them, whatever the number of layers.

    Where the host has no room for all of them, every second one waits there, and the input of the layer in
    between is computed once more from the one before: half the memory for a sixth more arithmetic.

    The copies run on a stream of their own beside the arithmetic. A CUDA graph can record them: the step that
    runs before a capture allocates the pinned buffers, and they stay. (The idea is Unsloth's offloaded
    checkpointing, which copies on the stream that computes.)
    """

    def __init__(self, device: torch.device, layers: int = 0):
        self.layers = layers  # at most so many are checkpointed
        self.choices: dict[int, bool] = {}  # by bytes of an input: whether every second one is kept
        self.before: tuple[Callable, tuple[Any, ...]] | None = None  # the layer before, if its input is kept
        self.stream = torch.cuda.Stream(device)
        self.pinned_buffers: list[torch.Tensor] = []  # pinned bytes, by layer
        self.outgrown: list[torch.Tensor] = []  # captured graphs write there
        self.is_full = self.is_announced = False
        self.kept: list[torch.Tensor] = []  # what left, in order
        self.leaving: torch.Tensor | None = None
        self.coming: dict[int, torch.Tensor] = {}

    def settle(self) -> None:
        """Before a micro-batch and after it: nothing is kept, nothing on its way.

        A backward pass that breaks off, or needs no gradient below some layer, has fetched an input in vain.
        Its memory would be another's while the copy still writes, and no capture may end before a copy does.
        """
        if self.coming:
            self.join()
        self.kept, self.leaving, self.coming = [], None, {}
        self.before = None

    def __call__(self, run: Callable, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """run(x, *args), checkpointed  # x: [rows, width, hidden_size]"""
        if self.before is not None and self.skips(x.nbytes):
            return self.skip(run, x, *args)
        buffer = self.find_buffer(len(self.kept), x.nbytes)
        self.before = None if buffer is None else (run, args)
        if buffer is None:
            return checkpoint_layer(run, x, *args)
        number, first, needs_grad = len(self.kept), [x], x.requires_grad
        self.send(x, buffer[: x.nbytes].view(x.dtype).view(x.shape))

        def run_again(*args: Any) -> torch.Tensor:
            return run(first.pop() if first else self.fetch(number).requires_grad_(needs_grad), *args)

        return checkpoint_layer(run_again, *args)

    def skip(self, run: Callable, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """As above, of a layer whose input is not kept: the layer before it makes it again."""
        assert self.before is not None
        (before, its_args), self.before = self.before, None
        number, first, needs_grad = len(self.kept) - 1, [x], x.requires_grad

        def compute() -> torch.Tensor:
            earlier = self.fetch(number, is_last=False)
            with saved_tensors_hooks(keep, keep):  # not those of checkpoint, which counts what a layer saves
                # With gradient, as it was: calls without may round otherwise.
                x = before(earlier, *its_args).detach()
            self.coming[number] = earlier  # which comes next
            return x.requires_grad_(needs_grad)

        return checkpoint_layer(lambda *args: run(first.pop() if first else compute(), *args), *args)

    def skips(self, size: int) -> bool:
        """Whether inputs of `size` bytes, of all layers, leave less than a quarter of the host's memory."""
        if size not in self.choices:
            total, free = read_host_memory()
            missing = self.layers * size - sum(map(len, self.pinned_buffers))
            self.choices[size] = missing > 0 and free - missing < total / 4
            if self.choices[size]:
                notice(
                    "host memory is short: every second layer's input waits there, the others are made again"
                )
        return self.choices[size]

    def find_buffer(self, number: int, size: int) -> torch.Tensor | None:
        """Pinned bytes for the layer; None when the host has no more to give."""
        if number < len(self.pinned_buffers) and len(self.pinned_buffers[number]) >= size:
            return self.pinned_buffers[number]
        total, free = read_host_memory()
        if self.is_full or free - size < total / 4:
            if not self.is_full:
                notice(f"host memory runs short: inputs of layers from {number} on stay on the GPU")
            self.is_full = True
            return None
        buffer = allocate_pinned(size)
        self.outgrown += self.pinned_buffers[number : number + 1]
        self.pinned_buffers[number : number + 1] = [buffer]
        return buffer

    def send(self, x: torch.Tensor, copy: torch.Tensor) -> None:
        if self.kept:  # a capture may not wait for a stream that is not in it yet
            self.join()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            copy.copy_(x.detach(), non_blocking=True)
        self.leaving = x.detach()  # nothing else may take its memory before the next join
        self.kept.append(copy)

    def fetch(self, number: int, is_last: bool = True) -> torch.Tensor:
        """The input kept as `number`; the one before it is sent for, unless this is asked for again."""
        if not self.is_announced:
            size = sum(map(len, self.pinned_buffers)) / 2**30
            notice(f"checkpointed layer inputs wait in {size:.1f} GiB of host memory (--offload_checkpoints)")
            self.is_announced = True
        x = self.coming.pop(number) if number in self.coming else self.start_fetching(number)
        self.join()
        if number and is_last:
            self.coming[number - 1] = self.start_fetching(number - 1)
        return x

    def start_fetching(self, number: int) -> torch.Tensor:
        x = torch.empty_like(self.kept[number], device=self.stream.device, pin_memory=False)
        self.stream.wait_stream(torch.cuda.current_stream())  # which may still use that memory
        with torch.cuda.stream(self.stream):
            x.copy_(self.kept[number], non_blocking=True)
        return x

    def join(self) -> None:
        """Let the computing stream wait for the copies so far: made a layer ago, they are done."""
        torch.cuda.current_stream().wait_stream(self.stream)
        self.leaving = None
