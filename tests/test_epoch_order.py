"""Every epoch takes every row once, in an order that all processes and all starts of a run agree on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import DataLoader

from utils.data.epoch_order import EpochOrder, deal_out_rows

LENGTHS = np.random.default_rng(0).integers(5, 400, 64)


def read_rows(
    strategy: str, epoch: int, processes: int, rows: int = 64, skip: int = 0
) -> list[list[list[int]]]:
    """The batches of each process, of steps of eight rows; their generators are in different states."""
    read = []
    for index in range(processes):
        torch.manual_seed(index)
        order = EpochOrder(LENGTHS[:rows], strategy, 8, seed=42)
        loader = DataLoader(range(rows), batch_size=8 // processes, sampler=order, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=index)
        deal_out_rows(
            loader,
            order,
            SimpleNamespace(process_index=index, world_size=processes, dataloader_drop_last=False),
        )
        order.epoch = epoch
        read.append(list(skip_first_batches(loader, skip) if skip else loader))
    return read


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_processes_share_the_rows_of_every_epoch_between_them(strategy):
    orders = []
    for epoch in range(3):
        (one,) = read_rows(strategy, epoch, processes=1)
        first, second = read_rows(strategy, epoch, processes=2)
        assert sorted(sum(one, [])) == list(range(64))
        assert [sorted(sum(pair, [])) for pair in zip(first, second, strict=True)] == [*map(sorted, one)]
        assert [ours[3:] for ours in (first, second)] == read_rows(strategy, epoch, processes=2, skip=3)
        orders.append(tuple(sum(one, [])))
    assert len(set(orders)) == (1 if strategy == "sequential" else 3)


@pytest.mark.parametrize("rows", [64, 57, 59, 5, 1])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_every_row_comes_once_an_epoch_and_in_the_same_step_for_however_many_processes(rows, processes):
    for epoch in range(3):
        shares = read_rows("group_by_length", epoch, processes, rows)
        steps = [sorted(sum(step, [])) for step in zip(*shares, strict=True)]
        ((*one,),) = read_rows("group_by_length", epoch, 1, rows)
        assert steps == [sorted(step) for step in one]
        assert sorted(sum(steps, [])) == list(range(rows))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_have_as_many_rows_and_nearly_as_many_tokens_as_each_other(processes):
    steps = list(zip(*read_rows("random", 0, processes), strict=True))
    assert all(len(share) == 8 // processes for step in steps for share in step)
    heaviest = sum(max(LENGTHS[share].sum() for share in step) for step in steps)  # the others wait for it
    in_order = np.array(sum(read_rows("random", 0, 1)[0], [])).reshape(8, processes, -1)
    assert heaviest >= LENGTHS.sum() / processes
    if processes < 8:  # with a row each there is nothing to choose
        spare = 1 - LENGTHS.sum() / processes / heaviest
        assert spare < 0.5 * (1 - LENGTHS.sum() / processes / LENGTHS[in_order].sum(2).max(1).sum())


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
