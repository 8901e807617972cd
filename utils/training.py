"""A run from its first step to what it leaves behind: train, evaluate, predict, record."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from utils.arguments import GenerationArguments, ModelArguments, TrainingArguments
from utils.callbacks import AnswerScores, MmluEvaluation, SampleAnswers, save_training_curve
from utils.console import is_main_process, notice
from utils.data import Rows
from utils.predictions import predict_rows, read_asked_chats
from utils.prompts import Messages
from utils.run_record import (
    build_run_record,
    clear_run,
    find_last_checkpoint,
    hash_text,
    next_free_path,
    save_run_record,
    write_json,
)
from utils.trainer import QLoraTrainer


def train(trainer: QLoraTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from `checkpoint` on where given; returns the run's figures."""
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    tokens = trainer.tokens_seen + trainer.accelerator.reduce(trainer.tokens_since_log).item()
    return {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_seconds": round(seconds, 1),
        "train_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_gib": measure_peak_memory(),
    }


def measure_peak_memory() -> float:
    """Peak of this process, GiB: of GPU memory where one is used, else of resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**30 if sys.platform == "darwin" else peak / 2**20, 2)


def save_run(trainer: QLoraTrainer, metrics: dict[str, Any], output_dir: Path) -> None:
    """Write the adapter, metrics.json, training_curve.png and, last, the finished run.json."""
    trainer.record["metrics"] = metrics
    trainer.save_model(str(output_dir))
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
    }
    prompt = {
        "template_sha256": hash_text(tokenizer.chat_template),
        "stop_ids": stop_ids,
        "stop_tokens": tokenizer.convert_ids_to_tokens(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return build_run_record(arguments, base, prompt, rows.describe())


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
    if training_args.predict_with_generate and rows.held_out:
        tokenizer = trainer.processing_class
        chats = read_asked_chats(rows.held_out, rows.held_out_format, tokenizer)
        trainer.add_callback(AnswerScores(tokenizer, stop_ids, chats, generation_args))
    if training_args.do_train:
        metrics |= train(trainer, start_run(trainer.record, output_dir, training_args))
    if training_args.do_eval:
        metrics |= trainer.evaluate()
    if training_args.do_predict:
        metrics |= predict(trainer, rows, stop_ids, training_args, generation_args)
    if training_args.do_train:
        save_run(trainer, metrics, output_dir)
        notice(f"finished: {output_dir}\nto chat: python cli_demo.py --checkpoint_dir {output_dir}")
    elif is_main_process():
        path = next_free_path(output_dir / "eval_metrics.json")
        write_json({"command": trainer.record["command"], "data": trainer.record["data"]} | metrics, path)
        notice(f"{json.dumps(metrics)}\nsaved in {path}")


def start_run(record: dict[str, Any], output_dir: Path, training_args: TrainingArguments) -> str | None:
    """Write run.json of a run that starts now; returns the checkpoint to go on from, if any."""
    if training_args.overwrite_output_dir and output_dir.is_dir() and is_main_process():
        notice(f"--overwrite_output_dir: removing the earlier run's files from {output_dir}")
        clear_run(output_dir)
    asked = training_args.extra.get("resume_from_checkpoint")
    checkpoint = asked if asked and asked.lower() != "true" else find_last_checkpoint(output_dir)
    if checkpoint:
        notice(f"going on from {checkpoint}")
    if is_main_process():
        save_run_record(record, output_dir)
    return checkpoint


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
        rows.held_out,
        rows.held_out_format,
        stop_ids,
        generation_args,
        training_args.seed,
        training_args.per_device_eval_batch_size,
        Path(training_args.output_dir),
    )
