"""The documents hold what they promise: links, tests and figures are there, both READMEs say the same."""

import json
import re
from urllib.parse import unquote

import pytest
from helpers import ROOT
from helpers.documents import (
    DOCS,
    DOCUMENTS,
    READMES,
    find_marked,
    list_bash_commands,
    name_document,
    read_blocks,
)
from helpers.families import FAMILIES
from helpers.formats import list_turns
from helpers.rows import load, write_rows

by_readme = pytest.mark.parametrize("readme", READMES, ids=name_document)
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
RESULTS = ROOT / "docs" / "results.md"


def list_anchors(text):
    """GitHub's anchors: lower case, punctuation left out, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_both_hold_the_same_commands_in_the_same_order():
    english, chinese = (list_bash_commands(readme) for readme in READMES)
    assert len(english) > 15 and english == chinese


@by_readme
def test_a_readme_is_read_in_one_sitting(readme):
    text = readme.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2_100


def test_both_hold_the_same_output_rows_and_citation():
    english, chinese = (readme.read_text(encoding="utf-8") for readme in READMES)
    for language in ("bibtex", "text", "json"):
        assert read_blocks(english, language) == read_blocks(chinese, language) != []


def test_both_have_the_same_sections_and_tables():
    shapes = []
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        headings = re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
        tables = [table.count("\n") for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)]
        shapes.append((headings, tables))
    assert shapes[0] == shapes[1]


def list_links(text):
    """Relative targets of links and pictures, code blocks left out."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    return [link for link in links if not link.startswith(("https://", "http://"))]


def test_both_lead_to_the_same_documents():
    english, chinese = (set(list_links(readme.read_text(encoding="utf-8"))) for readme in READMES)
    assert english - {"README_zh.md"} == chinese - {"README.md"} and "assets/logo.svg" in english


@by_document
def test_every_relative_link_and_picture_exists(document):
    text = document.read_text(encoding="utf-8")
    for link in list_links(text):
        path, _, anchor = unquote(link).partition("#")
        assert not path or (document.parent / path).exists(), link
        target = (document.parent / path).read_text(encoding="utf-8") if path.endswith(".md") else text
        assert not anchor or anchor in list_anchors(target), link


def test_every_document_is_led_to_from_the_readme():
    """By a link, or by a link of a linked one."""
    found, open_ = set(), [READMES[0]]
    while open_:
        document = open_.pop()
        found.add(document)
        for link in list_links(document.read_text(encoding="utf-8")):
            path = (document.parent / link.partition("#")[0]).resolve()
            if path.suffix == ".md" and path not in found:
                open_.append(path)
    assert [name_document(path) for path in DOCUMENTS if path not in found] == []


@by_document
def test_every_named_test_and_file_exists(document):
    text = document.read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    tests = re.findall(r"`(test_\w+?)_?\.\.\.`", text)
    assert [name for name in tests if f"def {name}" not in sources] == []
    named = re.findall(r"^    (\w[\w/]*\.py) ", text, flags=re.MULTILINE)
    named += re.findall(r"\b(?:utils|eval|tests|examples)/[\w/]+\.py\b", text)
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_reliability_names_the_tests_that_hold_it():
    assert len(re.findall(r"`test_\w+?_?\.\.\.`", (ROOT / "docs" / "reliability.md").read_text())) > 10


@by_readme
def test_models_of_the_readme_are_those_that_the_tests_build(readme):
    named = re.findall(r"`([^`]+)`", find_marked(readme.read_text(encoding="utf-8"), "models"))
    assert sorted(named) == sorted(family.example for family in FAMILIES)


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
SMALL = {"rank": 16, "adapter_bytes": 12}  # --lora_r 16 --optim paged_adamw_8bit


def estimate_memory(model, tokens=2048, rank=64, adapter_bytes=18):
    """The formula of docs/results.md, GiB."""
    hidden, gate, layers, keys, vocabulary, tied = SHAPES[model]
    linear = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * gate)
    adapter = rank * layers * (4 * hidden + 2 * (hidden + keys) + 3 * (hidden + gate))
    embedding = vocabulary * hidden * (1 if tied else 2)
    total = 0.516 * linear + 2 * embedding + adapter_bytes * adapter + 54 * hidden * tokens
    return total / 2**30 + 0.3


def choose_card(gib):
    return next(card for card in (4, 6, 8, 12, 16, 24, 32, 48, 80) if gib + 1 <= 0.92 * card)


def test_table_of_memory_is_what_its_formula_says_and_near_what_was_measured():
    table = find_marked(RESULTS.read_text(encoding="utf-8"), "memory")
    rows = re.findall(r"^\| (\S+) \| (\d.*) \|$", table, re.MULTILINE)
    for model, cells in rows:
        default, small = estimate_memory(model), estimate_memory(model, **SMALL)
        said = f"{default:.1f} | {choose_card(default)} | {small:.1f} | {choose_card(small)}"
        assert cells == said, model
    assert {model for model, _ in rows} == SHAPES.keys()
    assert estimate_memory("LLaMA-7B", tokens=512) == pytest.approx(6.65, rel=0.02)  # measured on one H100
    assert estimate_memory("LLaMA-7B", tokens=8192) == pytest.approx(8.2, rel=0.02)


