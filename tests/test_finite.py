"""A loss, gradient or weight that is not finite: skipped, counted, named, and never saved."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import slow_but
from helpers.rows import write_sums
from safetensors.torch import load_file, save_file

from utils.arguments import LoraArguments, ModelArguments
from utils.data.packing import PackingCollator, PaddingCollator, list_rows
from utils.models.adapter import add_lora
from utils.models.base import load_base
from utils.run import checkpoints


@pytest.fixture
def poisoned_model(small_model, tmp_path):
    """The small model, to which the character ~ is not a number."""
    folder = shutil.copytree(small_model, tmp_path / "poisoned")
    tensors = load_file(folder / "model.safetensors")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["model.embed_tokens.weight"][vocabulary["~"]] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("packing", slow_but(["True"], ["True", "False"]))
def test_step_that_is_not_finite_is_skipped_counted_and_its_rows_named(
    server, command, poisoned_model, tmp_path, packing
):
    write_sums(tmp_path / "rows.jsonl", poisoned=[7])
    command[1] = poisoned_model
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [
        *command,
        "--output_dir",
        run,
        "--packing",
        packing,
        "--num_train_epochs",
        "1",
        "--save_steps",
        "1",
    ]
    assert server.run(log, *argv, "--save_total_limit", "20", "--logging_steps", "1") == 0, log.read_text()
    (entry,) = map(json.loads, (run / "non_finite_steps.jsonl").read_text().splitlines())
    assert entry["loss"] == "nan" and len(entry["rows"]) == 8
    assert [row for row in entry["rows"] if row["row"] == 7][0]["begins"].startswith("7 + 0?")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["skipped_steps"] == 1 and metrics["steps"] == 12
    losses = {entry["step"]: entry["loss"] for entry in metrics["log"] if "loss" in entry}
    step = entry["step"]
    assert set(losses) == set(range(1, 13)) - {step} and all(0 < loss < 10 for loss in losses.values())
    assert metrics["train_loss"] == pytest.approx(sum(losses.values()) / 11)
    before, after, later = ((run / f"checkpoint-{step + i}") for i in (-1, 0, 1))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes() != (later / name).read_bytes()


def test_five_bad_steps_in_a_row_stop_the_run_and_leave_the_good_checkpoint(
    server, command, poisoned_model, tmp_path
):
    write_sums(tmp_path / "rows.jsonl", poisoned=range(12, 96))
    command[1] = poisoned_model
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*command, "--output_dir", run, "--train_sampling_strategy", "sequential", "--save_steps", "50"]
    assert server.run(log, *argv) == 2
    text = log.read_text()
    assert "error: 5 steps in a row had a loss or gradient that is not finite, up to step 6" in text
    assert text.count("is skipped: loss nan") == 5 and "Traceback" not in text
    assert checkpoints.find_valid_checkpoint(run) == run / "checkpoint-1"
    tensors = load_file(run / "checkpoint-1" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_that_are_not_finite_are_not_saved(server, command, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*command, "--output_dir", run, "--learning_rate", "3e38", "--max_grad_norm", "0"]
    assert server.run(log, *argv, "--optim", "sgd") == 2
    assert "not finite" in log.read_text() and "Traceback" not in log.read_text()
    for folder in checkpoints.list_checkpoints(run):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("collator", [PackingCollator(0, 8), PaddingCollator(0, 8)])
def test_rows_of_a_step_are_known_by_their_index(collator):
    rows = [{"input_ids": np.array([5, 6, i]), "labels": np.array([-100, 6, i]), "row": i} for i in range(20)]
    batches = [collator([rows[7], rows[3], rows[4]]), collator([rows[12]])]
    assert list_rows(batches) == [7, 3, 4, 12]


def train_half(model, scaler, steps=40):
    """Loss of each step in float16 autocast, until one is not finite."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=2e-3), []
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            break
    return losses


def test_float16_with_float32_adapters_and_a_loss_scale_learns_where_pure_float16_diverges(small_model):
    """Adam's epsilon, 1e-8, is zero in float16, and so are the first gradients of lora_A: 0 / 0."""
    losses = {}
    for name in ("ours", "pure"):
        torch.manual_seed(0)
        base = load_base(ModelArguments(str(small_model), bits=16, fp16=True), torch.float16)
        model = add_lora(base, LoraArguments(lora_r=8))
        trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
        assert trained == {torch.float32}
        if name == "pure":
            model.half()
        losses[name] = train_half(model, torch.amp.GradScaler("cpu", enabled=name == "ours"))
    assert len(losses["pure"]) < 40 and losses["pure"][-1] != losses["pure"][-1]
    assert len(losses["ours"]) == 40 and losses["ours"][-1] < 0.9 * losses["ours"][0]
