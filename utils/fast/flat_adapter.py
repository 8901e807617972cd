"""Adapter weights in one buffer and their gradients in a second.

LLaMA-7B has 224 adapted layers, so 448 small matrices A and B. An optimizer that walks them launches
thousands of kernels a step, each for microseconds of work. Laid end to end in one float32 buffer they are one
parameter: clipping, zeroing and Adam are one launch each, and several processes need one all-reduce.
"""

from collections.abc import Callable

import torch
from torch import nn

ALIGNMENT = 16  # elements: a view starts on 32 bytes in 16 bits, where tensor cores want it


class FlatAdapter:
    """Every adapter weight and gradient as a view of two float32 buffers, with a copy in the compute dtype.

    Where memory is short no copy is kept (`keeps_copy`), and each matrix is rounded when it is used.

    `segments`: lists of parameters; the members of one lie end to end, so a list of equally wide matrices is
    also one matrix (the A of q, k and v: one product instead of three). PEFT's modules keep their parameters.
    """

    def __init__(self, segments: list[list[nn.Parameter]], dtype: torch.dtype, keeps_copy: bool = True):
        self.dtype = dtype
        device = segments[0][0].device
        self.starts: dict[nn.Parameter, int] = {}
        size = 0
        for segment in segments:
            size = -(-size // ALIGNMENT) * ALIGNMENT
            for parameter in segment:
                self.starts[parameter] = size
                size += parameter.numel()
        self.weights = nn.Parameter(torch.zeros(size, device=device))  # what the optimizer is given
        for parameter in self.starts:
            view = self.view(self.weights.data, [parameter])
            view.copy_(parameter.data)
            parameter.data = view
        if self.weights.is_cuda:  # the parameters' own memory makes room for what follows
            torch.cuda.empty_cache()
        self.grads = torch.zeros(size, device=device)
        self.copy: torch.Tensor | None = self.weights.data if dtype == torch.float32 else None
        if keeps_copy and dtype != torch.float32:
            self.copy = torch.zeros(size, device=device, dtype=dtype)
        self.refresh_copy()
        self.attach_gradients()

    def view(self, buffer: torch.Tensor, segment: list[nn.Parameter]) -> torch.Tensor:
        """The matrices of `segment`, one below the other, as a view of `buffer`  # [rows of all, columns]"""
        start, size = self.starts[segment[0]], sum(parameter.numel() for parameter in segment)
        return buffer[start : start + size].view(-1, *segment[0].shape[1:])

    def check_place(self) -> None:
        """Raises RuntimeError where a parameter has left the buffer: it would not be trained any more."""
        for parameter in self.starts:
            if parameter.data_ptr() != self.view(self.weights.data, [parameter]).data_ptr():
                raise RuntimeError("an adapter weight has left the buffer that is trained")

    def find_runs(self, is_of_kind: Callable[[nn.Parameter], bool]) -> list[tuple[bool, int, int]]:
        """(whether of the kind, start, end) of each stretch of the buffer whose matrices are or are not."""
        kinds = [(is_of_kind(parameter), start) for parameter, start in self.starts.items()]
        first = [kinds[i] for i in range(len(kinds)) if i == 0 or kinds[i][0] != kinds[i - 1][0]]
        ends = [start for _, start in first[1:]] + [self.weights.numel()]
        return [(kind, start, end) for (kind, start), end in zip(first, ends, strict=True)]

    def cut(self, start: int, end: int) -> nn.Parameter:
        """A stretch of the buffer as a parameter of its own: whoever steps it steps these weights."""
        part = nn.Parameter(self.weights.data[start:end])
        part.grad = self.grads[start:end]
        return part

    def refresh_copy(self) -> None:
        """Bring the 16-bit copy up to date: one launch, and no way for a resume to leave it stale."""
        if self.copy is not None and self.copy.dtype != torch.float32:
            self.copy.copy_(self.weights.data)

    def attach_gradients(self) -> None:
        """Zero the gradients and point every .grad into the buffer, if zero_grad() has set any to None.

        Without it the optimizer would find no gradient where the backward pass writes, and learn nothing.
        """
        weights = [self.weights, *self.starts]
        if all(weight.grad is not None for weight in weights):
            return
        self.grads.zero_()
        self.weights.grad = self.grads
        for parameter in self.starts:
            parameter.grad = self.view(self.grads, [parameter])

    def zero_gradients(self) -> None:
        self.grads.zero_()

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to `max_norm`; returns their norm before, on the device."""
        norm = torch.linalg.vector_norm(self.grads)
        self.grads.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
