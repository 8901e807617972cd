"""A gated MLP with its adapters as one: y = down(act(gate(x)) * up(x)), forward and backward by hand.

It comes in two autograd functions, so that recomputation can stop early. Checkpointing runs a layer again
only up to the last tensor that it saved. If the down product belonged to the function that saves, the second
run would compute it too, only to throw y away: a fifth of the layer's time. So FusedMLP saves all that its
backward pass needs and returns an empty y with [hidden | ha]; DownProduct, which saves nothing, multiplies y
out. Of the forward pass gate and up are kept, not their product: the backward pass makes it again, in place.

Rows of more than TILE tokens come in tiles: gate and up of 131,072 tokens of LLaMA-3-8B are 7.5 GB, of 8,192
tokens 0.5. There x alone is kept, and the backward pass makes all else again, tile by tile. In a layer that
is recomputed anyway that costs no arithmetic: its second run stops where x is saved.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from utils.fast.kernels import gated_activation, gated_activation_backward
from utils.fast.lora import AdapterGroup

TILE = 8192  # tokens: products of a size that a GPU likes


class MLP:
    """The groups of a gated MLP and the arithmetic on some of its tokens."""

    def __init__(self, gate_up: AdapterGroup, down: AdapterGroup, act: str):
        self.gate_up, self.down, self.act = gate_up, down, act
        self.out_features = down.bases[0].out_features

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[x | xa]; gate and up, side by side; [hidden | ha], which the down product reads"""
        width = self.down.bases[0].in_features
        extended = self.gate_up.append_low_rank(x)
        sides = x.new_empty(len(x), 2 * width)
        self.gate_up.multiply(extended, list(sides.split(width, 1)))
        buffer = x.new_empty(len(x), width + sum(self.down.ranks))
        dropped = gated_activation(sides, buffer[:, :width], self.act, self.down.mask)
        torch.mm(dropped, self.down.A.t(), out=buffer[:, width:])
        return extended, sides, buffer

    def find_gradient(
        self, dy: torch.Tensor, extended: torch.Tensor, sides: torch.Tensor, ha: torch.Tensor, needs_dx: bool
    ) -> torch.Tensor | None:
        """dx  # [tokens, in]; the adapter's gradients are added to theirs. `sides` are written over."""
        hidden, dyb = self.down.multiply_grads([dy], True)  # so far the gradient of hidden
        assert hidden is not None
        gated_activation_backward(sides, hidden, self.act, self.down.mask)
        self.down.add_gradients(hidden, ha, [dy], dyb)
        del hidden
        dys = list(sides.split(sides.shape[1] // 2, 1))
        dx, dyb = self.gate_up.multiply_grads(dys, needs_dx)
        self.gate_up.add_gradients(*self.gate_up.split(extended), dys, dyb)
        return dx

    def tiles(self, count: int) -> Iterator[slice]:
        """Stretches of `count` tokens; while one is out, dropout masks are those of its tokens."""
        mask = self.gate_up.mask or self.down.mask
        for start in range(0, count, TILE):
            tile = slice(start, start + TILE)
            with mask.keys.narrowed(tile) if mask else nullcontext():
                yield tile


class FusedMLP(torch.autograd.Function):
    """x  # [tokens, in] -> y, still empty, and [hidden | ha]. `anchor` only makes autograd come here."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, anchor: torch.Tensor, mlp: MLP):
        extended, sides, buffer = mlp.begin(x)
        ctx.mlp = mlp
        ctx.save_for_backward(extended, sides, buffer[:, mlp.down.bases[0].in_features :].contiguous())
        ctx.mark_non_differentiable(buffer)
        return x.new_empty(len(x), mlp.out_features), buffer

    @staticmethod
    def backward(ctx, dy: torch.Tensor, _):
        extended, sides, ha = ctx.saved_tensors
        return ctx.mlp.find_gradient(dy, extended, sides, ha, ctx.needs_input_grad[0]), None, None


class DownProduct(torch.autograd.Function):
    """Fills the y that FusedMLP returned. The gradient passes through: FusedMLP's backward does the rest."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, buffer: torch.Tensor, mlp: MLP):
        mlp.down.multiply(buffer, [y])
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        return dy, None, None


class TiledMLP(torch.autograd.Function):
    """x  # [tokens, in] -> y, still empty: TiledProduct fills it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, anchor: torch.Tensor, mlp: MLP):
        ctx.mlp = mlp
        ctx.save_for_backward(x)
        return x.new_empty(len(x), mlp.out_features)

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        (x,) = ctx.saved_tensors
        mlp, needs_dx = ctx.mlp, ctx.needs_input_grad[0]
        dx, width = torch.empty_like(x) if needs_dx else None, mlp.down.bases[0].in_features
        for tile in mlp.tiles(len(x)):
            extended, sides, buffer = mlp.begin(x[tile])
            ha = buffer[:, width:].contiguous()
            del buffer
            part = mlp.find_gradient(dy[tile], extended, sides, ha, needs_dx)
            if dx is not None:
                dx[tile] = part
            del extended, sides, part
        return dx, None, None


class TiledProduct(torch.autograd.Function):
    """Fills the y that TiledMLP returned; nothing is saved."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, x: torch.Tensor, mlp: MLP):
        for tile in mlp.tiles(len(x)):
            mlp.down.multiply(mlp.begin(x[tile])[2], [y[tile]])
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        return dy, None, None


def run_mlp(x: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """y  # [tokens, out] of x  # [tokens, in]"""
    anchor = mlp.down.anchor
    if len(x) > TILE:
        return TiledProduct.apply(TiledMLP.apply(x, anchor, mlp), x.detach(), mlp)
    return DownProduct.apply(*FusedMLP.apply(x, anchor, mlp), mlp)
