"""SIGTERM and SIGINT in every phase: a checkpoint of the last whole step, exit code 75, and the same bits after."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROOT, slow_but
from helpers.rows import write_sums
from helpers.runs import assert_equal_runs, check_kills

from utils.run import checkpoints

REQUEUE = 75
EVALUATE = (
    "--do_train --do_eval --eval_strategy steps --eval_steps 1 --logging_steps 1 --disable_tqdm False".split()
)


def stop(server, pid, number=signal.SIGTERM):
    """Exit code and seconds after a signal."""
    start = time.monotonic()
    os.kill(pid, number)
    return server.wait(pid), time.monotonic() - start


def read_last_progress(run):
    folder = checkpoints.find_valid_checkpoint(run)
    return json.loads((folder / "training_state.json").read_text())["progress"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_run_stopped_at_random_moments_ends_with_the_bits_of_the_uninterrupted_one(
    server, command, tmp_path, number
):
    codes = check_kills(server, [*command, "--save_steps", "7"], tmp_path, "adamw_torch", 3, number)
    assert set(codes) <= {REQUEUE, 0} and codes[-1] == 0  # a stop that comes too late meets a finished run


def test_signal_within_a_long_step_drops_it_and_saves_the_step_before(server, command, tmp_path):
    """A step of 48 rows, one by one, takes a second or more; a signal does not wait for it."""
    run, log = tmp_path / "run", tmp_path / "log"
    command += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "48"]
    command += ["--save_steps", "100", "--logging_steps", "1", "--disable_tqdm", "False"]
    pid = server.start(log, *command, "--output_dir", run)
    server.wait_for(pid, lambda: "2/4" in log.read_text())
    code, seconds = stop(server, pid)
    assert code == REQUEUE and seconds < 10
    last = checkpoints.find_valid_checkpoint(run)
    assert last.name == "checkpoint-2"
    assert f"stopped by SIGTERM, step 2 is in {last}" in log.read_text()
    assert server.run(log, *command, "--output_dir", run) == 0
    assert server.run(log, *command, "--output_dir", tmp_path / "expected") == 0
    assert_equal_runs(run, tmp_path / "expected")


def test_signal_while_rows_are_prepared_exits_at_once_and_leaves_nothing(server, command, tmp_path):
    command[3] = write_sums(tmp_path / "many.jsonl", 100_000)
    log = tmp_path / "log"
    pid = server.start(log, *command, "--output_dir", tmp_path / "run")
    time.sleep(1.5)
    code, seconds = stop(server, pid)
    assert code == REQUEUE and seconds < 5
    assert "train: " not in log.read_text() and not (tmp_path / "run").exists()


def test_signal_during_a_save_lets_it_finish(server, command, tmp_path):
    run = tmp_path / "run"
    pid = server.start(tmp_path / "log", *command, "--output_dir", run)
    server.wait_for(pid, (run / ".checkpoint-2.tmp").is_dir)
    assert stop(server, pid)[0] == REQUEUE
    assert checkpoints.find_valid_checkpoint(run) == run / "checkpoint-2"
    assert not list(run.glob(".checkpoint-*"))


def wait_for_first_step(server, pid, log):
    """Its loss is shown, so what --eval_steps 1 asks for begins."""
    server.wait_for(pid, lambda: "loss " in log.read_text())


def test_signal_during_an_evaluation_saves_and_the_evaluation_is_made_up_for(server, command, tmp_path):
    command[3] = write_sums(tmp_path / "rows.jsonl", 296)
    command += [
        *EVALUATE,
        "--eval_dataset_size",
        "200",
        "--per_device_eval_batch_size",
        "1",
        "--max_steps",
        "2",
    ]
    run, log = tmp_path / "run", tmp_path / "log"
    assert server.run(log, *command, "--output_dir", tmp_path / "expected") == 0, log.read_text()
    log.unlink()
    pid = server.start(log, *command, "--output_dir", run)
    wait_for_first_step(server, pid, log)
    code, seconds = stop(server, pid)
    assert code == REQUEUE and seconds < 10
    assert read_last_progress(run)["evaluation_due"] is True
    assert server.run(log, *command, "--output_dir", run) == 0
    assert_equal_runs(run, tmp_path / "expected")


def test_signal_while_samples_are_generated_saves(server, command, tmp_path):
    command += [*EVALUATE, "--eval_dataset_size", "2", "--sample_generate", "--max_new_tokens", "200"]
    command += ["--min_new_tokens", "200", "--max_steps", "2"]
    run, log = tmp_path / "run", tmp_path / "log"
    pid = server.start(log, *command, "--output_dir", run)
    wait_for_first_step(server, pid, log)
    server.wait_for(pid, lambda: "eval loss" in log.read_text())
    assert stop(server, pid)[0] == REQUEUE
    state = json.loads((checkpoints.find_valid_checkpoint(run) / "trainer_state.json").read_text())
    assert read_last_progress(run)["evaluation_due"] is True
    assert "eval_loss" in state["log_history"][-1]  # so the loss was there, and the samples under way


def test_signal_while_predictions_are_generated_keeps_the_finished_training(server, command, tmp_path):
    command += [
        "--do_train",
        "--do_predict",
        "--eval_dataset_size",
        "40",
        "--per_device_eval_batch_size",
        "1",
    ]
    command += ["--max_new_tokens", "300", "--min_new_tokens", "300", "--max_steps", "2"]
    run, log = tmp_path / "run", tmp_path / "log"
    pid = server.start(log, *command, "--output_dir", run)
    server.wait_for(pid, (run / "checkpoint-2").is_dir)
    time.sleep(1)
    assert stop(server, pid, signal.SIGINT)[0] == REQUEUE
    assert checkpoints.find_valid_checkpoint(run) == run / "checkpoint-2"
    assert json.loads((run / "run.json").read_text())["status"] == "running"


def test_signal_with_no_saves_asked_for_still_saves(server, command, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*command, "--save_strategy", "no", "--num_train_epochs", "30", "--logging_steps", "1"]
    pid = server.start(log, *command, "--disable_tqdm", "False", "--output_dir", run)
    server.wait_for(pid, lambda: "loss" in log.read_text())
    assert stop(server, pid)[0] == REQUEUE
    assert checkpoints.find_valid_checkpoint(run) is not None


@pytest.mark.parametrize("seconds_between", slow_but([1], [0, 1]))
def test_signal_to_data_workers_too_ends_the_same_way(server, command, tmp_path, seconds_between):
    """Schedulers signal every process of a job, a worker perhaps first; workers leave it to their parent."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*command, "--dataloader_num_workers", "2", "--num_train_epochs", "30"]
    pid = server.start(log, *command, "--output_dir", run)
    server.wait_for(pid, (run / "checkpoint-2").is_dir)
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    for child in map(int, children):
        os.kill(child, signal.SIGTERM)
    time.sleep(seconds_between)
    code, seconds = stop(server, pid)
    assert code == REQUEUE and seconds < 10
    assert "Error" not in log.read_text()
    assert checkpoints.find_valid_checkpoint(run) is not None


