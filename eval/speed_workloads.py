"""Rows of the lengths that a timing runs on, and micro-batches of random tokens made of them."""

import random
from typing import Any

import torch

from utils.console import UserError

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


def cut_into_bins(rows: Rows, capacity: int) -> list[tuple[int, Rows]]:
    """Whole rows into micro-batches of capacity and one of as many eighths as are left: (size, its rows)."""
    eighth = capacity // 8
    whole, rest = divmod(sum(rows), capacity)
    sizes = [capacity] * whole + [-(-rest // eighth) * eighth] * (rest > 0)
    bins = [[size, size, []] for size in sizes]  # size, room left, rows
    for row in sorted(rows, reverse=True):  # best fit
        chosen = min((each for each in bins if each[1] >= row), key=lambda each: each[1], default=None)
        if chosen is None:
            size = -(-row // eighth) * eighth
            chosen = [size, size, []]
            bins.append(chosen)
        chosen[1] -= row
        chosen[2].append(row)
    return [(size, inside) for size, _, inside in bins if inside]


def build_packed(size: int, rows: Rows, vocabulary: int) -> dict[str, Any]:
    """One packed micro-batch of random tokens; what is left at its end is a row of its own without labels."""
    rest = size - sum(rows)
    lengths = rows + [rest] * (rest > 0)
    labels = torch.randint(5, vocabulary, (1, size))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    labels[:, ends[:-1]] = -100
    labels[:, size - rest :] = -100
    return {
        "input_ids": torch.where(labels == -100, 5, labels),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "label_positions": (labels[0, 1:] != -100).nonzero().flatten(),
        "cu_seqlens": ends.to(torch.int32),
        "max_length": max(lengths),
    }


def build_padded(rows: Rows, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    """Rows of random tokens padded to the longest."""
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    ids = torch.randint(5, vocabulary, mask.shape)
    batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return {name: x.to(device) for name, x in batch.items()}
