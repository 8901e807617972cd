"""The floor plan: rooms look down, no two know each other, nothing goes in circles, no script is imported."""

import ast
import re

import pytest
from helpers import ROOT
from helpers.rooms import IMPORTS, MODULES, ORDER, ROOMS, find_imports, find_room

SCRIPTS = {"qlora_finetune", "qlora_int8_finetune", "cli_demo", "gradio_webserver"}


def test_rooms_only_look_down():
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if find_room(module)
        and other.startswith(("utils", "eval"))
        and find_room(module) != find_room(other)
        and not (find_room(other) and ORDER.index(find_room(other)) < ORDER.index(find_room(module)))
    ]
    assert wrong == []


def test_nothing_imports_in_a_circle():
    state = {}

    def visit(module, path):
        assert state.get(module) != "open", f"a circle: {[*path, module]}"
        if module in state or module not in MODULES:
            return
        state[module] = "open"
        for other in IMPORTS[module]:
            visit(other, [*path, module])
        state[module] = "done"

    for module in MODULES:
        visit(module, [])


def test_nothing_imports_a_script_and_utils_nothing_of_eval():
    for module, others in IMPORTS.items():
        names = {other.split(".")[0] for other in others}
        assert not names & SCRIPTS, module
        assert not (module.startswith("utils") and "eval" in names), module


def test_nothing_imports_a_test_module():
    """What two of them use stands in tests/helpers/."""
    files = list((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    wrong = [
        f"{path.name} imports {other}"
        for path in files
        for other in find_imports(path)
        if other.split(".")[0] in tests
    ]
    assert len(tests) > 50 and wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_page_of_a_room_is_its_docstring_and_keeps_its_word(room):
    """What comes in and out, what to read first, and what it must not import, which it does not."""
    path = ROOT / "utils" / room / "__init__.py"
    tree = ast.parse(path.read_text())
    assert len(tree.body) == 1 and len(path.read_text().splitlines()) <= 12
    page = ast.get_docstring(tree)
    assert "In: " in page and "Out: " in page and "Must not import" in page and "Read: " in page
    named = re.match(r"[\w, ]+", page.partition("Must not import: ")[2]).group()
    forbidden = set(re.findall(r"\w+", named)) & set(ROOMS)
    imported = {
        find_room(other)
        for module, others in IMPORTS.items()
        if module.startswith(f"utils.{room}.")
        for other in others
    }
    assert forbidden and forbidden.isdisjoint(imported)


def test_utils_shows_at_most_twenty_entries():
    entries = [path.name for path in (ROOT / "utils").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 20, sorted(entries)
