"""Attention of packed rows: torch's variable-length kernel, which never looks across a row's end.

Its signature differs between torch 2.10 and 2.13, so its parameters are looked up. It needs an Ampere GPU and
16 bits. Older GPUs and float32 take torch's memory-efficient kernel, which knows rows as well; a CPU, or a
window without the first kernel, takes sdpa with a block-diagonal mask. None of them reads anything on the
host, so all can be captured in a CUDA graph. For packed training only: padded batches, as evaluation and
generation have them, keep the model's own attention. What a model hands its attention besides (a sink, a
bias, a cap) is refused, and the whole is tried on the model before it is used.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from utils.fast.capability import is_before_ampere
from utils.fast.trials import ROW, draw_tokens, evaluating, is_near, shallow

varlen_attn: Any = None  # stays so in torch before 2.10
with suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn
PARAMETERS = set(inspect.signature(varlen_attn).parameters) if varlen_attn else set()

SHORT = 8192  # tokens
NAME, TRIAL = "packed", "packed_trial"
# Arguments that change nothing here: rows are causal and as long on both sides.
WITHOUT_EFFECT = {"position_ids", "is_causal", "cu_seq_lens_k", "max_length_k", "output_attentions"}
AMPERE_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # any GPU


def find_attention_obstacle(model: PreTrainedModel) -> str | None:
    """Why packed rows need the model's own attention; None if ours computes the same, tried on the model."""
    config = model.config.get_text_config().to_dict()
    if any(value for name, value in config.items() if name.startswith("att") and "drop" in name):
        return "attention scores are dropped"
    if not getattr(model, "_supports_sdpa", False):
        return "the model has an attention of its own"
    if model.device.type == "meta":  # a rehearsal takes it that the trial succeeds
        return None
    with evaluating(model), shallow(model):
        try:
            return try_packed_attention(model.base_model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code does where it misses its mask
            return f"tried on packed rows: {(str(error) or type(error).__name__).splitlines()[0]}"


def try_packed_attention(model: Any) -> str | None:
    """Rows alone, by the model's own attention, against the same rows packed; `model`: without its head."""
    rows = draw_tokens(model, 2, ROW)
    alone = model(input_ids=rows, use_cache=False)[0]  # [2, ROW, hidden_size]
    with packed_attention(model, TRIAL):  # without position_ids: its mask is that of one row
        run_packed(model, rows[:1], [ROW])
    for second in (ROW, ROW - 5):  # rows of one length are attended to as a batch
        packed = torch.cat([rows[0], rows[1, :second]])[None]
        with packed_attention(model):
            places = torch.cat([torch.arange(ROW), torch.arange(second)])[None].to(packed.device)
            found = run_packed(model, packed, [ROW, second], position_ids=places)
        if not is_near(found[0], torch.cat([alone[0], alone[1, :second]])):
            return "packed rows come out otherwise than alone"
    return None


def run_packed(
    model: PreTrainedModel, packed: torch.Tensor, lengths: list[int], **inputs: Any
) -> torch.Tensor:
    """Hidden states  # [1, tokens, hidden_size]"""
    ends = torch.tensor([0, *lengths], device=packed.device).cumsum(0).to(torch.int32)
    bounds = {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}
    return model(input_ids=packed, use_cache=False, **bounds, **inputs)[0]


def has_varlen_kernel(query: torch.Tensor, sliding_window: int | None) -> bool:
    return (
        varlen_attn is not None
        and query.dtype in (torch.bfloat16, torch.float16)
        and (query.is_cuda or query.is_meta)
        and not lacks_flash(query)
        and ("window_size" in PARAMETERS or ("is_causal" in PARAMETERS and not sliding_window))
    )


def is_gpus(query: torch.Tensor) -> bool:
    """Whether `query` is on the GPU at hand, or rehearses what will be."""
    return query.is_cuda or (query.is_meta and torch.cuda.is_available())


def lacks_flash(query: torch.Tensor) -> bool:
    return is_gpus(query) and is_before_ampere()


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
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row  # [1, tokens, heads, head_dim]

    query, key, value  # [1, heads, tokens, head_dim]
    cu_seq_lens_q: where rows begin and end  # int32 [rows + 1]
    Raises ValueError for what it would leave out.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("its layers do not tell attention where rows begin")
    refuse_what_is_left_out(given | {"attention_mask": attention_mask})
    tokens, rows = query.shape[2], len(cu_seq_lens_q) - 1
    if rows * max_length_q == tokens and not sliding_window:
        return attend_dense(query, key, value, rows, scaling), None
    if not has_varlen_kernel(query, sliding_window):
        if is_gpus(query) and not sliding_window:
            return attend_efficiently(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
        mask = build_block_mask(tokens, cu_seq_lens_q, sliding_window)
        gqa = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2), None
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling}
    if "enable_gqa" in PARAMETERS:  # before torch 2.13 nothing asks, and the kernel shares heads all the same
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    if "window_size" in PARAMETERS:
        options["window_size"] = (sliding_window - 1 if sliding_window else -1, 0)
    else:
        options["is_causal"] = True
    ends, longest = cu_seq_lens_q, max_length_q
    out = varlen_attn(query, key, value, ends, ends, longest, longest, **options).unsqueeze(0)
    is_rehearsed = out.is_meta and tokens > SHORT
    return (RehearsedWorkspace.apply(out, key.shape[1], rows) if is_rehearsed else out), None


