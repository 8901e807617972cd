"""Which layers of a model take the products of packed_product.py for few tokens, and how calls come to them.

Every architecture has these: linear layers in 4 bits are replaced where they stand, and what lies between
them stays transformers' own. For more tokens, a prompt say, and for other layers the adapter's part is added
in two products of the dtype, where PEFT makes seven of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from utils.decode.cuda_c import KernelError
from utils.decode.packed_product import (
    MOST_TOKENS,
    Kernels,
    PackedGroup,
    find_packed_obstacle,
    is_alike,
    read_base,
)
from utils.fast.keyed_noise import SHARED_INPUT
from utils.fast.lora import ADAPTER, AdaptedLayer
from utils.fast.lora_layers import find_obstacle
from utils.fast.trials import is_near


class SharedProduct:
    """q, k and v are called one after another on one tensor: the first call computes all three."""

    def __init__(self, group: PackedGroup, kernels: Kernels):
        self.group, self.kernels = group, kernels
        self.x: torch.Tensor | None = None
        self.ys: dict[int, torch.Tensor] = {}  # of x, by layer, those not taken yet

    def forward(self, i: int, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        group = self.group
        if args or kwargs or x.dtype != group.dtype or torch.is_grad_enabled():
            return plain(x, *args, **kwargs)
        if x.numel() > MOST_TOKENS * x.shape[-1]:
            if not group.is_on:
                return group.bases[i](x)
            A, B = group.A.split(group.ranks)[i], group.B[i]
            return add_adapter_product(group.bases[i](x), x, A, B)
        if self.x is not x or i not in self.ys:
            self.x, self.ys = x, dict(enumerate(self.multiply(x)))
        y = self.ys.pop(i)
        if not self.ys:
            self.x = None
        return y

    def multiply(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """y of all layers  # [..., out] each"""
        group, flat, xa = self.group, x.reshape(-1, x.shape[-1]).contiguous(), None
        y = flat.new_empty(len(flat), sum(group.sizes))
        if group.is_on:
            xa = flat.new_empty(len(flat), len(group.A))
            self.kernels.multiply_rows(group.A, flat, xa)
        self.kernels.multiply(group, flat, y, xa)
        return y.view(*x.shape[:-1], -1).split(group.sizes, -1)


def add_adapter_product(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """y + (x A') (s B)', in place  # [..., out]"""
    return y.flatten(0, -2).addmm_(F.linear(x, A).flatten(0, -2), B.t()).view(y.shape)


def forward_adapted(
    layer: AdaptedLayer, A: torch.Tensor, B: torch.Tensor, plain: Callable, x: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    if layer.disable_adapters or x.dtype != A.dtype or torch.is_grad_enabled() or kwargs:
        return plain(x, **kwargs)
    return add_adapter_product(layer.get_base_layer()(x), x, A, B)


def install_decode_layers(
    model: nn.Module, dtype: torch.dtype, kernels: Kernels | None
) -> dict[nn.Module, PackedGroup]:
    """Replace the forward of linear layers; the group of each that is multiplied where it lies.

    Without `kernels` none is: adapters take fewer kernels all the same.
    """
    groups: dict[nn.Module, PackedGroup] = {}
    for layers in find_packed_groups(model, dtype) if kernels else []:
        group = PackedGroup(layers, dtype)
        shared = SharedProduct(group, cast(Kernels, kernels))
        for i, layer in enumerate(layers):
            groups[layer] = group
            layer.forward = partial(shared.forward, i, layer.forward)
    adapted: list[AdaptedLayer] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in adapted:
        if layer not in groups and is_linear(layer) and find_obstacle(layer, dtype) is None:
            A, B = (part[ADAPTER].weight.detach().to(dtype) for part in (layer.lora_A, layer.lora_B))
            layer.forward = partial(forward_adapted, layer, A, B * layer.scaling[ADAPTER], layer.forward)
    return groups


def is_linear(layer: AdaptedLayer) -> bool:
    return isinstance(layer.get_base_layer(), nn.Linear)


@torch.no_grad()
def find_kernel_fault(model: nn.Module, dtype: torch.dtype, kernels: Kernels) -> str | None:
    """Why this model's layers are not multiplied by the kernels: each kind of group is tried once."""
    kinds = {}
    for layers in find_packed_groups(model, dtype):
        kind = tuple((read_base(layer).in_features, read_base(layer).out_features) for layer in layers)
        if kind not in kinds:
            group = PackedGroup(layers, dtype)
            x = torch.randn(1, group.width, generator=torch.Generator().manual_seed(0))
            kinds[kind] = SharedProduct(group, kernels), x.to(layers[0].weight.device, dtype)
    try:
        kernels.compile_ahead(lambda: [shared.multiply(x) for shared, x in kinds.values()])
        for shared, x in kinds.values():
            ys = shared.multiply(x)
            if not all(is_near(y, layer(x)) for y, layer in zip(ys, shared.group.layers, strict=True)):
                return "the kernels compute something else"
    except KernelError as error:
        return str(error)
    return None


def find_packed_groups(model: nn.Module, dtype: torch.dtype) -> list[list[AdaptedLayer]]:
    """The layers that the kernel multiplies, those of one input together."""
    wrapped = {module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)}
    return [group for parent in model.modules() for group in find_groups_below(parent, dtype, wrapped)]


def find_groups_below(
    parent: nn.Module, dtype: torch.dtype, wrapped: set[nn.Module]
) -> list[list[AdaptedLayer]]:
    left: dict[str, AdaptedLayer] = {}
    for name, child in parent.named_children():
        if isinstance(child, LoraLayer):
            if is_linear(child) and find_obstacle(child, dtype) is not None:
                continue
        elif child in wrapped:  # the layer above it is replaced
            continue
        if find_packed_obstacle(read_base(child), dtype) is None:
            left[name] = child
    found = []
    for names in SHARED_INPUT:
        members = [left[name] for name in names if name in left]
        if len(members) == len(names) and is_alike(members):
            found.append(members)
            left = {name: child for name, child in left.items() if name not in names}
    return found + [[child] for child in left.values()]
