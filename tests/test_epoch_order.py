"""Every epoch takes every row once, in an order that all processes and all starts of a run agree on."""

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import DataLoader

from utils.data.epoch_order import EpochOrder

LENGTHS = np.random.default_rng(0).integers(5, 400, 64)


def read_rows(strategy: str, epoch: int, processes: int, skip: int = 0) -> list[list[list[int]]]:
    """The batches of four rows of each process, whose generators are in different states."""
    read = []
    for index in range(processes):
        torch.manual_seed(index)
        order = EpochOrder(LENGTHS, strategy, 8, seed=42)
        loader = DataLoader(range(64), batch_size=4, sampler=order, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=index)
        order.epoch = epoch
        read.append(list(skip_first_batches(loader, skip) if skip else loader))
    return read


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_processes_share_the_rows_of_every_epoch_between_them(strategy):
    orders = []
    for epoch in range(3):
        ((*one,),) = read_rows(strategy, epoch, processes=1)
        first, second = read_rows(strategy, epoch, processes=2)
        assert sorted(sum(one, [])) == list(range(64))
        assert [batch for pair in zip(first, second, strict=True) for batch in pair] == one
        assert [ours[3:] for ours in (first, second)] == read_rows(strategy, epoch, processes=2, skip=3)
        orders.append(tuple(sum(one, [])))
    assert len(set(orders)) == (1 if strategy == "sequential" else 3)


def test_random_order_is_that_of_accelerates_seedable_sampler():
    expected = SeedableRandomSampler(range(64), data_seed=42)
    order = EpochOrder(LENGTHS, "random", 8, seed=42)
    for epoch in range(2):
        expected.set_epoch(epoch)
        order.epoch = epoch
        assert list(order) == list(expected)


def test_rows_of_a_step_are_of_like_lengths():
    order = list(EpochOrder(LENGTHS, "group_by_length", 8, seed=42))
    spread = np.mean([np.ptp(LENGTHS[order[i : i + 8]]) for i in range(8, 64, 8)])
    assert spread < 0.6 * np.mean([np.ptp(LENGTHS[i : i + 8]) for i in range(0, 64, 8)])
