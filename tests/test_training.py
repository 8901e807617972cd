"""What is learned: the right gradients, whatever the batch, the packing and the quantization."""

import json
import shutil

import pytest
import torch
from helpers import IDENTITY, slow_but
from helpers.models import relative_difference
from helpers.runs import load_weights, read_log, train, trainer_kept
from safetensors.torch import load_file, save_file

from utils.train.training import measure_peak_memory

SHORT = ["--source_max_len", "200", "--target_max_len", "100"]
FLAGS = [*SHORT, *"--gradient_checkpointing False --logging_steps 1 --save_strategy no --lora_r 4".split()]


@pytest.mark.parametrize("packing", ["True", "False"])
def test_batch_of_four_equals_four_accumulated_rows(call_main, tiny_model, tmp_path, packing):
    flags = ["--bits", "32", "--max_steps", "3", "--learning_rate", "1e-2", "--packing", packing]
    flags += ["--lora_dropout", "0.1", "--neftune_noise_alpha", "5"]
    flags += ["--adam_epsilon", "1e-4"]  # tiny gradients: Adam's sign of rounding noise must not count
    for name, batch, accumulation in (("whole", 4, 1), ("parts", 1, 4)):
        sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        train(call_main, tiny_model, tmp_path / name, *FLAGS, *flags, *sizes)
    whole, parts = load_weights(tmp_path / "whole"), load_weights(tmp_path / "parts")
    assert relative_difference(parts, whole) < 1e-5
    norms = read_log(tmp_path / "whole", "grad_norm")
    assert read_log(tmp_path / "parts", "grad_norm") == pytest.approx(norms, rel=1e-5) and min(norms) > 0


def test_packed_run_equals_the_padded_run_of_the_same_command(call_main, tiny_model, tmp_path):
    """Steps, checkpoints, gradients and adapter; three steps an epoch, the last of them of fewer rows."""
    flags = ["--bits", 32, "--max_steps", 5, "--learning_rate", 1e-2, "--adam_epsilon", 1e-4]
    flags += ["--lora_dropout", 0.1, "--neftune_noise_alpha", 5]
    flags += [
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
        "--max_train_samples",
        21,
    ]
    for packing in ("True", "False"):
        run_flags = [*flags, "--packing", packing, "--save_strategy", "steps", "--save_steps", 2]
        train(call_main, tiny_model, tmp_path / packing, *FLAGS, *run_flags)
    packed, padded = tmp_path / "True", tmp_path / "False"
    assert relative_difference(load_weights(packed), load_weights(padded)) < 1e-5
    assert read_log(packed, "grad_norm") == pytest.approx(read_log(padded, "grad_norm"), rel=1e-5)
    assert len(read_log(packed, "grad_norm")) == 5
    names = [sorted(path.name for path in run.glob("checkpoint-*")) for run in (packed, padded)]
    assert names[0] == names[1] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    states = [
        json.loads((run / "checkpoint-4" / "trainer_state.json").read_text()) for run in (packed, padded)
    ]
    assert states[0]["epoch"] == pytest.approx(states[1]["epoch"], abs=0.05)
    assert states[0]["global_step"] == states[1]["global_step"] == 4


@pytest.mark.parametrize(
    ("bits", "model", "targets"),
    [
        (4, "tiny_model", ["all-linear"]),
        (32, "tiny_model", ["all-linear"]),
        (32, "small_model", ["q_proj", "lm_head"]),
    ],
)
def test_fast_path_trains_what_the_plain_path_trains(
    call_main, request, tmp_path, float32_cpu, bits, model, targets
):
    model = request.getfixturevalue(model)
    flags = ["--bits", bits, "--lora_target_modules", *targets, "--ignore_data_report"]
    flags += ["--max_steps", 4, "--learning_rate", 1e-2, "--adam_epsilon", 1e-4]
    flags += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--lora_dropout", 0.1]
    for fast in ("True", "False"):
        printed = train(call_main, model, tmp_path / fast, *FLAGS, *flags, "--fast_lora", fast)
        assert "plain path" not in printed
    assert relative_difference(load_weights(tmp_path / "True"), load_weights(tmp_path / "False")) < 1e-3
    norms = read_log(tmp_path / "False", "grad_norm")
    assert read_log(tmp_path / "True", "grad_norm") == pytest.approx(norms, rel=1e-3)


