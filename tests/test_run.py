"""A run folder: exact files, plain PEFT loads it, started again it is finished, resumed it is the same."""

import json

import pytest
import torch
from helpers import IDENTITY
from helpers.runs import CHECKPOINT_FILES
from helpers.shell import run_script
from safetensors.torch import load_file

from utils.console import UserError
from utils.run.record import hide_secrets, next_free_path

FLAGS = ["--dataset_name", IDENTITY, "--source_max_len", "200", "--target_max_len", "100", "--lora_r", "4"]
FLAGS += [
    "--per_device_train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
    "--gradient_checkpointing",
    "False",
]
RUN_FILES = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "data_report.json",
    "data_report.png", "metrics.json", "run.json", "tokenizer.json", "tokenizer_config.json", "training_curve.png",
]  # fmt: skip


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def run(trained_run):
    return trained_run(*FLAGS, "--max_steps", 4)


def test_finished_run_holds_exactly_these_files(call_main, tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--output_dir", tmp_path / "run", "--max_steps", "4"]
    argv += ["--save_steps", "2", "--do_train", "--do_eval", "--do_predict", "--sample_generate"]
    argv += [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--max_new_tokens",
        "8",
        "--eval_dataset_size",
        "6",
    ]
    printed = call_main("qlora_finetune", *argv)
    expected = [*RUN_FILES, "checkpoint-2", "checkpoint-4", "predictions.jsonl", "samples.jsonl"]
    assert list_names(tmp_path / "run") == sorted(expected)
    assert list_names(tmp_path / "run" / "checkpoint-2") == sorted(CHECKPOINT_FILES)
    assert (tmp_path / "run" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [2] * 4 + [4] * 4
    predictions = [
        json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(predictions) == 6 and all(
        set(row) == {"prompt", "reference", "prediction"} for row in predictions
    )
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]  # the last is not made twice
    assert "train: 116 rows" in printed and "held out for evaluation: 6 rows" in printed


def test_run_json_tells_what_made_the_adapter(run, tiny_model):
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert len(record["base_model"].pop("fingerprint")) == 64
    assert record["base_model"] == {"name": str(tiny_model), "revision": None, "type": "llama"}
    assert record["prompt"]["stop_tokens"] == ["<|im_end|>"]
    (source,) = record["data"]["sources"]
    assert source["rows"] == 128 and source["name"] == str(IDENTITY) and len(source["sha256"]) == 64
    assert record["arguments"]["lora_r"] == 4 and record["arguments"]["quant_type"] == "nf4"
    assert record["versions"]["bitsandbytes"] and record["command"].startswith("python qlora_finetune.py")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 4 and metrics["train_tokens"] > 500 and metrics["tokens_per_second"] > 0
    assert record["metrics"]["train_loss"] == metrics["train_loss"]


def test_adapter_loads_with_plain_peft(run, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run)
    loaded = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    saved = load_file(run / "adapter_model.safetensors")
    assert len(loaded) == 14
    assert all(torch.equal(weight, saved[name.replace(".default", "")]) for name, weight in loaded.items())


def test_same_command_again_trains_nothing(call_main, run_copy, tiny_model):
    before = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--output_dir", run_copy, "--max_steps", "4"]
    printed = call_main("qlora_finetune", *argv, "--logging_steps", "3")
    assert "is finished: 4 steps" in printed and "--overwrite_output_dir" in printed
    assert before == {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}


def test_run_with_other_arguments_is_refused_and_named(call_main, run_copy, tiny_model):
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--output_dir", run_copy, "--max_steps", "4"]
    with pytest.raises(UserError, match=r"--learning_rate 0.0002 -> 0.01"):
        call_main("qlora_finetune", *argv, "--learning_rate", "1e-2")


def test_overwriting_starts_anew_and_leaves_other_files(call_main, run_copy, tiny_model):
    (run_copy / "notes.txt").write_text("mine")
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--output_dir", run_copy, "--max_steps", "2"]
    call_main("qlora_finetune", *argv, "--overwrite_output_dir")
    assert list_names(run_copy) == sorted([*RUN_FILES, "checkpoint-2", "notes.txt"])
    assert json.loads((run_copy / "metrics.json").read_text())["steps"] == 2


def test_interrupted_run_goes_on_to_the_same_adapter(call_main, run, tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--max_steps", "4", "--save_steps", "2"]
    other = tmp_path / "other"
    call_main("qlora_finetune", *argv, "--output_dir", other)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"status": "running"}))
    for path in [*(other / "checkpoint-4").iterdir(), other / "adapter_model.safetensors"]:
        path.unlink()
    (other / "checkpoint-4").rmdir()
    printed = call_main("qlora_finetune", *argv, "--output_dir", other)
    assert "going on from" in printed and "checkpoint-2" in printed
    expected, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (run, other))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_evaluating_and_predicting_alone_leave_the_run_as_it_is(call_main, run_copy):
    before = {path: path.stat().st_mtime_ns for path in run_copy.iterdir()}
    for suffix in ("", "-2"):
        argv = [
            "--checkpoint_dir",
            run_copy,
            "--output_dir",
            run_copy,
            "--do_eval",
            "--do_predict",
            "--max_new_tokens",
            "4",
        ]
        call_main("qlora_finetune", *argv, "--max_eval_samples", "3")
        assert json.loads((run_copy / f"eval_metrics{suffix}.json").read_text())["eval_rows"] == 3
        assert len((run_copy / f"predictions{suffix}.jsonl").read_text().splitlines()) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.is_file())


