"""Which step is kept, and when a run stops: the same wherever the run was interrupted."""

import json
import shutil
import signal

import pytest
from helpers import runs, slow_but
from helpers.rows import write_rows, write_sums

from utils.console import UserError
from utils.run.checkpoints import list_checkpoints, read_step

FLAGS = "--learning_rate 3e-3 --lr_scheduler_type constant --load_best_model_at_end".split()
STEPS = "--eval_strategy steps --eval_steps 2 --save_steps 3 --save_total_limit 40".split()
PATIENCE = ["--early_stopping_patience", 2]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Answers that begin like the trained ones and end as none does: their loss falls, then rises."""
    rows = [{"instruction": f"{i} + 1?", "output": "said abcabc" + "~" * (i + 2)} for i in range(4)]
    return write_rows(tmp_path_factory.mktemp("held") / "held_out.jsonl", rows)


@pytest.fixture(scope="module")
def best_command(small_model, held_out):
    rows = write_sums(held_out.with_name("rows.jsonl"))
    argv = ["--model_name_or_path", small_model, "--dataset_name", rows, "--eval_dataset_name", held_out]
    return [*argv, *runs.FLAGS, *FLAGS]


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    """Runs a command unless the module has run it, and tells (folder, what was printed)."""
    made = {}

    def train(name, *argv):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            assert server.run(folder / "log", *argv, "--output_dir", folder / "run") == 0
            made[name] = folder / "run", (folder / "log").read_text()
        return made[name]

    return train


def read_metrics(run):
    metrics = json.loads((run / "metrics.json").read_text())
    kept = ("kept_step", "kept_because", "stopped_early", "steps", "eval_loss")
    return {name: metrics.get(name) for name in kept}, metrics["log"]


def list_losses(log):
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}


def read_adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def leave_as_if_killed(run, copy, step):
    """A copy of `run` that holds what a kill after the save of `step` leaves."""
    shutil.copytree(run, copy)
    for folder in list_checkpoints(copy):
        if read_step(folder) > step:
            shutil.rmtree(folder)
    for name in ("adapter_model.safetensors", "metrics.json"):
        (copy / name).unlink()
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"status": "running"}))
    return copy


def assert_same_step_kept(run, expected):
    assert read_metrics(run)[0] == read_metrics(expected)[0]
    runs.assert_equal_runs(run, expected)


def test_best_step_is_kept_and_the_run_stops_when_none_follows(trained, best_command):
    """Of 24 steps; by the log alone, with a patience counted here."""
    run, printed = trained("steps", *best_command, *STEPS, *PATIENCE)
    kept, log = read_metrics(run)
    losses = list_losses(log)
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(2, best + 6, 2)) and best + 4 < 24  # two after the best
    assert (kept["kept_step"], kept["steps"], kept["eval_loss"]) == (best, best + 4, losses[best])
    assert (
        read_adapter(run)
        == read_adapter(run / f"checkpoint-{best}")
        != read_adapter(run / f"checkpoint-{best + 4}")
    )
    count = len(losses)
    said = (
        f"step {best} of {best + 4} is kept: its eval_loss {losses[best]:.4f} is the lowest of {count} eval"
    )
    assert said in printed and f"stopped at step {best + 4} of 24: the last 2 evaluations were no" in printed
    assert json.loads((run / "run.json").read_text())["metrics"]["kept_step"] == best
    falling = [step for step in losses if all(losses[step] < losses[other] for other in range(2, step, 2))]
    saved = {1} & set(falling) | set(falling) | set(range(3, best + 5, 3)) | {best + 4}
    assert [read_step(folder) for folder in list_checkpoints(run)] == sorted(saved)


@pytest.mark.parametrize("back", slow_but([0, -3], [2, 0, -3, -4]), ids="before at after end".split())
def test_run_killed_after_any_save_keeps_the_step_of_the_unbroken_one(
    server, trained, best_command, tmp_path, back
):
    argv = [*best_command, *STEPS, *PATIENCE]
    run, _ = trained("steps", *argv)
    step = read_metrics(run)[0]["kept_step"] - back
    assert (run / f"checkpoint-{step}").is_dir()
    copy = leave_as_if_killed(run, tmp_path / "copy", step)
    assert server.run(tmp_path / "log", *argv, "--output_dir", copy) == 0
    assert f"going on from {copy}/checkpoint-{step}\n" in (tmp_path / "log").read_text()
    assert_same_step_kept(copy, run)


@pytest.mark.parametrize("save", slow_but(["steps"], ["steps", "epoch"]))
def test_evaluation_at_the_end_of_an_epoch_is_not_lost_between_save_and_kill(
    server, trained, best_command, tmp_path, save
):
    """Saved by steps, the epoch's last step is saved before its evaluation; by epochs, after it."""
    argv = [*best_command, "--eval_strategy", "epoch", "--save_strategy", save, "--save_steps", 12]
    run, _ = trained(f"epochs {save}", *argv)
    assert [read_step(folder) for folder in list_checkpoints(run)] == [12, 24]
    for step in (12, 24):
        copy = leave_as_if_killed(run, tmp_path / str(step), step)
        progress = json.loads((copy / f"checkpoint-{step}" / "training_state.json").read_text())["progress"]
        assert progress["evaluation_due"] is (save == "steps" and step == 24)  # a new best is saved again
        assert server.run(tmp_path / "log", *argv, "--output_dir", copy) == 0
        assert_same_step_kept(copy, run)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_run_interrupted_at_random_moments_keeps_the_step_of_the_unbroken_one(
    server, best_command, tmp_path, number
):
    """Most of its time goes to evaluations, so most interruptions fall into them."""
    argv = [*best_command, *STEPS, *PATIENCE, "--per_device_eval_batch_size", 1, "--save_total_limit", 2]
    codes = runs.check_kills(server, argv, tmp_path, "adamw_torch", 3, number)
    assert codes[0] != 0
    assert read_metrics(tmp_path / "killed")[0] == read_metrics(tmp_path / "expected")[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_run_interrupted_twenty_times_keeps_the_step_of_the_unbroken_one(
    server, best_command, held_out, tmp_path, number
):
    many = write_rows(
        tmp_path / "many.jsonl", [json.loads(row) for row in held_out.read_text().split("\n")] * 40
    )
    argv = [*best_command, *STEPS, "--num_train_epochs", 10, "--per_device_eval_batch_size", 1]
    argv += ["--eval_dataset_name", many, "--early_stopping_patience", 30, "--save_total_limit", 2]
    runs.check_kills(server, argv, tmp_path, "adamw_torch", 20, number)
    assert read_metrics(tmp_path / "killed")[0] == read_metrics(tmp_path / "expected")[0]


def test_limit_of_one_leaves_the_best_and_the_last(trained, best_command):
    run, _ = trained("limit", *best_command, *STEPS, *PATIENCE, "--save_total_limit", 1)
    kept = read_metrics(run)[0]
    assert [read_step(f) for f in list_checkpoints(run)] == [kept["kept_step"], kept["steps"]]


def test_run_whose_best_checkpoint_is_damaged_goes_on_from_the_one_before(
    server, trained, best_command, tmp_path
):
    argv = [*best_command, *STEPS, *PATIENCE]
    run, _ = trained("steps", *argv)
    best = read_metrics(run)[0]["kept_step"]
    copy = leave_as_if_killed(run, tmp_path / "copy", 24)
    (copy / f"checkpoint-{best}" / "adapter_model.safetensors").write_bytes(b"")
    assert server.run(tmp_path / "log", *argv, "--output_dir", copy) == 0
    printed = (tmp_path / "log").read_text()
    assert (
        f"checkpoint-{best + 4} is skipped: the best step before it was {best}, and of checkpoint-" in printed
    )
    assert f"going on from {copy}/checkpoint-{best - 2}\n" in printed
    assert_same_step_kept(copy, run)


def test_run_that_stopped_early_goes_on_with_more_patience_as_if_it_had_had_it(
    server, trained, best_command, tmp_path
):
    argv = [*best_command, *STEPS]
    run, _ = trained("steps", *argv, *PATIENCE)
    copy = shutil.copytree(run, tmp_path / "copy")
    log = tmp_path / "log"
    assert server.run(log, *argv, *PATIENCE, "--num_train_epochs", 3, "--output_dir", copy) == 2
    assert "the run stopped at step 16 of 24: the last 2 evaluations were no better (--ear" in log.read_text()
    argv += ["--early_stopping_patience", 3]
    assert server.run(log, *argv, "--output_dir", copy) == 0
    expected, _ = trained("patience 3", *argv)
    assert_same_step_kept(copy, expected)
    assert read_metrics(copy)[0]["steps"] == read_metrics(run)[0]["steps"] + 2


def test_patience_is_counted_by_the_rule_of_transformers_callback_whatever_the_threshold(tmp_path):
    """Against a count made here: better is better by more than the threshold, the best moves all the same."""
    from transformers import TrainingArguments

    from utils.train.best import BestStep

    args = TrainingArguments(tmp_path, metric_for_best_model="loss", use_cpu=True)
    values = [5.0, 4.0, 3.95, 3.9, float("nan"), 2.0, 2.5]
    for threshold, expected in ((0.0, [0, 0, 0, 0, 1, 0, 1]), (0.2, [0, 0, 1, 2, 3, 0, 1])):
        for length, count in enumerate(expected, 1):
            log = [{"step": 0, "eval_loss": 0.1}, {"step": 1, "loss": 1.0}]
            log += [{"step": i, "eval_loss": value} for i, value in enumerate(values[:length], 1)]
            for patience in (1, 2, 3, 4):
                recorded = {"early_stopping_patience": patience, "early_stopping_threshold": threshold}
                assert BestStep(args, recorded).is_patience_over(log) is (count >= patience)


def test_run_that_keeps_its_last_step_says_which_was_better(trained, best_command):
    argv = [word for word in best_command if word != "--load_best_model_at_end"]
    run, printed = trained("last", *argv, *STEPS)
    kept, log = read_metrics(run)
    losses = list_losses(log)
    best = min(losses, key=losses.get)
    assert kept["kept_step"] is None and kept["steps"] == 24 and kept["eval_loss"] == losses[24]
    assert (
        f"step 24, the last, is kept; eval_loss was best at step {best} ({losses[best]:.4f}, then" in printed
    )


def test_metric_that_no_evaluation_gives_is_refused(capsys):
    from utils.arguments import TrainingArguments
    from utils.flags.checks import check_best

    def check(metric, **flags):
        training_args = TrainingArguments(eval_strategy="epoch", load_best_model_at_end=True, **flags)
        training_args.extra = {"metric_for_best_model": metric}
        check_best(training_args)

    for metric, flags in (("loss", {}), ("eval_loss", {}), ("rouge-l", {"predict_with_generate": True})):
        check(metric, **flags)
    for metric in ("rouge-l", "mmlu_accuracy", "accuracy"):
        with pytest.raises(UserError, match=f"--metric_for_best_model {metric}: use loss or, with --predict"):
            check(metric)


def test_held_out_rows_without_anything_to_evaluate_are_said_before_weights_load(
    server, best_command, tmp_path
):
    long = write_rows(tmp_path / "long.jsonl", [{"instruction": "Long?", "output": "word " * 100}] * 2)
    argv = [*best_command, *STEPS, "--eval_dataset_name", long, "--truncation", "drop"]
    assert server.run(tmp_path / "log", *argv, "--output_dir", tmp_path / "run") == 2
    printed = (tmp_path / "log").read_text()
    assert "--eval_strategy steps: not one of 2 held-out rows has anything to evaluate" in printed
    assert "Traceback" not in printed and "parameters" not in printed


def test_best_step_by_rouge_is_the_one_with_the_highest(server, best_command, tmp_path):
    argv = [*best_command, *STEPS, "--predict_with_generate", "--metric_for_best_model", "rouge-l"]
    argv += ["--max_new_tokens", 8, "--max_steps", 6]
    assert server.run(tmp_path / "log", *argv, "--output_dir", tmp_path / "run") == 0
    kept, log = read_metrics(tmp_path / "run")
    scores = {entry["step"]: entry["eval_rouge-l"] for entry in log if "eval_rouge-l" in entry}
    assert list(scores) == [2, 4, 6] and kept["kept_step"] == max(scores, key=scores.get)
    assert "is the highest of 3 evaluations" in kept["kept_because"]
