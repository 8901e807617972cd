"""The GPU kernels behind utils.fast.kernels, in Triton: Python, compiled for the GPU at its first call.

None is limited by arithmetic. What each costs is one pass over memory, where torch would make several: that
is why they exist. A program (one instance of a kernel) does one row of tokens, or one row of a weight, unless
its docstring says otherwise; `_stride` is the distance between two rows in elements.
"""

import triton
import triton.language as tl


@triton.jit
def unpack_4bit_kernel(
    packed, out, row_blocks, out_stride, code, absmax, outer_absmax, outer_code, offset,
    BLOCK_SIZE: tl.constexpr, OUTER_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """NF4 or FP4 codes, two a byte, to 16-bit weights: code[4 bits] * scale of the block of 64.

    The scales of double quantization are 8-bit codes themselves: outer_code[8 bits] * scale of 256 blocks +
    offset.
    """
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
def gather_rows_kernel(table, ids, out, width, BLOCK: tl.constexpr):
    """Rows of a table that may lie in pinned host memory."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, chosen = column < width, tl.load(ids + row)
    values = tl.load(table + chosen * width + column, mask=inside)
    tl.store(out + row * width + column, values, mask=inside)


@triton.jit
def unpack_8bit_kernel(weight, out, out_stride, row_max, columns, BLOCK: tl.constexpr):
    """int8 weights to 16 bits: value * the row's maximum / 127, as LLM.int8() stores them."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    scale = tl.load(row_max + row).to(tl.float32) / 127
    values = tl.load(weight + row * columns + column, mask=inside, other=0).to(tl.float32) * scale
    tl.store(out + row * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def hash_columns(key, layer, column):
    """32 random bits for each column, those of token_keys.hash_columns; `key` of the token, int64."""
    low = key.to(tl.uint32) ^ (layer.to(tl.uint32) * 2654435761)
    high = (key >> 32).to(tl.uint32) + layer.to(tl.uint32) * 2246822519
    bits = column.to(tl.uint32) * 3266489917 + low
    bits = (bits ^ (bits >> 16)) * 2246822507 + high
    bits = (bits ^ (bits >> 13)) * 3266489909
    return bits ^ (bits >> 16)


@triton.jit
def is_kept(key, layer, column, threshold):
    """Whether dropout keeps an element: its 32 random bits are not among the lowest p * 2**32."""
    return hash_columns(key, layer, column) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["layer"])
def noise_kernel(noise, keys, scales, width, layer, BLOCK: tl.constexpr):
    """Uniform numbers in [-1, 1) times the token's scale, from the token's key: NEFTune's noise."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = hash_columns(tl.load(keys + row), layer, column)
    uniform = (bits >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0  # 2**-23: in [-1, 1)
    tl.store(noise + row * width + column, uniform * tl.load(scales + row), mask=column < width)


@triton.jit(do_not_specialize=["first"])
def place_low_rank_kernel(out, out_stride, right, rows, columns, first, ranks, scale, BLOCK: tl.constexpr):
    """s B into the columns of one layer behind its W, zeros in those of the layers that share its input.

    So the product of [x | xa] with [W | s B] takes this layer's xa and ignores the others'. A program does 16
    rows.
    """
    row = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    own = (row < rows) & (column >= first) & (column < first + ranks)
    values = tl.load(right + row * ranks + column - first, mask=own, other=0.0).to(tl.float32) * scale
    inside = (row < rows) & (column < columns)
    tl.store(out + row * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "threshold"])
def drop_kernel(
    x, x_stride, dropped, copy, copy_stride, width, keys, layer, threshold, scale,
    DROPS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of x for two writes: drop(x), and a copy of x into the buffer in front of xa."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place = column < width, row * width + column
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if COPIES:
        tl.store(copy + row * copy_stride + column, values, mask=inside)
    if DROPS:
        key = tl.load(keys + row)
        kept = tl.where(is_kept(key, layer, column, threshold), values.to(tl.float32) * scale, 0.0)
        tl.store(dropped + place, kept.to(dropped.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "layer", "threshold"])
def add_low_rank_kernel(
    total, left, right, tokens, width, keys, layer, threshold, scale,
    RANKS: tl.constexpr, DROPS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
):  # fmt: skip
    """total += drop(s left @ right) for a tile of 64 x 128, where the mask is drawn and not read.

    `left`  # [tokens, ranks] and `right`  # [ranks, width] are thin: the tile of the large `total` is read
    and written once, and the product costs nothing beside it. With twice the rows a multiprocessor of an H100
    holds too few tiles to draw the mask of one while it waits for another: 0.41 ms and not 0.24 for 8,192
    tokens of Qwen2.5-7B's 18,944 columns, where reading and writing them takes 0.21.
    """
    row = tl.program_id(1) * 64 + tl.arange(0, 64)[:, None]
    column = tl.program_id(0) * 128 + tl.arange(0, 128)[None, :]
    inside, place = (row < tokens) & (column < width), row.to(tl.int64) * width + column
    update = tl.zeros((64, 128), dtype=tl.float32)
    for first in range(0, RANKS, BLOCK_RANKS):
        rank = first + tl.arange(0, BLOCK_RANKS)
        kept = (row < tokens) & (rank < RANKS)[None, :]
        a = tl.load(left + row.to(tl.int64) * RANKS + rank[None, :], mask=kept, other=0.0)
        kept = (column < width) & (rank < RANKS)[:, None]
        b = tl.load(right + rank[:, None] * width + column, mask=kept, other=0.0)
        update = tl.dot(a, b, update, input_precision="ieee")
    update *= scale
    if DROPS:
        key = tl.load(keys + row, mask=row < tokens, other=0)  # [64, 1]
        update = tl.where(is_kept(key, layer, column, threshold), update, 0.0)
    update += tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + place, update.to(total.dtype.element_ty), mask=inside)


@triton.jit
def activation_and_slope(x, SILU: tl.constexpr):
    """act(x) and its derivative: SiLU, or GELU by its tanh form."""
    if SILU:
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    inner = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
    tanh = 2 * tl.sigmoid(2 * inner) - 1
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope


@triton.jit(do_not_specialize=["layer", "threshold"])
def gate_kernel(
    gate_up, out, out_stride, dropped, width, keys, layer, threshold, scale,
    SILU: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """act(gate) * up, and with dropout a second copy that is dropped: three tensors, one pass."""
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
        kept = tl.where(
            is_kept(tl.load(keys + row), layer, column, threshold), values.to(tl.float32) * scale, 0.0
        )
        tl.store(dropped + row * width + column, kept.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "threshold"])
def gate_backward_kernel(
    gate_up, grad, width, keys, layer, threshold, scale,
    SILU: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of gate and up written over both, and act(gate) * up made again over `grad`.

    So the backward pass of the MLP needs no third buffer, and the forward pass need not keep the product.
    """
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
        key = tl.load(keys + row)
        values = tl.where(is_kept(key, layer, column, threshold), values * scale, 0.0)
    tl.store(grad + place, values.to(kind), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def norm_kernel(
    x, weight, y, roots, tokens, width, eps, offset,
    ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm of ROWS tokens: x / root(mean(x^2) + eps) * (weight + offset); 1 / root is kept a token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside, place = (row < tokens) & (column < width), row * width + column
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / width + eps)
    tl.store(roots + row, root, mask=row < tokens)
    values *= root
    if ROUNDS_FIRST:
        values = values.to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    tl.store(y + place, (values * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def norm_backward_kernel(
    dy, x, weight, roots, dx, tokens, width, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of x alone: root * (g - h mean(g h)) with h = x root, g = dy weight."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside, place = (row < tokens) & (column < width), row * width + column
    root = tl.load(roots + row, mask=row < tokens, other=0.0)
    normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * root
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    grad = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32) * factor
    mean = tl.sum(grad * normed, 1, keep_dims=True) / width
    tl.store(dx + place, (root * (grad - normed * mean)).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(
    x, out, cosine, sine, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The heads of one token: element i and i + HALF are turned, those from 2 HALF on are copied."""
    head, column = tl.arange(0, BLOCK_HEADS)[:, None] * DIM, tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS * DIM) & (column < HALF)
    left = tl.load(x + head + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + head + HALF + column, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + head + column, (left * cosine - right * sine).to(kind), mask=inside)
    tl.store(out + head + HALF + column, (right * cosine + left * sine).to(kind), mask=inside)
    if DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head < HEADS * DIM) & (rest < DIM)
        tl.store(out + head + rest, tl.load(x + head + rest, mask=inside), mask=inside)


@triton.jit
def rotate_kernel(
    q, k, q_out, k_out, cos, sin, direction,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of a token's queries, and in a program of their own of its keys.

    A row of `cos` and `sin` has every angle twice, 2 HALF numbers. `direction` -1 turns back: the gradient.
    """
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_HALF)[None, :]
    place = token * 2 * HALF + column
    cosine = tl.load(cos + place, mask=column < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sin + place, mask=column < HALF, other=0.0).to(tl.float32) * direction
    if tl.program_id(1) == 0:
        first = token * Q_HEADS * DIM
        rotate_heads(
            q + first, q_out + first, cosine, sine, Q_HEADS, DIM, HALF, BLOCK_Q, BLOCK_HALF, BLOCK_REST
        )
    else:
        first = token * K_HEADS * DIM
        rotate_heads(
            k + first, k_out + first, cosine, sine, K_HEADS, DIM, HALF, BLOCK_K, BLOCK_HALF, BLOCK_REST
        )


@triton.jit
def real_logits(logits, scale, softcap):
    """What the loss sees of a stored logit: times the model's scale and, where it has one, its soft cap."""
    real = logits.to(tl.float32) * scale
    return tl.where(softcap > 0, softcap * (2 * tl.sigmoid(2 * real / softcap) - 1), real)


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, vocabulary, scale, softcap, ignore_index, BLOCK: tl.constexpr
):
    """The loss of one position, and its gradient written over the logits.

    First pass: the logarithm of the sum of exponentials, with a running maximum so that nothing overflows.
    Second pass: softmax minus one at the target. The logits are never kept in float32.
    """
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