def start_program(text):
    program = f"from utils.run import signals\nimport time\nsignals.catch_stop_signals()\n{text}"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_second_sigint_exits_at_once_even_where_the_first_must_wait():
    process = start_program("signals.hold_stop()\nprint('ready')\nwhile True: time.sleep(0.1)")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(2) == 130


def test_second_sigterm_changes_nothing():
    process = start_program("with signals.stop_held():\n  print('ready')\n  time.sleep(2)\n  print('saved')")
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.wait(5) == REQUEUE and process.stdout.read() == "saved\n"


def test_save_that_takes_too_long_is_left_before_the_scheduler_kills():
    process = start_program(
        "signals.DEADLINE_SECONDS = 1\nsignals.hold_stop()\nprint('ready')\nwhile True: time.sleep(0.1)"
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(3) == REQUEUE


def test_process_ends_as_at_sigterm_when_its_launcher_was_killed(tmp_path):
    run = (
        "import pathlib, sys, time; from utils.run.signals import catch_stop_signals; catch_stop_signals(); "
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    started, log = tmp_path / "started", tmp_path / "log"
    launch = (
        "import subprocess, sys; run, started, log = sys.argv[1:]; "
        "subprocess.run([sys.executable, '-c', run, started], stderr=open(log, 'w'))"
    )
    environment = os.environ | {"LOCAL_RANK": "0"}
    argv = [sys.executable, "-c", launch, run, str(started), str(log)]
    launcher = subprocess.Popen(argv, cwd=ROOT, env=environment)
    while not started.exists():
        time.sleep(0.05)
    (process,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running() and "SIGTERM: stopping" in log.read_text()
