"""The captured step trains what the eager one does, whatever rows, masks and losses come after the capture."""

import os
from dataclasses import dataclass

import pytest
import torch
from helpers.architectures import (
    CONFIGS,
    DEVICE,
    GQA,
    LINEARS,
    SIZES,
    adapter_gradients,
    build_batch,
    build_model,
)
from helpers.models import relative_difference
from transformers import LlamaConfig, Phi3Config

from utils.console import run_main
from utils.fast.graphed_step import GraphedStep, graph_key, pad_to_fixed_sizes
from utils.fast.model import prepare_fast_model

SIXTEEN = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def build_pair(name="llama with grouped queries", dropout=0.2, dtype=SIXTEEN, bits=4, checkpointed=False):
    """(graphed step, the same model to run eagerly)"""
    pair = []
    for _ in range(2):
        model = build_model(name, dropout, dtype, bits)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        pair.append(prepare_fast_model(model, dtype))
    # Whether a capture pays is another question, which the host's other work has a say in.
    return GraphedStep(pair[0], captures="always"), pair[1]


def test_rounding_up_changes_neither_loss_nor_gradients():
    _, fast = build_pair(dropout=0.0, bits=16, dtype=torch.float32)
    batch, scale = build_batch(packed=True), torch.tensor(0.5, device=DEVICE)
    loss = fast.run(batch, scale)
    gradients = adapter_gradients(fast.model)
    fast.flat.zero_gradients()
    rounded = pad_to_fixed_sizes(batch)
    assert len(rounded["cu_seqlens"]) == 17 and len(rounded["label_positions"]) % 10 == 0
    assert len(rounded["label_positions"]) > len(batch["label_positions"])
    assert fast.run(rounded, scale).item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_difference(adapter_gradients(fast.model), gradients) < 1e-5


def test_few_sizes_for_many_micro_batches():
    sizes = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        ends = torch.cat(
            [torch.tensor([0]), torch.randint(1, 1024, (30,), generator=generator).sort().values]
        )
        batch = {
            "input_ids": torch.zeros(1, 1024, dtype=torch.long),
            "labels": torch.zeros(1, 1024, dtype=torch.long),
            "position_ids": torch.zeros(1, 1024, dtype=torch.long),
            "token_keys": torch.zeros(1, 1024, dtype=torch.long),
            "label_positions": torch.arange(500 + seed),
            "cu_seqlens": torch.cat([ends.unique(), torch.tensor([1024])]).to(torch.int32),
        }
        sizes.add(graph_key(pad_to_fixed_sizes(batch)))
    assert len(sizes) <= 4


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the step is captured")
def test_without_a_gpu_the_step_runs_eagerly():
    step, fast = build_pair()
    assert step.obstacle == "no GPU"
    for model in (step.fast, fast):
        model.keys.choose_step(seed=3, step=0)
    loss = step(build_batch(packed=True), 0.5)
    assert loss.item() == pytest.approx(
        fast.run(build_batch(packed=True), torch.tensor(0.5)).item(), rel=1e-6
    )
    assert relative_difference(adapter_gradients(step.fast.model), adapter_gradients(fast.model)) < 1e-6


@dataclass
class Moment:
    """A CUDA event, `seconds` after the first."""

    seconds: float

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)


@pytest.mark.parametrize(
    "took, launched, pays",
    [
        (0.25, 0.25, True),  # the GPU waits for launches all the while
        (0.40, 0.40, True),  # the same on a CPU that others use: 2 times the measured 0.19 s
        (0.46, 0.33, False),  # launching is hidden
        (9.00, 8.90, False),  # a long run, whose full queue holds the CPU back
    ],
)
def test_size_is_captured_where_its_own_launching_takes_its_time(took, launched, pays):
    step, _ = build_pair()
    step.captures, step.launch_seconds, size = "timed", 0.19, (2048, 1024, 17, 1024)
    step.seen[size] = Moment(1.0), Moment(1.0 + took), launched
    assert step.pays(size) == pays


