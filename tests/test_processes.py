"""Two processes learn what one learns from the same rows, and go on after a kill to the same bits."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROOT
from helpers.models import relative_difference
from helpers.runs import assert_equal_runs, load_weights, read_log
from helpers.shell import find_free_port

FLAGS = """--dataset_name data/guanaco_identity.jsonl --model_max_length 400 --max_steps 6 --learning_rate 1e-2
    --gradient_accumulation_steps 2 --lora_dropout 0.1 --neftune_noise_alpha 5 --logging_steps 1 --save_steps 1
    --max_train_samples 24 --group_by_length""".split()  # two epochs


def start(processes, model, output_dir, *flags):
    port = find_free_port()
    launcher = f"-m torch.distributed.run --nproc_per_node {processes} --master_port {port}".split()
    command = [sys.executable, *launcher, "qlora_finetune.py", "--model_name_or_path", model, *FLAGS]
    return subprocess.Popen(
        [*map(str, command), *map(str, flags), "--output_dir", str(output_dir)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*command):
    process = start(*command)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.mark.parametrize("fast_lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_equal_one_with_twice_the_rows(call_main, tiny_model, tmp_path, float32_cpu, fast_lora):
    two, one = tmp_path / "two", tmp_path / "one"
    printed = run(2, tiny_model, two, "--per_device_train_batch_size", 2, "--fast_lora", fast_lora)
    assert printed.count("finished: ") == 1  # one process speaks
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--per_device_train_batch_size", 4]
    call_main("qlora_finetune", *argv, "--fast_lora", fast_lora, "--output_dir", one)
    assert relative_difference(load_weights(two), load_weights(one)) < 1e-5
    for name in ("loss", "grad_norm"):
        first, second = (read_log(path, name) for path in (two, one))
        assert len(first) == 6 and first == pytest.approx(second, rel=1e-5)


@pytest.mark.slow
def test_two_processes_killed_and_started_again_end_with_the_same_bits(tiny_model, tmp_path):
    flags = ["--per_device_train_batch_size", 2]
    run(2, tiny_model, tmp_path / "expected", *flags)
    process = start(2, tiny_model, tmp_path / "killed", *flags)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-4").is_dir():
        time.sleep(0.005)
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):  # workers have sessions of their own
        each.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "checkpoint-" in run(2, tiny_model, tmp_path / "killed", *flags)
    assert_equal_runs(tmp_path / "killed", tmp_path / "expected")