@by_readme
@pytest.mark.parametrize("column, setting", [(0, {}), (1, SMALL)], ids=["default", "small"])
def test_cards_hold_the_models_that_the_readme_names_and_no_larger_one(readme, column, setting):
    table = find_marked(readme.read_text(encoding="utf-8"), "cards")
    rows = re.findall(r"^\| (\d+) GB \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)
    assert [int(size) for size, *_ in rows] == [4, 6, 8, 12, 16, 24, 32, 48, 80]
    peaks = {model: estimate_memory(model, **setting) for model in SHAPES}
    for size, *cells in rows:
        named = cells[column].replace("**", "").split(", ")
        fitting = {model for model, peak in peaks.items() if choose_card(peak) <= int(size)}
        assert set(named) <= fitting, size
        assert max(peaks[model] for model in named) == max(peaks[model] for model in fitting), size


@by_readme
def test_what_qlora_needs_of_a_7b_is_the_tables(readme):
    (line,) = (line for line in readme.read_text(encoding="utf-8").splitlines() if "100 GB" in line)
    peaks = [estimate_memory("LLaMA-7B", **setting) for setting in ({}, SMALL)]
    assert re.findall(r"\d+\.\d+", line) == [f"{peak:.1f}" for peak in peaks]


def test_times_are_the_measured_speed_by_the_cards_arithmetic():
    table = find_marked(RESULTS.read_text(encoding="utf-8"), "time")
    row = r"^\| ([A-Z][\w ]+) \| (\d+) \| ([\d,]*\d)\b[^|]*\| (\d+) [^|]*\|$"
    cards = re.findall(row, table, re.MULTILINE)
    assert "11,750, **measured**" in table and len(cards) == 5
    for card, peak, speed, minutes in cards:  # a small card recomputes, an H100 need not
        expected = 16_400 if card == "H100" else 11_750 * int(peak) / 989
        assert int(speed.replace(",", "")) == pytest.approx(expected, rel=0.03)
        assert int(minutes) == pytest.approx(10_000 * 283 / expected / 60, rel=0.05)
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        assert [
            card for card, _, _, minutes in cards if not re.search(rf"{card}[^,\d]*\b{minutes}\b", text)
        ] == []


@by_readme
def test_every_figure_of_the_readmes_speed_table_stands_in_the_results(readme):
    text, results = readme.read_text(encoding="utf-8"), RESULTS.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| .*\| \d+\.\dx \|$", line)]
    assert len(rows) == 3
    for row in rows:
        figures = re.findall(r"(?<![\d.,])\d+(?:,\d{3})+(?![\d.])|\d+\.\d+(?![\dx])", row)
        assert len(figures) >= 2 and [figure for figure in figures if figure not in results] == [], row
        was, now, ratio = row.split("|")[2:5]
        was, now = (float(re.match(r"[\d,.]+", cell.strip())[0].replace(",", "")) for cell in (was, now))
        assert float(ratio.strip()[:-1]) == pytest.approx(now / was, abs=0.05)


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


def test_example_rows_of_the_readmes_are_the_first_of_all_formats():
    english, chinese, data = map(read_example_rows, [*READMES, ROOT / "data" / "README.md"])
    assert english == chinese == data[:4] and len(data) == len(EXAMPLES)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_row_alone_is_a_data_set(number, tmp_path):
    row = read_example_rows(ROOT / "data" / "README.md")[number]
    rows = load(write_rows(tmp_path / "YOUR.jsonl", [row]))
    ((_, _, _, chat),) = rows.read("\n\n")
    assert list_turns(chat) == EXAMPLES[number]


def test_docs_are_those_that_the_house_has():
    names = "architecture commands lab_log memory reliability results serving several_gpus training"
    assert [path.stem for path in DOCS] == names.split()


# What the two reports print, and where the code says it.
SAID = {
    "answers that lost their end and stop token": "utils/data/tokenizing.py",
    "of the rows have a thought": "utils/data/thoughts.py",
    "would hold 99% of the rows": "utils/data/report.py",
    "RED: ": "utils/data/report.py",
    "No clear difference": "eval/measures/report.md.jinja",
    "unclear": "eval/measures/differences.py",
    "better": "eval/measures/differences.py",
    "worse": "eval/measures/differences.py",
}


@by_readme
@pytest.mark.parametrize("words", SAID)
def test_words_that_the_readme_explains_are_those_that_are_printed(readme, words):
    assert words in readme.read_text(encoding="utf-8") and words in (ROOT / SAID[words]).read_text()
