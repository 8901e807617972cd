"""In 16 bits evaluation, samples and MMLU compute what training computes: PEFT's own would round it away."""

import json

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from helpers import slow_but
from helpers.architectures import DEVICE, VOCABULARY, build_batch, build_model
from helpers.rows import write_sums
from helpers.runs import read_log
from torch.nn import functional as F

from utils.fast import lora as fast_lora
from utils.fast.few_tokens import multiply_few
from utils.fast.frozen_weights import read_weight
from utils.fast.lora_layers import install_fast_evaluation
from utils.fast.model import prepare_fast_model

BF16 = torch.bfloat16
NOISE = 1e-4 if DEVICE == "cpu" else 2e-3  # of a loss: a GPU attends to packed rows in other kernels


def prepare(name, bits):
    return prepare_fast_model(build_model(name, dtype=BF16, bits=bits), BF16)


@torch.no_grad()
def measure_kept_share(layer, multiply, tokens) -> float:
    """Of an adapter's part far below the rounding of y, the share that is still in y: 1 is all of it."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(256 // tokens, tokens, layer.in_features, generator=generator).to(DEVICE, BF16)
    torch.nn.init.normal_(B, std=5e-5)
    part = 2.0 * (xs.double() @ A.to(BF16).double().t()) @ B.to(BF16).double().t()
    tuned = torch.stack([multiply(x) for x in xs]).double()
    B.zero_()
    change = tuned - torch.stack([multiply(x) for x in xs]).double()
    assert part.abs().mean() < 0.2 * (tuned.abs() * 2**-8).mean()
    return ((change * part).sum() / part.square().sum()).item()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", ["q_proj", "o_proj"])  # three that read one input, with biases; a single one
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_no_part_of_the_adapter_is_rounded_away(name, tokens, bits):
    fast = prepare("qwen2 with biases", bits)
    layer = fast.model.get_submodule(f"base_model.model.model.layers.0.self_attn.{name}")
    group = layer.forward.func.__self__.group

    def call(x):
        fast.flat.refresh_copy()
        return layer(x[None])[0]

    def call_few(x):
        fast.flat.refresh_copy()
        return multiply_few(group, group.layers.index(layer), x)

    assert measure_kept_share(layer, call, tokens) == pytest.approx(1, abs=0.15)
    if bits != 8 and tokens < 8:  # on a GPU
        assert measure_kept_share(layer, call_few, tokens) == pytest.approx(1, abs=0.15)
    if tokens == 64:
        plain = layer.forward.args[1]
        assert measure_kept_share(layer, lambda x: plain(x[None])[0], tokens) < 0.6


@torch.no_grad()
def measure_loss(model, batch, autocast=False) -> float:
    """By the model's own logits, as the Trainer does it."""
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels).item()


def copy_weights(model, twin) -> None:
    """Into PEFT's own model in float32."""
    parameters, modules = dict(twin.named_parameters()), dict(twin.named_modules())
    for path, weight in model.named_parameters():
        if weight.is_floating_point():
            parameters[path].data = weight.data.float().clone()
    for path, layer in model.named_modules():
        if isinstance(layer, (Linear4bit, Linear8bitLt)):
            modules[path].weight.data = read_weight(layer, torch.float32)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", ["llama with grouped queries", "gpt_neox", "qwen2 with biases"])
def test_evaluation_is_the_loss_of_training_after_every_step(name, bits):
    fast, twin = prepare(name, bits), build_model(name)
    batch = build_batch(packed=False)
    count = (batch["labels"][:, 1:] != -100).sum()
    optimizer = torch.optim.AdamW([fast.flat.weights], lr=2e-4)
    for _ in range(4):
        copy_weights(fast.model, twin)
        exact = measure_loss(twin, batch)
        evaluated = [measure_loss(fast.model.eval(), batch, autocast) for autocast in (False, True)]
        trained = (fast.run(batch, 1 / count) / count).item()
        assert evaluated == pytest.approx([trained] * 2, abs=NOISE)
        assert trained == pytest.approx(exact, abs=4e-3)
        optimizer.step()
        fast.flat.zero_gradients()


def test_adapter_that_is_switched_off_or_merged_counts_not_at_all_or_once():
    plain, fast = build_model("llama", dtype=BF16), prepare("llama", 16)
    ids = build_batch(packed=False)["input_ids"]
    with torch.no_grad():
        with fast.model.disable_adapter(), plain.disable_adapter():
            base = plain(ids).logits.float()
            assert (fast.model(ids).logits - base).norm() < 0.005 * base.norm()
        tuned = fast.model.eval()(ids).logits.float()
        fast.model.merge_adapter()
        assert (fast.model(ids).logits - tuned).norm() < 0.02 * tuned.norm()
        fast.model.unmerge_adapter()


def test_few_tokens_of_a_reply_copy_no_weight(monkeypatch):
    fast, read = prepare("llama", 16), []
    monkeypatch.setattr(fast_lora, "read_weight", lambda *args: (read.append(args), read_weight(*args))[1])
    ids = torch.arange(3, 11, device=DEVICE)[None]
    with torch.no_grad():
        expected = fast.model.eval()(ids).logits[:, :7]
        assert len(read) == 14
        few = fast.model(ids[:, :7]).logits
    assert len(read) == 14 and (few - expected).norm() < 0.02 * expected.norm()


def test_trained_adapter_is_evaluated_as_in_its_training(monkeypatch):
    """Loaded again, without anything of the training: the same logits."""
    fast, loaded = prepare("llama", 4), build_model("llama", dtype=BF16, bits=4).requires_grad_(False)
    ids = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        expected, own = fast.model.eval()(ids).logits.float(), loaded.eval()(ids).logits.float()
        install_fast_evaluation(loaded, BF16)
        again = loaded(ids).logits.float()
    assert (again - expected).norm() <= (0 if DEVICE == "cpu" else 0.5) * (own - expected).norm()
    assert (own - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("bits", slow_but([4], [4, 16]))
def test_logged_evaluation_is_the_next_steps_loss(call_main, small_model, monkeypatch, tmp_path, bits):
    """The rows of the step are those held out; then the finished run is evaluated once more, from its folder."""
    monkeypatch.setenv("QLORA_CPU_DTYPE", "bfloat16")
    # A run would not train on what it holds out.
    monkeypatch.setattr(
        "utils.data.rows.find_copies",
        lambda sources, scans: np.concatenate([scan.hashes for scan in scans]) == 0,
    )
    data, run = write_sums(tmp_path / "rows.jsonl", 8), tmp_path / "run"
    argv = ["--model_name_or_path", small_model, "--dataset_name", data, "--eval_dataset_name", data]
    argv += [
        "--template",
        "vanilla",
        "--source_max_len",
        100,
        "--target_max_len",
        100,
        "--bits",
        bits,
        "--do_train",
        "--do_eval",
        "--output_dir",
        run,
    ]
    argv += ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1, "--max_steps", 4]
    argv += ["--logging_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--eval_on_start", "True"]
    call_main("qlora_finetune", *argv, "--save_strategy", "no", "--learning_rate", 2e-4)
    trained, evaluated = read_log(run, "loss"), read_log(run, "eval_loss")
    assert evaluated[:4] == pytest.approx(trained, abs=NOISE) and evaluated[3] < evaluated[0]
    call_main("qlora_finetune", "--checkpoint_dir", run, "--do_eval", "--bits", bits, "--output_dir", run)
    again = json.loads((run / "eval_metrics.json").read_text())["eval_loss"]
    assert again == pytest.approx(evaluated[-1], abs=NOISE)
