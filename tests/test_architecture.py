"""docs/architecture.md: its picture is the import graph, its road is what a default run comes along."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize

import pytest
from helpers import ROOT
from helpers.documents import find_marked, read_blocks
from helpers.rooms import IMPORTS, ORDER, ROOMS, find_room

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROAD = re.findall(r"^([a-z0-9_/]+\.py)", find_marked(PAGE, "road"), flags=re.MULTILINE)
# A run as a user starts it; then the modules of this repository that it has imported.
RUN = """
import json, sys
sys.path.insert(0, ".")
import qlora_finetune
qlora_finetune.main()
print(json.dumps([module.__file__ for name, module in list(sys.modules.items()) if name.startswith("utils")]))
"""


def test_order_of_the_rooms_is_the_one_that_is_held():
    assert re.findall(r"\w+", find_marked(PAGE, "order").partition("-->")[2]) == ORDER


def read_picture():
    """{room: rooms that its arrows lead to}; the ground files are one box."""
    (picture,) = read_blocks(PAGE, "mermaid")
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", picture, flags=re.MULTILINE)
    return {room: {to for start, to in arrows if start == room} for room in [*ROOMS, "scripts"]}


def follow(picture, room):
    found = set()
    for other in picture.get(room, ()):
        found |= {other} | follow(picture, other)
    return found


def test_picture_has_every_import_between_rooms_and_no_arrow_without_one():
    picture = read_picture()
    imports = {room: set() for room in ROOMS}
    for module, others in IMPORTS.items():
        rooms = {find_room(other) for other in others} - {None, find_room(module)}
        if find_room(module) in ROOMS:
            imports[find_room(module)] |= {room if room in ROOMS else "ground" for room in rooms}
    for room in ROOMS:
        assert picture[room] <= imports[room], room
        assert imports[room] <= follow(picture, room), room
    assert follow(picture, "scripts") == {*ROOMS, "ground"}


def count_code_lines(path):
    """Lines that are neither empty, comments nor docstrings."""
    text, strings = path.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            strings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    marks = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in marks:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - strings)


def test_command_of_the_page_counts_the_files_of_the_road():
    (command,) = read_blocks(PAGE, "bash")
    printed = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    counted = re.findall(r"^ *\d+ (\S+\.py)$", printed, flags=re.MULTILINE)
    assert counted == ROAD and re.search(r"^ *\d+ total$", printed, flags=re.MULTILINE)


def test_default_run_comes_along_every_file_of_the_road(tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", ROOT / "data" / "guanaco_identity.jsonl"]
    argv += ["--output_dir", tmp_path / "run", "--max_steps", 2, "--max_train_samples", 8]
    argv += ["--source_max_len", 200, "--target_max_len", 100]
    result = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    imported = {"qlora_finetune.py"}
    for file in json.loads(result.stdout.splitlines()[-1]):
        imported.add(file.removeprefix(f"{ROOT}/"))
    assert [name for name in ROAD if name not in imported] == []
    sizes = {name: count_code_lines(ROOT / name) for name in ROAD}
    print(
        "\n".join(f"{lines:5d}  {name}" for name, lines in sizes.items()),
        f"\n{sum(sizes.values()):5d}  in all",
    )


@pytest.mark.parametrize("room", ROOMS)
def test_page_says_what_comes_in_and_out_of_each_room(room):
    assert re.search(rf"^\| `{room}/` \| .+ \| .+ \|$", PAGE, flags=re.MULTILINE)