def test_float32_base_trains_in_the_16_bits_that_it_is_evaluated_in(
    call_main, small_model, tmp_path, monkeypatch
):
    """Both losses are those of the base under autocast, to a tenth of what float32 is away from it."""
    from torch.nn import functional as F
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("QLORA_CPU_DTYPE", "bfloat16")
    flags = ["--bits", 32, "--bf16", "--max_steps", 1, "--max_train_samples", 3, "--max_eval_samples", 3]
    flags += ["--template", "vanilla", "--source_max_len", 30, "--target_max_len", 30, "--ignore_data_report"]
    flags += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1]
    flags += ["--do_train", "--do_eval", "--eval_on_start", "True", "--packing", "False"]
    folder = shutil.copytree(small_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")  # as it is, rounding moves the loss by 3e-6 only
    save_file({n: x * 4 for n, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with trainer_kept() as kept:
        printed = train(call_main, folder, tmp_path / "run", *FLAGS, *flags)
    assert (
        "the plain path is used (no adapted layer is covered: a base in torch.float32 under torch.bf"
        in printed
    )
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def compute_loss(rows, dtype):
        ids, labels = (
            [torch.from_numpy(rows[i][name]) for i in range(len(rows))] for name in ("input_ids", "labels")
        )
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            logits = model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten()).item()

    for name, rows in (("loss", kept[0].train_dataset), ("eval_loss", kept[0].eval_dataset)):
        found = next(entry[name] for entry in log if name in entry)
        exact, expected = (compute_loss(rows, dtype) for dtype in (torch.float32, torch.bfloat16))
        assert abs(found - expected) < 0.1 * abs(exact - expected), (name, found, expected, exact)


def test_flags_of_the_trainer_reach_it(call_main, tiny_model, tmp_path, monkeypatch):
    """Whatever our own code fills in on the way: the output folder, the optimizer."""
    flags = ["--max_steps", 1, "--eval_on_start", "True", "--do_train", "--do_eval", "--max_eval_samples", 4]
    train(call_main, tiny_model, tmp_path / "run", *FLAGS, *flags)
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 1]

    from utils.arguments import DataArguments, ModelArguments, TrainingArguments
    from utils.flags.checks import resolve_arguments

    training_args = TrainingArguments()
    training_args.extra = {"neftune_noise_alpha": 5.0}
    data_args = DataArguments("data/guanaco_identity.jsonl", source_max_len=100, target_max_len=100)
    *_, resolved = resolve_arguments(ModelArguments(str(tiny_model)), data_args, training_args, set())
    assert resolved.output_dir.startswith("output/guanaco_identity-")
    assert resolved.extra == training_args.extra and training_args.output_dir is None


@pytest.mark.parametrize(
    "script", ["qlora_finetune", pytest.param("qlora_int8_finetune", marks=pytest.mark.slow)]
)
def test_two_runs_with_one_seed_are_bitwise_equal(call_main, tiny_model, tmp_path, script):
    flags = ["--max_steps", "3", "--lora_dropout", "0.1", "--per_device_train_batch_size", "4"]
    flags += ["--gradient_accumulation_steps", "2"]
    for name in ("first", "second"):
        train(call_main, tiny_model, tmp_path / name, *FLAGS, *flags, script=script)
    first, second = load_weights(tmp_path / "first"), load_weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(weights.abs().sum() > 0 for name, weights in first.items() if "lora_B" in name)


@pytest.fixture
def quantized_pair(smollm2):
    """(NF4 model with an adapter, the dequantized 16-bit base with the same adapter), float32 compute."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    from utils.arguments import LoraArguments, ModelArguments
    from utils.models.adapter import add_lora
    from utils.models.base import load_base

    model_args = ModelArguments(str(smollm2), bits=4)
    base = load_base(model_args, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).requires_grad_(False)
    weights = {
        name: module.weight for name, module in base.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(
            weight.data, weight.quant_state
        )
    assert len(weights) == 7 * 30
    torch.manual_seed(0)
    models = [add_lora(model, LoraArguments(lora_r=8)) for model in (base, plain)]
    adapter = {
        name: torch.randn_like(weight) * 0.02
        for name, weight in models[0].named_parameters()
        if "lora_" in name
    }
    for model in models:
        model.load_state_dict(adapter, strict=False)
    return models


def adapter_gradients(model, batch):
    model.train()
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_nf4_gradients_equal_those_of_the_dequantized_base_even_after_an_evaluation(
    quantized_pair, smol_tokenizer
):
    quantized, plain = quantized_pair
    batch = dict(
        smol_tokenizer(["The llama grazes above the clouds, far from the city."], return_tensors="pt")
    )
    expected = adapter_gradients(plain, batch)
    assert relative_difference(adapter_gradients(quantized, batch), expected) < 1e-2
    quantized.eval()
    with torch.no_grad():
        quantized(**batch)
    assert relative_difference(adapter_gradients(quantized, batch), expected) < 1e-2


def test_evaluation_loss_does_not_depend_on_the_batch_size(call_main, tiny_model, tmp_path):
    losses = []
    for size in (1, 5):
        argv = ["--model_name_or_path", tiny_model, "--dataset_name", IDENTITY, "--do_eval", *SHORT]
        argv += ["--output_dir", tmp_path / str(size), "--per_device_eval_batch_size", size, "--bits", "32"]
        call_main("qlora_finetune", *argv)
        losses.append(json.loads((tmp_path / str(size) / "eval_metrics.json").read_text())["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 5


def test_held_out_loss_is_not_smoothed(call_main, tiny_model, tmp_path):
    losses = []
    for smoothing in (0, 0.3):
        run = tmp_path / str(smoothing)
        argv = [
            "--model_name_or_path",
            tiny_model,
            "--dataset_name",
            IDENTITY,
            "--do_eval",
            *SHORT,
            "--bits",
            "32",
        ]
        call_main("qlora_finetune", *argv, "--output_dir", run, "--label_smoothing_factor", smoothing)
        losses.append(json.loads((run / "eval_metrics.json").read_text())["eval_loss"])
    assert losses[0] == losses[1]


SETTINGS = {
    "fp4 without double quantization": ["--quant_type", "fp4", "--no_double_quant"],
    "8 bits": ["--bits", "8"],
    "16 bits": ["--bits", "16"],
    "rslora": ["--use_rslora"],
    "dora": ["--use_dora"],
    "some modules and their biases": ["--lora_target_modules", "q_proj", "v_proj", "--bias", "lora_only"],
    "8-bit Adam": ["--adam8bit"],
    "checkpointing": ["--gradient_checkpointing", "True"],
    "padded, by length": ["--packing", "False", "--group_by_length"],
    "bf16 asked for": ["--bf16"],
    "fp16 asked for": ["--fp16"],
    "train on source": ["--train_on_source"],
    "template": ["--template", "alpaca"],
    "another Trainer flag": ["--neftune_noise_alpha", "5"],
    "label smoothing": ["--label_smoothing_factor", "0.1"],
}


FEW = ["8 bits", "dora", "some modules and their biases", "padded, by length", "bf16 asked for"]


@pytest.mark.parametrize("setting", slow_but(FEW, SETTINGS))
def test_setting_trains_and_its_adapter_learns(call_main, tiny_model, tmp_path, setting):
    flags = [*FLAGS, "--max_steps", "2", "--gradient_accumulation_steps", "4", *SETTINGS[setting]]
    train(call_main, tiny_model, tmp_path / "run", *flags)
    weights = load_weights(tmp_path / "run")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    layers = {name.split(".")[-3] for name in weights if "lora_A" in name}
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers == ({"q_proj", "v_proj"} if "some modules" in setting else everything)


@pytest.mark.parametrize("bits", slow_but(["16"], ["16", "32"]))
def test_full_finetune_saves_a_model_that_evaluates(call_main, tiny_model, tmp_path, bits):
    run = tmp_path / "run"
    flags = ["--full_finetune", "--bits", bits, "--max_steps", "2", "--do_train"]
    printed = train(call_main, tiny_model, run, *FLAGS, *flags)
    assert "finished" in printed and not (run / "adapter_model.safetensors").exists()
    before, after = load_file(tiny_model / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(not torch.equal(before[name].float(), after[name].float()) for name in after if "proj" in name)
    call_main("qlora_finetune", "--checkpoint_dir", run, "--do_eval", "--eval_dataset_size", "8")
    assert json.loads((run / "eval_metrics.json").read_text())["eval_rows"] == 8


@pytest.mark.parametrize("targets", [["W_pack"], ["q_proj", "W_pack"], ["proj"], ["mlp"]])
def test_unknown_target_module_names_the_models_own(call_main, tiny_model, tmp_path, monkeypatch, targets):
    import utils.models.base
    from utils.console import UserError

    monkeypatch.setattr(utils.models.base, "load_base", None)  # no weights are read
    with pytest.raises(
        UserError, match=f"{targets[-1]}: the model has no .*down_proj, embed_tokens, gate_proj"
    ):
        train(call_main, tiny_model, tmp_path / "run", *FLAGS, "--lora_target_modules", *targets)


def test_peak_memory_is_measured_where_the_kernel_does_not_tell_it(tmp_path):
    told, silent = tmp_path / "told", tmp_path / "silent"
    told.write_text("Name:\tpython\nVmHWM:\t  3145728 kB\n")
    silent.write_text("Name:\tpython\n")
    if not torch.cuda.is_available():
        assert measure_peak_memory(told) == 3
    assert measure_peak_memory(silent) > 0
