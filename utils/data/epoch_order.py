"""The order in which an epoch takes the rows, and which of them each process takes."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochOrder(Sampler[int]):
    """Follows from --data_seed and the epoch alone, so all processes and all starts of a run agree on it.

    Whoever runs an epoch sets `epoch`: what accelerate wraps around a sampler may not reach it.
    """

    def __init__(self, lengths: np.ndarray, strategy: str, rows_per_step: int, seed: int):
        """`lengths` of the rows  # int64 [rows]; `rows_per_step`: of all processes."""
        self.lengths, self.strategy, self.rows_per_step, self.seed = lengths, strategy, rows_per_step, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.strategy == "sequential":
            return iter(range(len(self)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.strategy == "group_by_length":
            lengths = self.lengths.tolist()
            return iter(get_length_grouped_indices(lengths, self.rows_per_step, generator=generator))
        return iter(torch.randperm(len(self), generator=generator).tolist())


def deal_rows(rows: list[int], lengths: np.ndarray, processes: int) -> list[list[int]]:
    """The `rows` of a step for each process: about as many tokens, as all wait for the last one.

    The longest first, each to the one that has the fewest tokens and fewer rows than an even share.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens, most = [0] * processes, -(-len(rows) // processes)
    for row in sorted(rows, key=lambda row: -lengths[row]):
        least = min((i for i in range(processes) if len(shares[i]) < most), key=tokens.__getitem__)
        shares[least].append(row)
        tokens[least] += lengths[row]
    return shares


class StepBatches(Sampler[list[int]]):
    """Of each step's rows those of one process; none is taken twice to fill up an epoch's last step.

    26 rows, steps of 12, 3 processes: the last step has 2 rows, and the third process an empty batch.
    """

    def __init__(self, order: EpochOrder, rank: int, processes: int, drop_last: bool):
        self.order, self.rank, self.processes, self.drop_last = order, rank, processes, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.order.rows_per_step)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        rows, size = list(self.order), self.order.rows_per_step
        for start in range(0, len(self) * size, size):
            yield deal_rows(rows[start : start + size], self.order.lengths, self.processes)[self.rank]


def deal_out_rows(dataloader: DataLoader, order: EpochOrder, args: TrainingArguments) -> None:
    """Let a prepared `dataloader` of several processes give each its share of every step's rows in `order`.

    accelerate, which prepared it, would repeat the first rows until all have a full last batch.
    """
    shard = dataloader.batch_sampler
    if isinstance(shard, BatchSamplerShard):
        shard.batch_sampler = StepBatches(
            order, args.process_index, args.world_size, args.dataloader_drop_last
        )
        shard.num_processes, shard.process_index, shard.batch_size = 1, 0, None  # it passes them through
