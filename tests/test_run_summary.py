"""What a run shows: its size before, ten lines at least, and what came of it."""

import io
import json
import re
import sys

import torch
from helpers.rows import write_sums
from safetensors.torch import load_file
from tqdm.auto import tqdm

from utils.arguments import TrainingArguments
from utils.console import notice
from utils.flags.parser import parse_args
from utils.train.summary import describe_start


def test_short_run_shows_ten_lines_its_size_and_what_came_of_it(call_main, small_model, tmp_path):
    rows = write_sums(tmp_path / "rows.jsonl", 30)
    argv = ["--model_name_or_path", small_model, "--dataset_name", rows, "--output_dir", tmp_path / "run"]
    argv += ["--template", "vanilla", "--source_max_len", "100", "--target_max_len", "100", "--lora_r", "2"]
    argv += ["--gradient_accumulation_steps", "8", "--num_train_epochs", "4"]
    printed = call_main("qlora_finetune", *argv)
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert "--logging_steps is 1: the run has 16 steps" in printed and len(losses) == 16
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    trained = sum(weight.numel() for weight in weights.values())
    assert re.search(rf"training {trained:,} of [\d,]+ parameters \(.*%\), 16 steps of 8 rows\n", printed)
    assert f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}" in printed and " tokens/s, " in printed
    assert f"to chat: python cli_demo.py --checkpoint_dir {tmp_path / 'run'}" in printed


def test_step_larger_than_the_data_is_said():
    training_args = parse_args(["--gradient_accumulation_steps", "64"], [TrainingArguments], "")[0]
    layer = torch.nn.Linear(3, 2)
    assert describe_start(layer, 50, training_args) == (
        "training 8 of 8 parameters (100.00%), 3 steps of 50 rows: a step has room for 64 and the training set "
        "has 50, so each is an epoch"
    )
    assert describe_start(layer, 130, training_args).endswith("9 steps of 64 rows")


def test_line_is_printed_above_the_progress_bar(monkeypatch):
    """On a terminal a bar ends without a newline: a line printed behind it would be glued to it."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=3, file=screen, mininterval=0) as bar:
        bar.update(1)
        notice("a line")
        bar.update(1)
    (row,) = [row for row in screen.getvalue().split("\n") if "a line" in row]
    assert row.split("\r")[-1] == "a line"
