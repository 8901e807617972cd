"""Small kernels the fused path needs: Triton on a GPU, the same arithmetic in torch elsewhere.

Each replaces several passes over memory by one; cuBLAS does the large matrix products.
"""

from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has none
    triton = None


def unpack_4bit(weight: torch.Tensor, state: QuantState, out: torch.Tensor) -> torch.Tensor:
    """NF4 or FP4 codes into `out`  # [out, in]; double-quantized scales are decoded on the way."""
    if triton is None or not weight.is_cuda or out.shape[1] % state.blocksize:
        return out.copy_(dequantize_4bit(weight, state))
    absmax, outer = state.absmax, state.state2
    row_blocks = out.shape[1] // state.blocksize
    unpack_4bit_kernel[(out.shape[0], triton.cdiv(row_blocks, 64))](
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
        BLOCKS=min(64, triton.next_power_of_2(row_blocks)),
    )
    return out


def unpack_8bit(weight: torch.Tensor, row_max: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """INT8 rows and their absolute maxima into `out`  # [out, in]"""
    if triton is None or not weight.is_cuda:
        return out.copy_(weight * (row_max.float() / 127)[:, None])
    grid = (weight.shape[0], triton.cdiv(weight.shape[1], 1024))
    unpack_8bit_kernel[grid](weight, out, out.stride(0), row_max, weight.shape[1], BLOCK=1024)
    return out


def place_low_rank(out: torch.Tensor, right: torch.Tensor, first: int, scale: float) -> None:
    """out = [0 | scale * right | 0], `right` from column `first` on  # [out, ranks]; one launch."""
    if triton is None or not out.is_cuda:
        out.zero_()
        torch.mul(right, scale, out=out[:, first : first + right.shape[1]])
        return
    rows, columns = out.shape
    place_low_rank_kernel[(triton.cdiv(rows, 16),)](
        out,
        out.stride(0),
        right,
        rows,
        columns,
        first,
        right.shape[1],
        scale,
        BLOCK=triton.next_power_of_2(columns),
    )


@dataclass(frozen=True)
class Mask:
    """Dropout whose mask follows from (seed, layer): the backward pass draws it again instead of keeping it."""

    seed: torch.Tensor  # int64 [1], on the device: a captured graph reads the current one
    layer: int
    probability: float

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        if triton is None or not x.is_cuda:
            return x * self.build(x.shape, x.dtype)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch_drop(x, out, out, self, copies=False)
        return out

    def build(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Zeros and 1 / (1 - probability), on the CPU; a GPU draws other numbers."""
        generator = torch.Generator().manual_seed(int(self.seed) * 65_537 + self.layer)
        kept = torch.rand(shape, generator=generator) >= self.probability
        return kept.to(dtype) / (1 - self.probability)


def unfold(mask: Mask | None, x: torch.Tensor) -> tuple[torch.Tensor, int, int, float]:
    """(seed, layer, threshold of a 32-bit hash, scale of what is kept): a kernel's arguments."""
    if mask is None:
        return x, 0, 0, 1.0  # never read
    return mask.seed, mask.layer, int(mask.probability * 2**32), 1 / (1 - mask.probability)


def copy_and_drop(x: torch.Tensor, out: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """Copy `x` into `out`, whose rows may be longer; returns `x` dropped by `mask`, x itself without one."""
    if triton is None or not x.is_cuda:
        out.copy_(x)
        return mask.drop(x) if mask else x
    dropped = torch.empty_like(x) if mask else x
    launch_drop(x, dropped, out, mask, copies=True)
    return dropped


def launch_drop(
    x: torch.Tensor, dropped: torch.Tensor, copy: torch.Tensor, mask: Mask | None, copies: bool
) -> None:
    drop_kernel[(x.shape[0], triton.cdiv(x.shape[1], 1024))](
        x, x.stride(0), dropped, copy, copy.stride(0), x.shape[1], *unfold(mask, x),
        DROPS=mask is not None, COPIES=copies, BLOCK=1024,
    )  # fmt: skip


def add_low_rank(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, mask: Mask | None
) -> None:
    """total += drop(scale * left @ right), in place and in one pass over `total`  # [tokens, width]

    `left`  # [tokens, ranks]; `right`  # [ranks, width]
    """
    (tokens, width), ranks = total.shape, left.shape[1]
    if triton is None or not total.is_cuda:
        update = (left * scale) @ right
        total += mask.drop(update) if mask else update
        return
    seed, layer, threshold, kept_scale = unfold(mask, total)
    add_low_rank_kernel[(triton.cdiv(width, 128), triton.cdiv(tokens, 128))](
        total, left, right, tokens, width, seed, layer, threshold, scale * kept_scale,
        RANKS=ranks, DROPS=mask is not None, BLOCK_RANKS=64 if ranks > 32 else 32, num_warps=8,
    )  # fmt: skip


def gate(
    gate_up: torch.Tensor, out: torch.Tensor, activation: str, mask: "Mask | None" = None
) -> torch.Tensor:
    """act(gate) * up into `out`  # [tokens, width] from gate and up side by side  # [tokens, 2 * width]

    Returns it dropped by `mask`; the same tensor without one.
    """
    tokens, width = out.shape
    if triton is None or not gate_up.is_cuda:
        gated, up = gate_up.split(width, 1)
        torch.mul(activate(gated, activation), up, out=out)
        return mask.drop(out) if mask else out
    dropped = torch.empty_like(out) if mask else out
    gate_kernel[(tokens, triton.cdiv(width, 1024))](
        gate_up, out, out.stride(0), dropped, width, *unfold(mask, out),
        SILU=activation == "silu", DROPS=mask is not None, BLOCK=1024,
    )  # fmt: skip
    return dropped


def gate_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, activation: str, mask: "Mask | None" = None
) -> None:
    """In place: gate_up becomes its gradient and grad becomes act(gate) * up, dropped by `mask`, once more."""
    tokens, width = grad.shape
    if grad.is_cuda and triton is not None:
        gate_backward_kernel[(tokens, triton.cdiv(width, 1024))](
            gate_up, grad, width, *unfold(mask, grad),
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

    The model's real logits are softcap * tanh(scale * logits / softcap), or scale * logits where softcap is 0.
    """
    if logits.is_cuda and triton is not None:
        losses = torch.empty(len(targets), device=logits.device)
        cross_entropy_kernel[(len(targets),)](
            logits, targets, losses, logits.shape[1], scale, softcap, ignore_index, BLOCK=4096, num_warps=8
        )
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


if triton is not None:

    @triton.jit
    def unpack_4bit_kernel(
        packed, out, row_blocks, out_stride, code, absmax, outer_absmax, outer_code, offset,
        BLOCK_SIZE: tl.constexpr, OUTER_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row, own = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        inside, block = own < row_blocks, row * row_blocks + own
        if OUTER_SIZE > 1:  # double quantization: the scales are 8-bit codes with scales of their own
            inner = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
            outer = tl.load(outer_absmax + block // OUTER_SIZE, mask=inside, other=0.0)
            scale = tl.load(outer_code + inner) * outer + tl.load(offset)
        else:
            scale = tl.load(absmax + block, mask=inside, other=0.0)
        byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
        codes = tl.load(packed + byte, mask=inside[:, None], other=0).to(tl.int32)
        high = tl.load(code + (codes >> 4)) * scale[:, None]  # the high half of a byte comes first
        low = tl.load(code + (codes & 15)) * scale[:, None]
        column = own[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        pairs = tl.interleave(high, low).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column, pairs, mask=inside[:, None])

    @triton.jit
    def unpack_8bit_kernel(weight, out, out_stride, row_max, columns, BLOCK: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        scale = tl.load(row_max + row).to(tl.float32) / 127
        values = tl.load(weight + row * columns + column, mask=inside, other=0).to(tl.float32) * scale
        tl.store(out + row * out_stride + column, values.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def is_kept(place, seed, layer, threshold):
        """A hash of the element's number (murmur3's finalizer) against the probability times 2**32."""
        key = tl.load(seed).to(tl.uint32) * 2654435761 + layer.to(tl.uint32) * 2246822519
        hashed = place.to(tl.uint32) * 3266489917 + key
        hashed = (hashed ^ (hashed >> 16)) * 2246822507
        hashed = (hashed ^ (hashed >> 13)) * 3266489909
        return (hashed ^ (hashed >> 16)) >= threshold.to(tl.uint32)

    @triton.jit(do_not_specialize=["first"])
    def place_low_rank_kernel(
        out, out_stride, right, rows, columns, first, ranks, scale, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        own = (row < rows) & (column >= first) & (column < first + ranks)
        values = tl.load(right + row * ranks + column - first, mask=own, other=0.0).to(tl.float32) * scale
        inside = (row < rows) & (column < columns)
        tl.store(out + row * out_stride + column, values.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["layer", "threshold"])
    def drop_kernel(
        x, x_stride, dropped, copy, copy_stride, width, seed, layer, threshold, scale,
        DROPS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, place = column < width, row * width + column
        values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
        if COPIES:
            tl.store(copy + row * copy_stride + column, values, mask=inside)
        if DROPS:
            kept = tl.where(is_kept(place, seed, layer, threshold), values.to(tl.float32) * scale, 0.0)
            tl.store(dropped + place, kept.to(dropped.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["layer", "threshold"])
    def add_low_rank_kernel(
        total, left, right, tokens, width, seed, layer, threshold, scale,
        RANKS: tl.constexpr, DROPS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(1) * 128 + tl.arange(0, 128)[:, None]
        column = tl.program_id(0) * 128 + tl.arange(0, 128)[None, :]
        inside, place = (row < tokens) & (column < width), row.to(tl.int64) * width + column
        update = tl.zeros((128, 128), dtype=tl.float32)
        for first in range(0, RANKS, BLOCK_RANKS):
            rank = first + tl.arange(0, BLOCK_RANKS)
            kept = (row < tokens) & (rank < RANKS)[None, :]
            a = tl.load(left + row.to(tl.int64) * RANKS + rank[None, :], mask=kept, other=0.0)
            kept = (column < width) & (rank < RANKS)[:, None]
            b = tl.load(right + rank[:, None] * width + column, mask=kept, other=0.0)
            update = tl.dot(a, b, update, input_precision="ieee")
        update *= scale
        if DROPS:
            update = tl.where(is_kept(place, seed, layer, threshold), update, 0.0)
        update += tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + place, update.to(total.dtype.element_ty), mask=inside)

    @triton.jit
    def activation_and_slope(x, SILU: tl.constexpr):
        if SILU:
            sigmoid = tl.sigmoid(x)
            return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
        inner = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
        tanh = 2 * tl.sigmoid(2 * inner) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope

    @triton.jit(do_not_specialize=["layer", "threshold"])
    def gate_kernel(
        gate_up, out, out_stride, dropped, width, seed, layer, threshold, scale,
        SILU: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        start = gate_up + row * 2 * width + column
        gated = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
        active, _ = activation_and_slope(gated, SILU)
        active = active.to(out.dtype.element_ty).to(tl.float32)  # rounded where the plain path rounds
        values = (active * up).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column, values, mask=inside)
        if DROPS:
            place = row * width + column
            kept = tl.where(is_kept(place, seed, layer, threshold), values.to(tl.float32) * scale, 0.0)
            tl.store(dropped + place, kept.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["layer", "threshold"])
    def gate_backward_kernel(
        gate_up, grad, width, seed, layer, threshold, scale,
        SILU: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, place = column < width, row * width + column
        start = gate_up + row * 2 * width + column
        gated = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        active, slope = activation_and_slope(gated, SILU)
        kind = grad.dtype.element_ty
        tl.store(start, (upstream * up * slope).to(kind), mask=inside)
        tl.store(start + width, (upstream * active).to(kind), mask=inside)
        values = active * up
        if DROPS:
            values = tl.where(is_kept(place, seed, layer, threshold), values * scale, 0.0)
        tl.store(grad + place, values.to(kind), mask=inside)

    @triton.jit
    def real_logits(logits, scale, softcap):
        real = logits.to(tl.float32) * scale
        return tl.where(softcap > 0, softcap * (2 * tl.sigmoid(2 * real / softcap) - 1), real)

    @triton.jit
    def cross_entropy_kernel(
        logits, targets, losses, vocabulary, scale, softcap, ignore_index, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * vocabulary
        target = tl.load(targets + row)
        kept = target != ignore_index
        top, total = -float("inf"), 0.0
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            values = tl.load(logits + column, mask=column < vocabulary, other=0.0)
            values = tl.where(column < vocabulary, real_logits(values, scale, softcap), -float("inf"))
            new_top = tl.maximum(top, tl.max(values))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(values - new_top))
            top = new_top
        log_sum = top + tl.log(total)
        own = real_logits(tl.load(logits + tl.where(kept, target, 0)), scale, softcap)
        tl.store(losses + row, tl.where(kept, log_sum - own, 0.0))
        tl.debug_barrier()  # every thread has read the target's logit before it is overwritten
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < vocabulary
            real = real_logits(tl.load(logits + column, mask=inside, other=0.0), scale, softcap)
            grads = tl.exp(real - log_sum) - tl.where(column == target, 1.0, 0.0)
            grads *= tl.where(softcap > 0, 1 - (real / softcap) * (real / softcap), 1.0)
            grads = tl.where(kept, grads * scale, 0.0)
            tl.store(logits + column, grads.to(logits.dtype.element_ty), mask=inside)
