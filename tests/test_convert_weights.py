"""What is no model's folder, or a damaged one, is one clear line; nothing is left behind."""

import json

import pytest
import torch
from helpers.shell import run_script

from utils.console import UserError
from utils.convert_weights import convert_folder


def write_folder(folder, config='{"model_type": "llama"}', **files):
    folder.mkdir()
    (folder / "config.json").write_text(config)
    for name, content in files.items():
        (folder / f"{name}.{'safetensors' if name == 'model' else 'bin'}").write_bytes(content)
    return folder


def pickle_content(content, path):
    torch.save(content, path)
    data = path.read_bytes()
    path.unlink()
    return data


def test_folder_without_a_model_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run_script("-m", "utils.convert_weights", tmp_path / "empty", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {tmp_path}/empty holds no config.json, so no model: download")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_is_no_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "nowhere"):
        with pytest.raises(UserError, match=f"{name} is no folder: download one"):
            convert_folder(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("case", ["no weights", "config", "junk", "empty", "cut", "list", "safetensors"])
def test_damaged_folder_is_one_line_that_names_the_file(tmp_path, case):
    whole = pickle_content({"a": torch.zeros(1000)}, tmp_path / "whole.bin")
    files, says = {
        "no weights": ({}, "holds neither"),
        "config": ({"config": "{", "model": b""}, "config.json is no JSON"),
        "junk": ({"pytorch_model": b"junk"}, "pytorch_model.bin is damaged"),
        "empty": ({"pytorch_model": b""}, "pytorch_model.bin is damaged"),
        "cut": ({"pytorch_model": whole[: len(whole) // 2]}, "pytorch_model.bin is damaged"),
        "list": ({"pytorch_model": pickle_content([1], tmp_path / "list.bin")}, "holds a list"),
        "safetensors": ({"model": b"junk"}, "model.safetensors is damaged"),
    }[case]
    folder = write_folder(tmp_path / "folder", **files)
    with pytest.raises(UserError, match=says) as caught:
        convert_folder(folder, tmp_path / "out")
    assert "\n" not in str(caught.value) and json.dumps(str(folder)).strip('"') in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_converted_weights_are_readable_by_whom_the_config_is(tmp_path):
    weights = pickle_content({"a": torch.zeros(10)}, tmp_path / "whole.bin")
    convert_folder(write_folder(tmp_path / "folder", pytorch_model=weights), tmp_path / "out")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] and modes["config.json"] & 0o044
