"""Which adapted layers of a model take the fused product of lora.py, and how their calls come to it.

Layers of one input (q, k and v; gate and up) are one group, and a gated MLP is fused as a whole. What is not
covered keeps PEFT's own forward.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.fast.few_tokens import is_few, multiply_few
from utils.fast.flat_adapter import FlatAdapter
from utils.fast.fused_mlp import MLP, run_mlp
from utils.fast.keyed_noise import SHARED_INPUT
from utils.fast.lora import ADAPTER, AdaptedLayer, AdapterGroup, FusedProjections
from utils.fast.trials import is_near

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


def find_obstacles(model: nn.Module, dtype: torch.dtype) -> dict[AdaptedLayer, str | None]:
    """What keeps each adapted layer of `model` from the fused path; None where nothing does."""
    return {layer: find_obstacle(layer, dtype) for layer in model.modules() if isinstance(layer, LoraLayer)}


class SharedInput:
    """q, k and v are called one after another on one tensor: the first call computes all three."""

    def __init__(self, group: AdapterGroup):
        self.group = group
        self.x: torch.Tensor | None = None
        self.ys: dict[int, torch.Tensor] = {}  # of x, by layer, those not taken yet

    def forward(self, i: int, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.group.covers_call():
            return plain(x, *args, **kwargs)
        with without_autocast(x):
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


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """The fused functions choose their dtypes themselves. (The meta device knows no autocast.)"""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def forward_mlp(mlp: MLP, plain: Callable, x: torch.Tensor) -> torch.Tensor:
    if not mlp.down.covers_call() or is_few(mlp.gate_up, x):
        return plain(x)
    with without_autocast(x):
        y = run_mlp(x.reshape(-1, x.shape[-1]).to(mlp.down.dtype).contiguous(), mlp)
    return y.view(*x.shape[:-1], -1)


def install_fast_lora(
    model: nn.Module, dtype: torch.dtype, keeps_copy: bool = True
) -> tuple[FlatAdapter, list[str]]:
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
    flat = FlatAdapter(segments + [[parameter] for parameter in rest], dtype, keeps_copy)
    uncovered = {layer: obstacle for layer, obstacle in obstacles.items() if obstacle}
    is_cast = dtype != torch.float32 and not flat.grads.is_meta
    for layer in uncovered if is_cast else ():
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
) -> tuple[dict[nn.Module, list[AdapterGroup]], dict[AdaptedLayer, str | None]]:
    """The groups below each module that has any; and find_obstacles."""
    obstacles = find_obstacles(model, dtype)
    covered = {layer for layer, obstacle in obstacles.items() if obstacle is None}
    groups = {parent: find_groups(parent, covered) for parent in model.modules()}
    return {parent: found for parent, found in groups.items() if found}, obstacles


def replace_forwards(parent: nn.Module, groups: list[AdapterGroup]) -> None:
    for group in groups:
        shared = SharedInput(group)
        for i, layer in enumerate(group.layers):
            layer.forward = partial(shared.forward, i, layer.forward)
    install_mlp(parent, groups)


def find_groups(parent: nn.Module, covered: set[AdaptedLayer]) -> list[AdapterGroup]:
    """The covered layers directly below `parent`, those of one input together."""
    left: dict[str, AdaptedLayer] = {
        name: child for name, child in parent.named_children() if child in covered
    }
    groups = []
    for names in SHARED_INPUT:
        members = [left[name] for name in names if name in left]
        kinds = {(m.in_features, m.scaling[ADAPTER], str(m.lora_dropout[ADAPTER])) for m in members}
        if len(members) == len(names) and len(kinds) == 1:
            groups.append(AdapterGroup(members))
            left = {name: child for name, child in left.items() if name not in names}
    return groups + [AdapterGroup([child]) for child in left.values()]


def install_mlp(mlp: nn.Module, groups: list[AdapterGroup]) -> None:
    """Fuse a whole gated MLP, if it computes what the fused one does: tried on the module itself."""
    children = dict(mlp.named_children())
    act = ACTIVATIONS.get(type(children.get("act_fn")).__name__)
    gate_up = [group for group in groups if group.layers[0] is children.get("gate_proj")]
    down = [group for group in groups if group.layers == [children.get("down_proj")]]
    if act is None or not down or not gate_up or len(gate_up[0].layers) != 2:
        return
    fused = partial(forward_mlp, MLP(gate_up[0], down[0], act), mlp.forward)
    was_training = mlp.training
    mlp.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, gate_up[0].bases[0].in_features, generator=generator)
    x = x.to(gate_up[0].A.device, gate_up[0].dtype)
    expected = mlp.forward(x)  # its adapted layers are the fused ones already
    if is_near(fused(x), expected, 0.02):
        mlp.forward = fused
    mlp.train(was_training)
