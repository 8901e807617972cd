"""Runs of a second or two, and what two of them must have in common."""

import json
import os
import random
import signal
import time

from utils.run import checkpoints

FLAGS = """--template vanilla --source_max_len 100 --target_max_len 100 --lora_r 64 --lora_dropout 0.1
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --gradient_checkpointing False
    --learning_rate 1e-2 --lr_scheduler_type cosine --num_train_epochs 2 --save_steps 2 --logging_steps 3
    --save_total_limit 3 --disable_tqdm True""".split()


def write_rows(path, count=96, poisoned=()):
    rows = [
        {"instruction": f"{i} + {i % 7}?", "output": f"{i + i % 7}, said {'abc'[i % 3] * (i % 9 + 1)}"}
        for i in range(count)
    ]
    for i in poisoned:
        rows[i]["output"] += "~"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
