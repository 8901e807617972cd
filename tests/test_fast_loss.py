"""The chunked loss and its gradient equal the plain ones, for any chunk, cap and scale."""

import pytest
import torch
from helpers.architectures import DEVICE
from torch import nn
from torch.nn import functional as F

from utils.fast import loss as fast_loss
from utils.fast.loss import OutputLayer, pick_targets


class SmallOutputLayer(OutputLayer):
    def __init__(self, bias: bool, scale: float, softcap: float, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 301, bias=bias, device=DEVICE, dtype=dtype).requires_grad_(False)
        self.scale, self.softcap = scale, softcap


def plain_loss(head, hidden, labels, positions):
    logits = F.linear(hidden[:, positions].float(), head.linear.weight.float(), head.linear.bias) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    targets = pick_targets(labels, positions)
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(False, 1.0, 0.0), (True, 0.25, 0.0), (False, 4.0, 3.0)]
)
def test_loss_and_gradient_equal_the_plain_ones(rows, bias, scale, softcap, monkeypatch):
    monkeypatch.setattr(fast_loss, "count_positions", lambda vocabulary: 7)
    head = SmallOutputLayer(bias, scale, softcap)
    hidden = (3 * torch.randn(rows, 20, 32, device=DEVICE)).requires_grad_()
    labels = torch.randint(301, (rows, 20), device=DEVICE)
    labels[:, 5:9] = -100
    positions = torch.tensor([2, 3, 6, 7, 8, 12, 17, 18, 19], device=DEVICE)
    (expected,) = torch.autograd.grad(plain_loss(head, hidden, labels, positions) * 3, hidden)
    loss = head.sum_losses(hidden, labels, positions)
    (gradient,) = torch.autograd.grad(loss * 3, hidden)
    assert loss.item() == pytest.approx(plain_loss(head, hidden, labels, positions).item(), rel=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert gradient[:, :2].norm() == 0


def test_a_chunk_fills_tiles_and_is_large_enough_for_its_reads_of_the_output_layer():
    vocabularies = (32_000, 49_152, 128_256, 152_064, 256_000)
    assert [fast_loss.count_positions(words) for words in vocabularies] == [1024, 640, 384, 384, 384]


def test_the_last_token_has_no_target():
    labels = torch.tensor([[1, 2, 3]])
    assert pick_targets(labels, torch.tensor([0, 1, 2, 2])).tolist() == [2, 3, -100, -100]


def test_a_loss_scale_that_would_overflow_half_floats_does_not():
    dtype = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    head = SmallOutputLayer(False, 1.0, 0.0, dtype)
    hidden = torch.randn(1, 20, 32, device=DEVICE, dtype=dtype).requires_grad_()
    labels, positions = torch.randint(301, (1, 20), device=DEVICE), torch.arange(19, device=DEVICE)
    (gradient,) = torch.autograd.grad(head.sum_losses(hidden, labels, positions) * 65536 / 19, hidden)
    (expected,) = torch.autograd.grad(plain_loss(head, hidden, labels, positions), hidden)
    assert torch.isfinite(gradient).all()
    assert (gradient * 19 / 65536 - expected).norm() < 2e-2 * expected.norm()


def test_a_trained_head_is_not_covered():
    from helpers.architectures import build_model

    model = build_model("llama").get_base_model()
    assert fast_loss.find_loss_obstacle(model, OutputLayer(model)) is None
    model.lm_head.weight.requires_grad = True
    assert "is trained" in fast_loss.find_loss_obstacle(model, OutputLayer(model))
