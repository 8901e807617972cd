"""Frozen layers that several processes hold together: each keeps 1/N of every layer's bytes.

A layer is whole only while it computes. One all-gather puts its codes and scales together, and that of the
next layer runs meanwhile, so there are two slots and even and odd layers take turns in them:

    forward    slot 0   layer 0   layer 2 ...           gathered while layer 1 computes
               slot 1        layer 1   layer 3 ...
    backward   the other way round; the last two layers lie in the slots already

Of a 65B in NF4 (32 GB) on eight GPUs each holds 4 GB, and 0.8 GB of slots. The fused path reads a weight
where it multiplies (frozen_weights.py) and keeps none for its backward pass, so nothing in it knows of the
slots. All processes take the same layers in the same order, and equally many micro-batches (even_out).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import distributed, nn

from utils.prompts.messages import IGNORE_INDEX

# torch 2.13 has new names for these two, and torch 2.11 only the old ones.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated")
ALIGNMENT = 64  # bytes: where a tensor of any dtype may begin
BLOCK, OUTER_BLOCK = 64, 256  # weights of a scale; scales of a double-quantized one's
PIECE = 2**21  # weights read and quantized at once: on a CPU bitsandbytes takes 20 bytes for each meanwhile


@dataclass(frozen=True)
class Quantization:
    """How layers are quantized; `example` lends its tables of code values."""

    quant_type: str
    is_double: bool
    dtype: torch.dtype  # of the weights before
    device: torch.device

    def quantize_into(self, weight: Any, read: Callable[[slice], torch.Tensor]) -> None:
        """Give `weight` codes and scales as bitsandbytes does when a model is loaded, piece by piece.

        `read` gives some rows of the matrix. It is never whole, and its scales are quantized in the end.
        """
        state = weight.quant_state
        rows, columns = state.shape
        scales = torch.empty(divide_up(rows * columns, BLOCK), device=self.device)
        step = count_rows(columns)
        for first in range(0, rows, step):
            piece = read(slice(first, min(first + step, rows))).to(self.device, self.dtype).contiguous()
            codes, made = quantize_4bit(piece, blocksize=BLOCK, quant_type=self.quant_type)
            at = first * columns
            weight.data[at // 2 : at // 2 + len(codes)] = codes
            scales[at // BLOCK : at // BLOCK + len(made.absmax)] = made.absmax
        if self.is_double:
            state.offset.copy_(scales.mean())
            scales, made = quantize_blockwise(scales - state.offset, blocksize=OUTER_BLOCK)
            state.state2.absmax.copy_(made.absmax)
        state.absmax.copy_(scales)

    def build_example(self) -> QuantState:
        zeros = torch.zeros(BLOCK, BLOCK, dtype=self.dtype, device=self.device)
        return quantize_4bit(
            zeros, blocksize=BLOCK, compress_statistics=self.is_double, quant_type=self.quant_type
        )[1]


def count_rows(columns: int) -> int:
    """Rows of a piece, which are whole blocks together."""
    whole = BLOCK // gcd(columns, BLOCK)
    return max(1, PIECE // columns // whole) * whole


def divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def list_sizes(weights: int, is_double: bool) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) of codes, scales, offset and scales of the scales, for a matrix of so many `weights`."""
    scales = divide_up(weights, BLOCK)
    codes = (torch.uint8, (divide_up(weights, 2), 1))
    if not is_double:
        return [codes, (torch.float32, (scales,))]
    outer = (torch.float32, (divide_up(scales, OUTER_BLOCK),))
    return [codes, (torch.uint8, (scales,)), (torch.float32, ()), outer]


