"""The forward and backward pass of a frozen, quantized layer and its LoRA adapter, written out by hand.

    y  = [x | xa] [W | s B]'      xa = drop(x) A'     base and adapter are one product
    dx = dy W + drop(s dyb A)     dyb = dy B
    dA = s dyb' drop(x)           dB = s dy' xa

What that gains over autograd on PEFT's modules: W is unpacked once a pass and never kept, the low-rank part
costs no pass over y of its own, x is kept once for all projections of it, dropout keeps no mask, and the
products that make dA and dB add them to the float32 gradients. The parameters stay those of PEFT.

In 16 bits the same product serves calls without gradient. PEFT adds the adapter's part to a y that is rounded
already, which rounds a small part away: after one step of Adam SmolLM2's loss is 3.135 by this product, 3.162
by PEFT's, and was 3.160 (docs/results.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.fast.few_tokens import is_few, multiply_few
from utils.fast.flat_adapter import FlatAdapter
from utils.fast.frozen_weights import read_weight
from utils.fast.kernels import Mask, add_low_rank, copy_and_drop, gate, gate_backward, place_low_rank
from utils.fast.keyed_noise import SHARED_INPUT, KeyedDropout

ADAPTER = "default"
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu", "PytorchGELUTanh": "gelu"}


def find_obstacle(layer: LoraLayer, dtype: torch.dtype) -> str | None:
    """Why this adapted layer keeps PEFT's own forward; None if the fused one covers it."""
    base = layer.get_base_layer()
    if type(base) not in (nn.Linear, Linear4bit, Linear8bitLt):
        return f"{type(base).__name__} layers"
    if list(layer.lora_A) != [ADAPTER] or layer.active_adapters != [ADAPTER] or layer.merged:
        return "several adapters"
    if layer.lora_variant or layer.lora_bias[ADAPTER]:
        return "DoRA" if layer.lora_variant else "adapter biases"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "trained biases"
    if type(base) is nn.Linear and base.weight.dtype != dtype:
        return f"a base in {base.weight.dtype} under {dtype}"
    return None


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


class SharedInput:
    """q, k and v are called one after another on one tensor: the first call computes all three."""

    def __init__(self, group: Projections):
        self.group, self.x, self.ys = group, None, {}

    def forward(self, i: int, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.group.covers_call():
            return plain(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            y = multiply_few(self.group, i, self.flatten(x)) if is_few(self.group, x) else self.take(i, x)
        return y.view(*x.shape[:-1], -1)

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the compute dtype  # [tokens, in]"""
        return x.reshape(-1, x.shape[-1]).to(self.group.dtype).contiguous()

    def take(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """y of layer `i`  # [tokens, out], computed with the others'."""
        if self.x is not x or i not in self.ys:
            ys = FusedProjections.apply(self.flatten(x), self.group.anchor, self.group)
            self.x, self.ys = x, dict(enumerate(ys))
        y = self.ys.pop(i)
        if not self.ys:
            self.x = None
        return y


def forward_mlp(
    gate_up: Projections, down: Projections, act: str, plain: Callable, x: torch.Tensor
) -> torch.Tensor:
    if not down.covers_call() or is_few(gate_up, x):
        return plain(x)
    flat_x = x.reshape(-1, x.shape[-1]).to(down.dtype).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        y = FillDown.apply(*FusedMLP.apply(flat_x, down.anchor, gate_up, down, act), down)
    return y.view(*x.shape[:-1], -1)


def find_obstacles(model: nn.Module, dtype: torch.dtype) -> dict[LoraLayer, str | None]:
    """What keeps each adapted layer of `model` from the fused path; None where nothing does."""
    return {layer: find_obstacle(layer, dtype) for layer in model.modules() if isinstance(layer, LoraLayer)}


def install_fast_lora(model: nn.Module, dtype: torch.dtype) -> tuple[FlatAdapter, list[str]]:
    """Replace the forward of every adapted layer that the fused path covers.

    Returns the flat adapter and what is not covered: that keeps PEFT's forward, under autocast as in
    evaluation and on the plain path.
    """
    groups, obstacles = find_all_groups(model, dtype)
    segments = [segment for found in groups.values() for group in found for segment in group.segments]
    known = {parameter for segment in segments for parameter in segment}
    rest = [
        parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in known
    ]
    flat = FlatAdapter(segments + [[parameter] for parameter in rest], dtype)
    uncovered = {layer: obstacle for layer, obstacle in obstacles.items() if obstacle}
    for layer in uncovered if dtype != torch.float32 else ():
        layer.forward = torch.autocast(flat.grads.device.type, dtype)(layer.forward)
    for parent, found in groups.items():
        for group in found:
            group.bind(flat)
        replace_forwards(parent, found)
    return flat, sorted(set(uncovered.values()))


@torch.no_grad()
def install_fast_evaluation(model: nn.Module, dtype: torch.dtype) -> None:
    """Let calls without gradient compute what training does, of an adapter that is not trained any more."""
    for parent, found in find_all_groups(model, dtype)[0].items():
        for group in found:
            group.bind_frozen(dtype)
        replace_forwards(parent, found)


def find_all_groups(
    model: nn.Module, dtype: torch.dtype
) -> tuple[dict[nn.Module, list[Projections]], dict[LoraLayer, str | None]]:
    """The groups below each module that has any; and find_obstacles."""
    obstacles = find_obstacles(model, dtype)
    covered = {layer for layer, obstacle in obstacles.items() if obstacle is None}
    groups = {parent: find_groups(parent, covered) for parent in model.modules()}
    return {parent: found for parent, found in groups.items() if found}, obstacles


def replace_forwards(parent: nn.Module, groups: list[Projections]) -> None:
    for group in groups:
        shared = SharedInput(group)
        for i, layer in enumerate(group.layers):
            layer.forward = partial(shared.forward, i, layer.forward)
    install_mlp(parent, groups)


def find_groups(parent: nn.Module, covered: set[LoraLayer]) -> list[Projections]:
    """The covered layers directly below `parent`, those of one input together."""
    left = {name: child for name, child in parent.named_children() if child in covered}
    groups = []
    for names in SHARED_INPUT:
        members = [left[name] for name in names if name in left]
        kinds = {(m.in_features, m.scaling[ADAPTER], str(m.lora_dropout[ADAPTER])) for m in members}
        if len(members) == len(names) and len(kinds) == 1:
            groups.append(Projections(members))
            left = {name: child for name, child in left.items() if name not in names}
    return groups + [Projections([child]) for child in left.values()]


def install_mlp(mlp: nn.Module, groups: list[Projections]) -> None:
    """Fuse a whole gated MLP, if it computes what the fused one does: tried on the module itself."""
    children = dict(mlp.named_children())
    act = ACTIVATIONS.get(type(children.get("act_fn")).__name__)
    gate_up = [group for group in groups if group.layers[0] is children.get("gate_proj")]
    down = [group for group in groups if group.layers == [children.get("down_proj")]]
    if act is None or not down or not gate_up or len(gate_up[0].layers) != 2:
        return
    fused = partial(forward_mlp, gate_up[0], down[0], act, mlp.forward)
    was_training = mlp.training
    mlp.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, gate_up[0].bases[0].in_features, generator=generator)
    x = x.to(gate_up[0].A.device, gate_up[0].dtype)
    expected = mlp.forward(x).float()  # its adapted layers are the fused ones already
    if (fused(x).float() - expected).norm() < 0.02 * expected.norm():
        mlp.forward = fused
    mlp.train(was_training)
