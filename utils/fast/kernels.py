"""What the fused path needs beside matrix products: unpacking, dropout, activations, the loss.

Each function runs a Triton kernel (triton_kernels.py) on a GPU and the same arithmetic in torch elsewhere.
The torch form is the definition: tests hold the kernels to it, so a reader need not know Triton to know what
it does. Tensors on the meta device take the GPU's branch and launch nothing: a rehearsal (rehearsal.py) sees
the memory that the GPU would hold.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch.nn import functional as F

from utils.fast.token_keys import TokenKeys, draw_mask, draw_uniform

kernels: Any = None  # stays so in a CPU build of torch, which has no Triton
with suppress(ImportError):
    from utils.fast import triton_kernels as kernels


def takes_kernel(x: torch.Tensor) -> bool:
    """Whether `x` takes the branch that launches kernels."""
    return x.is_meta or (kernels is not None and x.is_cuda)


# (kernel, dtypes of its tensors and its other arguments, options) of what rehearsals would have launched.
Launch = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]
rehearsed: set[Launch] = set()


def launch(x: torch.Tensor, name: str, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run the Triton kernel `name` on the device of `x`; the meta device only notes it (compiling.py)."""
    if x.is_meta:
        kinds = tuple(arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args)
        rehearsed.add((name, kinds, tuple(options.items())))
        return
    kernel: Callable = getattr(kernels, name)[grid]
    kernel(*args, **options)


def divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def round_to_power(number: int) -> int:
    """The first power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def unpack_4bit(weight: torch.Tensor, state: QuantState, out: torch.Tensor) -> torch.Tensor:
    """NF4 or FP4 codes into `out`  # [out, in]; double-quantized scales are decoded on the way."""
    if not takes_kernel(weight) or out.shape[1] % state.blocksize:
        return out if out.is_meta else out.copy_(dequantize_4bit(weight, state))
    absmax, outer = state.absmax, state.state2
    row_blocks = out.shape[1] // state.blocksize
    launch(
        out,
        "unpack_4bit_kernel",
        (out.shape[0], divide_up(row_blocks, 64)),
        weight,
        out,
        row_blocks,
        out.stride(0),
        state.code,
        absmax,
        outer.absmax if outer else absmax,
        outer.code if outer else absmax,
        state.offset if outer else absmax,
        BLOCK_SIZE=state.blocksize,
        OUTER_SIZE=outer.blocksize if outer else 1,
        BLOCKS=min(64, round_to_power(row_blocks)),
    )
    return out


