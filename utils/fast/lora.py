"""The forward and backward pass of a frozen, quantized layer and its LoRA adapter, written out by hand.

A LoRA layer computes y = x W' + s (drop(x) A') B' (LoRA, arXiv 2106.09685; QLoRA, equation 5). W is frozen
and stored in 4 bits, A  # [rank, in] and B  # [out, rank] are trained, s is lora_alpha / rank. With x  #
[tokens, in]:

    forward    xa = drop(x) A'              the low-rank part: 64 columns beside 4,096, say
               y  = [x | xa] [W | s B]'     base and adapter are one product
    backward   dyb = dy B
               dx = dy W + drop(s dyb A)    nothing is computed for W itself: it is frozen
               dA = s dyb' drop(x)
               dB = s dy' xa

Why by hand, where autograd on PEFT's modules gives the same? PEFT runs base and adapter one after the other,
and autograd keeps what each step needs. Here W is unpacked once a pass and never kept; adding the adapter
costs no pass over y of its own; q, k and v keep one x and not three; dropout keeps no mask, it is drawn again
(token_keys.py); and dA and dB are added to the float32 gradients by the products that make them. The
parameters stay those of PEFT, so saving and loading know nothing of this file.

In 16 bits the same product serves calls without gradient. PEFT adds the adapter's part to a y that is rounded
already, which rounds a small part away: after one step of Adam SmolLM2's loss is 3.135 by this product, 3.162
by PEFT's, and was 3.160 (docs/results.md).
"""

from typing import Any

import torch
from torch import nn

from utils.fast.flat_adapter import FlatAdapter
from utils.fast.frozen_weights import read_weight
from utils.fast.kernels import (
    Mask,
    add_low_rank,
    copy_and_drop,
    place_low_rank,
)
from utils.fast.keyed_noise import KeyedDropout

ADAPTER = "default"

AdaptedLayer = Any  # PEFT's: a LoraLayer and an nn.Module, for which Python has no one annotation


