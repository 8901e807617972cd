"""What eval.memory trains under a cap is what a run trains: the same losses whatever lies in host memory."""

import pytest
import torch

from eval.speed.promises import Promise, describe, train
from eval.speed.shapes import SHAPES, build_random_model
from utils.arguments import LoraArguments, TrainingArguments
from utils.fast.streamed_layers import find_store
from utils.models.adapter import add_lora
from utils.train.plan import Plan
from utils.train.savings import LAYERS, SAVINGS


def test_losses_fall_and_are_the_same_with_every_saving():
    curves = []
    for savings in ((), SAVINGS):
        torch.manual_seed(0)
        config = SHAPES["tiny"]()
        config.tie_word_embeddings = False
        model = build_random_model(config, 4, torch.float32, "cpu", LAYERS in savings)
        torch.manual_seed(1)
        model = add_lora(model, LoraArguments(lora_r=4)).train()
        assert (find_store(model) is not None) == (LAYERS in savings)
        plan = Plan("adamw_torch_fused", 64, 2, 2, savings=savings)
        training_args = TrainingArguments(learning_rate=1e-2)
        curves.append(train(model, torch.float32, plan, training_args, rows=3, width=32, steps=10)[0])
    assert curves[0] == curves[1] and curves[0][-1] < curves[0][0] and len(curves[0]) == 10


@pytest.mark.parametrize(
    "held, last, verdict", [(5.9, 9.0, "kept"), (6.3, 9.0, "BROKEN"), (5.9, 11.0, "BROKEN")]
)
def test_promise_is_kept_by_memory_and_loss(held, last, verdict):
    promise = Promise(
        "llama-7b:64:1x512:6.2", 6.0, held - 0.5, 0.0, 0.5, 1.5, 10.4, last, 2.0, 1024.0, [], 28, 10
    )
    line = describe(promise)
    assert line.endswith(verdict) and f"{held:.2f} GiB" in line and "2.00 steps/s" in line
