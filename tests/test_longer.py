"""A run that is made longer goes on from its end: as one that was that long from the start, where it can."""

import json
import math
import shutil

import pytest
from helpers import runs
from helpers.rows import write_sums

from utils.console import UserError
from utils.run.checkpoints import list_checkpoints, read_step
from utils.run.resume import find_extension

EPOCH = 12  # steps
CONSTANT = ["--lr_scheduler_type", "constant", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def base_command(small_model, tmp_path_factory):
    rows = write_sums(tmp_path_factory.mktemp("longer") / "rows.jsonl")
    return ["--model_name_or_path", small_model, "--dataset_name", rows, *runs.FLAGS]


@pytest.fixture(scope="module")
def train(server, base_command, tmp_path_factory):
    """Train by these flags, in a folder of their own or the one given; (folder, what was printed, exit code)."""

    def run(*flags, folder=None):
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        log = folder.with_name(f"log-{len(list(folder.parent.iterdir()))}")
        code = server.run(log, *base_command, *flags, "--output_dir", folder)
        return folder, log.read_text(), code

    return run


@pytest.mark.parametrize(
    "short, long",
    [
        pytest.param(["--num_train_epochs", 1], ["--num_train_epochs", 2], marks=pytest.mark.slow),
        (["--max_steps", 7], ["--max_steps", 17]),  # from the middle of an epoch to that of the next
        pytest.param(["--num_train_epochs", 1], ["--max_steps", 15], marks=pytest.mark.slow),
        pytest.param(["--max_steps", 15], ["--num_train_epochs", 2], marks=pytest.mark.slow),
        (["--num_train_epochs", 1, "--warmup_steps", 5], ["--num_train_epochs", 2, "--warmup_steps", 5]),
    ],
    ids=["epochs", "steps", "epochs, then steps", "steps, then epochs", "with warm-up"],
)
def test_longer_run_with_a_constant_rate_equals_one_that_was_long_from_the_start(train, short, long):
    schedule = [*CONSTANT]
    if "--warmup_steps" in short:
        schedule[1] = "constant_with_warmup"
    run, _, code = train(*short, *schedule)
    assert code == 0
    _, printed, code = train(*long, *schedule, folder=run)
    expected, _, _ = train(*long, *schedule)
    assert code == 0, printed
    steps = json.loads((expected / "metrics.json").read_text())["steps"]
    assert f"{run} goes on and becomes longer (--" in printed
    assert f"learning rate is 3.00e-03; the run goes on to step {steps} as one that had this" in printed
    runs.assert_equal_runs(run, expected)
    (extended,) = json.loads((run / "run.json").read_text())["extended"]
    assert extended["after_step"] == (EPOCH if "epochs" in short[0] else short[1])
    assert long[0] in extended["changes"][0] or short[0] in extended["changes"][0]


def test_longer_run_by_cosine_follows_the_longer_cosine_and_says_that_it_differs(train):
    run, _, _ = train("--num_train_epochs", 1, "--logging_steps", 1)
    _, printed, code = train("--num_train_epochs", 2, "--logging_steps", 1, folder=run)
    assert code == 0
    peak, total = 1e-2, 2 * EPOCH
    rates = runs.read_log(run, "learning_rate")
    expected = [peak * (1 + math.cos(math.pi * step / EPOCH)) / 2 for step in range(EPOCH)]
    expected += [peak * (1 + math.cos(math.pi * step / total)) / 2 for step in range(EPOCH, total)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert "cosine: after step 12 the learning rate is 5.00e-03, where it was 0.00e+00; the run" in printed
    assert "goes on to step 24 and is not equal to one that had this length from the start" in printed


def test_warm_up_by_share_makes_a_longer_run_another_one(train):
    schedule = ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", 0.25]
    run, _, _ = train("--num_train_epochs", 1, *schedule)
    _, printed, _ = train("--num_train_epochs", 2, *schedule, folder=run)
    assert "the learning rate is 1.00e-02; the run goes on to step 24 and is not equal to one" in printed


def test_longer_run_killed_on_its_way_goes_on_and_stays_longer(train):
    run, _, _ = train("--num_train_epochs", 1, *CONSTANT)
    train("--num_train_epochs", 2, *CONSTANT, folder=run)
    expected = shutil.copytree(run, run.with_name("expected"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    for step in (22, 24):
        shutil.rmtree(run / f"checkpoint-{step}")
    _, printed, code = train("--num_train_epochs", 2, *CONSTANT, folder=run)
    assert code == 0 and "becomes longer" not in printed and "checkpoint-20" in printed
    runs.assert_equal_runs(run, expected)
    assert json.loads((run / "run.json").read_text())["extended"] == record["extended"]


def test_run_without_the_checkpoint_of_its_end_goes_on_from_an_earlier_one_to_the_same_bits(train):
    run, _, _ = train("--num_train_epochs", 1, *CONSTANT, "--save_strategy", "no")
    _, printed, code = train("--num_train_epochs", 2, *CONSTANT, folder=run)
    expected, _, _ = train("--num_train_epochs", 2, *CONSTANT)
    assert code == 0 and "going on from" not in printed
    runs.assert_equal_runs(run, expected)


def test_steps_between_saves_and_log_lines_are_those_of_the_start_that_runs(train):
    run, _, _ = train("--num_train_epochs", 1, *CONSTANT)
    flags = ["--save_steps", 5, "--logging_steps", 4, "--save_total_limit", 10]
    _, printed, _ = train("--num_train_epochs", 2, *CONSTANT, *flags, folder=run)
    assert [read_step(folder) for folder in list_checkpoints(run)] == [8, 10, 12, 15, 20, 24]
    log = json.loads((run / "metrics.json").read_text())["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [3, 6, 9, 12, 16, 20, 24]
    assert "do not match" not in printed


def record(epochs=2.0, max_steps=-1, patience=None, **metrics):
    lengths = {"num_train_epochs": epochs, "max_steps": max_steps, "early_stopping_patience": patience}
    return {"arguments": lengths, "metrics": metrics}


DONE = {"steps": 24, "epochs": 2.0}
EXTENSIONS = [
    (record(**DONE), record(3.0), ["--num_train_epochs 2.0 -> 3.0"]),
    (record(**DONE), record(2.0), []),
    (record(**DONE), record(1.0), []),
    (record(**DONE), record(max_steps=25), ["--max_steps -1 -> 25"]),
    (record(**DONE), record(max_steps=24), []),
    (record(), record(max_steps=25), []),  # how long an unfinished run by epochs is no one knows yet
    (record(max_steps=24, **DONE), record(max_steps=30), ["--max_steps 24 -> 30"]),
    (record(max_steps=24, **DONE), record(max_steps=20), []),
    (record(patience=2), record(patience=3), ["--early_stopping_patience 2 -> 3"]),
    (record(patience=2), record(), ["--early_stopping_patience 2 -> None"]),
    (record(patience=2), record(patience=1), []),
    (record(), record(patience=3), []),
    (record(patience=2), record(3.0, patience=1), []),
]


@pytest.mark.parametrize("was, now, expected", EXTENSIONS)
def test_only_what_makes_a_run_longer_is_taken_for_an_extension(was, now, expected):
    assert find_extension(was, now["arguments"]) == expected


def test_run_that_has_stopped_early_needs_more_patience_to_go_on():
    stopped = record(patience=2, steps=16, epochs=1.3, stopped_early="at step 16 of 24: no better")
    with pytest.raises(UserError, match="the run stopped at step 16 of 24: no better: to go on, raise that"):
        find_extension(stopped, record(4.0, patience=2)["arguments"])
    assert len(find_extension(stopped, record(4.0, patience=3)["arguments"])) == 2
