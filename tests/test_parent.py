"""A run that starts from an adapter: what it learns by plain PEFT, what it takes over, what it refuses."""

import json
import shutil

import pytest
import torch
from helpers import IDENTITY
from helpers.models import relative_difference, save_random_model, train_with_plain_peft
from helpers.rows import alpaca_rows, write_rows
from helpers.runs import load_weights, trainer_kept
from safetensors.torch import load_file, save_file

from utils.console import UserError

LENGTHS = ["--source_max_len", 200, "--target_max_len", 100, "--gradient_checkpointing", "False"]
STEPS = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_steps", 3]
PLAIN = [
    "--bits",
    32,
    "--learning_rate",
    1e-2,
    "--adam_epsilon",
    1e-4,
    "--train_sampling_strategy",
    "sequential",
]


@pytest.fixture(scope="module")
def run(trained_run):
    flags = ["--dataset_name", IDENTITY, *LENGTHS, "--bits", 32, "--template", "alpaca"]
    return trained_run(*flags, "--max_steps", 2, "--lora_r", 4, "--lora_alpha", 6, "--learning_rate", 1e-2)


@pytest.fixture(scope="module")
def foreign(tiny_model, tmp_path_factory):
    """An adapter of plain PEFT: other ranks in other layers, no run.json, no tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 5},
        use_rslora=True,
    )
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    folder = tmp_path_factory.mktemp("foreign") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", alpaca_rows(20))


@pytest.mark.parametrize("parent", ["run", "foreign"])
@pytest.mark.parametrize("fast", ["True", "False"])
def test_training_on_from_an_adapter_is_what_plain_peft_learns(
    call_main, request, tiny_model, rows, tmp_path, float32_cpu, parent, fast
):
    adapter = request.getfixturevalue(parent)
    argv = ["--adapter_name_or_path", adapter, "--dataset_name", rows, *LENGTHS, *STEPS, *PLAIN]
    with trainer_kept() as kept:
        call_main("qlora_finetune", *argv, "--fast_lora", fast, "--output_dir", tmp_path / "child")
    expected = train_with_plain_peft(tiny_model, adapter, kept[0].train_dataset)
    learned, before = load_weights(tmp_path / "child"), load_file(adapter / "adapter_model.safetensors")
    assert relative_difference(learned, expected) < 1e-5
    assert relative_difference(before, expected) > 1e-2


def test_child_records_its_parent_and_takes_shape_and_prompt_from_it(call_main, run, rows, tmp_path):
    argv = ["--adapter_name_or_path", run, "--dataset_name", rows, *LENGTHS, *STEPS]
    printed = call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "child")
    record, parent = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "child", run))
    digest = parent["data"]["sources"][0]["sha256"]
    assert record["parent"]["folder"] == str(run) and record["parent"]["data"][0]["sha256"] == digest
    assert record["parent"]["command"] == parent["command"] and len(record["parent"]["adapter_sha256"]) == 64
    assert record["prompt"] == parent["prompt"] and "prompt format" not in printed
    assert record["base_model"] == parent["base_model"] and record["arguments"]["bits"] == 32
    config = json.loads((tmp_path / "child" / "adapter_config.json").read_text())
    before = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert sorted(config["target_modules"]) == sorted(before["target_modules"])  # PEFT's is a set
    text = (tmp_path / "child" / "chat_template.jinja").read_text()
    assert text == (run / "chat_template.jinja").read_text() and "### Instruction" in text


def test_child_with_a_prompt_of_its_own_says_so(call_main, run, rows, tmp_path):
    argv = ["--adapter_name_or_path", run, "--dataset_name", rows, *LENGTHS, *STEPS, "--template", "vicuna"]
    printed = call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "child")
    assert "the prompt format is not the one that the adapter was trained with before" in printed
    assert "USER" in (tmp_path / "child" / "chat_template.jinja").read_text()


def test_child_starts_from_a_checkpoint_of_its_parent_too(call_main, run, rows, tmp_path):
    argv = ["--adapter_name_or_path", run / "checkpoint-2", "--dataset_name", rows, *LENGTHS]
    argv += ["--max_steps", 1, "--learning_rate", 1e-12, "--save_strategy", "no"]
    call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "child")
    first, second = load_weights(tmp_path / "child"), load_weights(run)
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in second)


def refuse(call_main, rows, tmp_path, *argv):
    with pytest.raises(UserError) as error:
        call_main(
            "qlora_finetune", "--dataset_name", rows, *LENGTHS, "--output_dir", tmp_path / "child", *argv
        )
    assert not (tmp_path / "child").exists()
    return str(error.value)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--lora_r", 8], "--lora_r 8: the adapter in {run} has 4; leave the flag out"),
        (["--lora_alpha", 16], "--lora_alpha 16.0: the adapter in {run} has 6"),
        (["--lora_target_modules", "q_proj"], "--lora_target_modules ['q_proj']: the adapter in {run} has"),
        (
            ["--full_finetune", "--bits", 16],
            "--full_finetune trains every weight and --adapter_name_or_path {run} is an adapter",
        ),
    ],
)
def test_flag_that_contradicts_the_adapter_is_one_line(call_main, run, rows, tmp_path, flags, says):
    message = refuse(call_main, rows, tmp_path, "--adapter_name_or_path", run, *flags)
    assert says.format(run=run) in message and "\n" not in message and "--checkpoint_dir" not in message


def test_another_base_is_refused_by_its_files_and_by_name(call_main, run, foreign, rows, tmp_path):
    other = save_random_model(tmp_path / "other", seed=1)
    argv = ["--adapter_name_or_path", run, "--model_name_or_path", other]
    assert f"{run} was trained on" in (message := refuse(call_main, rows, tmp_path, *argv))
    assert f"and {other} is another model" in message


def test_base_that_changed_since_is_refused(call_main, tiny_model, rows, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    argv = ["--model_name_or_path", base, "--dataset_name", rows, *LENGTHS, "--max_steps", 1, "--lora_r", 2]
    call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "run")
    save_random_model(base, seed=1)
    message = refuse(call_main, rows, tmp_path, "--adapter_name_or_path", tmp_path / "run")
    assert f"{tmp_path / 'run'} was trained on {base}, whose files have changed since" in message


def test_adapter_of_another_kind_or_none_is_one_line(call_main, foreign, rows, tmp_path):
    folder = shutil.copytree(foreign, tmp_path / "other")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    assert "holds an adapter of the kind LOHA" in refuse(
        call_main, rows, tmp_path, "--adapter_name_or_path", folder
    )
    missing = tmp_path / "missing"
    message = refuse(call_main, rows, tmp_path, "--adapter_name_or_path", missing)
    assert message == f"--adapter_name_or_path {missing}: no such folder"


def test_parent_that_changed_is_named_when_the_child_goes_on(call_main, run, rows, tmp_path):
    parent = shutil.copytree(run, tmp_path / "parent")
    argv = ["--adapter_name_or_path", parent, "--dataset_name", rows, *LENGTHS, *STEPS]
    call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "child")
    weights = load_file(parent / "adapter_model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, parent / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"the adapter in {parent} has changed"):
        call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "child")
