"""Rotary embedding (arXiv 2104.09864) of queries and keys in one kernel, in place of some ten.

Elements i and i + d/2 of a head are a point in the plane, which is turned by an angle that grows with the
token's place and falls with i. The way back turns by the same angle the other way.

transformers writes this as one function, apply_rotary_pos_emb, in the module of each architecture. It is
replaced there, which reaches every model of that architecture in the process: the fused form takes tensors on
a GPU alone, and only where a model's hidden states stay the same with it. (GLM and Cohere turn neighbours.)
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from utils.console import notice
from utils.fast.kernels import launch, round_to_power, takes_kernel
from utils.fast.trials import is_near, try_first_layers

NAME = "apply_rotary_pos_emb"


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both turned, as views that are contiguous with tokens before heads.

    q, k  # [rows, heads, tokens, head_dim]; cos, sin  # [rows or 1, tokens, rotary_dim], each angle twice
    direction: 1; -1 for gradients, which are turned back
    """
    if not takes_kernel(q):
        return turn(q, cos, sin, direction), turn(k, cos, sin, direction)
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))  # [rows, tokens, heads, head_dim]
    cos, sin = (x.expand(len(q), -1, -1).contiguous() for x in (cos, sin))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    dim, half = q.shape[-1], cos.shape[-1] // 2
    launch(
        q, "rotate_kernel", (q.shape[0] * q.shape[1], 2), q, k, q_out, k_out, cos, sin, direction,
        Q_HEADS=q.shape[2], K_HEADS=k.shape[2], DIM=dim, HALF=half,
        BLOCK_Q=round_to_power(q.shape[2]), BLOCK_K=round_to_power(k.shape[2]),
        BLOCK_HALF=round_to_power(half), BLOCK_REST=round_to_power(max(1, dim - 2 * half)),
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    half = cos.shape[-1] // 2
    cos, sin = (angle[:, None, :, :half].float() for angle in (cos, sin * direction))
    left, right, rest = x.float().split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1).to(x.dtype)


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        ctx.save_for_backward(cos, sin)
        return rotate(q, k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dq: torch.Tensor, dk: torch.Tensor):
        cos, sin = ctx.saved_tensors
        return *rotate(dq, dk, cos, sin, -1.0), None, None


def choose_rotation(plain: Callable, is_rehearsal: bool = False) -> Callable:
    """The fused form for calls that it covers, `plain` for others, and for all with data in a rehearsal."""

    @wraps(plain)
    def rotate_any(q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        takes = q.is_meta if is_rehearsal else takes_kernel(q)
        is_covered = takes and not args and not kwargs and q.ndim == k.ndim == 4 and cos.ndim == 3
        if is_covered and q.dtype == k.dtype and cos.shape[1] == q.shape[2] and cos.shape[2] <= q.shape[3]:
            return Rotation.apply(q, k, cos, sin)
        return plain(q, k, cos, sin, *args, **kwargs)

    rotate_any.plain = plain  # type: ignore[attr-defined]
    return rotate_any


def fuse_rotation(causal_model: Any) -> None:
    """Let the model's own function take the fused form, where that computes the same."""
    module = sys.modules[type(causal_model).__module__]
    own = getattr(module, NAME, None)
    if own is None:
        return
    own = getattr(own, "plain", own)  # an earlier model of the process replaced it
    if causal_model.device.type == "meta":  # a rehearsal takes it that the trial succeeds
        setattr(module, NAME, choose_rotation(own, is_rehearsal=True))
        return
    setattr(module, NAME, own)
    expected = try_first_layers(causal_model)
    setattr(module, NAME, choose_rotation(own))
    if not is_near(try_first_layers(causal_model), expected):
        setattr(module, NAME, own)
        notice("fast path: the model's own rotary embedding is used (the fused one turns other pairs)")