def test_evaluation_of_a_run_uses_its_adapter(call_main, run, tiny_model, tmp_path):
    losses = []
    for argv in (["--checkpoint_dir", run], ["--model_name_or_path", tiny_model, "--max_train_samples", "9"]):
        call_main("qlora_finetune", *argv, *FLAGS, "--output_dir", tmp_path / str(len(losses)), "--do_eval")
        losses.append(
            json.loads((tmp_path / str(len(losses)) / "eval_metrics.json").read_text())["eval_loss"]
        )
    assert losses[0] != losses[1]


def test_training_goes_on_from_another_runs_adapter(call_main, run, tiny_model, tmp_path):
    argv = [
        "--checkpoint_dir",
        run,
        *FLAGS,
        "--output_dir",
        tmp_path / "next",
        "--max_steps",
        "1",
        "--do_train",
    ]
    call_main("qlora_finetune", *argv, "--learning_rate", "1e-9")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "next"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


@pytest.mark.slow
def test_wandb_offline_and_tensorboard_get_the_run(tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--output_dir", tmp_path / "run", "--max_steps", "2"]
    argv += [
        "--report_to",
        "wandb",
        "tensorboard",
        "--logging_steps",
        "1",
        "--run_name",
        "offline",
        "--hub_token",
        "hf_x",
    ]
    result = run_script("qlora_finetune.py", *argv, WANDB_DIR=str(tmp_path), WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr[-2000:]
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((tmp_path / "run" / "runs").glob("*/events.out.tfevents.*"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_x" in path.read_bytes()]


def test_mmlu_is_measured_at_each_evaluation(call_main, tiny_model, tmp_path):
    questions = [
        {"subject": subject, "input": f"{i} + 1 = ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", "output": "ABCD"[i]}
        for subject in ("sums", "more_sums")
        for i in range(4)
    ]
    (tmp_path / "zero_shot_mmlu_val.json").write_text("\n".join(map(json.dumps, questions)))
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--output_dir", tmp_path / "run", "--max_steps", "1"]
    argv += ["--do_train", "--do_eval", "--do_mmlu_eval", "--data_dir", tmp_path, "--eval_dataset_size", "4"]
    call_main("qlora_finetune", *argv)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mmlu_accuracy"] == (metrics["mmlu_sums"] + metrics["mmlu_more_sums"]) / 2
    assert metrics["mmlu_sums"] in (0, 0.25, 0.5, 0.75, 1)


def test_secrets_stay_out_of_the_recorded_command():
    words = hide_secrets(["qlora_finetune.py", "--hub_token", "hf_a", "--hub-token=hf_b", "--bits", "4"])
    assert words == ["qlora_finetune.py", "--hub_token", "***", "--hub-token=***", "--bits", "4"]


def test_results_never_take_a_name_that_is_there(tmp_path):
    (tmp_path / "predictions.jsonl").touch()
    assert next_free_path(tmp_path / "predictions.jsonl").name == "predictions-2.jsonl"
