"""Layers that come from elsewhere compute what layers in place do, to the bit, forward and backward."""

import json

import pytest
import torch
from helpers.architectures import build_batch, build_model

from utils.fast.host_embedding import move_embedding
from utils.fast.model import prepare_fast_model
from utils.fast.streamed_layers import StreamedLayers, find_store, stream_layers

CPU = torch.device("cpu")


def build(name="llama", dropout=0.0, prepare=lambda model: None, **options):
    """A model of four layers in NF4 with every layer recomputed; `prepare` is given its base."""
    from helpers import architectures

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.SIZES, "num_hidden_layers", 4)
        patch.setitem(architectures.GQA, "num_hidden_layers", 4)
        model = build_model(name, dropout, bits=4)
    prepare(model.get_base_model())
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return prepare_fast_model(model.train(), torch.float32, **options)


def run_steps(fast, count=3):
    losses = []
    for seed in range(count):
        fast.keys.choose_step(seed=0, step=seed)
        losses.append(fast.run(build_batch(packed=True, seed=seed), torch.tensor(0.5)))
    return losses, fast.flat.grads.clone()


@pytest.mark.parametrize("name, dropout", [("llama", 0.1), ("qwen2 with biases", 0.0), ("gpt_neox", 0.0)])
def test_loss_and_gradient_of_streamed_layers_are_those_of_layers_in_place(name, dropout, monkeypatch):
    fetched, fetch = [], StreamedLayers.fetch
    monkeypatch.setattr(StreamedLayers, "fetch", lambda self, i: (fetched.append(i), fetch(self, i))[1])
    streamed = build(name, dropout, lambda base: stream_layers(base, CPU))
    expected, gradient = run_steps(build(name, dropout))
    find_store(streamed.model).use(0, 1)
    fetched.clear()
    assert find_store(streamed.model) and streamed.flat.grads.any() == False  # noqa: E712
    losses, ours = run_steps(streamed)
    assert all(map(torch.equal, losses, expected)) and torch.equal(ours, gradient) and gradient.any()
    assert fetched == [2, 3, 1, 0] * 3  # there, and back; two stay


def test_two_layers_are_on_the_device_and_the_others_hold_nothing_there():
    bases = []
    streamed = build(prepare=lambda base: (bases.append(base), stream_layers(base, CPU)))
    store = find_store(streamed.model)
    slots = {slot.data_ptr() for slot in store.slots}
    weights = [piece.linear.weight for pieces in store.pieces for piece in pieces]
    storages = {x.untyped_storage().data_ptr() for w in weights for x in (w.data, w.quant_state.absmax)}
    assert storages == slots and len(slots) == 2
    assert all(len(held) <= len(store.slots[0]) for held in store.held) and len(store.held) == 4


def test_evaluation_reads_each_layer_and_the_next_step_is_right():
    expected, gradient = run_steps(build(), 2)
    streamed = build(prepare=lambda base: stream_layers(base, CPU))
    losses, _ = run_steps(streamed, 1)
    ids = torch.arange(4, 24)[None]
    plain = build()
    run_steps(plain, 1)
    logits = []
    for fast in (plain, streamed):
        fast.model.eval()
        with torch.no_grad():
            logits.append(fast.model(input_ids=ids, use_cache=False).logits)
        fast.model.train()
    assert torch.equal(*logits)
    streamed.keys.choose_step(seed=0, step=1)
    losses.append(streamed.run(build_batch(packed=True, seed=1), torch.tensor(0.5)))
    assert all(map(torch.equal, losses, expected)) and torch.equal(streamed.flat.grads, gradient)


def test_layer_that_would_not_be_recomputed_is_refused():
    streamed = build(prepare=lambda base: stream_layers(base, CPU), recomputed_layers=2)
    with pytest.raises(RuntimeError, match="layer 2 comes from host memory and is not recomputed"):
        run_steps(streamed, 1)


def test_rows_of_the_embedding_come_from_its_table_elsewhere():
    def move(base):
        tables.append(base.get_input_embeddings().weight.detach().clone())
        move_embedding(base)

    tables = []
    moved = build(prepare=move)
    weight = moved.causal_model.get_input_embeddings().weight
    assert weight.shape == tables[0].shape and weight.untyped_storage().nbytes() == 4 and weight.isnan().all()
    expected, gradient = run_steps(build())
    losses, ours = run_steps(moved)
    assert all(map(torch.equal, losses, expected)) and torch.equal(ours, gradient)
    ids = torch.tensor([[3, 0], [95, 3]])
    assert torch.equal(moved.causal_model.get_input_embeddings()(ids), tables[0][ids])


def test_adapter_rounded_at_its_use_is_the_adapter_whose_copy_is_kept():
    from helpers.architectures import build_model as build_any

    gradients = []
    for keeps_copy in (True, False):
        model = build_any("llama", 0.1, torch.bfloat16, bits=4)
        fast = prepare_fast_model(model.train(), torch.bfloat16, keeps_copy=keeps_copy)
        assert (fast.flat.copy is not None) == keeps_copy
        gradients.append(run_steps(fast)[1])
    assert torch.equal(*gradients) and gradients[0].any()


def test_run_on_streamed_layers_that_is_stopped_and_goes_on_is_the_run_in_place(
    tiny_model, tmp_path, float32_cpu, monkeypatch
):
    """The scripts themselves: loaded into host memory, trained, evaluated, saved, resumed."""
    from helpers import IDENTITY
    from helpers.runs import run_in_process
    from safetensors.torch import load_file

    from utils.train import dry_run

    flags = f"""--model_name_or_path {tiny_model} --dataset_name {IDENTITY} --model_max_length 200 --lora_r 4
        --gradient_accumulation_steps 2 --eval_dataset_size 4 --save_steps 2 --do_train --do_eval
        --gradient_checkpointing True --lora_dropout 0.1""".split()
    adapters = []
    for name, streams, ends in (("placed", False, [4]), ("streamed", True, [2, 4])):
        monkeypatch.setattr(dry_run, "needs_streaming", lambda *_, streams=streams: streams)
        for end in ends:
            run_in_process("qlora_finetune", *flags, "--max_steps", end, "--output_dir", tmp_path / name)
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    losses = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("placed", "streamed")]
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]
