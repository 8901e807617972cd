"""Runs of a second or two: how tests start them, and what two of them must have in common."""

import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from helpers import IDENTITY, ROOT
from utils.run import checkpoints

FLAGS = """--template vanilla --source_max_len 100 --target_max_len 100 --lora_r 64 --lora_dropout 0.1
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --gradient_checkpointing False
    --learning_rate 1e-2 --lr_scheduler_type cosine --num_train_epochs 2 --save_steps 2 --logging_steps 3
    --save_total_limit 3 --disable_tqdm True""".split()
CHECKPOINT_FILES = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "manifest.json",
    "optimizer.safetensors", "rng_state_0.json", "tokenizer.json", "tokenizer_config.json",
    "trainer_state.json", "training_state.json",
]  # fmt: skip


def run_in_process(script, *argv):
    """A script's main() in this process: no seconds lost on imports."""
    if not gc.get_freeze_count():  # a Trainer collects garbage: 0.7 s over all that tests have imported
        importlib.import_module("utils.train.training")
        gc.freeze()  # once: what is frozen is never freed
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        importlib.import_module(script).main()


def train(call_main, model, folder, *flags, script="qlora_finetune"):
    """Train on the identity rows; what the script printed."""
    argv = ["--model_name_or_path", model, "--dataset_name", IDENTITY, "--output_dir", folder]
    return call_main(script, *argv, *flags)


@contextmanager
def trainer_kept() -> Iterator[list]:
    """The Trainers of the runs that end inside, in their order: main() gives none back."""
    from utils.train.trainer import QLoraTrainer

    kept, save_final = [], QLoraTrainer.save_final
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QLoraTrainer, "save_final", lambda self: (kept.append(self), save_final(self)))
        yield kept


def read_log(run, name) -> list[float]:
    log = json.loads((run / "metrics.json").read_text())["log"]
    return [entry[name] for entry in log if name in entry]


def load_weights(run):
    weights = load_file(run / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    return weights


def read_last_state(run):
    """What must be equal, bit for bit: adapter, optimizer, schedule, random numbers, counters, logged losses."""
    folder = checkpoints.list_checkpoints(run)[-1]
    state = json.loads((folder / "training_state.json").read_text())
    del state["progress"]["seconds"]
    log = json.loads((run / "metrics.json").read_text())["log"]
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "train_loss")
    return {
        "step": folder.name,
        "adapter": (run / "adapter_model.safetensors").read_bytes(),
        "optimizer": (folder / "optimizer.safetensors").read_bytes(),
        "random numbers": (folder / "rng_state_0.json").read_text(),
        "state": state,
        "log": [{name: entry[name] for name in kept if name in entry} for entry in log],
        "metrics": json.loads((run / "metrics.json").read_text())["train_loss"],
    }


def assert_equal_runs(run, expected):
    first, second = read_last_state(run), read_last_state(expected)
    assert [name for name in first if first[name] != second[name]] == []


def wait_for_a_moment(server, pid, run, kind, chance):
    """Until a random moment: of the whole start, of the training, or of a save."""
    lock = run / "run.lock"
    if kind != "start":
        while not server.has_ended(pid) and not (lock.is_file() and f"process {pid} " in lock.read_text()):
            time.sleep(0.002)
    if kind == "save":
        while not server.has_ended(pid) and not any(run.glob(".checkpoint-*.tmp")):
            time.sleep(0.0005)
    end = time.monotonic() + chance.uniform(0, {"start": 3, "training": 1, "save": 0.1}[kind])
    while not server.has_ended(pid) and time.monotonic() < end:
        time.sleep(0.001)


def kill_until_done(server, command, run, kills, log, number=signal.SIGKILL):
    """Start the same command again and again, killed at random moments; exit codes, the last one of its end."""
    chance, codes = random.Random(0), []
    for kill in range(kills):
        pid = server.start(log, *command, "--output_dir", run)
        try:
            wait_for_a_moment(server, pid, run, ("save", "training", "start")[kill % 3], chance)
            os.kill(pid, number)
        except FileNotFoundError:  # the lock went as we looked: the run has just ended
            pass
        codes.append(server.wait(pid))
        if codes[-1] == 0:
            break
    codes.append(server.run(log, *command, "--output_dir", run))
    return codes


def check_kills(server, command, tmp_path, optimizer, kills, number=signal.SIGKILL):
    command = [*command, "--optim", optimizer]
    log = tmp_path / "log"
    assert server.run(log, *command, "--output_dir", tmp_path / "expected") == 0, log.read_text()
    codes = kill_until_done(server, command, tmp_path / "killed", kills, log, number)
    assert codes[-1] == 0, log.read_text()
    assert_equal_runs(tmp_path / "killed", tmp_path / "expected")
    left, wanted = ({path.name for path in (tmp_path / name).iterdir()} for name in ("killed", "expected"))
    if number != signal.SIGKILL:  # a stop saves a checkpoint of its own, which counts for --save_total_limit
        left, wanted = ({n for n in names if not n.startswith("checkpoint-")} for names in (left, wanted))
    assert left == wanted, left ^ wanted
    return codes


def forget_second_step(run):
    """Leave the run as if it had been killed after its first checkpoint."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    shutil.rmtree(run / "checkpoint-2")
    (run / "adapter_model.safetensors").unlink()
