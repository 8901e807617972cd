"""Frozen layers that wait in host memory and come to the GPU one before they are needed.

A quantized 65B has 31 GiB in its 80 layers, and one of them computes at a time. So the GPU holds two: the one
at work and the one that comes next, in two slots that the layers take in turn. While layer i computes, a
stream of copies fills the other slot:

    forward    layer 0 in slot 0 | 1 in slot 1 | 2 in slot 0 | ... | 79 in slot 1
    backward   79 is still there | 78 as well  | 77 in slot 1 | ...

The backward pass needs a layer once more, to compute it again: every layer must be recomputed. Codes and
their scales are copied; small tensors stay on the GPU. Measured on an H100 (PCIe 5): a step of LLaMA-65B on
512 tokens moves 62 GB in 1.4 s, 44 GB/s, and what it computes is hidden behind that. LLaMA-7B moves 6 GB,
0.14 s; but a micro-batch of 2,048 tokens took 0.35 s, twice as long as in place, most likely for its
launches, which no CUDA graph makes. So a plan that streams prefers large micro-batches.

Who wants the layers from elsewhere (other GPUs, a disk) needs another `fetch`: what calls this says no more
than `layer i is next, after it j`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from utils.fast.memory import allocate_pinned
from utils.fast.trials import find_layers

SLOTS = 2
ALIGNMENT = 512  # bytes


@dataclass(frozen=True)
class Piece:
    """Codes or scales of a linear layer, and the byte of the decoder's layer at which they start."""

    linear: Linear4bit
    are_codes: bool
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def place(self, x: torch.Tensor) -> None:
        """Let the linear layer have them in `x`."""
        weight: Any = self.linear.weight
        if self.are_codes:
            weight.data = x
        else:
            weight.quant_state.absmax = x

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


class StreamedLayers:
    """hold() each layer, then bind() them; from then on a layer that is called finds its weights."""

    def __init__(self, device: torch.device):
        self.device = device
        self.layers: list[nn.Module] = []
        self.pieces: list[list[Piece]] = []  # of each layer
        self.held: list[torch.Tensor] = []  # bytes of each layer on the host
        self.resident: list[int | None] = [None] * SLOTS
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.arrived = [torch.cuda.Event() for _ in range(SLOTS)] if on_gpu else []  # a copy into each slot

    def hold(self, layer: nn.Module) -> None:
        """Move the quantized weights of the next layer to the host."""
        tensors, pieces, size = list_tensors(layer), [], 0
        for linear, are_codes, x in tensors:
            pieces.append(Piece(linear, are_codes, size, x.shape, x.dtype))
            size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = allocate_pinned(size)
        for piece, (*_, x) in zip(pieces, tensors, strict=True):
            piece.view(buffer).copy_(x)
            piece.place(x.new_empty(0))
        self.layers.append(layer)
        self.pieces.append(pieces)
        self.held.append(buffer)

    def bind(self) -> None:
        """Give the layers their slots, and let each call of one ask for it and for the one that follows."""
        size = max(map(len, self.held))
        self.slots = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
        for i, layer in enumerate(self.layers):
            for piece in self.pieces[i]:
                piece.place(piece.view(self.slots[i % SLOTS]))
            for child in list_parts(layer):
                child.register_forward_pre_hook(partial(self.prepare, i, layer))
        for i in range(min(SLOTS, len(self.layers))):
            self.use(i, i)

    def prepare(self, i: int, layer: Any, *_: Any) -> None:
        if layer.training and torch.is_grad_enabled() and not layer.gradient_checkpointing:
            raise RuntimeError(f"layer {i} comes from host memory and is not recomputed in the backward pass")
        goes_back = torch._C._current_graph_task_id() != -1  # it is computed again
        self.use(i, i - 1 if goes_back else i + 1)

    def use(self, i: int, following: int) -> None:
        """Layer `i` computes next, and after it most likely `following`."""
        slot = i % SLOTS
        if self.resident[slot] != i:
            self.fetch(i)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
        if 0 <= following < len(self.layers) and self.resident[following % SLOTS] != following:
            if following % SLOTS != slot:
                self.fetch(following)

    def fetch(self, i: int) -> None:
        """Begin to copy layer `i` into its slot, once all that was told to compute so far is done."""
        slot, held = i % SLOTS, self.held[i]
        self.resident[slot] = i
        target = self.slots[slot][: len(held)]
        if self.stream is None:
            target.copy_(held)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(held, non_blocking=True)
            self.arrived[slot].record()


def list_tensors(layer: nn.Module) -> list[tuple[Linear4bit, bool, torch.Tensor]]:
    """What is streamed of a layer: (linear layer, True, its codes), (the same, False, their scales), ..."""
    linears: list[Any] = [module for module in layer.modules() if isinstance(module, Linear4bit)]
    codes = [(linear, True, linear.weight.data) for linear in linears]
    return codes + [(linear, False, linear.weight.quant_state.absmax) for linear in linears]


def list_parts(layer: nn.Module) -> list[nn.Module]:
    """Attention and MLP of a layer. Recomputing calls them again; of the layer itself it may call forward."""
    return [child for child in layer.children() if list_tensors(child)]


def stream_layers(model: Any, device: torch.device) -> None:
    """Keep the layers of `model`, which is quantized and on the CPU, there, and move the rest to `device`."""
    store = StreamedLayers(device)
    for layer in find_layers(model):
        store.hold(layer)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
        if isinstance(module, Linear4bit):
            quantized: Any = module.weight
            quantized.quant_state.to(device)
    store.bind()
    model.streamed_layers = store


def find_store(model: nn.Module) -> StreamedLayers | None:
    """The store of a model whose layers are streamed."""
    return next(filter(None, (getattr(m, "streamed_layers", None) for m in list_cores(model))), None)


def list_cores(model: Any) -> list[Any]:
    """`model`, and the base within a PeftModel."""
    return [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