class AdapterGroup:
    """Adapted layers that read one input, or a single layer; their adapter as views of the flat buffers."""

    flat: FlatAdapter | None  # None of an adapter that is not trained
    rounded: list[torch.Tensor] | None  # A and each B in the compute dtype; None where none are kept

    def __init__(self, layers: list[AdaptedLayer]):
        self.layers = layers
        self.bases: list[nn.Linear] = [layer.get_base_layer() for layer in layers]
        self.scale = layers[0].scaling[ADAPTER]
        self.ranks = [layer.r[ADAPTER] for layer in layers]

    @property
    def segments(self) -> list[list[nn.Parameter]]:
        """A of all layers end to end, then each B: the order in the flat buffer."""
        return [
            [layer.lora_A[ADAPTER].weight for layer in self.layers],
            *([layer.lora_B[ADAPTER].weight] for layer in self.layers),
        ]

    def bind(self, flat: FlatAdapter) -> None:
        self.flat, self.dtype = flat, flat.dtype
        copy, segments = flat.copy, self.segments
        self.rounded = None if copy is None else [flat.view(copy, segment) for segment in segments]
        self.exact = [flat.view(flat.weights.data, segment) for segment in segments]
        self.A_grad, *self.B_grads = (flat.view(flat.grads, segment) for segment in self.segments)

    def bind_frozen(self, dtype: torch.dtype) -> None:
        """For calls without gradient only: a copy of the adapter as it is now."""
        self.flat, self.dtype = None, dtype
        self.rounded = [
            torch.cat([weight.detach() for weight in segment]).to(dtype) for segment in self.segments
        ]

    def read(self, matrix: int) -> torch.Tensor:
        """A (0), or B of a layer (from 1 on), in the compute dtype."""
        return self.exact[matrix].to(self.dtype) if self.rounded is None else self.rounded[matrix]

    @property
    def A(self) -> torch.Tensor:
        """Of all layers, one below the other  # [ranks, in]"""
        return self.read(0)

    @property
    def B(self) -> list[torch.Tensor]:
        """Of each layer  # [out, rank]"""
        return [self.read(1 + i) for i in range(len(self.layers))]

    @property
    def anchor(self) -> torch.Tensor | None:
        """What makes autograd come to the fused functions."""
        return None if self.flat is None else self.flat.weights

    def covers_call(self) -> bool:
        """Whether a call takes the fused product. In float32 PEFT's own rounds nothing away."""
        if any(layer.disable_adapters or layer.merged for layer in self.layers):
            return False
        return self.flat is not None if torch.is_grad_enabled() else self.dtype != torch.float32

    @property
    def mask(self) -> Mask | None:
        """The dropout of this step; one mask for all layers of the group, as they read one input."""
        dropout = self.layers[0].lora_dropout[ADAPTER]
        return dropout.mask if isinstance(dropout, KeyedDropout) and dropout.training else None

    def append_low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """x and, behind it, its low-rank part: [x | xa]  # [tokens, in + ranks]

        So y = x W' + s xa B' is one product with [W | s B], and no second pass adds to y.
        """
        width = self.bases[0].in_features
        buffer = x.new_empty(len(x), width + sum(self.ranks))
        dropped = copy_and_drop(x, buffer[:, :width], self.mask)
        torch.mm(dropped, self.A.t(), out=buffer[:, width:])
        return buffer

    def multiply(self, extended: torch.Tensor, outs: list[torch.Tensor]) -> None:
        """Fill `outs`  # [tokens, out] each, from [x | xa]."""
        first = 0  # column of this layer's own xa; the others meet zeros
        for base, B, rank, out in zip(self.bases, self.B, self.ranks, outs, strict=True):
            weight = extended.new_empty(base.out_features, extended.shape[1])  # [W | s B]
            read_weight(base, self.dtype, weight[:, : base.in_features])
            place_low_rank(weight[:, base.in_features :], B, first, self.scale)
            first += rank
            if base.bias is None:
                torch.mm(extended, weight.t(), out=out)
            else:
                torch.addmm(base.bias.to(self.dtype), extended, weight.t(), out=out)

    def multiply_grads(
        self, dys: list[torch.Tensor], needs_dx: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """dx  # [tokens, in] (None where nobody asks) and dyb  # [tokens, ranks]"""
        dyb, dx = dys[0].new_empty(len(dys[0]), sum(self.ranks)), None
        for dy, B, part in zip(dys, self.B, dyb.split(self.ranks, 1), strict=True):
            torch.mm(dy, B, out=part)
        for base, dy in zip(self.bases if needs_dx else [], dys, strict=False):
            weight = read_weight(base, self.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if dx is not None:
            add_low_rank(dx, dyb, self.A, self.scale, self.mask)
        return dx, dyb

    def split(self, extended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """drop(x)  # [tokens, in] and xa  # [tokens, ranks]"""
        x, xa = extended.split([self.bases[0].in_features, sum(self.ranks)], 1)
        return self.mask.drop(x) if self.mask else x, xa

    def add_gradients(
        self, dropped: torch.Tensor, xa: torch.Tensor, dys: list[torch.Tensor], dyb: torch.Tensor
    ) -> None:
        """dA and dB into the flat gradient buffer; `dropped` is drop(x)  # [tokens, in]"""
        add_product(self.A_grad, dyb.t(), dropped, self.scale)
        for grad, dy, part in zip(self.B_grads, dys, xa.split(self.ranks, 1), strict=True):
            add_product(grad, dy.t(), part, self.scale)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale * left @ right in float32, in place; a GPU reads 16-bit factors without a copy."""
    if left.is_meta:  # a rehearsal: nothing is allocated
        return
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=scale, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=scale)


class FusedProjections(torch.autograd.Function):
    """x  # [tokens, in] -> one output a layer  # [tokens, out]. `anchor` only makes autograd come here."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, anchor: torch.Tensor, group: AdapterGroup):
        ys = [x.new_empty(len(x), base.out_features) for base in group.bases]
        extended = group.append_low_rank(x)
        group.multiply(extended, ys)
        ctx.group = group
        ctx.save_for_backward(extended)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: torch.Tensor):
        (extended,) = ctx.saved_tensors
        dx, dyb = ctx.group.multiply_grads(dys, ctx.needs_input_grad[0])
        ctx.group.add_gradients(*ctx.group.split(extended), dys, dyb)
        return dx, None, None
