"""RMSNorm (arXiv 1910.07467) in one pass over memory each way.

    forward     y  = h (w + offset)         h = x root, root = 1 / sqrt(mean(x^2) + eps): a number a token
    backward    dx = root (g - h mean(g h))     g = dy (w + offset)

torch makes six passes forward, in float32, and keeps two tensors for the way back. Here x and the root are
kept, and the weight gets no gradient: it is frozen. Families differ in two points, which no list tells: Gemma
stores w - 1, and LLaMA rounds h to 16 bits before the weight multiplies it. Each class of norm is tried on
random numbers, and keeps its own forward where neither is what it computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from utils.console import notice
from utils.fast.kernels import divide_up, launch, round_to_power, takes_kernel
from utils.fast.trials import is_near

TILE = 4096  # numbers that a program works on


@dataclass(frozen=True)
class Convention:
    offset: float = 0.0  # added to the stored weight
    rounds_first: bool = True  # h is rounded before the weight multiplies it


CONVENTIONS = (Convention(), Convention(rounds_first=False), Convention(offset=1.0, rounds_first=False))


def normalize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, convention: Convention
) -> tuple[torch.Tensor, torch.Tensor]:
    """y  # [tokens, width] and root  # float32 [tokens] of `x`  # [tokens, width]"""
    if not takes_kernel(x):
        return normalize_plainly(x, weight, eps, convention)
    y, roots = torch.empty_like(x), torch.empty(len(x), device=x.device)
    grid, tile = choose_tile(x)
    tile["ROUNDS_FIRST"] = convention.rounds_first
    launch(x, "norm_kernel", grid, x, weight, y, roots, *x.shape, eps, convention.offset, **tile)
    return y, roots


def normalize_plainly(
    x: torch.Tensor, weight: torch.Tensor, eps: float, convention: Convention
) -> tuple[torch.Tensor, torch.Tensor]:
    roots = (x.float().square().mean(1) + eps).rsqrt()
    normed = x.float() * roots[:, None]
    normed = normed.to(x.dtype).float() if convention.rounds_first else normed
    return (normed * (weight.float() + convention.offset)).to(x.dtype), roots


def normalize_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, roots: torch.Tensor, convention: Convention
) -> torch.Tensor:
    """dx  # [tokens, width]"""
    dx = torch.empty_like(x)
    if not takes_kernel(x):
        normed, grad = x.float() * roots[:, None], dy.float() * (weight.float() + convention.offset)
        return dx.copy_(roots[:, None] * (grad - normed * (grad * normed).mean(1, keepdim=True)))
    grid, tile = choose_tile(x)
    launch(x, "norm_backward_kernel", grid, dy, x, weight, roots, dx, *x.shape, convention.offset, **tile)
    return dx


def choose_tile(x: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, options) of a kernel that takes several short rows at once, or one long one."""
    block = round_to_power(x.shape[1])
    rows = max(1, TILE // block)
    return (divide_up(len(x), rows),), {"ROWS": rows, "BLOCK": block, "num_warps": 8 if block <= 8192 else 16}


class FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, convention: Convention):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, roots = normalize(rows, weight, eps, convention)
        ctx.save_for_backward(rows, weight, roots)
        ctx.convention = convention
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        rows, weight, roots = ctx.saved_tensors
        dx = normalize_backward(dy.reshape(rows.shape).contiguous(), rows, weight, roots, ctx.convention)
        return dx.view(dy.shape), None, None, None


def forward_norm(
    plain: Callable, weight: torch.Tensor, eps: float, convention: Convention, x: torch.Tensor, *args: Any
) -> torch.Tensor:
    if args or not takes_kernel(x) or x.dtype != weight.dtype or x.shape[-1] != len(weight):
        return plain(x, *args)
    return FusedNorm.apply(x, weight, eps, convention)


def fuse_norms(model: nn.Module) -> None:
    """Let every frozen RMSNorm of `model` on a GPU be one kernel, where that computes the same."""
    conventions: dict[tuple[type, int], Convention | None] = {}
    for norm in model.modules():
        weight, eps = getattr(norm, "weight", None), find_eps(norm)
        if eps is None or not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.requires_grad:
            continue
        kind = (type(norm), len(weight))
        if kind not in conventions:
            conventions[kind] = find_convention(norm, weight, eps)
        if convention := conventions[kind]:
            norm.forward = partial(forward_norm, norm.forward, weight, eps, convention)


def find_eps(norm: nn.Module) -> float | None:
    """None where `norm` is none."""
    if not type(norm).__name__.endswith("RMSNorm"):
        return None
    values = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in values if isinstance(value, float)), None)


@torch.no_grad()
def find_convention(norm: nn.Module, weight: torch.Tensor, eps: float) -> Convention | None:
    """The one that is nearest to the module's own forward; None where none is near."""
    if weight.is_meta:  # nothing to compare: all take the same memory
        return CONVENTIONS[0]
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    expected = norm(x).float()

    def measure_distance(convention: Convention) -> float:
        return float((normalize_plainly(x, weight, eps, convention)[0].float() - expected).norm())

    nearest = min(CONVENTIONS, key=measure_distance)
    if is_near(normalize(x, weight, eps, nearest)[0], expected, 0.02):
        return nearest
    what = type(norm).__name__
    notice(f"fast path: the model's own {what} is used (ours computes something else)")
    return None
