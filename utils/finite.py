"""A loss or gradient that is not finite: which rows made it, on disk, and when to give up."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils.console import UserError, is_main_process, notice

MAX_IN_A_ROW = 5
ROWS_FILE = "non_finite_steps.jsonl"


def split_batch(batch: Any) -> Iterator[list[int]]:
    """The token ids of each row in a packed or padded batch, or in any nesting of such batches."""
    if isinstance(batch, (list, tuple)):
        for part in batch:
            yield from split_batch(part)
    elif isinstance(batch, dict) and "input_ids" not in batch:
        yield from split_batch(list(batch.values()))
    elif isinstance(batch, dict):
        ids = batch["input_ids"].cpu()  # [rows, width]
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].cpu().sum(1).tolist()
            yield from (row[:length].tolist() for row, length in zip(ids, lengths, strict=True))
        else:
            starts = (batch["position_ids"].cpu().flatten() == 0).nonzero().flatten().tolist()
            flat = ids.flatten().tolist()
            yield from (
                flat[first:last] for first, last in zip(starts, [*starts[1:], len(flat)], strict=True)
            )


def find_rows(batch: Any, dataset: list[dict[str, list[int]]]) -> list[int]:
    """Indices, in `dataset`, of the rows that the batch holds; found by content, padding matches nothing."""
    index = {tuple(dataset[i]["input_ids"]): i for i in reversed(range(len(dataset)))}
    found = []
    for ids in split_batch(batch):
        trimmed = tuple(ids)
        if trimmed in index:
            found.append(index[trimmed])
    return found


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
