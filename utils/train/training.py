"""A run from its first step to what it leaves behind: train, evaluate, predict, record.

    run.begin         under the folder's lock: run.json is written, the checkpoint to go on from is chosen
    trainer.train     the steps (trainer.py); probes are asked at each evaluation, checkpoints saved
    evaluate          --do_eval, --do_predict, with the finished adapter
    save_results      the adapter, metrics.json, the curve and, last of all, `finished` in run.json

A signal on the way saves the last whole step and ends with exit code 75: the same command goes on.
"""

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from utils.arguments import GenerationArguments, TrainingArguments
from utils.chat.generation import BatchAnswerer
from utils.console import UserError, is_main_process, notice
from utils.data.rows import Rows
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.answer_spans import find_input_marker
from utils.prompts.messages import EVAL, TEST
from utils.run.checkpoints import disk_errors_explained
from utils.run.lock import run_locked
from utils.run.record import next_free_path, write_json
from utils.run.run import Run
from utils.run.signals import StopRequested, find_stop_signal, hold_stop, stop_held
from utils.train.best import find_evaluation
from utils.train.callbacks import AnswerScores, MmluEvaluation, SampleAnswers, save_training_curve
from utils.train.model_card import share_finished_run
from utils.train.predictions import find_answered, predict_rows
from utils.train.probes import Probes
from utils.train.step_memory import OutOfRoom
from utils.train.summary import describe_end
from utils.train.trainer import QLoraTrainer


