"""README.md and README_zh.md stay in step: the same commands, the same models, and every link leads somewhere."""

import re
import shlex
from urllib.parse import unquote

import pytest
from conftest import ROOT
from test_scripts import find_flag_types
from tiny_models import render_models

from utils.arguments import parse_args

READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
by_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)


def read_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def list_bash_commands(readme):
    joined = "".join(read_blocks(readme.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [command for command in words if command]


def list_anchors(text):
    """GitHub's anchors: lower case, punctuation left out, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_both_hold_the_same_commands_in_the_same_order():
    english, chinese = (list_bash_commands(readme) for readme in READMES)
    assert len(english) > 20 and english == chinese


def test_both_hold_the_same_python_and_the_same_citation():
    english, chinese = (readme.read_text(encoding="utf-8") for readme in READMES)
    for language in ("python", "bibtex", "text"):
        assert read_blocks(english, language) and read_blocks(english, language) == read_blocks(
            chinese, language
        )


def test_python_of_the_readmes_compiles():
    for block in read_blocks(READMES[0].read_text(encoding="utf-8"), "python"):
        compile(block, "README.md", "exec")


def test_both_have_the_same_sections_and_tables():
    shapes = []
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        headings = re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
        tables = [table.count("\n") for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)]
        shapes.append((headings, tables))
    assert shapes[0] == shapes[1]


@by_readme
def test_list_of_models_is_the_tests_own(readme):
    text = readme.read_text(encoding="utf-8")
    assert f"<!-- models -->\n{render_models()}\n<!-- /models -->" in text


@by_readme
def test_every_relative_link_and_picture_exists(readme):
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    relative = [link for link in links if not link.startswith(("https://", "http://"))]
    assert "assets/logo.svg" in relative
    for link in relative:
        path, _, anchor = unquote(link).partition("#")
        assert (ROOT / path).exists() if path else anchor in list_anchors(text), link


@by_readme
def test_every_named_test_and_file_exists(readme):
    text = readme.read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    tests = re.findall(r"`(test_\w+?)_?\.\.\.`", text)
    assert len(tests) > 5
    assert [name for name in tests if f"def {name}" not in sources] == []
    named = re.findall(r"^    (\w[\w/]*\.py) ", text, flags=re.MULTILINE)
    assert named and [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("command", list_bash_commands(READMES[0]), ids=" ".join)
def test_command_names_what_exists(command):
    """Scripts and questions are there; `accelerate launch` passes its own parser and the script's."""
    if command[0] == "bash":
        assert (ROOT / command[1]).is_file()
    if "--questions" in command:
        assert (ROOT / command[command.index("--questions") + 1]).is_file()
    if command[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(command[2:])
        assert (ROOT / launched.training_script).is_file() and launched.num_processes > 1
        parse_args(launched.training_script_args, find_flag_types("qlora_finetune"), "")
