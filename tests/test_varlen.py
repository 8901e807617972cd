"""Packed attention keeps rows apart and equals attention on each row alone."""

import pytest
import torch
from helpers.architectures import DEVICE
from torch.nn import functional as F

from utils.fast.attention import attend_packed, build_block_mask, has_varlen_kernel, packed_attention
from utils.fast.capability import is_before_ampere

LENGTHS = (5, 17, 1, 9)
ENDS = torch.tensor([0, 5, 22, 23, 32, 32], dtype=torch.int32, device=DEVICE)  # an empty row at the end


def draw(heads, dtype=torch.float32, head_dim=64):
    return torch.randn(1, heads, 32, head_dim, device=DEVICE, dtype=dtype, requires_grad=True)


def attend_alone(query, key, value, window, lengths=LENGTHS):
    outs = []
    parts = (x.split(lengths, 2) for x in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = ((distance >= 0) & (distance < (window or 99))).to(DEVICE)
        outs.append(F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))
    return torch.cat(outs, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_rows_attend_as_rows_alone(kv_heads, window, dtype):
    torch.manual_seed(0)
    query, key, value = draw(4, dtype), draw(kv_heads, dtype), draw(kv_heads, dtype)
    expected = attend_alone(query, key, value, window)
    out, _ = attend_packed(
        None, query, key, value, None, 64**-0.5, sliding_window=window, cu_seq_lens_q=ENDS, max_length_q=17
    )
    upstream = torch.randn_like(out)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert out.shape == (1, 32, 4, 64) and (out - expected).norm() < tolerance * expected.norm()
    found = torch.autograd.grad(out, (query, key, value), upstream)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    for gradient, other in zip(found, wanted, strict=True):
        assert (gradient - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_length_attend_as_rows_alone(dtype):
    query, key, value = draw(4, dtype), draw(2, dtype), draw(2, dtype)
    ends = torch.tensor([0, 16, 32], dtype=torch.int32, device=DEVICE)
    expected = attend_alone(query, key, value, None, (16, 16))
    out, _ = attend_packed(None, query, key, value, None, 64**-0.5, cu_seq_lens_q=ends, max_length_q=16)
    assert out.shape == (1, 32, 4, 64) and (out - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.gpu
def test_the_variable_length_kernel_is_what_runs():
    assert has_varlen_kernel(draw(4, torch.bfloat16), None) != is_before_ampere()


def test_block_mask_by_hand():
    mask = build_block_mask(4, torch.tensor([0, 3, 4], dtype=torch.int32), sliding_window=2)
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_the_models_own_attention_returns():
    from helpers.architectures import build_model

    model = build_model("llama").get_base_model()
    with pytest.raises(RuntimeError), packed_attention(model):
        assert model.config._attn_implementation == "packed"
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
