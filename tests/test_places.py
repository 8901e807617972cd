"""A run used from other folders, and after it, its base or the checkout has moved."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.rows import write_sums
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.flags.checks import read_recorded_data
from utils.models.folder import check_model_path, resolve_model
from utils.run.places import REPOSITORY, find_data


@pytest.fixture
def home(call_main, small_model, tmp_path):
    """A folder with a model, its data, and a run made of both."""
    home = tmp_path / "home"
    shutil.copytree(small_model, home / "model")
    argv = ["--model_name_or_path", home / "model", "--dataset_name", write_sums(home / "rows.jsonl")]
    argv += ["--source_max_len", "100", "--target_max_len", "100", "--lora_r", "2", "--template", "vanilla"]
    call_main("qlora_finetune", *argv, "--max_steps", "1", "--output_dir", home / "run")
    return home


def find_base_of(run, *given, **flags):
    return resolve_model(ModelArguments(checkpoint_dir=str(run), **flags), set(given)).args.base


def test_run_and_base_moved_together_are_found_from_anywhere(home, tmp_path, call_main, monkeypatch, capsys):
    moved = shutil.move(home, tmp_path / "elsewhere" / "home")
    monkeypatch.chdir(tmp_path)
    for run in ("elsewhere/home/run", moved / "run" / "checkpoint-1"):
        assert os.path.samefile(find_base_of(run), moved / "model")
        assert "the run's base" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n"))
    assert "> Who?\n" in call_main("cli_demo", "--checkpoint_dir", moved / "run", "--max_new_tokens", "2")


def test_base_of_a_relative_path_is_found_from_other_folders(home, tmp_path, monkeypatch):
    """As a run records it that was started beside its model."""
    record = json.loads((home / "run" / "run.json").read_text())
    record["arguments"]["model_name_or_path"] = "model"
    (home / "run" / "run.json").write_text(json.dumps(record))
    for folder in (home, tmp_path, "/"):
        monkeypatch.chdir(folder)
        assert os.path.samefile(find_base_of(home / "run"), home / "model")


def test_of_two_folders_the_one_that_was_trained_on_is_taken(home, tmp_path, small_model):
    moved = shutil.move(home, tmp_path / "moved")
    other = AutoModelForCausalLM.from_pretrained(small_model)
    other.lm_head.weight.data += 1
    other.save_pretrained(home / "model")  # where the run's base was
    assert os.path.samefile(find_base_of(moved / "run"), moved / "model")


def test_base_that_is_gone_is_called_the_runs_base(home):
    shutil.move(home / "model", home / "renamed")
    with pytest.raises(
        UserError, match="base of the run .*/run, .*/model, is not there any more.*--model_name"
    ):
        find_base_of(home / "run")
    given = str(home / "renamed")
    assert find_base_of(home / "run", "model_name_or_path", model_name_or_path=given) == given


def test_runs_of_older_versions_say_it_too(home):
    path = home / "run" / "run.json"
    record = json.loads(path.read_text())
    del record["base_places"], record["directory"]
    path.write_text(json.dumps(record))
    assert find_base_of(home / "run") == str(home / "model")
    shutil.move(home / "model", home / "renamed")
    with pytest.raises(UserError, match="base of the run"):
        find_base_of(home / "run")


def test_evaluation_from_another_folder_finds_the_runs_rows(home, tmp_path, call_main):
    record = json.loads((home / "run" / "run.json").read_text())
    record["arguments"]["dataset_name"] = "rows.jsonl#20"
    record["directory"] = str(home)
    (home / "run" / "run.json").write_text(json.dumps(record))
    assert read_recorded_data(record)["dataset_name"] == f"{home}/rows.jsonl#20"
    printed = call_main(
        "qlora_finetune", "--checkpoint_dir", home / "run", "--do_eval", "--max_eval_samples", "2"
    )
    assert '"eval_rows": 2' in printed


def test_data_is_left_as_it_was_where_it_is_found_or_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    record = {"directory": str(tmp_path / "gone")}
    assert find_data("here.jsonl,alpaca,org/name#5", record) == "here.jsonl,alpaca,org/name#5"
    own = "data/guanaco_identity.jsonl"
    assert find_data(f"here.jsonl,{own}#3", record) == f"here.jsonl,{REPOSITORY / own}#3"


def test_adapter_given_as_a_model_and_model_as_an_adapter_say_which_flag(home, small_model, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), config).save_pretrained(tmp_path / "a")
    for folder in (tmp_path / "a", home / "run"):
        with pytest.raises(UserError, match=f"holds an adapter and no model: use --checkpoint_dir {folder}"):
            check_model_path(str(folder), False)
    with pytest.raises(
        UserError, match=f"a whole model and no adapter: use --model_name_or_path {small_model}"
    ):
        resolve_model(ModelArguments(checkpoint_dir=str(small_model)), set())


def run_recipe(shell, folder, *flags):
    command = [shell, ROOT / "scripts" / "finetune_llama_guanaco7b.sh", *flags]
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_recipe_takes_data_from_where_it_is_called(small_model, tmp_path):
    write_sums(tmp_path / "mine.jsonl", 4)
    flags = ["--model_name_or_path", small_model, "--target_max_len", "100", "--dataset_name", "mine.jsonl"]
    result = run_recipe("bash", tmp_path, *flags, "--eval_dataset_size", "4")
    assert result.returncode == 2 and "mine.jsonl" in result.stderr + result.stdout
    assert "--eval_dataset_size 4" in result.stderr and "4 rows" in result.stderr


@pytest.mark.skipif(shutil.which("dash") is None, reason="no dash")
def test_sh_says_to_use_bash(tmp_path):
    result = run_recipe("dash", tmp_path, "--bits", "4")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "needs bash: bash" in result.stderr and result.stderr.endswith("guanaco7b.sh --bits 4\n")
