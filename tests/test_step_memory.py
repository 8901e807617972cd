"""A step that memory is too short for: cut smaller and taken again, with the same rows, masks and schedule."""

import pytest
import torch
from helpers.runs import run_in_process
from safetensors.torch import load_file

from utils.data.packing import find_micro_batches
from utils.train import step_memory
from utils.train.engine import FastEngine, PlainEngine

FLAGS = ["--dataset_name", "data/guanaco_identity.jsonl", "--model_max_length", 256, "--max_steps", 3]
FLAGS += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--lora_dropout", 0.1]
FLAGS += [
    "--bits",
    32,
    "--lora_r",
    4,
    "--learning_rate",
    1e-3,
    "--save_strategy",
    "no",
    "--eval_dataset_size",
    8,
]


def train(tiny_model, folder, *flags):
    run_in_process(
        "qlora_finetune", "--model_name_or_path", tiny_model, *FLAGS, *flags, "--output_dir", folder
    )
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def short_memory(monkeypatch):
    """From the second step on, micro-batches of more tokens than `limit` end in the middle of the backward pass."""

    def shorten(engine, limit):
        whole = engine.run_step
        steps = []

        def run_step(self, model, micro_batches, *args):
            steps.append([part["input_ids"].numel() for part in micro_batches])
            loss = whole(self, model, micro_batches, *args)  # gradients are there, and must not stay
            if len(steps) > 1 and max(steps[-1]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return loss

        monkeypatch.setattr(engine, "run_step", run_step)
        return steps

    return shorten


@pytest.mark.parametrize("flags", [(), ("--packing", False), ("--packing", False, "--fast_lora", False)])
def test_run_cut_short_in_the_middle_learns_what_the_uninterrupted_one_does(
    tiny_model, tmp_path, short_memory, capsys, flags
):
    expected = train(tiny_model, tmp_path / "whole", *flags)
    steps = short_memory(PlainEngine if "--fast_lora" in flags else FastEngine, 256 if flags else 300)
    found = train(tiny_model, tmp_path / "cut", *flags)
    assert "memory was too short" in capsys.readouterr().out
    assert max(steps[1]) > max(steps[-1]) and len(steps[-1]) > len(steps[1])
    assert sum(expected[name].abs().sum() for name in expected) > 0
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name


def test_run_that_nothing_makes_fit_ends_in_one_line_and_a_checkpoint(
    tiny_model, tmp_path, short_memory, capsys
):
    short_memory(FastEngine, 0)
    with pytest.raises(step_memory.OutOfRoom, match="micro-batches of one row"):
        train(tiny_model, tmp_path / "run")
    assert "the last whole step is in" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").is_file()


def test_cut_rows_are_those_of_the_batch():
    lengths = {0: 30, 1: 20, 2: 50, 3: 10}

    class Rows:
        lengths = torch.tensor([30, 20, 50, 10]).numpy()

        def __getitem__(self, row):
            ids = torch.arange(lengths[row]).numpy()
            return {"input_ids": ids, "labels": ids, "row": row}

    rows = Rows()
    collator = step_memory.PackingCollator(0, 110)
    memory = step_memory.StepMemory(collator, rows, PlainEngine(torch.nn.Linear(1, 1)), 1)
    batch = collator([rows[row] for row in range(4)])
    assert memory.cut(batch) is batch
    memory.shrink(torch.nn.Linear(1, 1), "CUDA out of memory")
    parts = find_micro_batches(memory.cut(batch))
    assert sorted(row for part in parts for row in part["rows"].tolist()) == [0, 1, 2, 3]
    assert max(part["input_ids"].numel() for part in parts) <= 55 and len(parts) > 1
    memory.shrink(torch.nn.Linear(1, 1), "CUDA out of memory")
    with pytest.raises(step_memory.OutOfRoom):
        memory.shrink(torch.nn.Linear(1, 1), "CUDA out of memory")
