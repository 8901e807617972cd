"""A run from its first step to what it leaves behind: train, evaluate, predict, record."""

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from utils.arguments import GenerationArguments, ModelArguments, TrainingArguments
from utils.console import UserError, is_main_process, notice
from utils.data.rows import Rows
from utils.messages import EVAL, TEST, Messages
from utils.prompts import find_input_marker
from utils.run.checkpoints import disk_errors_explained, sweep_leftovers
from utils.run.lock import LOCK_FILE, run_locked
from utils.run.places import describe_places
from utils.run.record import (
    build_run_record,
    clear_run,
    hash_text,
    next_free_path,
    save_run_record,
    write_json,
)
from utils.run.resume import check_same_run, choose_checkpoint, fingerprint_folder
from utils.run.signals import StopRequested, find_stop_signal, hold_stop, stop_held
from utils.train.callbacks import AnswerScores, MmluEvaluation, SampleAnswers, save_training_curve
from utils.train.model_card import share_finished_run
from utils.train.predictions import find_answered, predict_rows
from utils.train.summary import describe_end
from utils.train.trainer import QLoraTrainer


def train(trainer: QLoraTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from `checkpoint` on where given; returns the run's figures."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds, tokens = trainer.meter.seconds, trainer.meter.all_tokens
    return {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_seconds": round(seconds, 1),
        "train_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_gib": measure_peak_memory(),
        "skipped_steps": trainer.guard.skipped,
    }


def measure_peak_memory() -> float:
    """Peak of this process, GiB: of GPU memory where one is used, else of resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    status = Path("/proc/self/status")  # ru_maxrss would count what the process that started this one held
    if status.is_file():
        return round(int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) / 2**20, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**30 if sys.platform == "darwin" else peak / 2**20, 2)


def save_run(trainer: QLoraTrainer, metrics: dict[str, Any], output_dir: Path) -> None:
    """Write the adapter, metrics.json, training_curve.png and, last, the finished run.json."""
    trainer.record["metrics"] = metrics
    with stop_held(), disk_errors_explained(output_dir, trainer.keeper.last_checkpoint):
        trainer.save_final()
        if is_main_process():
            write_json(metrics | {"log": trainer.state.log_history}, output_dir / "metrics.json")
            save_training_curve(trainer.state.log_history, output_dir / "training_curve.png")
            save_run_record(trainer.record | {"status": "finished"}, output_dir)


def build_record(
    model: torch.nn.Module,
    tokenizer: Any,
    stop_ids: list[int],
    rows: Rows,
    model_args: ModelArguments,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """run.json of this run, as far as it is known before training."""
    config = model.config
    base = {
        "name": model_args.model_name_or_path,
        "revision": getattr(config, "_commit_hash", None),
        "type": config.model_type,
        "fingerprint": fingerprint_folder(Path(model_args.model_name_or_path)),
    }
    prompt = {
        "template_sha256": hash_text(tokenizer.chat_template),
        "stop_ids": stop_ids,
        "stop_tokens": tokenizer.convert_ids_to_tokens(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    record = build_run_record(arguments, base, prompt, rows.describe())
    places = describe_places(model_args.model_name_or_path, Path(arguments["output_dir"]))
    return record | ({"base_places": places} if places else {})


def build_callbacks(
    tokenizer: Any,
    stop_ids: list[int],
    sample_chats: list[Messages],
    mmlu_questions: list[dict[str, str]],
    training_args: TrainingArguments,
    generation_args: GenerationArguments,
) -> list[transformers.TrainerCallback]:
    """What the flags ask for beside the steps."""
    callbacks: list[transformers.TrainerCallback] = []
    if sample_chats:
        callbacks.append(
            SampleAnswers(
                tokenizer,
                stop_ids,
                sample_chats,
                Path(training_args.output_dir),
                generation_args,
                training_args.seed,
            )
        )
    if mmlu_questions:
        callbacks.append(MmluEvaluation(tokenizer, mmlu_questions, training_args))
    return callbacks


def run_trainer(
    trainer: QLoraTrainer,
    rows: Rows,
    stop_ids: list[int],
    training_args: TrainingArguments,
    generation_args: GenerationArguments,
) -> None:
    """Train, evaluate, predict, as asked; leave the results in the run's folder."""
    output_dir, metrics = Path(training_args.output_dir), {}
    if training_args.predict_with_generate and (rows.count(EVAL) or rows.count(TEST)):
        tokenizer = trainer.processing_class
        chats = find_answered(rows.read_held_out(EVAL, find_input_marker(tokenizer)))
        trainer.add_callback(AnswerScores(tokenizer, stop_ids, chats, generation_args))
    if training_args.do_train:
        with run_locked(output_dir), saved_when_stopped(trainer):
            checkpoint = start_run(trainer, output_dir, training_args)
            metrics |= train(trainer, checkpoint)
            metrics |= evaluate(trainer, rows, stop_ids, training_args, generation_args)
            save_run(trainer, metrics, output_dir)
        notice(describe_end(metrics, trainer.state.log_history, output_dir))
        share_finished_run(training_args)
        return
    metrics |= evaluate(trainer, rows, stop_ids, training_args, generation_args)
    if is_main_process():
        path = next_free_path(output_dir / "eval_metrics.json")
        write_json({"command": trainer.record["command"], "data": trainer.record["data"]} | metrics, path)
        notice(f"{json.dumps(metrics)}\nsaved in {path}")


@contextmanager
def saved_when_stopped(trainer: QLoraTrainer) -> Iterator[None]:
    """A signal inside leaves a checkpoint of the last whole step, and exit code 75."""
    try:
        yield
    except (StopRequested, Exception) as error:
        hold_stop()
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
    trainer: QLoraTrainer,
    rows: Rows,
    stop_ids: list[int],
    training_args: TrainingArguments,
    generation_args: GenerationArguments,
) -> dict[str, float]:
    """--do_eval and --do_predict. An evaluation of these very weights, just made, is not made again."""
    step, metrics = trainer.last_evaluation or (None, {})
    if not training_args.do_eval:
        metrics = {}
    elif step != trainer.state.global_step or trainer.args.load_best_model_at_end:
        metrics = trainer.evaluate()
    metrics = dict(metrics)
    if training_args.do_predict:
        metrics |= predict(trainer, rows, stop_ids, training_args, generation_args)
    return metrics


