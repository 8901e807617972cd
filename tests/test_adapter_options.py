"""Other ways to begin and to learn A and B: LoRA+, and --init_lora_weights."""

import json
import shutil

import pytest
import torch
from helpers import IDENTITY, slow_but
from helpers.models import relative_difference, train_with_plain_peft
from helpers.rows import alpaca_rows, write_rows
from helpers.runs import forget_second_step, load_weights, read_last_state, trainer_kept
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.merge_adapter import check_adapter_kind

SHORT = ["--source_max_len", 200, "--target_max_len", 100, "--gradient_checkpointing", "False"]
STEPS = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_steps", 3]
PLAIN = "--bits 32 --learning_rate 1e-2 --adam_epsilon 1e-4 --train_sampling_strategy sequential".split()
CHANGING = ["pissa", "olora"]


@pytest.fixture
def argv(tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", alpaca_rows(20))
    return ["--model_name_or_path", tiny_model, "--dataset_name", rows, *SHORT, *STEPS, *PLAIN]


@pytest.fixture(scope="module")
def started(trained_run):
    """An adapter whose B is not zero."""
    flags = ["--dataset_name", IDENTITY, *SHORT, "--bits", 32, "--max_steps", 2, "--lora_r", 4]
    return trained_run(*flags, "--learning_rate", 1e-2)


@pytest.mark.parametrize("fast", ["True", "False"])
def test_b_learns_faster_than_a_by_the_ratio_as_in_plain_peft(
    call_main, argv, started, tiny_model, tmp_path, float32_cpu, fast
):
    flags = ["--adapter_name_or_path", started, "--loraplus_lr_ratio", 8, "--fast_lora", fast]
    with trainer_kept() as kept:
        call_main("qlora_finetune", *argv, *flags, "--output_dir", tmp_path / "run")
    rows, learned = kept[0].train_dataset, load_weights(tmp_path / "run")
    expected = train_with_plain_peft(tiny_model, started, rows, b_rate=8e-2)
    assert relative_difference(learned, expected) < 1e-5
    assert relative_difference(learned, train_with_plain_peft(tiny_model, started, rows)) > 0.1
    assert kept[0].engine.name == ("fused" if fast == "True" else "plain")


@pytest.mark.parametrize(
    ("optim", "fast"),
    [
        ("adamw_bnb_8bit", "True"),
        ("adamw_torch", "False"),
        pytest.param("adamw_torch", "True", marks=pytest.mark.slow),
        pytest.param("adamw_bnb_8bit", "False", marks=pytest.mark.slow),
    ],
)
def test_run_with_two_rates_goes_on_to_the_same_bits(call_main, argv, tmp_path, fast, optim):
    flags = [*argv, "--loraplus_lr_ratio", 8, "--lr_scheduler_type", "cosine", "--save_steps", 1]
    flags += ["--fast_lora", fast, "--optim", optim, "--max_steps", 2]
    for name in ("expected", "run"):
        call_main("qlora_finetune", *flags, "--output_dir", tmp_path / name)
    forget_second_step(tmp_path / "run")
    printed = call_main("qlora_finetune", *flags, "--output_dir", tmp_path / "run")
    assert "going on from" in printed
    assert read_last_state(tmp_path / "run") == read_last_state(tmp_path / "expected")


@pytest.mark.parametrize("first", slow_but(["True"], ["True", "False"]))
def test_two_rates_stay_with_their_weights_on_the_other_path(call_main, argv, tmp_path, float32_cpu, first):
    second = "False" if first == "True" else "True"
    flags = [
        *argv,
        "--loraplus_lr_ratio",
        8,
        "--lr_scheduler_type",
        "cosine",
        "--save_steps",
        1,
        "--max_steps",
        2,
    ]
    for name in ("expected", "run"):
        call_main("qlora_finetune", *flags, "--fast_lora", first, "--output_dir", tmp_path / name)
    forget_second_step(tmp_path / "run")
    flags += ["--fast_lora", second, "--force_resume"]
    with trainer_kept() as kept:
        printed = call_main("qlora_finetune", *flags, "--output_dir", tmp_path / "run")
    assert "is put into another order" in printed
    rates = [group["initial_lr"] for group in kept[0].optimizer.param_groups if group["params"]]
    assert rates == pytest.approx([1e-2, 8e-2])
    assert kept[0].lr_scheduler.base_lrs[:1] == [1e-2] and 8e-2 in kept[0].lr_scheduler.base_lrs
    first_weights, second_weights = (load_weights(tmp_path / name) for name in ("run", "expected"))
    assert relative_difference(first_weights, second_weights) < 1e-5


@torch.no_grad()
def read_logits(model):
    model.eval()
    ids = torch.arange(5, 45)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def load_with_plain_peft(base, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


@pytest.mark.parametrize(
    ("fast", "begin"),
    [
        ("True", "pissa"),
        ("False", "olora"),
        pytest.param("True", "olora", marks=pytest.mark.slow),
        pytest.param("False", "pissa", marks=pytest.mark.slow),
    ],
)
def test_finished_adapter_fits_the_base_as_it_is(
    call_main, argv, tiny_model, tmp_path, float32_cpu, begin, fast
):
    """Against PEFT's own reading of the last checkpoint, for which it changes the base anew."""
    run = tmp_path / "run"
    flags = ["--init_lora_weights", begin, "--lora_r", 4, "--lora_alpha", 6, "--fast_lora", fast]
    call_main("qlora_finetune", *argv, *flags, "--output_dir", run)
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    last = json.loads((run / "checkpoint-3" / "adapter_config.json").read_text())
    assert (last["r"], last["init_lora_weights"]) == (4, begin)
    logits = read_logits(load_with_plain_peft(tiny_model, run))
    expected = read_logits(load_with_plain_peft(tiny_model, run / "checkpoint-3"))
    assert torch.allclose(logits, expected, atol=1e-4 * expected.abs().max().item())


def test_pissa_begins_with_the_largest_singular_vectors_and_at_the_base(
    call_main, argv, tiny_model, tmp_path, float32_cpu
):
    import numpy as np

    run = tmp_path / "run"
    flags = ["--init_lora_weights", "pissa", "--lora_r", 4, "--lora_alpha", 6, "--do_train", "--do_eval"]
    call_main("qlora_finetune", *argv, *flags, "--eval_on_start", "True", "--output_dir", run)
    began, base = load_weights(run / "initial_adapter"), load_file(tiny_model / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    a, b = (began[f"base_model.model.{layer}.lora_{kind}.weight"].numpy() for kind in "AB")
    u, s, v = np.linalg.svd(base[f"{layer}.weight"].float().numpy())
    assert np.allclose(6 / 4 * b @ a, (u[:, :4] * s[:4]) @ v[:4], atol=1e-5)
    log = json.loads((run / "metrics.json").read_text())["log"]
    plain = ["--model_name_or_path", tiny_model, *argv[2:], "--do_eval", "--output_dir", tmp_path / "base"]
    call_main("qlora_finetune", *plain)
    expected = json.loads((tmp_path / "base" / "eval_metrics.json").read_text())["eval_loss"]
    assert log[0]["eval_loss"] == pytest.approx(expected, rel=1e-5) and log[0]["step"] == 0


def test_gaussian_begins_with_a_of_that_spread_and_at_the_base(call_main, argv, tmp_path):
    flags = ["--init_lora_weights", "gaussian", "--lora_r", 8, "--max_steps", 1, "--learning_rate", 1e-9]
    call_main("qlora_finetune", *argv, *flags, "--output_dir", tmp_path / "run")
    weights = load_weights(tmp_path / "run")
    spread = torch.cat([weight.flatten() for name, weight in weights.items() if "lora_A" in name])
    assert spread.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name) < 1e-8


@pytest.mark.parametrize("begin", slow_but(["pissa"], CHANGING))
def test_run_that_began_with_a_part_of_the_base_goes_on_to_the_same_bits(call_main, argv, tmp_path, begin):
    flags = [*argv, "--init_lora_weights", begin, "--lora_r", 4, "--save_steps", 1, "--max_steps", 2]
    for name in ("expected", "run"):
        call_main("qlora_finetune", *flags, "--output_dir", tmp_path / name)
    forget_second_step(tmp_path / "run")
    assert "going on from" in call_main("qlora_finetune", *flags, "--output_dir", tmp_path / "run")
    assert read_last_state(tmp_path / "run") == read_last_state(tmp_path / "expected")
    forget_second_step(tmp_path / "run")
    shutil.copy(
        tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors", tmp_path / "run" / "initial_adapter"
    )
    with pytest.raises(
        UserError, match="gives other numbers than those in .*initial_adapter, with which the run"
    ):
        call_main("qlora_finetune", *flags, "--output_dir", tmp_path / "run")


@pytest.mark.parametrize("begin", slow_but(["pissa"], CHANGING))
def test_what_a_changed_base_does_not_allow_is_one_line(call_main, argv, tiny_model, tmp_path, begin):
    def refuse(*flags, script="qlora_finetune", command=argv):
        with pytest.raises(UserError) as error:
            call_main(script, *command, *flags, "--output_dir", tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        return str(error.value)

    asked = ["--init_lora_weights", begin]
    for other in (["--bits", "4"], ["--bits", "8"], ["--use_dora"], ["--bias", "all"]):
        message = refuse(*asked, *other)
        assert (
            f"{begin} takes a part of the base into the adapter and does not go with {' '.join(other)}"
            in message
        )
    run = tmp_path / "run"
    call_main("qlora_finetune", *argv, *asked, "--lora_r", 4, "--output_dir", run)
    last = ["--checkpoint_dir", run / "checkpoint-3"]
    assert f"belongs to a base that {begin} has changed: name the finished run" in refuse(*last)
    again = refuse("--checkpoint_dir", run, "--init_lora_weights", "gaussian")
    assert "begins an adapter anew, and one is named to start from" in again
    evaluate = [*last, *SHORT, "--do_eval", "--bits", "4"]
    assert f"belongs to a base that {begin} has changed: use --bits 16" in refuse(command=evaluate)
    assert f"has init_lora_weights {begin}" in refuse(script="utils.merge_adapter", command=last)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--loraplus_lr_ratio", "0"], "--loraplus_lr_ratio 0.0: use a number above 0"),
        (["--loraplus_lr_ratio", "16", "--full_finetune"], "two learning rates; --full_finetune has one"),
        (
            ["--loraplus_lr_ratio", "16", "--optim", "adafactor"],
            "two learning rates; --optim adafactor has one",
        ),
        (["--init_lora_weights", "eva"], "invalid choice: 'eva'"),
    ],
)
def test_flag_that_does_not_go_with_others_is_one_line(call_main, argv, tmp_path, flags, says):
    with pytest.raises(UserError) as error:
        call_main("qlora_finetune", *argv, *flags, "--output_dir", tmp_path / "run")
    assert says in str(error.value)


def test_adapter_of_a_mixture_is_evaluated_after_its_run_and_not_merged(call_main, tiny_model, tmp_path):
    """PEFT adapts all experts of a layer as one parameter, under names that no file of the base has."""
    base, run = tmp_path / "base", tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(base)
    sizes = dict.fromkeys(("num_hidden_layers", "num_key_value_heads"), 2)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_attention_heads=4,
        num_local_experts=4, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    flags = ["--model_name_or_path", base, "--dataset_name", IDENTITY, *SHORT, "--max_steps", 2]
    held_out = ["--do_eval", "--eval_dataset_size", 4]
    call_main("qlora_finetune", *flags, "--do_train", *held_out, "--learning_rate", 1e-2, "--output_dir", run)
    trained = json.loads((run / "metrics.json").read_text())["eval_loss"]
    call_main("qlora_finetune", "--checkpoint_dir", run, *held_out, "--output_dir", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "eval_metrics.json").read_text())["eval_loss"]
    assert again == pytest.approx(trained, rel=1e-5)
    with pytest.raises(UserError, match="a mixture's experts are not merged"):
        check_adapter_kind(ModelArguments(checkpoint_dir=str(run)))
