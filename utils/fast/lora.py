"""The forward and backward pass of a frozen, quantized layer and its LoRA adapter, written out by hand.

    y  = [x | xa] [W | s B]'      xa = drop(x) A'     base and adapter are one product
    dx = dy W + drop(s dyb A)     dyb = dy B
    dA = s dyb' drop(x)           dB = s dy' xa

What that gains over autograd on PEFT's modules: W is unpacked once a pass and never kept, the low-rank part
costs no pass over y of its own, x is kept once for all projections of it, dropout keeps no mask, and the
products that make dA and dB add them to the float32 gradients. The parameters stay those of PEFT.

In 16 bits the same product serves calls without gradient. PEFT adds the adapter's part to a y that is rounded
already, which rounds a small part away: after one step of Adam SmolLM2's loss is 3.135 by this product, 3.162
by PEFT's, and was 3.160 (scripts/README.md).
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.fast.flat_adapter import FlatAdapter
from utils.fast.frozen_weights import read_weight
from utils.fast.kernels import Mask, add_low_rank, copy_and_drop, gate, gate_backward, place_low_rank
from utils.fast.keyed_noise import KeyedDropout

ADAPTER = "default"


class Projections:
    """Adapted layers that read one input, or a single layer; their adapter as views of the flat buffers."""

    def __init__(self, layers: list[LoraLayer]):
        self.layers = layers
        self.bases = [layer.get_base_layer() for layer in layers]
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
        self.flat, self.dtype = flat, flat.copy.dtype
        self.A, *self.B = (flat.view(flat.copy, segment) for segment in self.segments)
        self.A_grad, *self.B_grads = (flat.view(flat.grads, segment) for segment in self.segments)

    def bind_frozen(self, dtype: torch.dtype) -> None:
        """For calls without gradient only: a copy of the adapter as it is now."""
        self.flat, self.dtype = None, dtype
        self.A, *self.B = (
            torch.cat([weight.detach() for weight in segment]).to(dtype) for segment in self.segments
        )

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

    def extend(self, x: torch.Tensor) -> torch.Tensor:
        """[x | xa]  # [tokens, in + ranks]"""
        width = self.bases[0].in_features
        room = x.new_empty(len(x), width + sum(self.ranks))
        dropped = copy_and_drop(x, room[:, :width], self.mask)
        torch.mm(dropped, self.A.t(), out=room[:, width:])
        return room

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
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=scale, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=scale)


class FusedProjections(torch.autograd.Function):
    """x  # [tokens, in] -> one output a layer  # [tokens, out]. `anchor` only makes autograd come here."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, anchor: torch.Tensor, group: Projections):
        ys = [x.new_empty(len(x), base.out_features) for base in group.bases]
        extended = group.extend(x)
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


class FusedMLP(torch.autograd.Function):
    """down(act(gate(x)) * up(x)). Keeps gate and up, which backward overwrites, and not their product.

    Returns y still empty, and [hidden | ha] for FillDown: recomputing a checkpointed layer stops at the last
    tensor that was kept, so the product behind it, a fifth of the layer, is left out there.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, anchor: torch.Tensor, gate_up: Projections, down: Projections, act: str
    ):
        width = down.bases[0].in_features
        extended = gate_up.extend(x)
        sides = x.new_empty(len(x), 2 * width)  # gate and up, side by side
        gate_up.multiply(extended, list(sides.split(width, 1)))
        room = x.new_empty(len(x), width + sum(down.ranks))  # [hidden | ha]
        dropped = gate(sides, room[:, :width], act, down.mask)
        torch.mm(dropped, down.A.t(), out=room[:, width:])
        ctx.gate_up, ctx.down, ctx.act = gate_up, down, act
        ctx.save_for_backward(extended, sides, room[:, width:].contiguous())
        ctx.mark_non_differentiable(room)
        return x.new_empty(len(x), down.bases[0].out_features), room

    @staticmethod
    def backward(ctx, dy: torch.Tensor, _):
        extended, sides, ha = ctx.saved_tensors
        hidden, dyb = ctx.down.multiply_grads([dy], True)  # so far the gradient of hidden
        gate_backward(sides, hidden, ctx.act, ctx.down.mask)
        ctx.down.add_gradients(hidden, ha, [dy], dyb)
        del hidden
        dys = list(sides.split(sides.shape[1] // 2, 1))
        dx, dyb = ctx.gate_up.multiply_grads(dys, ctx.needs_input_grad[0])
        ctx.gate_up.add_gradients(*ctx.gate_up.split(extended), dys, dyb)
        return dx, None, None, None, None


class FillDown(torch.autograd.Function):
    """FusedMLP's y, multiplied out in place; its gradient is FusedMLP's."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, room: torch.Tensor, down: Projections):
        down.multiply(room, [y])
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        return dy, None, None
