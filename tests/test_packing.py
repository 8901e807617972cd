"""Packing re-cuts the rows of a step and changes nothing that is learned."""

import json

import numpy as np
import pytest
import torch
from helpers import ROOT

from utils.data.packing import (
    PackingCollator,
    PaddingCollator,
    choose_capacity,
    choose_sizes,
    measure_packing,
    measure_padding,
    pack_rows,
)

LENGTHS = json.loads(
    (ROOT / "tests" / "instruction_lengths.json").read_text()
)  # 1,999 Alpaca rows, zh and en


def example(ids, labels):
    return {"input_ids": np.array(ids), "labels": np.array(labels), "row": 0}


@pytest.mark.parametrize("sizes", [[2048], choose_sizes(2048, fixed=True)], ids=["one size", "fixed sizes"])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:32], [2048] * 3, [1100] * 5, [64], []], ids=len)
def test_every_row_is_packed_once_and_no_micro_batch_overflows(lengths, sizes):
    packed = pack_rows(lengths, sizes)
    assert sorted(row for rows, _ in packed for row in rows) == list(range(len(lengths)))
    assert all(rows and sum(lengths[row] for row in rows) <= size in sizes for rows, size in packed)
    with pytest.raises(ValueError, match="2049"):
        pack_rows([*lengths, 2049], sizes)


def test_least_filling_of_fewest_micro_batches():
    sizes = choose_sizes(8192, fixed=True)
    assert [size for _, size in pack_rows([300] * 29, sizes)] == [1024, 7936]  # 3 + 26 rows
    assert [size for _, size in pack_rows([2048] * 5, sizes)] == [2048, 8192]
    assert [size for _, size in pack_rows([5000, 4000], sizes)] == [4096, 5120]  # rows stay whole


def test_packing_efficiency_on_real_lengths():
    order = np.random.default_rng(0).permutation(LENGTHS).tolist()
    whole = sum(LENGTHS) / (2048 * len(pack_rows(LENGTHS, [2048])))
    by_step = {capacity: measure_packing(order, 32, capacity, fixed=True) for capacity in (2048, 8192)}
    padded = measure_padding(order, 4)
    print(
        f"whole set {whole:.1%}, 32 rows a step {by_step[2048]:.1%} ({by_step[8192]:.1%} in micro-batches "
        f"of 8,192), padded batches of 4 {padded:.1%}"
    )
    assert whole >= 0.97 and min(by_step.values()) >= 0.97 and padded < 0.6


def test_fixed_sizes_are_few_and_whole_tiles():
    sizes = choose_sizes(2048, fixed=True)
    assert sizes == [256, 512, 768, 1024, 1280, 1536, 1792, 1856, 1920, 1984, 2048]
    small = choose_sizes(528, fixed=True)
    assert small[-1] >= 528 and all(size % 64 == 0 for size in small)


def test_capacity_is_the_flags_but_no_more_than_the_longest_step():
    lengths = np.array([60, 70, 137, 80])
    assert choose_capacity(lengths, 8, 8, 1280, on_gpu=True) == 60 + 70 + 137 + 80
    assert choose_capacity(lengths, 1, 2, 200, on_gpu=False) == 200
    assert choose_capacity(np.full(64, 100), 8, 64, 1280, on_gpu=False) == 768  # a CPU's largest
    assert choose_capacity(np.array([900, 300]), 2, 2, 1280, on_gpu=False) == 900
    assert choose_capacity(lengths, 1, 2, 200, on_gpu=True) == 137 + 80
    assert choose_capacity(np.full(64, 512), 4, 64, 512, on_gpu=True) == 2048
    assert choose_capacity(np.full(64, 512), 1, 16, 528, on_gpu=True) == 2048  # a GPU's smallest
    step = np.random.default_rng(0).choice(lengths, 800).tolist()
    assert measure_packing(step, 8, choose_capacity(np.array(step), 8, 8, 1280, True), fixed=True) > 0.9


def test_packing_restarts_positions_and_labels_no_first_token():
    rows = [example([5, 6, 2], [5, 6, 2]), example([7, 8], [7, 8])]
    (batch,) = PackingCollator(pad_token_id=0, capacity=64, fixed=True)(rows)["micro_batches"]
    assert batch["input_ids"].shape == (1, 64) and batch["input_ids"][0, :6].tolist() == [5, 6, 2, 7, 8, 0]
    assert batch["position_ids"][0, :8].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch["labels"][0, :6].tolist() == [-100, 6, 2, -100, 8, -100]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 64] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["label_positions"].tolist() == [0, 1, 3] and batch["num_tokens"] == 5


def test_packing_without_fixed_sizes_fills_nothing():
    rows = [example([5, 6, 2], [5, 6, 2])] * 5
    batches = PackingCollator(pad_token_id=0, capacity=7)(rows)["micro_batches"]
    assert [batch["input_ids"].shape[1] for batch in batches] == [6, 6, 3]


def test_padding_masks_by_length_although_an_answer_ends_with_the_pad_id():
    batch = PaddingCollator(pad_token_id=2)([example([5, 6, 2], [-100, 6, 2]), example([5, 2], [-100, 2])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert batch["label_positions"].tolist() == [0, 1] and batch["num_tokens"] == 5


def test_packed_row_has_the_loss_it_has_alone(smollm2):
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    rng = np.random.default_rng(0)
    rows = [example(ids, ids) for ids in (rng.integers(100, 40_000, n) for n in (9, 30, 4, 17))]
    (packed,) = PackingCollator(0, 64, fixed=True)(rows)["micro_batches"]

    def read_losses(batch):
        with torch.no_grad():
            ids, positions = batch["input_ids"], batch["position_ids"]
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        positions = batch["label_positions"]
        return F.cross_entropy(logits[positions], batch["labels"][0, positions + 1], reduction="none")

    alone = [read_losses(PackingCollator(0, 64)([row])["micro_batches"][0]) for row in rows]
    ((order, _),) = pack_rows([9, 30, 4, 17], [64])
    expected = torch.cat([alone[index] for index in order])
    assert torch.allclose(read_losses(packed), expected, atol=1e-4, rtol=1e-5)