def attend_efficiently(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """The same by the memory-efficient kernel, which any GPU and float32 have  # [1, tokens, heads, head_dim]

    Its backward pass is given no window (derivatives.yaml in torch), so none is taken.
    """
    key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attend = torch.ops.aten._efficient_attention_forward
    causal, needs_backward = 1, query.requires_grad or key.requires_grad or value.requires_grad
    return attend(
        query, key, value, None, ends, ends, longest, longest, 0.0, causal, needs_backward, scale=scaling
    )[0]


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values for each of so many query `heads`  # [rows, heads, tokens, head_dim]"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


class RehearsedWorkspace(torch.autograd.Function):
    """What attention's backward pass holds beside what it is given, found at 131,072 tokens on an H100.

    The gradient of queries in float32, of 128 more tokens for each row; those of queries, keys and values;
    where several heads share a key, the gradients of both for every head; and three copies of what is laid
    out otherwise than the kernel wants it. With SHORT rows the peak of a layer is in its MLP.
    """

    @staticmethod
    def forward(ctx, out: torch.Tensor, kv_heads: int, rows: int):
        ctx.kv_heads, ctx.rows = kv_heads, rows
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        _, tokens, heads, width = grad.shape
        shared = 2 * heads if ctx.kv_heads < heads else 0
        sixteen_bits = tokens * width * (4 * heads + 2 * ctx.kv_heads + shared)
        grad.new_empty(2 * (tokens + 128 * ctx.rows) * width * heads + sixteen_bits)
        return grad, None, None


def refuse_what_is_left_out(given: dict[str, Any]) -> None:
    unknown = [name for name, x in given.items() if isinstance(x, torch.Tensor) or x]
    unknown = [name for name in unknown if name not in WITHOUT_EFFECT]
    if unknown or given.get("is_causal") is False:
        raise ValueError(f"its attention takes {', '.join(unknown) or 'is_causal=False'}")


def attend_trial(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """attend_packed, which gets no mask and must then be told of every window by its argument."""
    if attention_mask is not None and not given.get("sliding_window"):
        raise ValueError("a mask alone keeps its tokens from seeing all earlier ones")
    return attend_packed(module, query, key, value, None, **given)


def build_trial_mask(
    mask_function: Callable[..., torch.Tensor], q_length: int, kv_length: int, device: torch.device, **_: Any
) -> torch.Tensor | None:
    """None where a token sees all earlier ones of its row; else something, for attend_trial to see."""
    first, far = (torch.tensor(place, device=device) for place in (0, 2**30))
    sees_all = mask_function(first, first, far, first)
    return None if sees_all else torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)


def attend_dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int, scaling: float | None
) -> torch.Tensor:
    """Rows of one length, as documents cut at the limit are: a batch, which cuDNN does twice as fast."""
    query, key, value = (
        x.transpose(1, 2).reshape(rows, -1, x.shape[1], x.shape[3]).transpose(1, 2)
        for x in (query, key, value)
    )
    backends = [*AMPERE_BACKENDS, *BACKENDS]
    if lacks_flash(query):  # what is left has no grouped heads
        backends = BACKENDS
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    gqa = key.shape[1] != query.shape[1]
    with sdpa_kernel(backends, set_priority=True):
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
def packed_attention(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Within it, forward and backward of `model` take packed rows; its own attention returns after."""
    AttentionInterface.register(NAME, attend_packed)
    AttentionInterface.register(TRIAL, attend_trial)
    AttentionMaskInterface.register(TRIAL, build_trial_mask)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
