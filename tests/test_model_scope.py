"""modelscope:ORG/NAME, against a stand-in with the functions of the package's 1.40.2; the site was not tried."""

import json
import shutil
import sys

import pytest
from helpers.rows import alpaca_rows, load, write_rows

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.models.folder import resolve_model

PACKAGE = """
import json, pathlib, shutil

SITE = pathlib.Path(__file__).parent / "site"
CALLS = []


def give(kind, repository, folder, ignored):
    CALLS.append((kind, repository, ignored))
    if not (SITE / kind / repository).is_dir():
        raise ValueError(f"404 {repository}\\nlong")
    target = pathlib.Path(folder or SITE.parent / "cache") / kind / repository
    shutil.copytree(SITE / kind / repository, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignored))
    return str(target)


def snapshot_download(model_id=None, revision=None, cache_dir=None, user_agent=None, local_files_only=False,
    cookies=None, ignore_file_pattern=None, allow_file_pattern=None, local_dir=None, allow_patterns=None,
    ignore_patterns=None, max_workers=None, repo_id=None, repo_type=None, progress_callbacks=None, token=None,
    endpoint=None):
    return give("models", model_id, cache_dir, ignore_patterns)


def dataset_snapshot_download(dataset_id=None, revision=None, cache_dir=None, local_dir=None,
    allow_file_pattern=None, ignore_file_pattern=None, allow_patterns=None, ignore_patterns=None,
    max_workers=None, cookies=None, repo_id=None, token=None, endpoint=None):
    return give("datasets", dataset_id, cache_dir, ignore_patterns or [])
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Where the stand-in finds what is published."""
    (tmp_path / "modelscope.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    yield tmp_path / "site"
    sys.modules.pop("modelscope", None)


def test_run_with_model_and_rows_of_modelscope_is_one_with_their_folders(
    call_main, site, tiny_model, tmp_path
):
    shutil.copytree(tiny_model, site / "models" / "org" / "tiny")
    (site / "models" / "org" / "tiny" / "pytorch_model.bin").write_bytes(b"a pickle")
    write_rows(site / "datasets" / "org" / "sums" / "train.jsonl", alpaca_rows(12))
    argv = ["--model_name_or_path", "modelscope:org/tiny", "--dataset_name", "modelscope:org/sums#8"]
    argv += ["--cache_dir", tmp_path / "kept", "--source_max_len", 100, "--target_max_len", 50]
    printed = call_main(
        "qlora_finetune", *argv, "--max_steps", 1, "--lora_r", 2, "--output_dir", tmp_path / "run"
    )
    folder = tmp_path / "kept" / "models" / "org" / "tiny"
    assert f"modelscope:org/tiny is in {folder}" in printed and not (folder / "pytorch_model.bin").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["base_model"]["name"] == str(folder) and record["data"]["rows"]["train"] == 8
    assert record["arguments"]["dataset_name"] == "modelscope:org/sums#8"


def test_rows_of_modelscope_stand_beside_other_files(site, tmp_path):
    write_rows(site / "datasets" / "org" / "sums" / "train.jsonl", alpaca_rows(3))
    other = write_rows(tmp_path / "other.jsonl", alpaca_rows(4, start=10))
    assert load(f"modelscope:org/sums,{other}").count("train") == 7


def test_what_modelscope_cannot_give_is_one_line(site, monkeypatch):
    def refuse(name):
        with pytest.raises(UserError) as error:
            resolve_model(ModelArguments(name), set())
        return str(error.value)

    assert (
        refuse("modelscope:org")
        == "--model_name_or_path modelscope:org: ModelScope's ids are written modelscope:ORG/NAME"
    )
    message = refuse("modelscope:org/none")
    assert "--model_name_or_path modelscope:org/none: ModelScope does not give it (404 org/none);" in message
    assert "\n" not in message
    with pytest.raises(
        UserError, match=r"--dataset_name modelscope:org/none: ModelScope does not give it \(404"
    ):
        load("modelscope:org/none")
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as where it is not installed
    missing = (
        "--model_name_or_path modelscope:org/tiny: the package modelscope is missing (pip install modelscope)"
    )
    assert refuse("modelscope:org/tiny") == missing
