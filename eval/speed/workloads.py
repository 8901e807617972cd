"""Rows of the lengths that a timing runs on, and micro-batches of random tokens made of them."""

import random
from typing import Any

import numpy as np
import torch

from utils.console import UserError
from utils.data.packing import PackingCollator, choose_sizes
from utils.data.token_rows import Example

Rows = list[int]  # their lengths, tokens
# 1,999 rows of Alpaca in English and Chinese, in tokens of LLaMA: every 32nd part of their sorted lengths.
REAL_LENGTHS = [49, 59, 66, 71, 77, 84, 93, 103, 114, 124, 134, 148, 161, 174, 189, 209, 229, 244, 267, 289,
                309, 332, 353, 372, 403, 428, 467, 511, 565, 616, 683, 748, 880]  # fmt: skip


def parse_workload(name: str, steps: int) -> tuple[list[Rows], bool]:
    """(rows of each optimizer step, whether activations are recomputed)"""
    core, _, suffix = name.partition("-checkpointed")
    checkpointed = name.endswith("-checkpointed") and not suffix
    draw = random.Random(0)
    try:
        if core.startswith("real-"):
            return [[draw_length(draw) for _ in range(int(core[5:]))] for _ in range(steps)], checkpointed
        batch, length = map(int, core.split("x"))
        return [[length] * batch for _ in range(steps)], checkpointed
    except ValueError:
        raise UserError(
            f"--workloads {name}: write 4x512 or real-32, with -checkpointed behind it or not"
        ) from None


def draw_length(draw: random.Random) -> int:
    place = draw.random() * (len(REAL_LENGTHS) - 1)
    low, share = int(place), place % 1
    return round(REAL_LENGTHS[low] * (1 - share) + REAL_LENGTHS[low + 1] * share)


def fill_each_size(capacity: int) -> list[Rows]:
    """Two steps for each size of packed micro-batches, the largest first: nearly all graphs of a run."""
    draw = random.Random(1)
    filled = [draw_rows(size, draw) for size in reversed(choose_sizes(capacity, fixed=True))]
    return [rows for rows in filled for _ in range(2)]


def draw_rows(tokens: int, draw: random.Random | None = None) -> Rows:
    """Rows of real lengths that have so many tokens in all."""
    rows: Rows = []
    draw = draw or random.Random(1)
    while sum(rows) < tokens:
        rows.append(min(draw_length(draw), tokens - sum(rows)))
    return rows


def build_packed(rows: Rows, capacity: int, vocabulary: int) -> list[dict[str, Any]]:
    """Micro-batches of random tokens, packed as a run on a GPU packs them; rows of one length are one."""
    capacity = sum(rows) if len(set(rows)) == 1 else capacity
    ids = [torch.randint(5, vocabulary, (length,)).numpy() for length in rows]
    examples: list[Example] = [
        {"input_ids": row, "labels": row, "row": np.int64(index)} for index, row in enumerate(ids)
    ]
    return PackingCollator(pad_token_id=0, capacity=capacity, fixed=True)(examples)["micro_batches"]


def build_padded(rows: Rows, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    """Rows of random tokens padded to the longest."""
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    ids = torch.randint(5, vocabulary, mask.shape)
    batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return {name: x.to(device) for name, x in batch.items()}