def train(trainer: QLoraTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from `checkpoint` on where given; returns the run's figures."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.engine.forget_step(trainer.model)  # its graphs hold what replies and saves may want
    seconds, tokens = trainer.meter.seconds, trainer.meter.all_tokens
    state = trainer.state
    figures = {
        "train_loss": result.training_loss,
        "steps": state.global_step,
        "epochs": state.epoch,
        "train_seconds": round(seconds, 1),
        "train_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_gib": measure_peak_memory(),
        "skipped_steps": trainer.guard.skipped,
    }
    best = trainer.best.describe(trainer.kept_step, state.global_step, state.max_steps, state.log_history)
    return figures | best | compare_with_plan(trainer.record["memory"]["needs"])


def compare_with_plan(needs: dict[str, int] | None) -> dict[str, float]:
    """GiB of GPU memory that were planned and taken: reserved, and a paged optimizer's; no CUDA context."""
    if needs is None or not torch.cuda.is_available() or not torch.cuda.max_memory_reserved():
        return {}
    taken = torch.cuda.max_memory_reserved() + needs["paged_optimizer"]
    planned = {"planned_memory_gib": round(needs["total"] / 2**30, 2)}
    return planned | {"taken_memory_gib": round(taken / 2**30, 2), "plan_error": needs["total"] / taken - 1}


def measure_peak_memory(status: Path = Path("/proc/self/status")) -> float:
    """Peak of this process, GiB: of GPU memory where one is used, else of resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    own = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.is_file() else None
    if own:  # not every kernel tells it; ru_maxrss counts what the process that started this one held too
        return round(int(own.group(1)) / 2**20, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**30 if sys.platform == "darwin" else peak / 2**20, 2)


def save_results(trainer: QLoraTrainer, run: Run, metrics: dict[str, Any]) -> None:
    """Write the adapter, metrics.json, training_curve.png and, last, the finished run.json."""
    run.record["metrics"] = metrics
    with stop_held(), disk_errors_explained(run.folder, trainer.keeper.last_checkpoint):
        trainer.save_final()
        if is_main_process():
            write_json(metrics | {"log": trainer.state.log_history}, run.folder / "metrics.json")
            save_training_curve(trainer.state.log_history, run.folder / "training_curve.png")
            run.save(status="finished")


def run_trainer(
    trainer: QLoraTrainer,
    run: Run,
    rows: Rows,
    probes: Probes,
    tokenizer: ChatTokenizer,
    training_args: TrainingArguments,
    generation_args: GenerationArguments,
) -> None:
    """Train, evaluate, predict, as asked; leave the results in the run's folder."""
    metrics: dict[str, Any] = {}
    answerer = BatchAnswerer(
        trainer.model,
        tokenizer,
        generation_args,
        training_args.seed,
        training_args.per_device_eval_batch_size,
    )
    add_probes(trainer, rows, probes, answerer, training_args)
    if training_args.do_train:
        with run_locked(run.folder), saved_when_stopped(trainer):
            checkpoint = run.begin(
                training_args.extra.get("resume_from_checkpoint"),
                trainer.keeper.fingerprints,
                trainer.accelerator.wait_for_everyone,
            )
            metrics |= train(trainer, str(checkpoint) if checkpoint else None)
            metrics |= evaluate(trainer, rows, answerer, training_args)
            save_results(trainer, run, metrics)
        notice(describe_end(metrics, trainer.state.log_history, run.folder))
        share_finished_run(run.folder, training_args)
        return
    metrics |= evaluate(trainer, rows, answerer, training_args)
    if is_main_process():
        path = next_free_path(run.folder / "eval_metrics.json")
        write_json({"command": run.record["command"], "data": run.record["data"]} | metrics, path)
        notice(f"{json.dumps(metrics)}\nsaved in {path}")


def add_probes(
    trainer: QLoraTrainer,
    rows: Rows,
    probes: Probes,
    answerer: BatchAnswerer,
    training_args: TrainingArguments,
) -> None:
    """Let the Trainer ask, at each evaluation, what the flags want asked."""
    raw = answerer.tokenizer.raw
    if probes.chats:
        trainer.add_callback(SampleAnswers(answerer, probes.chats, trainer.keeper.output_dir))
    if probes.questions:
        trainer.add_callback(MmluEvaluation(raw, probes.questions, training_args))
    if training_args.predict_with_generate and (rows.count(EVAL) or rows.count(TEST)):
        chats = find_answered(rows.read_held_out(EVAL, find_input_marker(raw)))
        trainer.add_callback(AnswerScores(answerer, chats))


@contextmanager
def saved_when_stopped(trainer: QLoraTrainer) -> Iterator[None]:
    """A signal inside leaves a checkpoint of the last whole step, and exit code 75; so does memory's end."""
    try:
        yield
    except (StopRequested, Exception) as error:
        hold_stop()
        if isinstance(error, OutOfRoom) and trainer.rng_after_step is not None:
            trainer._save_checkpoint(trainer.model)
            notice(f"the last whole step is in {trainer.keeper.last_checkpoint}")
        if find_stop_signal() is None or isinstance(error, UserError):
            raise
        if not isinstance(error, StopRequested):  # a broken graph capture, for one
            notice(f"{type(error).__name__} while stopping: {error}")
        save_stopped(trainer)
        raise StopRequested from error


def save_stopped(trainer: QLoraTrainer) -> None:
    """After a signal: save what the last whole step left, if no checkpoint holds it; say what is next."""
    if trainer.rng_after_step is not None:  # a step was done since this process started
        trainer._save_checkpoint(trainer.model)
    last, step = trainer.keeper.last_checkpoint, trainer.state.global_step
    where = f"step {step} is in {last}" if last else "before the first step"
    again = " without --overwrite_output_dir" if trainer.record["arguments"]["overwrite_output_dir"] else ""
    notice(f"stopped by {find_stop_signal()}, {where}: the same command{again} goes on from there")


def evaluate(
    trainer: QLoraTrainer, rows: Rows, answerer: BatchAnswerer, training_args: TrainingArguments
) -> dict[str, float]:
    """--do_eval and --do_predict. An evaluation of these very weights, just made, is not made again."""
    step, metrics = trainer.last_evaluation or (None, {})
    if not training_args.do_eval:
        metrics = {}
    elif trainer.kept_step is not None:
        metrics = find_evaluation(trainer.state.log_history, trainer.kept_step)
    elif step != trainer.state.global_step:
        metrics = trainer.evaluate()
    metrics = dict(metrics)
    if training_args.do_predict:
        chats = rows.read_held_out(TEST, find_input_marker(answerer.tokenizer.raw))
        metrics |= predict_rows(answerer, chats, trainer.keeper.output_dir)
    return metrics
