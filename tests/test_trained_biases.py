"""--bias all, lora_only: biases learn at the adapter's rate in every width of the base, and reach every reader."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from helpers.architectures import DEVICE, adapter_gradients, build_batch, build_model, run_plain
from helpers.models import relative_difference
from helpers.rows import write_sums
from helpers.runs import forget_second_step
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from utils.arguments import LoraArguments, ModelArguments
from utils.fast.frozen_weights import read_weight, unpack_8bit_layers
from utils.models.adapter import add_adapter
from utils.models.base import load_base
from utils.models.trained_biases import keep_biases_in_float32

RATE = 2e-4  # QLoRA's
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


def build_pair(name, bits, dtype, bias="all"):
    """The model as it is trained, and PEFT's own in float32 on the same weights, unpacked."""
    model, twin = build_model(name, dtype=dtype, bits=bits, bias=bias), build_model(name, bias=bias)
    parameters, modules = dict(twin.named_parameters()), dict(twin.named_modules())
    for path, weight in model.named_parameters():
        if weight.is_floating_point():
            parameters[path].data = weight.data.float()
    for path, layer in model.named_modules():
        if isinstance(layer, (Linear4bit, Linear8bitLt)):
            modules[path].weight.data = read_weight(layer, torch.float32)
    if bits == 8:
        unpack_8bit_layers(model)
    keep_biases_in_float32(model)
    return model, twin


def find_biases(model) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if name.endswith(".bias")}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["qwen2 with biases", "gpt_neox", "opt", "bloom"])
def test_gradients_equal_pefts_in_float32(name, dtype, bits):
    model, twin = build_pair(name, bits, dtype)
    batch = build_batch(packed=False)
    for each in (model, twin):
        run_plain(each, batch, 0.5)
    biases = [
        f"{path}.bias" for path, module in twin.named_modules() if getattr(module, "bias", None) is not None
    ]
    gradients, expected = adapter_gradients(model), adapter_gradients(twin)
    assert set(biases) >= {path for path in gradients if "lora_" not in path} and len(find_biases(model)) > 5
    assert relative_difference(gradients, expected) < ROUNDING[dtype]
    for part in ("lora_", ".bias"):
        chosen = [{path: x for path, x in each.items() if part in path} for each in (gradients, expected)]
        assert relative_difference(*chosen) < ROUNDING[dtype]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_every_bias_moves_by_the_learning_rate(bits, bias):
    """Adam's first step is the rate, whatever the gradient; half of the biases are above 0.05."""
    model, _ = build_pair("gpt_neox", bits, torch.bfloat16, bias)
    trained = {name: x for name, x in find_biases(model).items() if x.requires_grad}
    before = {name: x.detach().clone() for name, x in trained.items()}
    optimizer = torch.optim.AdamW(
        [x for x in model.parameters() if x.requires_grad], lr=RATE, eps=0, weight_decay=0
    )
    run_plain(model, build_batch(packed=False), 0.5)
    assert len(trained) == (13 if bias == "all" else 8)
    optimizer.step()
    for name, x in trained.items():
        assert x.dtype == torch.float32 and before[name].abs().max() > 0.05
        moved = (x - before[name]).abs()[x.grad != 0]
        torch.testing.assert_close(moved, torch.full_like(moved, RATE), rtol=1e-2, atol=0)
        assert len(moved) >= len(x) // 2  # a key's bias adds the same to all scores of a query


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_float16_gradients_can_be_unscaled(bits):
    model, _ = build_pair("qwen2 with biases", bits, torch.float16)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, scaler = torch.optim.AdamW(trained, lr=RATE), torch.amp.GradScaler(DEVICE, init_scale=4.0)
    before = {name: x.detach().clone() for name, x in find_biases(model).items()}
    run_plain(model, build_batch(packed=False), scaler.scale(torch.ones((), device=DEVICE)) / 60)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(not torch.equal(x, before[name]) for name, x in find_biases(model).items())


def test_checkpointing_autocast_and_calls_without_gradient():
    model, twin = build_pair("gpt_neox", 4, torch.bfloat16)
    batch = build_batch(packed=False)
    run_plain(twin, batch, 0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast(DEVICE, torch.bfloat16):
        run_plain(model, batch, 0.5)
    assert relative_difference(adapter_gradients(model), adapter_gradients(twin)) < 0.05
    with torch.no_grad():
        logits, expected = (each.eval()(batch["input_ids"]).logits.float() for each in (model, twin))
    assert (logits - expected).norm() < 0.02 * expected.norm()
    assert all(x.dtype == torch.float32 for x in find_biases(model).values())


@pytest.fixture(scope="module")
def biased_model(small_model, tmp_path_factory):
    """A random GPT-NeoX that reads bytes; every linear layer and norm has biases, none of them zero."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **sizes))
    for bias in find_biases(model).values():
        torch.nn.init.normal_(bias, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def in_bfloat16(monkeypatch):
    """As on a machine that has it."""
    monkeypatch.setattr("utils.models.base.choose_compute_dtype", lambda model_args: torch.bfloat16)


@pytest.mark.parametrize("flags", [["--bits", 4], ["--bits", 8, "--use_dora"]], ids=str)
def test_run_resumes_goes_on_merges_and_is_read_by_peft(
    call_main, biased_model, in_bfloat16, tmp_path, flags
):
    run, data = tmp_path / "run", write_sums(tmp_path / "rows.jsonl", 16)
    argv = ["--model_name_or_path", biased_model, "--dataset_name", data, "--template", "vanilla"]
    argv += ["--lora_r", 4, "--bias", "all", "--max_steps", 2, "--save_steps", 1]
    argv += ["--learning_rate", RATE, "--adam_epsilon", 1e-12]
    printed = call_main("qlora_finetune", *argv, *flags, "--output_dir", run)
    assert "the plain path is used" in printed and "bias is trained besides the adapter" in printed
    base, saved = load_file(biased_model / "model.safetensors"), load_file(run / "adapter_model.safetensors")
    biases = {
        name.removeprefix("base_model.model."): x for name, x in saved.items() if name.endswith(".bias")
    }
    assert len(biases) == 7
    for name, bias in biases.items():
        before = base[name.replace(".base_layer.", ".")].bfloat16().float()
        assert bias.dtype == torch.float32 and ((bias - before).abs() > RATE / 4).float().mean() > 0.5

    forget_second_step(run)
    assert "checkpoint-1" in call_main("qlora_finetune", *argv, *flags, "--output_dir", run)
    again = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in saved.items())

    model_args = ModelArguments(str(biased_model), checkpoint_dir=str(run), bits=flags[1])
    going_on = add_adapter(load_base(model_args, torch.bfloat16), model_args, LoraArguments(bias="all"), True)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(biased_model), run)
    for model in (going_on, by_peft):
        loaded = model.get_base_model().state_dict()
        assert all(torch.equal(loaded[name], bias) for name, bias in biases.items())

    call_main(
        "utils.merge_adapter", "--checkpoint_dir", run, "--output_dir", tmp_path / "merged", "--no_parity"
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(
        torch.equal(merged[name.replace(".base_layer.", ".")], bias.bfloat16())
        for name, bias in biases.items()
    )
