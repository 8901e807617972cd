"""README.md and README_zh.md stay in step: the same commands, the same models, and every link leads somewhere."""

import json
import re
import shlex
from urllib.parse import unquote

import pytest
from helpers import ROOT
from helpers.commands import READMES, find_flag_types
from helpers.families import render_models
from helpers.formats import list_turns
from helpers.rows import load, write_rows

from utils.flags.parser import parse_args

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
    for language in ("python", "bibtex", "text", "json"):
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
        assert not path or (ROOT / path).exists(), link
        target = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else text
        assert not anchor or anchor in list_anchors(target), link


@pytest.mark.parametrize("readme", [*READMES, ROOT / "docs" / "reliability.md"], ids=lambda path: path.name)
def test_every_named_test_and_file_exists(readme):
    text = readme.read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    tests = re.findall(r"`(test_\w+?)_?\.\.\.`", text)
    assert len(tests) > 5
    assert [name for name in tests if f"def {name}" not in sources] == []
    named = re.findall(r"^    (\w[\w/]*\.py) ", text, flags=re.MULTILINE)
    assert (named or readme not in READMES) and [name for name in named if not (ROOT / name).is_file()] == []


def find_marked(text, name):
    return text[text.index(f"<!-- {name} -->") : text.index(f"<!-- /{name} -->")]


# Hidden size, gate size, layers, width of keys, vocabulary, whether embedding and output layer are one.
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 128, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 256, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 256, 151936, True),
    "LLaMA-7B": (4096, 11008, 32, 4096, 32000, False),
    "Qwen2.5-7B": (3584, 18944, 28, 512, 152064, False),
    "LLaMA-3-8B": (4096, 14336, 32, 1024, 128256, False),
    "LLaMA-13B": (5120, 13824, 40, 5120, 32000, False),
    "Qwen2.5-14B": (5120, 13824, 48, 1024, 152064, False),
    "LLaMA-33B": (6656, 17920, 60, 6656, 32000, False),
    "LLaMA-65B": (8192, 22016, 80, 8192, 32000, False),
    "LLaMA-3-70B": (8192, 28672, 80, 1024, 128256, False),
}


def estimate_memory(model, tokens=2048, rank=64, adapter_bytes=18):
    """The README's formula, GiB."""
    hidden, gate, layers, keys, vocabulary, tied = SHAPES[model]
    linear = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * gate)
    adapter = rank * layers * (4 * hidden + 2 * (hidden + keys) + 3 * (hidden + gate))
    embedding = vocabulary * hidden * (1 if tied else 2)
    total = 0.516 * linear + 2 * embedding + adapter_bytes * adapter + 54 * hidden * tokens
    return total / 2**30 + 0.3


def choose_card(gib):
    return next(card for card in (4, 6, 8, 12, 16, 24, 32, 48, 80) if gib + 1 <= 0.92 * card)


@by_readme
def test_table_of_memory_is_what_its_formula_says_and_near_what_was_measured(readme):
    table = find_marked(readme.read_text(encoding="utf-8"), "memory")
    rows = re.findall(r"^\| (\S+) \| (\d.*) \|$", table, re.MULTILINE)
    for model, cells in rows:
        default, small = estimate_memory(model), estimate_memory(model, rank=16, adapter_bytes=12)
        said = f"{default:.1f} | {choose_card(default)} | {small:.1f} | {choose_card(small)}"
        assert cells == said, model
    assert {model for model, _ in rows} == SHAPES.keys()
    assert estimate_memory("LLaMA-7B", tokens=512) == pytest.approx(6.65, rel=0.02)  # measured on one H100
    assert estimate_memory("LLaMA-7B", tokens=8192) == pytest.approx(8.2, rel=0.02)


@by_readme
def test_times_are_the_measured_speed_by_the_cards_arithmetic(readme):
    row = r"^\| [A-Z][\w ]+ \| (\d+) \| ([\d,]*\d)\b[^|]*\| (\d+) [^|]*\|$"
    cards = re.findall(row, readme.read_text(encoding="utf-8"), re.MULTILINE)
    measured = 11_750
    assert len(cards) == 5
    for peak, speed, minutes in cards:
        expected = measured * int(peak) / 989
        assert int(speed.replace(",", "")) == pytest.approx(expected, rel=0.03)
        assert int(minutes) == pytest.approx(10_000 * 283 / expected / 60, rel=0.05)


def read_example_rows(path):
    (block,) = read_blocks(find_marked(path.read_text(encoding="utf-8"), "rows"), "json")
    return [json.loads(line) for line in block.splitlines()]


CHAT = ["u:Are you there?", "a:Yes, I am."]
EXAMPLES = [  # what the example rows mean, in their order
    ["u:法国的首都是哪里？", "a:巴黎。"],
    ["u:Translate into Chinese.\n\nGood morning.", "a:早上好。"],
    CHAT,
    CHAT,
    ["u:What is the capital of France?", "a:Paris.", "u:And of Italy?", "a:Rome."],
    ["u:Name a colour.", "a:Blue."],
    ["x:A text without a chat is continued and not answered."],
]


def test_example_rows_are_the_same_everywhere():
    english, chinese, data = map(read_example_rows, [*READMES, ROOT / "data" / "README.md"])
    assert english == chinese == data and len(english) == len(EXAMPLES)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_row_alone_is_a_data_set(number, tmp_path):
    row = read_example_rows(READMES[0])[number]
    rows = load(write_rows(tmp_path / "YOUR.jsonl", [row]))
    ((_, _, _, chat),) = rows.read("\n\n")
    assert list_turns(chat) == EXAMPLES[number]


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
