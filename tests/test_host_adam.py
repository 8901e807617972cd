"""Adam whose moments lie elsewhere learns what torch's own learns, and goes on from its state."""

import pytest
import torch

from utils.run.optimizer_state import describe_optimizer
from utils.train import host_adam
from utils.train.host_adam import HostAdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
SIZE = 5 * 1024 + 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_adam, "PIECE", 1024)  # six of them, the last not whole


def build(kind, weights):
    weight = torch.nn.Parameter(weights.clone())
    return weight, kind([{"params": [weight], "weight_decay": 0.1}], **OPTIONS)


def take_steps(weight, optimizer, seeds):
    for seed in seeds:
        weight.grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        optimizer.step()


def test_weights_are_those_of_the_fused_adam():
    start = torch.randn(SIZE)
    ours, theirs = (build(kind, start) for kind in (HostAdamW, torch.optim.AdamW))
    for pair in (ours, theirs):
        take_steps(*pair, range(5))
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[0], start)
    states = [optimizer.state_dict()["state"][0] for _, optimizer in (ours, theirs)]
    assert states[0].keys() == states[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("first, second", [(HostAdamW, HostAdamW), (torch.optim.AdamW, HostAdamW), (HostAdamW, torch.optim.AdamW)])  # fmt: skip
def test_run_goes_on_with_either_form(first, second):
    start = torch.randn(SIZE)
    whole = build(HostAdamW, start)
    take_steps(*whole, range(6))
    begun = build(first, start)
    take_steps(*begun, range(3))
    weight, optimizer = build(second, begun[0].detach())
    optimizer.load_state_dict(begun[1].state_dict())
    take_steps(weight, optimizer, range(3, 6))
    assert torch.equal(weight, whole[0])


def test_its_state_is_of_the_kind_of_torchs_own():
    weight, optimizer = build(HostAdamW, torch.zeros(8))
    assert describe_optimizer(optimizer) == "torch AdamW" == describe_optimizer(torch.optim.AdamW([weight]))