def measure(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes from where a tensor begins to where the next one may."""
    return divide_up(torch.Size(shape).numel() * dtype.itemsize, ALIGNMENT) * ALIGNMENT


class ShardedLayers:
    """`layers`, whose Linear4bit weights are on the meta device; `fill` gives each its share of the bytes."""

    def __init__(self, layers: list[nn.Module], quantization: Quantization):
        self.quantization = quantization
        self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
        self.linears = [
            [(name, each) for name, each in layer.named_modules() if isinstance(each, Linear4bit)]
            for layer in layers
        ]
        sizes = [sum(self.measure_linear(each) for _, each in linears) for linears in self.linears]
        self.shard_bytes = [
            divide_up(size, self.processes * ALIGNMENT) * ALIGNMENT for size in sizes
        ]  # of a process
        slot = max(self.shard_bytes) * self.processes
        self.slots = [torch.zeros(slot, dtype=torch.uint8, device=quantization.device) for _ in range(2)]
        # One piece of memory: pieces between what loading frees would keep a CPU's heap from shrinking.
        memory = torch.empty(sum(self.shard_bytes), dtype=torch.uint8, device=quantization.device)
        self.shards = list(memory.split(self.shard_bytes))
        self.filled = 0  # layers
        self.held: list[int | None] = [None, None]  # number of the layer in each slot, or on its way there
        self.works: list[Any] = [None, None]  # all-gathers under way
        self.at = -1  # layer that was asked for last
        self.example = quantization.build_example()
        for number, layer in enumerate(layers):
            self.lay_out(number)
            layer.register_forward_pre_hook(lambda *_, number=number: self.hold(number))

    def measure_linear(self, linear: Linear4bit) -> int:
        sizes = list_sizes(linear.in_features * linear.out_features, self.quantization.is_double)
        return sum(measure(shape, dtype) for dtype, shape in sizes)

    def lay_out(self, number: int) -> None:
        """Let the weights of layer `number` be views of its slot, for good."""
        slot, start = self.slots[number % 2], 0
        for _, linear in self.linears[number]:
            views = []
            for dtype, shape in list_sizes(
                linear.in_features * linear.out_features, self.quantization.is_double
            ):
                size = torch.Size(shape).numel() * dtype.itemsize
                views.append(slot[start : start + size].view(dtype).view(shape))
                start += measure(shape, dtype)
            self.bind(linear, views)
            vars(linear)["read_from"] = (self, number)  # what read_weight looks for

    def bind(self, linear: Any, views: list[torch.Tensor]) -> None:
        codes, absmax, *nested = views
        example, quantization = self.example, self.quantization
        state2 = None
        if nested:
            outer = example.state2
            state2 = QuantState(nested[1], blocksize=outer.blocksize, code=outer.code, dtype=outer.dtype)
        linear.quant_state = QuantState(
            absmax,
            shape=linear.weight.shape,
            code=example.code,
            blocksize=example.blocksize,
            quant_type=quantization.quant_type,
            dtype=quantization.dtype,
            offset=nested[0] if nested else None,
            state2=state2,
        )
        linear.weight = Params4bit(
            codes,
            requires_grad=False,
            quant_state=linear.quant_state,
            blocksize=BLOCK,
            compress_statistics=quantization.is_double,
            quant_type=quantization.quant_type,
            module=linear,
            bnb_quantized=True,
        )

    def fill(self, read: Callable[[str, slice], torch.Tensor]) -> None:
        """Quantize the next layer, whose matrices `read` gives by their name in it and rows; keep a share.

        Each process reads and quantizes every N-th matrix into an empty slot; the sum of all slots is the
        layer. So no process reads the whole model, and a node reads it from its disk once.
        """
        number = self.filled
        size, slot = self.shard_bytes[number], self.slots[number % 2]
        slot.zero_()
        for place, (name, linear) in enumerate(self.linears[number]):
            if place % self.processes == self.rank:
                self.quantization.quantize_into(linear.weight, partial(read, name))
        whole = slot[: size * self.processes]
        distributed.all_reduce(whole)
        self.shards[number].copy_(whole[self.rank * size : (self.rank + 1) * size])
        self.filled += 1

    def hold(self, number: int) -> None:
        """Have layer `number` whole, and begin with the one that is likely to be next."""
        if number == self.at:
            return
        ahead = 1 if number > self.at or number == 0 else -1
        self.at = number
        slot, (_, linear) = self.slots[number % 2], self.linears[number][0]
        assert linear.weight.data_ptr() == slot.data_ptr(), "the layers were moved out of their slots"
        self.gather(number)
        self.wait(number % 2)
        if 0 <= number + ahead < len(self.shards):
            self.gather(number + ahead)

    def gather(self, number: int) -> None:
        place = number % 2
        if self.held[place] != number:
            self.wait(place)
            whole = self.slots[place][: self.shard_bytes[number] * self.processes]
            self.held[place] = number
            # NCCL's stream begins when all that was launched before is done, so nobody reads the slot still.
            self.works[place] = distributed.all_gather_into_tensor(whole, self.shards[number], async_op=True)

    def wait(self, place: int) -> None:
        if self.works[place] is not None:
            self.works[place].wait()
            self.works[place] = None

    def even_out(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`micro_batches` and as many without labels as other processes have more: they add zeros."""
        count = torch.tensor(len(micro_batches), device=self.slots[0].device)
        distributed.all_reduce(count, op=distributed.ReduceOp.MAX)
        first = micro_batches[0]
        labels = torch.full_like(first["labels"], IGNORE_INDEX)
        empty = first | {"labels": labels, "label_positions": first["label_positions"][:0]}
        return micro_batches + [empty] * (int(count) - len(micro_batches))
