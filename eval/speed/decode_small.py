"""The other kernels of a reply: norm and A, attention, the output layer."""

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

from eval.speed.decode_products import make_kernels
from eval.speed.gpu_time import DEVICE, DTYPE, relative, say, say_failure, time_call
from eval.speed.shapes import SHAPES
from utils.decode.attention import DecodeAttention, HeadShape
from utils.decode.model import HEAD_BLOCKS, HEAD_ROWS
from utils.decode.packed_product import Kernels

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments

COPIES = 32 if DEVICE == "cuda" else 1  # of what is read, so that no cache holds it


def time_small(arguments: "DecodeSpeedArguments") -> None:
    config, kernels = SHAPES[arguments.model](), make_kernels()
    hidden, wide, rank = config.hidden_size, config.intermediate_size, arguments.lora_r
    parts = (("q k v", 3, hidden, True), ("o", 1, hidden, False), ("gate up", 2, hidden, True))
    for name, count, width, has_norm in (*parts, ("down", 1, wide, False)):
        for tokens in (1, 8):
            time_rows(kernels, f"A of {name}", count * rank, width, has_norm, tokens)
    for fresh, length in itertools.product((1, 8), (128, 640, 2048, 8192) if DEVICE == "cuda" else (40,)):
        try:
            time_attention(kernels, config, fresh, length)
        except Exception as error:
            say_failure(f"attention, {fresh} after {length}", error)
    for width, vocabulary in {(hidden, config.vocab_size), (4096, 128256) if DEVICE == "cuda" else (64, 96)}:
        time_head(kernels, width, vocabulary)


def multiply_copies(kernels: Kernels, As: list[torch.Tensor], x: Any, y: Any, **more: Any) -> None:
    for A in As:
        kernels.multiply_rows(A, x, y, **more)


def time_rows(kernels: Kernels, name: str, rows: int, width: int, has_norm: bool, tokens: int) -> None:
    As = [torch.randn(rows, width, device=DEVICE).to(DTYPE) for _ in range(COPIES)]
    x = torch.randn(tokens, width, device=DEVICE).to(DTYPE)
    more: dict[str, Any] = {}
    y = torch.empty(tokens, rows, dtype=DTYPE, device=DEVICE)
    expected = x.float()
    if has_norm:
        norm = torch.rand(width, device=DEVICE).to(DTYPE)
        more = {"norm": norm, "epsilon": 1e-5, "normed": torch.empty_like(x)}
        expected = F.rms_norm(expected, (width,), norm.float(), 1e-5)
    kernels.multiply_rows(As[0], x, y, **more)
    error = relative(y, expected @ As[0].float().T)
    times = [
        f"{1e3 * time_call(multiply_copies, kernels, As, x, y, rows_at_once=at, **more) / COPIES:.2f} us"
        for at in (1, 2)
    ]
    size = As[0].numel() * 2 / 1e6
    say(f"{name}, {tokens} tokens, {size:.2f} MB: error {error:.5f}; by 1 or 2 rows a block {times}")


def attend_copies(
    attention: DecodeAttention, caches: list[torch.Tensor], qkv: torch.Tensor, *more: Any
) -> None:
    for keys, values in caches:
        attention.attend(qkv, keys, values, *more)


def time_attention(kernels: Kernels, config: PretrainedConfig, fresh: int, length: int) -> None:
    heads, capacity = config.num_attention_heads, length + fresh
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    for kv_heads in sorted({config.num_key_value_heads, max(1, heads // 4)}):
        shape = HeadShape(heads, kv_heads, size, size**-0.5)
        copies = max(1, COPIES // (1 if length <= 2048 else 8))
        sizes = (2, 1, kv_heads, capacity, size)
        caches = [torch.randn(sizes, device=DEVICE).to(DTYPE) for _ in range(copies)]
        qkv = torch.randn(fresh, (heads + 2 * kv_heads) * size, device=DEVICE).to(DTYPE)
        ones = torch.ones(capacity, size, dtype=DTYPE, device=DEVICE)
        lengths = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        out = torch.empty(fresh, heads * size, dtype=DTYPE, device=DEVICE)
        attention = DecodeAttention(kernels, shape, 1, fresh, torch.device(DEVICE))
        attention.attend(qkv, caches[0][0], caches[0][1], (ones, 0 * ones), lengths, out)
        q = qkv[:, : heads * size].view(1, fresh, heads, size).transpose(1, 2).float()
        places = torch.arange(capacity, device=DEVICE)
        mask, (keys, values) = places <= places[length:, None], caches[0].float()
        expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        error = relative(out, expected[0].transpose(0, 1).reshape(fresh, -1))
        own, times = attention.grid[0], []
        for stretches in sorted({own, max(1, own // 2), min(64, 2 * own)}):
            attention.split(stretches)
            milliseconds = time_call(attend_copies, attention, caches, qkv, (ones, 0 * ones), lengths, out)
            times.append(f"{stretches}: {1e3 * milliseconds / copies:.2f} us")
        read = 4 * kv_heads * length * size / 1e6
        say(
            f"attention, {fresh} tokens after {length}, {kv_heads} kv heads of {size}, {read:.2f} MB: "
            f"error {error:.5f}; by blocks a head {times}"
        )


def time_head(kernels: Kernels, hidden: int, vocabulary: int) -> None:
    W = torch.randn(vocabulary, hidden, device=DEVICE, dtype=DTYPE)
    norm = torch.rand(hidden, device=DEVICE).to(DTYPE)
    for tokens in (1, 8):
        x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE)
        y = torch.empty(tokens, vocabulary, dtype=DTYPE, device=DEVICE)
        kernels.multiply_rows(W, x, y, norm, 1e-5, None, HEAD_ROWS, HEAD_BLOCKS * kernels.processors)
        expected = F.rms_norm(x.float(), (hidden,), norm.float(), 1e-5) @ W[:1000].float().T
        error, theirs = relative(y[:, :1000], expected), time_call(F.linear, x, W)
        times = {"cuBLAS": theirs}
        for rows, blocks in itertools.product((1, 2, 4, 8), (2, 4, 8)) if DEVICE == "cuda" else ((2, 2),):
            grid = blocks * kernels.processors
            times[f"{rows} rows x {blocks}"] = time_call(
                kernels.multiply_rows, W, x, y, norm, 1e-5, None, rows, grid
            )
        say(f"output layer {vocabulary}, {tokens} tokens, {2 * W.numel() / 1e6:.0f} MB: error {error:.5f}")
        for name, milliseconds in times.items():
            say(f"   {name:<12} {1e3 * milliseconds:7.1f} us {2 * W.numel() / milliseconds / 1e9:.2f} TB/s")
