"""Cached rows are those that today's code and libraries would make: nobody has to raise a number."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.rows import alpaca_rows, load, write_rows

from utils.arguments import DataArguments
from utils.console import UserError
from utils.data import cache, tokenizing
from utils.data.cache import ROW_LIBRARIES, hash_code
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.messages import TRAIN


@pytest.fixture
def copy(tmp_path):
    """This repository's code, free to be changed."""
    for folder in ("utils", "eval"):
        shutil.copytree(
            ROOT / folder, tmp_path / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path / "copy"


def hash_copy(copy, module="utils.data.tokenizing"):
    hash_code.cache_clear()
    return hash_code(module, copy)


def list_loaded(module):
    """Our modules that Python itself loads for this one."""
    program = f"import sys, {module}; print(*(name for name in sys.modules if name.startswith('utils.')))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


# Every fourth module in the first tier, all of them in the second: half a second each.
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_key_changes_with_every_module_that_makes_rows_and_no_other(copy, stride):
    before = hash_copy(copy)
    assert before == hash_copy(ROOT)
    loaded = list_loaded("utils.data.tokenizing")
    assert {
        "utils.data.tokenizing",
        "utils.prompts.answer_spans",
        "utils.data.token_rows",
        "utils.data.formats",
        "utils.data.readers",
    } <= {*loaded}
    for name in [*loaded[::stride], "utils.data.html_text"]:  # which is imported when the first page is read
        path = (copy / name.replace(".", "/")).with_suffix(".py")
        if not path.is_file():  # a room's page
            continue
        source = path.read_text()
        path.write_text(source + "\n# changed\n")
        assert hash_copy(copy) != before, name
        path.write_text(source)
    for path in ("utils/chat/page.py", "utils/train/trainer.py", "eval/elo.py", "utils/chat/generation.py"):
        (copy / path).write_text("changed =")
    assert hash_copy(copy) == before


@pytest.mark.parametrize("library", ROW_LIBRARIES)
def test_key_changes_with_the_version_of_a_library(library, monkeypatch):
    before = hash_copy(ROOT)
    installed = cache.version
    monkeypatch.setattr(cache, "version", lambda name: installed(name) + ".post1" * (name == library))
    assert hash_copy(ROOT) != before
    hash_code.cache_clear()


def test_rows_tokenized_by_other_code_are_made_anew(copy, tmp_path, smol_tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(3))
    monkeypatch.setattr(tokenizing, "hash_code", lambda module: hash_copy(copy, module))

    def tokenize():
        tokenizer = ChatTokenizer(smol_tokenizer, [smol_tokenizer.eos_token_id])
        tokenizing.tokenize_rows(load(path), tokenizer, DataArguments(str(path)))
        return "are read from" in capsys.readouterr().out

    assert [tokenize(), tokenize()] == [False, True]
    code = Path("utils", "prompts", "answer_spans.py")
    (copy / code).write_text((ROOT / code).read_text() + "\n")
    assert [tokenize(), tokenize()] == [False, True]


def test_large_file_is_scanned_anew_by_other_code(copy, tmp_path):
    """A mended format is used at the next start, in a process of its own, though the file is the same."""
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"q{i}", "output": "a"} for i in range(4)])
    program = (
        "import sys; from utils.data import rows, scanning; scanning.CACHED_ROWS = 0; from utils.arguments import *;"
        "rows = rows.load_rows(ModelArguments(), DataArguments(sys.argv[1]), TrainingArguments(do_train=True));"
        f"print(rows.count({TRAIN!r}))"
    )

    def scan():
        environment = {"QLORA_CACHE": str(tmp_path / "cache"), "PATH": ""}
        command = [sys.executable, "-c", program, path]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return int(result.stdout.splitlines()[-1]), len(list((tmp_path / "cache").glob("scan-*")))

    assert [scan(), scan()] == [(4, 1), (4, 1)]
    formats = copy / "utils" / "data" / "formats.py"
    line = '    return read_exchange(row, "instruction", "output"'
    head, tail = formats.read_text().split(line)
    guard = '    if row["instruction"] == "q1":\n        raise UserError("refused")\n'
    formats.write_text(f"{head}{guard}{line}{tail}")
    assert scan() == (3, 2)


def test_same_bytes_as_csv_and_tsv_are_other_rows(tmp_path, monkeypatch):
    from utils.data import scanning

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scanning, "CACHED_ROWS", 0)
    for suffix in ("csv", "tsv"):
        (tmp_path / f"rows.{suffix}").write_text("text\tmore,x\na\tb,c\n")
    assert load(tmp_path / "rows.tsv", dataset_format="text").count(TRAIN) == 1
    with pytest.raises(UserError, match="column 'text' holds 'None'"):
        load(tmp_path / "rows.csv", dataset_format="text")
