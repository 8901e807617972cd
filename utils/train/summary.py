"""The lines that open and close a training: how much is trained for how long, and what came of it."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from utils.arguments import TrainingArguments
from utils.console import notice, read_rank_and_size
from utils.fast.sharded_vocabulary import count_elsewhere

LOGGING_STEPS, LEAST_LOG_LINES = 10, 10


def count_steps(rows: int, training_args: TrainingArguments) -> tuple[int, int]:
    """(optimizer steps of the run, rows of a step) over all processes."""
    _, processes = read_rank_and_size()
    rows_per_step = (
        training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * processes
    )
    steps = math.ceil(training_args.num_train_epochs * math.ceil(rows / rows_per_step))
    return (training_args.max_steps if training_args.max_steps > 0 else steps), rows_per_step


def choose_logging_steps(rows: int, training_args: TrainingArguments) -> float:
    """--logging_steps, else 10, or fewer where a run on so many `rows` would show less than ten lines."""
    asked, strategy = training_args.logging_steps, training_args.logging_strategy
    if asked is not None or strategy != "steps" or not training_args.do_train:
        return asked or LOGGING_STEPS
    steps, _ = count_steps(rows, training_args)
    chosen = max(1, min(LOGGING_STEPS, steps // LEAST_LOG_LINES))
    if chosen < LOGGING_STEPS:
        notice(f"--logging_steps is {chosen}: the run has {steps} steps")
    return chosen


def describe_start(model: torch.nn.Module, rows: int, training_args: TrainingArguments) -> str:
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()  # counts packed 4-bit weights one by one
        total += count_elsewhere(model)
    else:
        weights = list(model.parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        total = sum(weight.numel() for weight in weights)
    steps, rows_per_step = count_steps(rows, training_args)
    line = (
        f"training {trained:,} of {total:,} parameters ({trained / total:.2%}), {steps:,} steps of "
        f"{min(rows, rows_per_step):,} rows"
    )
    if rows_per_step > rows:
        line += (
            f": a step has room for {rows_per_step:,} and the training set has {rows:,}, so each is an epoch"
        )
    return line


def describe_end(metrics: dict[str, Any], log: list[dict[str, Any]], output_dir: Path) -> str:
    """Loss before and after, time, speed and memory; where the run is and how to chat with it."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    minutes, seconds = divmod(round(metrics["train_seconds"]), 60)
    figures = [
        f"{metrics['steps']:,} steps in {f'{minutes} min ' if minutes else ''}{seconds} s",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"{metrics['peak_memory_gib']:.2f} GiB",
    ]
    if "planned_memory_gib" in metrics:
        figures[-1] = (
            f"{metrics['taken_memory_gib']:.2f} GiB taken, {metrics['planned_memory_gib']:.2f} planned"
        )
    if losses:
        figures.append(f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    if held_out:
        was = f"{held_out[0]:.3f} -> " if len(held_out) > 1 else ""
        figures.append(f"held-out loss {was}{metrics.get('eval_loss', held_out[-1]):.3f}")
    return (
        f"finished: {output_dir} ({', '.join(figures)})\n"
        f"to chat: python cli_demo.py --checkpoint_dir {output_dir}"
    )