CASES = {
    "bf16": {},
    "fp16": {"dtype": torch.float16},
    "int8": {"bits": 8},
    "no quantization": {"bits": 16},
    "checkpointed": {"checkpointed": True},
    "biases": {"name": "qwen2 with biases"},
    "window": {"name": "mistral with a window"},
    "other activation": {"name": "gemma"},
    "no gated MLP": {"name": "gpt_neox"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_replay_equals_eager_for_new_rows_masks_and_scales(case):
    step, fast = build_pair(**CASES[case])
    seeds = range(6)
    losses, expected = [], []
    for seed in seeds:  # eager, captured, then replayed; gradients add up
        step.fast.keys.choose_step(seed=3, step=seed)
        losses.append(step(build_batch(packed=True, seed=seed), 0.5 + seed).item())
        with torch.no_grad():  # an evaluation in between
            step.fast.model(build_batch(packed=True)["input_ids"])
    assert step.obstacle is None and len(step.graphs) == 1
    for seed in seeds:
        fast.keys.choose_step(seed=3, step=seed)
        expected.append(
            fast.run(build_batch(packed=True, seed=seed), torch.tensor(0.5 + seed, device=DEVICE)).item()
        )
    assert losses == pytest.approx(expected, rel=2e-3)
    assert len(set(losses)) == len(losses)
    assert relative_difference(adapter_gradients(step.fast.model), adapter_gradients(fast.model)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama with grouped queries", "gpt_neox"])
def test_checkpoints_in_host_memory_change_no_bit(monkeypatch, capsys, name):
    """Eager, captured and replayed steps, two sizes of micro-batches."""
    monkeypatch.setattr("utils.fast.model.SMALLEST_WIDTH", 1)
    gradients = []
    for offload in (True, False):
        model = build_model(name, 0.2, SIXTEEN, 4)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        step = GraphedStep(prepare_fast_model(model, SIXTEEN, offload))
        for seed in range(6):
            step.fast.keys.choose_step(seed=3, step=seed)
            batch = build_batch(packed=True, seed=seed)
            step(batch, 0.5)
            step(join_twice(batch), 0.5)
        assert len(step.graphs) == 2 and (step.fast.store is not None) == offload
        assert ("host memory" in capsys.readouterr().out) == offload
        gradients.append(torch.cat([x.flatten() for x in adapter_gradients(step.fast.model).values()]))
        if offload:
            layers = len(step.fast.blocks)
            assert len(step.fast.store.pinned_buffers) in (layers, layers - 1) and step.fast.store.outgrown
    assert torch.equal(*gradients)


@pytest.mark.gpu
def test_layers_that_need_no_gradient_leave_no_copy_under_way(monkeypatch):
    """A capture cannot end while one is: the step would run eagerly."""
    monkeypatch.setattr("utils.fast.model.SMALLEST_WIDTH", 1)
    gradients = []
    for offload in (True, False):
        model = build_model("llama", 0.0, SIXTEEN, 4, target_modules=LINEARS, layers_to_transform=[1])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.get_input_embeddings()._forward_hooks.clear()  # which would ask for a gradient
        step = GraphedStep(prepare_fast_model(model, SIXTEEN, offload))
        for seed in range(4):
            step(build_batch(packed=True, seed=seed), 0.5)
        assert step.obstacle is None and len(step.graphs) == 1
        assert not offload or (len(step.fast.store.pinned_buffers) == 2 and not step.fast.store.coming)
        gradients.append(torch.cat([x.flatten() for x in adapter_gradients(step.fast.model).values()]))
    assert torch.equal(*gradients)


def cut_rows(*lengths):
    """build_batch's 40 tokens as rows of other lengths."""
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    bounds = {"position_ids": places.to(DEVICE), "cu_seqlens": ends.to(DEVICE), "max_length": max(lengths)}
    return build_batch(packed=True) | bounds


@pytest.mark.gpu
def test_rows_beyond_the_original_context_turn_by_the_long_factors_in_a_graph(monkeypatch):
    """Captured on short rows, then replayed for a long one, which shares its size, and for short rows again."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = GQA | {"original_max_position_embeddings": 16, "rope_parameters": rope | {"rope_theta": 10000.0}}
    monkeypatch.setitem(CONFIGS, "long", lambda: Phi3Config(**sizes))
    step, fast = build_pair("long", dropout=0.0)
    losses = []
    for lengths in ((13, 9, 13, 5), (12, 10, 13, 5), (30, 10), (13, 9, 13, 5), (30, 10)):
        losses.append(step(cut_rows(*lengths), 0.5).item())
        expected = fast.run(cut_rows(*lengths), torch.tensor(0.5, device=DEVICE)).item()
        assert losses[-1] == pytest.approx(expected, rel=2e-3)
    assert step.obstacle is None and len(step.graphs) == 1 and losses[2] == losses[4] != losses[0]


@pytest.mark.gpu
def test_dynamic_frequencies_are_not_captured(monkeypatch, capsys):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    monkeypatch.setitem(CONFIGS, "dynamic", lambda: LlamaConfig(**SIZES, rope_parameters=rope))
    assert "rotary frequencies" in build_pair("dynamic")[0].obstacle
    assert "without CUDA graphs (its rotary frequencies" in capsys.readouterr().out


def join_twice(batch):
    """The same rows twice over, in one micro-batch."""
    tokens = batch["input_ids"].shape[1]
    names = ("input_ids", "labels", "position_ids", "token_keys")
    both = {name: torch.cat([batch[name]] * 2, 1) for name in names}
    ends, positions = batch["cu_seqlens"], batch["label_positions"]
    return both | {
        "cu_seqlens": torch.cat([ends, ends[1:] + tokens]).to(torch.int32),
        "label_positions": torch.cat([positions, positions + tokens]),
        "max_length": batch["max_length"],
    }


@pytest.mark.gpu
def test_optimizer_steps_reach_the_graph():
    step, _ = build_pair()
    optimizer = torch.optim.AdamW([step.fast.flat.weights], lr=3e-2, fused=True)
    losses = []
    for _ in range(30):
        losses.append(step(build_batch(packed=True), 0.1).item())
        optimizer.step()
        step.fast.flat.zero_gradients()
    assert losses[-1] < losses[0] - 5  # as on a CPU


@pytest.mark.gpu
def test_dropout_of_the_model_itself_is_not_captured(capsys):
    model = build_model("gpt_neox", dtype=SIXTEEN)
    model.base_model.model.gpt_neox.layers[0].post_mlp_dropout.p = 0.1
    step = GraphedStep(prepare_fast_model(model, SIXTEEN))
    assert "dropout of its own" in step.obstacle and "dropout of its own" in capsys.readouterr().out
    step(build_batch(packed=True), 1.0)
    step(build_batch(packed=True), 1.0)
    assert not step.graphs and step.fast.flat.grads.norm() > 0


@pytest.mark.gpu
def test_a_failed_capture_is_named_and_training_goes_on(capsys, monkeypatch):
    step, fast = build_pair()
    run = step.fast.run

    def run_with_host_read(batch, scale):
        loss = run(batch, scale)
        assert loss.item() > 0  # no graph can hold this
        return loss

    monkeypatch.setattr(step.fast, "run", run_with_host_read)
    losses = [step(build_batch(packed=True), 0.5).item() for _ in range(3)]
    assert "capturing failed" in capsys.readouterr().out and not step.graphs
    for loss in losses:
        assert fast.run(build_batch(packed=True), torch.tensor(0.5, device=DEVICE)).item() == pytest.approx(
            loss
        )
    assert torch.rand(2, device=DEVICE).shape == (2,)  # the GPU's generator still works


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}])
def test_gpu_memory_grows_in_place_unless_the_user_sets_it(monkeypatch, own):
    monkeypatch.setattr(os, "environ", dict(own))
    run_main(lambda: None)
    set_for_gpus = {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name}
    assert set_for_gpus == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