def unpack_8bit(weight: torch.Tensor, row_max: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """INT8 rows and their absolute maxima into `out`  # [out, in]"""
    if not takes_kernel(weight):
        return out.copy_(weight * (row_max.float() / 127)[:, None])
    rows, width = weight.shape
    grid = (rows, divide_up(width, 1024))
    launch(out, "unpack_8bit_kernel", grid, weight, out, out.stride(0), row_max, width, BLOCK=1024)
    return out


def place_low_rank(out: torch.Tensor, right: torch.Tensor, first: int, scale: float) -> None:
    """out = [0 | scale * right | 0], `right` from column `first` on  # [out, ranks]; one launch."""
    if not takes_kernel(out):
        out.zero_()
        torch.mul(right, scale, out=out[:, first : first + right.shape[1]])
        return
    rows, columns = out.shape
    launch(
        out,
        "place_low_rank_kernel",
        (divide_up(rows, 16),),
        out,
        out.stride(0),
        right,
        rows,
        columns,
        first,
        right.shape[1],
        scale,
        BLOCK=round_to_power(columns),
    )


@dataclass(frozen=True)
class Mask:
    """Dropout whose mask follows from token keys and layer: backward draws it again, nothing is kept."""

    keys: TokenKeys
    layer: int
    probability: float

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """`x`  # [tokens, width]"""
        if not takes_kernel(x):
            mask = draw_mask(self.keys.find(x).cpu(), self.layer, x.shape[1], self.probability)
            return (x * mask.to(x.device)).to(x.dtype)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch_drop(x, out, out, self, copies=False)
        return out


def mask_arguments(mask: Mask | None, x: torch.Tensor) -> tuple[torch.Tensor, int, int, float]:
    """(keys, layer, threshold of a 32-bit hash, scale of what is kept): a kernel's arguments."""
    if mask is None:
        return x, 0, 0, 1.0  # never read
    return mask.keys.find(x), mask.layer, int(mask.probability * 2**32), 1 / (1 - mask.probability)


def draw_noise(keys: torch.Tensor, layer: int, scales: torch.Tensor, width: int) -> torch.Tensor:
    """Uniform from [-scale, scale) of the token  # float32 [tokens, width]; `scales`  # float32 [tokens]"""
    if not takes_kernel(keys):
        return draw_uniform(keys.cpu(), layer, width).to(keys.device) * scales[:, None]
    noise = torch.empty(len(keys), width, device=keys.device)
    grid = (len(keys), divide_up(width, 1024))
    launch(noise, "noise_kernel", grid, noise, keys, scales, width, layer, BLOCK=1024)
    return noise


def copy_and_drop(x: torch.Tensor, out: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """Copy `x` into `out`, whose rows may be longer; returns `x` dropped by `mask`, x itself without one."""
    if not takes_kernel(x):
        out.copy_(x)
        return mask.drop(x) if mask else x
    dropped = torch.empty_like(x) if mask else x
    launch_drop(x, dropped, out, mask, copies=True)
    return dropped


def launch_drop(
    x: torch.Tensor, dropped: torch.Tensor, copy: torch.Tensor, mask: Mask | None, copies: bool
) -> None:
    launch(
        x, "drop_kernel", (x.shape[0], divide_up(x.shape[1], 1024)),
        x, x.stride(0), dropped, copy, copy.stride(0), x.shape[1], *mask_arguments(mask, x),
        DROPS=mask is not None, COPIES=copies, BLOCK=1024,
    )  # fmt: skip


def add_low_rank(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, mask: Mask | None
) -> None:
    """total += drop(scale * left @ right), in place and in one pass over `total`  # [tokens, width]

    `left`  # [tokens, ranks]; `right`  # [ranks, width]
    """
    (tokens, width), ranks = total.shape, left.shape[1]
    if not takes_kernel(total):
        update = (left * scale) @ right
        total += mask.drop(update) if mask else update
        return
    keys, layer, threshold, kept_scale = mask_arguments(mask, total)
    launch(
        total, "add_low_rank_kernel", (divide_up(width, 128), divide_up(tokens, 64)),
        total, left, right, tokens, width, keys, layer, threshold, scale * kept_scale,
        RANKS=ranks, DROPS=mask is not None, BLOCK_RANKS=64 if ranks > 32 else 32, num_warps=8,
    )  # fmt: skip


def gated_activation(
    gate_up: torch.Tensor, out: torch.Tensor, activation: str, mask: "Mask | None" = None
) -> torch.Tensor:
    """act(gate) * up into `out`  # [tokens, width] from gate and up side by side  # [tokens, 2 * width]

    Returns it dropped by `mask`; the same tensor without one.
    """
    tokens, width = out.shape
    if not takes_kernel(gate_up):
        gated, up = gate_up.split(width, 1)
        torch.mul(activate(gated, activation), up, out=out)
        return mask.drop(out) if mask else out
    dropped = torch.empty_like(out) if mask else out
    launch(
        out, "gate_kernel", (tokens, divide_up(width, 1024)),
        gate_up, out, out.stride(0), dropped, width, *mask_arguments(mask, out),
        SILU=activation == "silu", DROPS=mask is not None, BLOCK=1024,
    )  # fmt: skip
    return dropped


def gated_activation_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, activation: str, mask: "Mask | None" = None
) -> None:
    """In place: gate_up becomes its gradient, grad becomes act(gate) * up once more, dropped by `mask`."""
    tokens, width = grad.shape
    if takes_kernel(grad):
        launch(
            grad, "gate_backward_kernel", (tokens, divide_up(width, 1024)),
            gate_up, grad, width, *mask_arguments(mask, grad),
            SILU=activation == "silu", DROPS=mask is not None, BLOCK=1024,
        )  # fmt: skip
        return
    gated, up = (half.to(torch.float32, copy=True) for half in gate_up.split(width, 1))
    with torch.enable_grad():
        active = activate(gated.requires_grad_(), activation)
        (slope,) = torch.autograd.grad(active.sum(), gated)
    active = active.detach()
    gate_up[:, :width] = grad * up * slope
    gate_up[:, width:] = grad * active
    grad.copy_(active * up)
    if mask:
        grad.copy_(mask.drop(grad))


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float, ignore_index: int
) -> torch.Tensor:
    """Losses of the rows  # [rows]; `logits` become the gradient of their sum, in place  # [rows, vocabulary]

    The model's real logits are softcap * tanh(scale * logits / softcap); scale * logits where softcap is 0.
    """
    if takes_kernel(logits):
        losses = torch.empty(len(targets), device=logits.device)
        launch(
            logits, "cross_entropy_kernel", (len(targets),),
            logits, targets, losses, logits.shape[1], scale, softcap, ignore_index, BLOCK=4096, num_warps=8,
        )  # fmt: skip
        return losses
    real = logits.float() * scale
    if softcap:
        real = softcap * torch.tanh(real / softcap)
    kept = targets != ignore_index
    index = targets.where(kept, 0)[:, None]
    log_sum = real.logsumexp(1, keepdim=True)
    losses = (log_sum - real.gather(1, index))[:, 0] * kept
    grads = (real - log_sum).exp_()
    grads.scatter_add_(1, index, torch.full_like(log_sum, -1.0))
    if softcap:
        grads *= 1 - (real / softcap) ** 2
    logits.copy_(grads * (scale * kept)[:, None])
    return losses