def start_run(trainer: QLoraTrainer, output_dir: Path, training_args: TrainingArguments) -> str | None:
    """Write run.json of a run that starts now; returns the checkpoint to go on from, if any."""
    if is_main_process():
        if training_args.overwrite_output_dir and any(
            path.name != LOCK_FILE for path in output_dir.iterdir()
        ):
            notice(f"--overwrite_output_dir: removing the earlier run's files from {output_dir}")
            clear_run(output_dir)
        sweep_leftovers(output_dir)
    trainer.accelerator.wait_for_everyone()
    check_same_run(output_dir, trainer.record, training_args.force_resume)
    asked = training_args.extra.get("resume_from_checkpoint")
    checkpoint = choose_checkpoint(output_dir, asked, trainer.keeper.fingerprints, training_args.force_resume)
    if checkpoint:
        notice(f"going on from {checkpoint}")
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        with disk_errors_explained(output_dir, checkpoint):
            save_run_record(trainer.record, output_dir)
    return str(checkpoint) if checkpoint else None


def predict(
    trainer: QLoraTrainer,
    rows: Rows,
    stop_ids: list[int],
    training_args: TrainingArguments,
    generation_args: GenerationArguments,
) -> dict[str, float]:
    return predict_rows(
        trainer.model,
        trainer.processing_class,
        rows.read_held_out(TEST, find_input_marker(trainer.processing_class)),
        stop_ids,
        generation_args,
        training_args.seed,
        training_args.per_device_eval_batch_size,
        Path(training_args.output_dir),
    )
