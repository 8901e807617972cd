"""The starter model's folder, when two commands make it at once (test workers on a new machine do)."""

import sys

import pytest

from utils import starter_model
from utils.console import UserError


@pytest.fixture
def make(monkeypatch):
    def run(folder):
        monkeypatch.setattr(sys, "argv", ["starter_model", str(folder)])
        starter_model.main()

    return run


def write_model(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")


def test_folder_that_another_process_finished_first_is_kept(make, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"

    def save(complete):
        write_model(complete)
        write_model(folder)  # the other process is done first

    monkeypatch.setattr(starter_model, "save_starter_model", save)
    make(folder)
    assert "made meanwhile by another process" in "".join(capsys.readouterr())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_folder_that_holds_something_else_is_not_taken_for_a_model(make, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="holds no model.safetensors"):
        make(tmp_path / "model")
