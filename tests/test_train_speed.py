"""The timing command: its workloads, its packing, its table."""

import json

import pytest
import torch

from eval import train_speed
from eval.speed import steps as speed_steps
from eval.speed.shapes import SHAPES, build_random_model, count_linear_weights
from eval.speed.workloads import build_packed, draw_length, fill_each_size, parse_workload
from utils.console import UserError
from utils.data.packing import choose_sizes


def test_table_of_three_variants(tmp_path, monkeypatch, capsys):
    argv = "--model tiny --workloads 2x16 real-4-checkpointed --steps 1 --capacity 1024 2048".split()
    argv += ["--dtypes", "fp32" if not torch.cuda.is_available() else "bf16", "--lora_r", "4"]
    monkeypatch.setattr("sys.argv", ["train_speed", *argv, "--output_dir", str(tmp_path)])
    train_speed.main()
    saved = json.loads((tmp_path / "tiny.json").read_text())
    rows = [(timing["variant"], timing["workload"], timing["capacity"]) for timing in saved["timings"]]
    runs = [("original", 2048), ("plain", 2048), ("fast", 1024), ("fast", 2048)]  # only ours is packed
    assert rows == [(v, w, size) for v, size in runs for w in ("2x16", "real-4-checkpointed")]
    assert all(timing["tokens_per_second"] > 0 and 5 < timing["loss"] < 8 for timing in saved["timings"])
    assert saved["matmul_tflops"] > 0 and "tokens/s" in capsys.readouterr().out


def test_workloads_are_read_and_bad_ones_named():
    assert parse_workload("4x512", 2) == ([[512] * 4] * 2, False)
    steps, checkpointed = parse_workload("real-32-checkpointed", 3)
    assert checkpointed and [len(rows) for rows in steps] == [32] * 3 and steps[0] != steps[1]
    for bad in ("4x", "real", "4x512-fast"):
        with pytest.raises(UserError, match=f"--workloads {bad}"):
            parse_workload(bad, 1)


def test_lengths_are_those_of_the_data():
    import random

    draw = random.Random(0)
    lengths = [draw_length(draw) for _ in range(4000)]
    assert sum(lengths) / len(lengths) == pytest.approx(283, rel=0.03)


@pytest.mark.parametrize("rows", [8, 32, 128])
def test_packed_rows_are_all_there_and_fill_the_micro_batches(rows):
    steps, _ = parse_workload(f"real-{rows}", 20)
    computed = 0
    for lengths in steps:
        batches = build_packed(lengths, 8192, 512)
        assert sorted(row for batch in batches for row in batch["rows"].tolist()) == list(range(rows))
        assert sum(int(batch["num_tokens"]) for batch in batches) == sum(lengths)
        computed += sum(batch["input_ids"].shape[1] for batch in batches)
    assert sum(map(sum, steps)) / computed > 0.8
    (batch,) = build_packed([512] * 4, 8192, 512)
    assert batch["input_ids"].shape == (1, 2048) and batch["cu_seqlens"].diff().tolist() == [512] * 4


def test_warm_up_fills_each_size_twice_the_largest_first():
    sizes = [
        batch["input_ids"].shape[1] for rows in fill_each_size(8192) for batch in build_packed(rows, 8192, 9)
    ]
    assert sizes == [size for size in reversed(choose_sizes(8192, fixed=True)) for _ in range(2)]


def test_padded_variants_time_as_many_micro_batches_for_each_number_of_rows():
    arguments = train_speed.SpeedArguments(steps=6)
    for workload, rows, timed in (
        ("real-4", 4, 24),
        ("real-32", 32, 3),
        ("real-128", 32, 3),
        ("4x2048", 4, 3),
    ):
        steps, warm_ups, _ = speed_steps.plan_steps("original", workload, 8192, arguments, "cuda")
        assert warm_ups == 1 and [len(step) for step in steps] == [rows] * (1 + timed)
    steps, warm_ups, _ = speed_steps.plan_steps("fast", "real-128", 8192, arguments, "cuda")
    assert [len(step) for step in steps[warm_ups:]] == [128] * 6


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_random_model_has_the_shape_and_the_layers(bits):
    import bitsandbytes as bnb

    kinds = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: torch.nn.Linear}
    config = SHAPES["tiny"]()
    model = build_random_model(config, bits, torch.float32, "cpu")
    linears = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 14 and all(type(m) is kinds[bits] for m in linears)
    assert sum(m.in_features * m.out_features for m in linears) + 64 * 512 == count_linear_weights(config)
    assert all(layer.self_attn.config is model.config for layer in model.base_model.layers)


def test_seven_billion_weights_are_counted():
    assert count_linear_weights(SHAPES["llama-7b"]()) == pytest.approx(6.6e9, rel=0.01)


def test_shapes_of_the_flag_are_those_that_can_be_built():
    assert list(train_speed.SHAPE_NAMES) == list(SHAPES)
