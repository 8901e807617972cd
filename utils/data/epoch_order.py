"""The order in which an epoch takes the rows."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
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
