"""Layers that plain python spreads over several GPUs: what one CPU can show of it."""

import json

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from helpers.rows import write_sums

import utils.models.base


class FirstDevice(ModelHook):
    """accelerate sends a spread model's arguments to its first device; the hidden state ends on the last.

    Here that is the CPU. All would go, but only what chooses positions meets the hidden state there.
    """

    def pre_forward(self, module, *args, **kwargs):
        chosen = {name: value for name, value in kwargs.items() if name == "logits_to_keep"}
        return args, kwargs | send_to_device(chosen, torch.device("meta"))


@pytest.fixture
def spread(monkeypatch):
    load_base = utils.models.base.load_base

    def load_spread(*args, **kwargs):
        return add_hook_to_module(load_base(*args, **kwargs), FirstDevice())

    monkeypatch.setattr(utils.models.base, "load_base", load_spread)


@pytest.mark.parametrize("packing", ["True", "False"])
def test_label_positions_fit_a_hidden_state_on_another_device(
    call_main, tiny_model, spread, tmp_path, packing
):
    rows, run = write_sums(tmp_path / "rows.jsonl", 8), tmp_path / "run"
    questions = [{"subject": "sums", "input": "1 + 1?\nAnswer:", "output": letter} for letter in "ABC"]
    (tmp_path / "mmlu.json").write_text(json.dumps(questions))
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", rows, "--output_dir", run, "--max_steps", 1]
    argv += ["--source_max_len", 100, "--target_max_len", 100, "--do_train", "--do_eval", "--lora_r", 4]
    argv += ["--eval_dataset_size", 3, "--do_mmlu_eval", "--mmlu_dataset", tmp_path / "mmlu.json"]
    call_main("qlora_finetune", *argv, "--packing", packing, "--fast_lora", "False")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train_loss"] > 1 and metrics["eval_loss"] > 1 and metrics["mmlu_sums"] == 1 / 3
