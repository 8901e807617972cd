"""From rows to micro-batches: laid end to end in a few fixed sizes, or padded to the longest.

Padding wastes what the rows differ in length: one row of 400 tokens and seven of 50, padded to 400, are 77%
padding. Packing lays rows end to end and lets attention keep them apart:

    padded    [a a a a a a a a]      packed    [a a a a a a a a b b b c c c c d]
              [b b b . . . . .]      positions  0 1 2 3 4 5 6 7 0 1 2 0 1 2 3 0
              [c c c c . . . .]
              [d . . . . . . .]

Only the rows of one optimizer step are packed together, and each whole: what a step trains is what the flags
say, packed or not. Packing the whole set, as others do, would change which rows share a step and cut rows in
two.
"""

import bisect
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.data.token_rows import Example
from utils.fast.token_keys import number_tokens
from utils.prompts.messages import IGNORE_INDEX

MIN_GPU_TOKENS = 2048  # a smaller micro-batch leaves a GPU waiting for its next launch
MAX_CPU_TOKENS = 768  # a larger one outgrows a CPU's caches: 2,048 tokens at once train two thirds as fast
TILE = 64  # fixed sizes are multiples of this


def find_micro_batches(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that a collator made of a batch: several where it packed, else the batch itself."""
    return batch["micro_batches"] if "micro_batches" in batch else [batch]


def list_rows(batches: list[dict[str, Any]]) -> list[int]:
    """Indices, in the training set, of the rows that the batches of a step hold."""
    parts = [part for batch in batches for part in find_micro_batches(batch)]
    return [row for part in parts for row in part["rows"].tolist()]


def pack_rows(lengths: list[int], sizes: list[int]) -> list[tuple[list[int], int]]:
    """The rows (by index) and the size (tokens) of each micro-batch: as few as hold all rows, filled best.

    All but the last two have the largest of `sizes` (ascending), and the last two the pair of sizes with the
    fewest tokens that still holds what is left. Say rows of 900, 700, 500 and 400 tokens and sizes 256, 512,
    ..., 2,048: 2,500 tokens need two micro-batches, and 512 (the row of 500) with 2,048 (the others, 2,000)
    is the tightest pair that they fit into. Raises ValueError for a row that is longer than the largest size.
    """
    total, longest, largest = sum(lengths), max(lengths, default=0), sizes[-1]
    if longest > largest:
        raise ValueError(f"a row of {longest} tokens does not fit into {largest}")
    count = -(-total // largest)
    while True:
        full = [largest] * (count - 2)
        for last in sorted(itertools.combinations_with_replacement(sizes, min(count, 2)), key=sum):
            chosen = full + list(last)
            bins = fit_rows(lengths, chosen) if sum(chosen) >= total else None
            if bins is not None:
                return [(rows, size) for rows, size in zip(bins, chosen, strict=True) if rows]
        count += 1


def fit_rows(lengths: list[int], sizes: list[int]) -> list[list[int]] | None:
    """Best-fit decreasing: each row, the longest first, goes into the fullest bin that still has room for it.

    Returns the rows (by index) of each bin, or None where a row finds no bin.
    """
    bins: list[list[int]] = [[] for _ in sizes]
    rooms = sorted((size, index) for index, size in enumerate(sizes))  # tokens left in each bin
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = bisect.bisect_left(rooms, (lengths[row],))
        if at == len(rooms):
            return None
        room, index = rooms.pop(at)
        bins[index].append(row)
        bisect.insort(rooms, (room - lengths[row], index))
    return bins


def split_at_long(lengths: list[int], limit: int | None) -> list[list[int]]:
    """Rows by index, in their order: each of more than `limit` tokens alone, those between together."""
    groups: list[list[int]] = []
    shared = False
    for row, length in enumerate(lengths):
        is_long = limit is not None and length > limit
        if is_long or not shared:
            groups.append([])
        groups[-1].append(row)
        shared = not is_long
    return groups


def pack_apart(lengths: list[int], sizes: list[int], limit: int | None) -> list[tuple[list[int], int]]:
    """pack_rows, with a micro-batch of its own for each row of more than `limit` tokens."""
    short = [row for row, length in enumerate(lengths) if limit is None or length <= limit]
    packed = pack_rows([lengths[row] for row in short], sizes)
    long = sorted(set(range(len(lengths))) - set(short))
    alone = [([row], sizes[bisect.bisect_left(sizes, lengths[row])]) for row in long]
    return [([short[i] for i in rows], size) for rows, size in packed] + alone


def choose_capacity(
    lengths: np.ndarray, batch_size: int, rows_per_step: int, max_len: int, on_gpu: bool
) -> int:
    """Tokens of the largest micro-batch: what a padded one may take, never more than a whole step holds."""
    allowed = batch_size * max_len
    if on_gpu:
        allowed = max(allowed, MIN_GPU_TOKENS)
    else:
        allowed = min(allowed, max(MAX_CPU_TOKENS, int(lengths.max(initial=0))))
    longest_step = int(np.sort(lengths)[-rows_per_step:].sum())
    return min(allowed, longest_step)


def choose_sizes(capacity: int, fixed: bool) -> list[int]:
    """The sizes (tokens) that micro-batches may have.

    The capacity alone or, if `fixed`, a few smaller ones too.

    On a GPU each size is one CUDA graph to capture, so they are few. For a capacity of 2,048 tokens: 256,
    512, ..., 1,792 in steps of an eighth, then 1,856, 1,920, 1,984 and 2,048, all of them multiples of TILE.
    Two of these 11 sizes add up to any multiple of 64 tokens above 2,048, as well as all 32 multiples would.
    """
    if not fixed:
        return [capacity]
    parts = (4, 8, 12, 16, 20, 24, 28, 29, 30, 31, 32)
    return sorted({-(-capacity * part // 32 // TILE) * TILE for part in parts})


def measure_packing(lengths: list[int], rows_per_step: int, capacity: int, fixed: bool) -> float:
    """Real tokens over tokens computed, packing `rows_per_step` rows at a time as the collator does."""
    if not fixed:
        return 1.0  # nothing is filled up
    sizes, starts = choose_sizes(capacity, fixed), range(0, len(lengths), rows_per_step)
    packed = (pack_rows(lengths[start : start + rows_per_step], sizes) for start in starts)
    return sum(lengths) / sum(size for step in packed for _, size in step)


def measure_padding(lengths: list[int], batch_size: int) -> float:
    """Real tokens over tokens computed, every micro-batch padded to its longest row."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def make_filling(collator: "PackingCollator | PaddingCollator") -> dict[str, Any]:
    """What a process without a row computes, in step with the others: a token that is no row's, no label."""
    nothing: Example = {
        "input_ids": np.zeros(1, np.int64),
        "labels": np.full(1, IGNORE_INDEX),
        "row": np.int64(-1),
    }
    (part,) = find_micro_batches(collator([nothing]))
    return part | {"num_tokens": torch.tensor(0), "rows": part["rows"][:0]}


@dataclass(frozen=True)
class PackingCollator:
    """The rows of one optimizer step, re-cut whole into micro-batches of at most `capacity` tokens.

    Positions restart with each row: attention sees it and keeps the rows apart, as long as no attention_mask
    is passed. Gives {"micro_batches": [...]}, each of
    input_ids, labels, position_ids, token_keys (see utils.fast.token_keys)  # int64 [1, tokens]
    cu_seqlens (where rows begin and end)  # int32 [rows + 1]; max_length (of a row, an int)
    label_positions, in NumPy  # int64 [positions]; num_tokens  # int64 []; rows (of the set)  # int64 [rows]
    `fixed`: filled up to one of choose_sizes, for GPUs.
    `limit`: a row of more tokens shares with no other (utils/fast/rope.py).
    """

    pad_token_id: int
    capacity: int
    fixed: bool = False
    limit: int | None = None

    def __call__(self, examples: list[Example]) -> dict[str, list[dict[str, Any]]]:
        if not examples:
            return {"micro_batches": [make_filling(self)]}
        lengths = [len(example["input_ids"]) for example in examples]
        packed = pack_apart(lengths, choose_sizes(self.capacity, self.fixed), self.limit)
        return {"micro_batches": [self.join([examples[row] for row in rows], size) for rows, size in packed]}

    def join(self, examples: list[Example], size: int) -> dict[str, Any]:
        lengths = [len(example["input_ids"]) for example in examples]
        tokens = sum(lengths)
        width = size if self.fixed else tokens
        while (filled := sum(lengths)) < width:  # the filling is rows of its own
            lengths.append(min(width - filled, self.limit or width))
        input_ids = np.full(width, self.pad_token_id, np.int64)
        labels = np.full(width, IGNORE_INDEX, np.int64)
        input_ids[:tokens] = np.concatenate([example["input_ids"] for example in examples])
        labels[:tokens] = np.concatenate([example["labels"] for example in examples])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        labels[bounds[:-1]] = IGNORE_INDEX  # nothing comes before a row's first token
        position_ids = np.arange(width) - np.repeat(bounds[:-1], lengths)
        rows = np.array([example["row"] for example in examples])
        owners = np.append(rows, [-1] * (len(lengths) - len(rows)))  # of the filling: none
        return {
            "input_ids": torch.from_numpy(input_ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(position_ids)[None],
            "token_keys": number_tokens(np.repeat(owners, lengths), position_ids)[None],
            "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
            "max_length": max(lengths),
            "label_positions": np.flatnonzero(labels[1:] != IGNORE_INDEX),
            "num_tokens": torch.tensor(tokens),
            "rows": torch.from_numpy(rows),
        }


@dataclass(frozen=True)
class PaddingCollator:
    """Each row padded on the right to the longest; masks go by length, so that the pad id never matters.

    Gives input_ids, labels, attention_mask, token_keys  # int64 [rows, width]; num_tokens  # int64 []
    label_positions, whose next token is a label in some row, in NumPy  # int64 [positions]
    `limit`: a row of more tokens is padded with no other.
    `rows`: at most so many are padded together; None: all.
    Several micro-batches are {"micro_batches": [...]}, in the rows' order.
    """

    pad_token_id: int
    multiple: int = 1
    limit: int | None = None
    rows: int | None = None

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        if not examples:
            return make_filling(self)
        size = self.rows or len(examples)
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        parts = []
        for batch in batches:
            groups = split_at_long([len(example["input_ids"]) for example in batch], self.limit)
            parts += [self.pad([batch[row] for row in group]) for group in groups]
        return parts[0] if len(parts) == 1 else {"micro_batches": parts}

    def pad(self, examples: list[Example]) -> dict[str, Any]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        longest = int(lengths.max())
        width = -(-longest // self.multiple) * self.multiple
        if self.limit and width > self.limit:  # padding has positions, too
            width = max(longest, self.limit)
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORE_INDEX)
        rows = np.array([example["row"] for example in examples])
        for i, example in enumerate(examples):
            input_ids[i, : lengths[i]] = torch.as_tensor(example["input_ids"])
            labels[i, : lengths[i]] = torch.as_tensor(example["labels"])
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": (torch.arange(width)[None] < lengths[:, None]).long(),
            "label_positions": (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().flatten().numpy(),
            "token_keys": number_tokens(rows[:, None], np.arange(width)),
            "num_tokens": lengths.sum(),
            "rows": torch.from_numpy(rows),
        }
