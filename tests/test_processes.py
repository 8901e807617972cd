"""Several processes learn what one learns from the same rows, and go on after any failure to the same bits."""

import signal
import time

import psutil
import pytest
from helpers.models import relative_difference
from helpers.processes import find_ranks, kill_all, run, start, train_forked, wait_for
from helpers.runs import assert_equal_runs, load_weights, read_log

from utils.run.checkpoints import find_valid_checkpoint
from utils.run.resume import find_changes

# Three epochs of 26 rows in steps of 8: two rows are left for the last step of each.
FLAGS = """--dataset_name data/guanaco_identity.jsonl --model_max_length 400 --learning_rate 1e-2
    --lora_dropout 0.1 --neftune_noise_alpha 5 --logging_steps 1 --save_steps 1 --save_total_limit 3
    --num_train_epochs 3 --max_train_samples 26 --group_by_length""".split()
TWO = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]


def assert_equals_one(call_main, model, tmp_path, processes, *flags):
    several, one = tmp_path / "several", tmp_path / "one"
    argv = ["--model_name_or_path", model, *FLAGS, *flags, "--per_device_train_batch_size", 2]
    argv += ["--save_strategy", "no", "--gradient_accumulation_steps"]
    printed = train_forked(processes, *argv, 4 // processes, "--output_dir", several)
    assert "12 steps of 8 rows" in printed
    call_main("qlora_finetune", *argv, 4, "--output_dir", one)
    assert relative_difference(load_weights(several), load_weights(one)) < 1e-5
    for name in ("loss", "grad_norm"):
        first, second = (read_log(path, name) for path in (several, one))
        assert len(first) == 12 and first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--bits", 32, "--adam_epsilon", 1e-4],
        pytest.param(["--fast_lora", False], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_equal_one_with_as_many_rows_a_step(
    call_main, tiny_model, tmp_path, float32_cpu, flags
):
    assert_equals_one(call_main, tiny_model, tmp_path, 2, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--packing", "False"], ["--fast_lora", "False"]])
def test_four_processes_equal_one_with_as_many_rows_a_step(
    call_main, tiny_model, tmp_path, float32_cpu, flags
):
    assert_equals_one(call_main, tiny_model, tmp_path, 4, *flags)


@pytest.mark.slow
def test_two_processes_killed_and_started_again_end_with_the_same_bits(tiny_model, tmp_path):
    printed = run(2, tiny_model, tmp_path / "expected", *FLAGS, *TWO)
    assert printed.count("finished: ") == 1  # one process speaks
    process = start(2, tiny_model, tmp_path / "killed", *FLAGS, *TWO)
    wait_for(process, tmp_path / "killed" / "checkpoint-4")
    kill_all(process)
    assert process.returncode == -signal.SIGKILL
    assert "checkpoint-" in run(2, tiny_model, tmp_path / "killed", *FLAGS, *TWO)
    assert_equal_runs(tmp_path / "killed", tmp_path / "expected")


def break_rank(process, ranks, number):
    ranks[1].send_signal(number)


def kill_launcher(process, ranks, number):
    process.send_signal(number)


TIMEOUT = 10  # seconds that a process waits for another; torchrun gives a stopped one 30 more
FAILURES = {
    "a process dies": (break_rank, signal.SIGKILL, 60),
    "the launcher dies": (kill_launcher, signal.SIGKILL, 60),
    "a process hangs": (break_rank, signal.SIGSTOP, TIMEOUT + 60),
}


@pytest.mark.slow
@pytest.mark.parametrize("shared", [[], ["--shard_layers"]], ids=["copies", "shared layers"])
@pytest.mark.parametrize("failure", FAILURES)
def test_job_ends_by_itself_and_goes_on_to_the_same_bits(small_model, tmp_path, failure, shared):
    flags = [*FLAGS, *TWO, "--num_train_epochs", 10, "--ddp_timeout", TIMEOUT, *shared]
    run(2, small_model, tmp_path / "expected", *flags)
    process = start(2, small_model, tmp_path / "broken", *flags)
    wait_for(process, tmp_path / "broken" / "checkpoint-6")
    ranks, (breaks, number, seconds) = find_ranks(process), FAILURES[failure]
    since = time.monotonic()
    breaks(process, ranks, number)
    process.communicate(timeout=seconds)
    _, alive = psutil.wait_procs(ranks.values(), timeout=seconds)
    assert not alive and time.monotonic() - since < seconds
    assert process.returncode != 0 and find_valid_checkpoint(tmp_path / "broken") is not None
    assert "going on from" in run(2, small_model, tmp_path / "broken", *flags)
    assert_equal_runs(tmp_path / "broken", tmp_path / "expected")


def describe(processes, batch, accumulation):
    arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return {"arguments": arguments, "processes": processes}


def test_run_goes_on_with_other_processes_where_a_step_keeps_its_rows():
    was = describe(2, 4, 8)
    for now in (describe(1, 4, 16), describe(4, 4, 4), describe(8, 1, 8), describe(2, 8, 4)):
        assert find_changes(was, now) == []
    (change,) = find_changes(was, describe(4, 4, 8))
    assert change.startswith("rows of a step 64 -> 128, as processes are 2 -> 4; ")
    assert change.endswith("--per_device_train_batch_size 4 --gradient_accumulation_steps 4 keeps them")
    (change,) = find_changes(was, describe(32, 4, 8))
    assert change.endswith("--per_device_train_batch_size 1 --gradient_accumulation_steps 2 keeps them")
    (change,) = find_changes(was, describe(3, 4, 8))
    assert change.endswith("and 3 cannot share 64")
