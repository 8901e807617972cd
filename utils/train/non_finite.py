"""A loss or gradient that is not finite: which rows made it, on disk, and when to give up."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils.console import UserError, is_main_process, notice

MAX_IN_A_ROW = 5
ROWS_FILE = "non_finite_steps.jsonl"


def find_rows(batches: list[Any]) -> list[int]:
    """Indices, in the training set, of the rows that the batches of a step hold."""
    parts = [part for batch in batches for part in batch.get("micro_batches", [batch])]
    return [row for part in parts for row in part["rows"].tolist()]


def report_skipped_step(
    step: int,
    loss: float,
    grad_norm: float,
    rows: list[int],
    texts: list[str],
    in_a_row: int,
    output_dir: Path,
) -> None:
    """Append the step to ROWS_FILE and say so. Raises UserError after MAX_IN_A_ROW of them."""
    path = output_dir / ROWS_FILE
    if is_main_process():
        entry = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)}
        entry["rows"] = [{"row": row, "begins": text} for row, text in zip(rows, texts, strict=True)]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    notice(f"step {step} is skipped: loss {loss}, gradient norm {grad_norm}, rows {shown} (see {path})")
    if in_a_row >= MAX_IN_A_ROW:
        raise UserError(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite, up to step {step}: lower "
            f"--learning_rate, or look at the rows in {path}; the last good checkpoint is as it was"
        )


def all_finite(parameters: Iterator[torch.nn.Parameter]) -> bool:
    """Whether every weight that is trained is finite; one host read."""
    flags = [parameter.detach().isfinite().all() for parameter in parameters if parameter.requires_grad]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all().item())
