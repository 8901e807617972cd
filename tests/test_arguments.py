"""Familiar flags work, and say what they became."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers

from utils.arguments import (
    DataArguments,
    GenerationArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
)
from utils.chat.page_arguments import PageArguments
from utils.console import UserError
from utils.flags.hints import HINTS, NEVER_PROPOSED, describe_unknown
from utils.flags.parser import find_given_flags, parse_args
from utils.flags.strict_parser import StrictParser
from utils.flags.trainer_flags import find_trainer_fields, list_loggers, list_optimizers, list_schedulers

FLAGS = [ModelArguments, DataArguments, LoraArguments, TrainingArguments, GenerationArguments]
# Defaults of the QLoRA recipe that differ from the Trainer's, on purpose.
OUR_DEFAULTS = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "optim",
    "max_grad_norm", "logging_steps", "save_steps", "save_total_limit", "data_seed", "remove_unused_columns",
    "ddp_find_unused_parameters", "gradient_checkpointing", "report_to",
}  # fmt: skip


def parse(line):
    return parse_args(line.split(), FLAGS, "")


def parse_training(line):
    return parse(line)[3]


@pytest.mark.parametrize(
    ("old", "field", "value"),
    [
        ("--evaluation_strategy steps", "eval_strategy", "steps"),
        ("--evaluation_strategy=epoch", "eval_strategy", "epoch"),
        ("--warmup_ratio 0.03", "warmup_steps", 0.03),
        ("--group_by_length", "train_sampling_strategy", "group_by_length"),
        ("--group_by_length False", "train_sampling_strategy", "random"),
        ("--adam8bit", "optim", "adamw_bnb_8bit"),
        ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
    ],
)
def test_old_training_flag_becomes_the_new_one_and_says_so(capsys, old, field, value):
    assert getattr(parse_training(old), field) == value
    assert capsys.readouterr().out.startswith(old.split("=")[0].split()[0])


@pytest.mark.parametrize(
    ("old", "group", "field", "value"),
    [
        ("--dataset rows.jsonl", 1, "dataset_name", "rows.jsonl"),
        ("--data_path rows.jsonl", 1, "dataset_name", "rows.jsonl"),
        ("--lora_model_name_or_path run", 0, "checkpoint_dir", "run"),
        ("--no_cuda", 0, "use_cpu", True),
        ("--lora_modules all", 2, "lora_target_modules", ["all-linear"]),
        ("--lora_modules q_proj,v_proj", 2, "lora_target_modules", ["q_proj", "v_proj"]),
    ],
)
def test_old_flag_of_the_other_groups_still_works(capsys, old, group, field, value):
    assert getattr(parse(old)[group], field) == value
    assert "is now" in capsys.readouterr().out


def test_flag_without_effect_says_why_and_hides_a_token(capsys):
    parse("--use_auth_token hf_secret --save_safetensors True --max_memory_MB 24000")
    printed = capsys.readouterr().out
    assert "--use_auth_token has no effect" in printed and "--save_safetensors True has no effect" in printed
    assert "hf_secret" not in printed


def test_any_other_trainer_flag_is_taken(capsys):
    training_args = parse_training("--neftune_noise_alpha 5 --dataloader_drop_last --ddp_timeout=60")
    assert training_args.extra == {
        "neftune_noise_alpha": 5.0,
        "dataloader_drop_last": True,
        "ddp_timeout": 60,
    }


def test_bad_value_of_another_trainer_flag_is_a_user_error():
    with pytest.raises(UserError, match="--neftune_noise_alpha.*'loud'"):
        parse("--neftune_noise_alpha loud")


def test_last_flag_wins():
    assert parse_training("--seed 1 --seed 2").seed == 2


def test_hyphens_and_bare_switches_work():
    model_args, *_ = parse("--double-quant --trust_remote_code --no_double_quant")
    assert model_args.trust_remote_code and not model_args.double_quant


def test_without_do_flags_the_run_trains():
    assert parse_training("").do_train
    assert not parse_training("--do_eval").do_train


def test_given_flags_are_found_in_every_spelling():
    assert find_given_flags(["--bits", "8", "--quant-type=fp4", "--no_double_quant"]) == {
        "bits", "quant_type", "double_quant"
    }  # fmt: skip
    assert find_given_flags([]) == set()
    assert find_given_flags(["--no_repeat_ngram_size", "3"]) == {"no_repeat_ngram_size"}
    assert find_given_flags(["--load_8bit", "--adam8bit", "True"]) == {"bits", "optim"}
    assert find_given_flags(["--load_8bit", "False", "--adam8bit=no", "--seed", "1"]) == {"seed"}
    assert find_given_flags(["--lora_modules", "q_proj", "--no_cuda"]) == {"lora_target_modules", "use_cpu"}


def test_shared_defaults_are_the_trainers():
    from transformers import TrainingArguments as Trainers

    theirs = {field.name: field for field in dataclasses.fields(Trainers)}
    shared = {
        field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.name in theirs
    }
    same = {name: default for name, default in shared.items() if name not in OUR_DEFAULTS | {"extra"}}
    assert same == {name: theirs[name].default for name in same}
    assert OUR_DEFAULTS <= shared.keys()


def test_trainer_fields_are_found_without_importing_it():
    from transformers import TrainingArguments as Trainers

    ours = {"bf16", "fp16", "use_cpu", "activation_checkpointing", "use_cache"}
    assert find_trainer_fields() == {field.name for field in dataclasses.fields(Trainers)} - ours


README_COMMANDS = [
    "--model_name_or_path decapoda-research/llama-7b-hf --data_path tatsu-lab/alpaca --output_dir work_dir_lora/ "
    "--num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    "--gradient_accumulation_steps 8 --evaluation_strategy no --save_strategy steps --save_steps 500 "
    "--save_total_limit 5 --learning_rate 1e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine "
    "--model_max_length 2048 --logging_steps 1 --fp16 True",
    "--model_name_or_path PATH_OR_NAME",
    "--model_name_or_path ~/checkpoints/baichuan7b --dataset_name oasst1 --data_dir ~/prompt_datasets "
    "--load_from_local --output_dir ./work_dir/oasst1-baichuan-7b --num_train_epochs 4 "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8 "
    "--evaluation_strategy steps --eval_steps 50 --save_strategy steps --save_total_limit 5 --save_steps 100 "
    "--logging_strategy steps --logging_steps 1 --learning_rate 0.0002 --warmup_ratio 0.03 --weight_decay 0.0 "
    "--lr_scheduler_type constant --adam_beta2 0.999 --max_grad_norm 0.3 --max_new_tokens 32 --source_max_len 512 "
    "--target_max_len 512 --lora_r 64 --lora_alpha 16 --lora_dropout 0.1 --double_quant --quant_type nf4 --fp16 "
    "--bits 4 --gradient_checkpointing --trust_remote_code --do_train --do_eval --sample_generate --data_seed 42 "
    "--seed 0",
    "--dataset=path/to/your/dataset --dataset_format=self-instruct",
    "--do_train --do_eval --do_mmlu_eval --mmlu_dataset mmlu-fs --mmlu_split test --max_mmlu_samples 5 "
    "--mmlu_source_max_len 1024 --max_memory_MB 80000 --train_on_source --eval_dataset_size 1024 --full_finetune "
    "--bits 16 --do_predict --predict_with_generate --min_new_tokens 2 --do_sample --num_beams 2 --temperature 0.7 "
    "--top_k 40 --top_p 0.9 --typical_p 0.9 --repetition_penalty 1.1 --length_penalty 1.2 --no_repeat_ngram_size 3 "
    "--max_train_samples 10 --max_eval_samples 10 --use_rslora --use_dora --optim paged_adamw_8bit",
]


@pytest.mark.parametrize("command", README_COMMANDS)
def test_commands_of_the_original_parse(command):
    assert [type(group) for group in parse(command)] == FLAGS


def test_readme_values_arrive():
    model_args, data_args, lora_args, training_args, _ = parse(README_COMMANDS[2])
    assert (model_args.bits, model_args.fp16, model_args.quant_type) == (4, True, "nf4")
    assert (data_args.source_max_len, data_args.target_max_len, data_args.max_len) == (512, 512, 1024)
    assert (lora_args.lora_r, lora_args.lora_alpha, lora_args.lora_dropout) == (64, 16, 0.1)
    assert (training_args.eval_steps, training_args.max_grad_norm, training_args.seed) == (50, 0.3, 0)


def test_names_are_those_of_the_trainer():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert [kind.value for kind in SchedulerType] == list_schedulers()
    assert [name.value for name in OptimizerNames] == list_optimizers()
    assert sorted(INTEGRATION_TO_CALLBACK) == list_loggers()


def test_negative_number_with_an_exponent_is_a_value():
    assert parse("--length_penalty -1e-1")[4].length_penalty == -0.1
    assert parse("--length_penalty -.5E+1 --bits 8")[4].length_penalty == -5
    assert parse("--greater_is_better True --label_smoothing_factor -1e-5")[3].extra[
        "label_smoothing_factor"
    ] == pytest.approx(-1e-5)


def test_lists_take_commas_and_blanks():
    for line in ("q_proj,v_proj", "q_proj v_proj", "q_proj, v_proj"):
        assert parse(f"--lora_target_modules {line}")[2].lora_target_modules == ["q_proj", "v_proj"]
    assert parse("--report_to tensorboard,wandb")[3].report_to == ["tensorboard", "wandb"]


def test_every_hint_names_flags_that_exist():
    page = StrictParser([PageArguments], "").flag_names()
    known = {*StrictParser(FLAGS, "").flag_names(), *page}
    for name, hint in HINTS.items():
        assert f"--{name}" not in known, name
        assert set(re.findall(r"--\w+", hint)) <= known, hint


def test_no_misspelling_leads_to_a_flag_that_destroys():
    flags = [*NEVER_PROPOSED, "--output_dir"]
    for flag in NEVER_PROPOSED:
        for typed in (flag[:-1], flag + "s", flag.replace("_", "")):
            assert f"did you mean {flag}" not in describe_unknown(typed, flags)


def test_help_shows_a_per_cent_sign_as_it_is_written():
    """argparse would fill its own names into "10% at most"."""
    shown = " ".join(StrictParser([DataArguments], "").format_help().split())
    assert "Default: 1024, 10% at most. (default: None)" in shown and "option_strings" not in shown


def test_inverted_flag_has_a_help_of_its_own():
    shown = " ".join(StrictParser(FLAGS, "").format_help().split())
    assert "--no_repeat_ngram_size NO_REPEAT_NGRAM_SIZE No n-gram of this size" in shown  # turns nothing off
    assert "--no_packing Turns --packing off. --fast_lora" in shown


def test_output_dir_in_the_home_is_one_folder_for_the_run_and_the_trainer(monkeypatch, tmp_path):
    """A shell leaves the ~ of --output_dir=~/runs/a as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    trainers = transformers.TrainingArguments(output_dir="~/runs/a").output_dir
    assert TrainingArguments(output_dir="~/runs/a").run_dir == Path(trainers) == tmp_path / "runs" / "a"
