"""Attention of packed rows: torch's variable-length kernel, which never looks across a row's end.

Its signature differs between torch 2.10 and 2.13, so its parameters are looked up. Where it cannot run
(a CPU, a GPU before Ampere, float32) sdpa gets a block-diagonal mask. Neither reads anything on the host, so
both can be captured in a CUDA graph. For packed training only: padded batches, as evaluation and generation
have them, keep the model's own attention.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn

    PARAMETERS = set(inspect.signature(varlen_attn).parameters)
except ImportError:  # torch before 2.10
    varlen_attn, PARAMETERS = None, set()

NAME = "packed"
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def find_attention_obstacle(model: nn.Module) -> str | None:
    """Why packed rows need the model's own attention; None if ours computes the same."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0):
        return "attention scores are capped or dropped"
    if not getattr(model, "_supports_sdpa", False):
        return "the model has an attention of its own"
    return None


def has_varlen_kernel(query: torch.Tensor, sliding_window: int | None) -> bool:
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and ("window_size" in PARAMETERS or ("is_causal" in PARAMETERS and not sliding_window))
    )


def attend_packed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row  # [1, tokens, heads, head_dim]

    query, key, value  # [1, heads, tokens, head_dim]
    cu_seq_lens_q: where rows begin and end  # int32 [rows + 1]
    """
    tokens, rows = query.shape[2], len(cu_seq_lens_q) - 1
    if rows * max_length_q == tokens and not sliding_window:
        return attend_dense(query, key, value, rows, scaling), None
    if not has_varlen_kernel(query, sliding_window):
        mask = build_block_mask(tokens, cu_seq_lens_q, sliding_window)
        gqa = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2), None
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    if key.shape[1] != query.shape[1] and "enable_gqa" not in PARAMETERS:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    options: dict[str, Any] = {"scale": scaling}
    if "enable_gqa" in PARAMETERS:
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    if "window_size" in PARAMETERS:
        options["window_size"] = (sliding_window - 1 if sliding_window else -1, 0)
    else:
        options["is_causal"] = True
    ends, longest = cu_seq_lens_q, max_length_q
    return varlen_attn(query, key, value, ends, ends, longest, longest, **options).unsqueeze(0), None


def attend_dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int, scaling: float | None
) -> torch.Tensor:
    """Rows of one length, as documents cut at the limit are: a batch, which cuDNN does twice as fast."""
    query, key, value = (
        x.transpose(1, 2).reshape(rows, -1, x.shape[1], x.shape[3]).transpose(1, 2)
        for x in (query, key, value)
    )
    gqa = key.shape[1] != query.shape[1]
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).reshape(1, -1, query.shape[1], query.shape[3])


def build_block_mask(
    tokens: int, cu_seqlens: torch.Tensor, sliding_window: int | None = None
) -> torch.Tensor:
    """True where a token sees another: in its own row, not later, within the window  # [tokens, tokens]"""
    place = torch.arange(tokens, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True)
    distance = place[:, None] - place
    mask = (row[:, None] == row) & (distance >= 0)
    return mask & (distance < sliding_window) if sliding_window else mask


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Within it, forward and backward of `model` take packed rows; its own attention returns after."""
    AttentionInterface.register(NAME, attend_packed)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
