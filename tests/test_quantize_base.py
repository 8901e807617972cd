"""A base quantized once: what transformers loads from it, and what runs on it, is what loading in 4 bits gives."""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import IDENTITY
from helpers.models import save_random_model
from helpers.runs import run_in_process
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from utils.console import UserError
from utils.merge import shards

FLAGS = f"""--dataset_name {IDENTITY} --model_max_length 200 --lora_r 4 --gradient_accumulation_steps 1
    --learning_rate 1e-2 --eval_dataset_size 4 --save_steps 2""".split()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model whose weights lie in bfloat16, as published ones do."""
    folder = save_random_model(tmp_path_factory.mktemp("bases") / "tiny", seed=0)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(original):
    folder = original.parent / "tiny-4bit"
    run_in_process("utils.quantize_base", original, folder, "--bits", 4)
    return folder


def list_quantized(model):
    """{name: (codes, tensors of the scales)}"""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    states = {name: layer.weight.quant_state.as_dict(packed=True) for name, layer in layers.items()}
    return {name: {"codes": layer.weight.data} | states[name] for name, layer in layers.items()}


@pytest.mark.parametrize("kind, double", [("nf4", True), ("fp4", False)])
def test_transformers_loads_what_quantizing_while_loading_makes(
    kind, double, original, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards.save_sharded, "__defaults__", (30_000,))  # several shards
    flags = ["--quant_type", kind, "--double_quant", double]
    run_in_process("utils.quantize_base", original, tmp_path / "out", *flags)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 3
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(original, quantization_config=how, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    theirs, ours = list_quantized(expected), list_quantized(loaded)
    assert theirs.keys() == ours.keys() and len(ours) == 14
    for name, parts in theirs.items():
        assert parts.keys() == ours[name].keys()
        assert all(torch.equal(part, ours[name][end]) for end, part in parts.items()), name
    rest = {name: weight for name, weight in loaded.named_parameters() if "_proj" not in name}
    assert rest and all(torch.equal(weight, expected.get_parameter(name)) for name, weight in rest.items())


def test_run_on_it_is_the_run_on_the_original(original, quantized, tmp_path, float32_cpu, capsys):
    """Trained, killed after two steps and gone on with; evaluated, answered and merged."""
    for base, steps in ((original, (4,)), (quantized, (2, 4))):
        for count in steps:
            flags = ["--max_steps", count, "--output_dir", tmp_path / base.name, "--do_train", "--do_eval"]
            run_in_process("qlora_finetune", "--model_name_or_path", base, *FLAGS, *flags)
    adapters = [
        load_file(tmp_path / base.name / "adapter_model.safetensors") for base in (original, quantized)
    ]
    assert all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    losses = [
        json.loads((tmp_path / base.name / "metrics.json").read_text()) for base in (original, quantized)
    ]
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]
    capsys.readouterr()
    for base in (original, quantized):
        run = tmp_path / base.name
        run_in_process("utils.merge_adapter", "--checkpoint_dir", run, "--output_dir", f"{run}-merged")
    assert "stored in 4 bits: its weights are unpacked" in capsys.readouterr().out
    merged = [
        load_file(tmp_path / f"{base.name}-merged" / "model.safetensors") for base in (original, quantized)
    ]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(weight, merged[1][name]) for name, weight in merged[0].items())
    config = json.loads((tmp_path / "tiny-4bit-merged" / "config.json").read_text())
    assert "quantization_config" not in config and AutoModelForCausalLM.from_pretrained(
        tmp_path / "tiny-4bit-merged", dtype=torch.float32
    )


def test_bits_of_the_folder_are_taken_and_other_ones_refused(original, quantized, tmp_path, capsys):
    run_in_process(
        "qlora_int8_finetune", "--model_name_or_path", quantized, *FLAGS, "--max_steps", 1, "--output_dir",
        tmp_path / "run",
    )  # fmt: skip
    assert "is stored quantized and taken as it is: bits 4, quant_type nf4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["bits"] == 4
    for flags, words in (
        (["--bits", 8], "--bits 8: .* is stored with bits 4"),
        (["--quant_type", "fp4"], "--quant_type fp4: .* is stored with quant_type nf4"),
    ):
        with pytest.raises(UserError, match=words):
            run_in_process("qlora_finetune", "--model_name_or_path", quantized, *FLAGS, *flags)
    with pytest.raises(UserError, match="stored quantized, --merge_base original: name the 16-bit model"):
        run_in_process(
            "utils.merge_adapter", "--checkpoint_dir", tmp_path / "run", "--output_dir", tmp_path / "merged",
            "--merge_base", "original",
        )  # fmt: skip


@pytest.mark.parametrize(
    "words, problem",
    [
        (["{original}", "{quantized}"], "is there already"),
        (["{original}"], "name a model and a new folder"),
        (["{original}", "{new}", "--bits", "8"], "--bits 8: only 4 bits"),
        (["{quantized}", "{new}"], "is stored quantized already"),
        (["{new}", "{new}-too"], "no such folder"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(words, problem, original, quantized, tmp_path):
    folders = {"original": original, "quantized": quantized, "new": tmp_path / "new"}
    with pytest.raises(UserError, match=problem):
        run_in_process("utils.quantize_base", *(word.format(**folders) for word in words))
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_one_line(original, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(original, broken)
    for path in broken.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"\.safetensors is damaged"):
        run_in_process("utils.quantize_base", broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_base_of_another_method_is_refused(tmp_path, original):
    import shutil

    shutil.copytree(original, tmp_path / "gptq")
    config = json.loads((original / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is stored quantized by gptq: name the 16-bit model"):
        run_in_process("qlora_finetune", "--model_name_or_path", tmp_path / "gptq", *FLAGS)
