"""The fused path trains what PEFT's modules train: the same loss and adapter gradients on every architecture."""

import json

import pytest
import torch
from helpers import ROOT
from helpers.architectures import (
    CONFIGS,
    DEVICE,
    adapter_gradients,
    build_batch,
    build_model,
    run_plain,
    share_masks,
)
from helpers.models import relative_difference

from utils.fast.model import FastModel, prepare_fast_model

CANNOT_PACK = {"bloom", "opt"}
SCALE = torch.tensor(0.5, device=DEVICE)


def prepare(model, dtype=torch.float32) -> FastModel:
    fast = prepare_fast_model(model, dtype)
    assert isinstance(fast, FastModel), fast
    return fast


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_gradients_equal_pefts(name, dropout):
    plain, fast = build_model(name, dropout), prepare(build_model(name, dropout))
    fast.keys.choose_step(seed=0, step=1)
    share_masks(plain, fast)
    for step in range(2):  # the second is added to the first, as in accumulation
        batch = build_batch(packed=name not in CANNOT_PACK, seed=step)
        fast.keys.read(batch)
        expected = run_plain(plain, batch, SCALE)
        assert fast.run(batch, SCALE).item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = adapter_gradients(plain)
    assert relative_difference(adapter_gradients(fast.model), gradients) < 1e-5
    assert all(gradient.norm() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", ["llama with grouped queries", "gemma", "bloom", "gpt_neox"])
def test_checkpointing_changes_no_gradient(name):
    fast, again = (prepare(build_model(name, 0.3)) for _ in range(2))
    again.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = build_batch(packed=name != "bloom")
    for model in (fast, again):
        model.keys.choose_step(seed=0, step=7)
        model.run(batch, SCALE)
    assert relative_difference(adapter_gradients(again.model), adapter_gradients(fast.model)) < 1e-6
    assert all(
        block._gradient_checkpointing_func.keywords["preserve_rng_state"] is False for block in again.blocks
    )


def test_recomputing_leaves_out_the_product_that_nothing_needs(monkeypatch):
    from utils.fast.lora import AdapterGroup

    fast, calls = prepare(build_model("llama")), []
    fast.model.gradient_checkpointing_enable({"use_reentrant": False})
    multiply = AdapterGroup.multiply
    monkeypatch.setattr(
        AdapterGroup, "multiply", lambda group, *rest: (calls.append(group), multiply(group, *rest))
    )
    fast.run(build_batch(packed=True), SCALE)
    names = {id(module): name for name, module in fast.model.named_modules()}
    counts = {names[id(group.layers[0])].split(".")[-1]: calls.count(group) for group in calls}
    assert counts == {"q_proj": 2, "o_proj": 2, "gate_proj": 2, "down_proj": 1}


def test_dropout_of_the_base_keeps_the_rng_state_of_checkpointing():
    assert not prepare(build_model("opt")).has_own_dropout
    model = build_model("opt")
    model.config.dropout = 0.1
    fast = prepare(model)
    fast.model.gradient_checkpointing_enable({"use_reentrant": False})
    fast.run(build_batch(packed=False), SCALE)
    kept = [
        block
        for block in fast.blocks
        if "preserve_rng_state" not in block._gradient_checkpointing_func.keywords
    ]
    assert fast.has_own_dropout and kept == fast.blocks


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quantized_bases_train_as_their_unpacked_weights(bits):
    from utils.fast.frozen_weights import read_weight

    plain, fast = build_model("llama", bits=16), prepare(build_model("llama", bits=bits))
    twins = dict(plain.named_modules())
    layers = [(n, m) for n, m in fast.model.named_modules() if n.endswith("_proj.base_layer")]
    assert len(layers) == 14
    for name, layer in layers:
        error = (read_weight(layer, torch.float32) - twins[name].weight).norm() / twins[name].weight.norm()
        assert error < {4: 0.15, 8: 0.02, 16: 1e-9}[bits]
        twins[name].weight.data = read_weight(layer, torch.float32)
    batch = build_batch(packed=True)
    expected = run_plain(plain, batch, SCALE)
    assert fast.run(batch, SCALE).item() == pytest.approx(expected.item(), rel=1e-4)
    assert relative_difference(adapter_gradients(fast.model), adapter_gradients(plain)) < 1e-4


def test_sixteen_bits_stay_within_sixteen_bit_noise():
    plain, fast = build_model("llama"), prepare(build_model("llama", dtype=torch.bfloat16), torch.bfloat16)
    batch = build_batch(packed=True)
    expected = run_plain(plain, batch, SCALE)
    assert fast.run(batch, SCALE).item() == pytest.approx(expected.item(), rel=1e-2)
    assert relative_difference(adapter_gradients(fast.model), adapter_gradients(plain)) < 0.05


def test_in_float32_evaluation_is_pefts_own():
    plain, fast = build_model("llama", 0.5), prepare(build_model("llama", 0.5))
    ids = build_batch(packed=False)["input_ids"]
    tolerance = 0.0 if DEVICE == "cpu" else 1e-5  # a GPU's fused norms add in another order
    with torch.no_grad():
        found, expected = fast.model.eval()(ids).logits, plain.eval()(ids).logits
        assert relative_difference({"": found}, {"": expected}) <= tolerance
        with fast.model.disable_adapter(), plain.disable_adapter():
            found, expected = fast.model(ids).logits, plain(ids).logits
        assert relative_difference({"": found}, {"": expected}) <= tolerance


def test_adapter_saves_and_loads_as_before(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fast = prepare(build_model("llama"))
    optimizer = torch.optim.AdamW([fast.flat.weights], lr=1e-2)
    batch = build_batch(packed=True)
    before = fast.run(batch, SCALE).item()
    optimizer.step()
    fast.model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).to(DEVICE)
    twin = build_model("llama").get_base_model()
    base.load_state_dict(
        {n.replace(".base_layer", ""): p for n, p in twin.state_dict().items() if "lora" not in n}
    )
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    after = run_plain(loaded, batch, SCALE).item()
    assert after < before - 0.5
    fast.flat.zero_gradients()
    assert fast.run(batch, SCALE).item() == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("zero", ["model.zero_grad()", "optimizer.zero_grad()", "in place"])
def test_gradients_start_anew_however_they_are_zeroed(zero):
    fast = prepare(build_model("llama"))
    optimizer = torch.optim.AdamW([fast.flat.weights])
    for step in range(2):
        fast.run(build_batch(packed=True), SCALE)
        if step == 0:
            first = adapter_gradients(fast.model)
            if zero == "model.zero_grad()":
                fast.model.zero_grad()
            elif zero == "optimizer.zero_grad()":
                optimizer.zero_grad()
            else:
                fast.flat.zero_gradients()
    assert relative_difference(adapter_gradients(fast.model), first) < 1e-6
    assert fast.flat.weights.grad is fast.flat.grads
    norm = torch.stack([gradient.norm() for gradient in first.values()]).norm()
    assert fast.flat.clip_gradients(0.1).item() == pytest.approx(norm.item(), rel=1e-5)
    assert fast.flat.grads.norm().item() == pytest.approx(0.1, rel=1e-4)


def test_what_cannot_be_fused_is_named():
    model = build_model("llama")
    assert "every weight is trained" in prepare_fast_model(model.get_base_model(), torch.float32)
    model.base_model.model.model.norm.weight.requires_grad = True
    assert "norm.weight is trained besides the adapter" in prepare_fast_model(model, torch.float32)


def test_dora_keeps_pefts_forward(capsys):
    from peft import LoraConfig, get_peft_model

    base = build_model("llama").unload()
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    message = prepare_fast_model(get_peft_model(base, config), torch.float32)
    assert "lora_magnitude_vector" in message


def read_identity_batches(tokenizer, rows_each: int, count: int) -> list[dict]:
    """Packed micro-batches of our own small data set, labels on the whole rows."""
    lines = (ROOT / "data" / "guanaco_identity.jsonl").read_text().splitlines()
    rows = [tokenizer(" ".join(str(x) for x in json.loads(line).values())).input_ids for line in lines]
    batches = []
    for start in range(0, rows_each * count, rows_each):
        chosen = [rows[i % len(rows)][:160] for i in range(start, start + rows_each)]
        ends = torch.tensor([0] + [len(row) for row in chosen]).cumsum(0)
        ids = torch.tensor([sum(chosen, [])])
        labels = ids.clone()
        labels[:, ends[:-1]] = -100
        batches.append(
            {
                "input_ids": ids,
                "labels": labels,
                "position_ids": torch.cat([torch.arange(len(row)) for row in chosen])[None],
                "cu_seqlens": ends.to(torch.int32),
                "max_length": max(map(len, chosen)),
                "label_positions": (labels[0, 1:] != -100).nonzero().flatten(),
            }
        )
    return [
        {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in batch.items()} for batch in batches
    ]


@pytest.mark.slow
def test_twenty_steps_on_a_real_model_equal_pefts(smollm2, smol_tokenizer):
    from utils.arguments import LoraArguments, ModelArguments
    from utils.models.adapter import add_lora
    from utils.models.base import load_base

    dtype = torch.float32
    batches = read_identity_batches(smol_tokenizer, rows_each=2, count=20)
    held_out = read_identity_batches(smol_tokenizer, rows_each=8, count=3)[-1]
    history = []
    for is_fast in (False, True):
        torch.manual_seed(0)
        model = add_lora(load_base(ModelArguments(str(smollm2)), dtype), LoraArguments(lora_r=8)).train()
        fast = prepare(model, dtype) if is_fast else None
        weights = [fast.flat.weights] if is_fast else [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=2e-4)
        losses, gradients = [], []
        for batch in batches:
            scale = torch.tensor(1 / len(batch["label_positions"]), device=DEVICE)
            loss = fast.run(batch, scale) if is_fast else run_plain(model, batch, scale)
            losses.append((loss * scale).item())
            gradients.append(torch.cat([g.flatten() for g in adapter_gradients(model).values()]))
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            names = ("input_ids", "position_ids")
            logits = model(**{n: held_out[n] for n in names}, use_cache=False).logits[0, :-1].float()
            final = torch.nn.functional.cross_entropy(logits, held_out["labels"][0, 1:]).item()
        history.append((losses, gradients, final))
    (plain_losses, plain_gradients, plain_final), (losses, gradients, final) = history
    assert losses == pytest.approx(plain_losses, abs=1e-2)
    assert losses[-1] < losses[0]
    for first, second in zip(gradients, plain_gradients, strict=True):
        assert torch.cosine_similarity(first, second, dim=0) > 0.999
    assert final == pytest.approx(plain_final, rel=5e-3)
