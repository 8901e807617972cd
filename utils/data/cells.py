"""What a cell of a row holds: text, a number that is text there too, or nothing."""

import functools
import json
import math
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

from utils.console import UserError
from utils.prompts.messages import Row

NUMBERS = "numbers and booleans written as text"
LINES = "lists of lines joined to one text"

# Columns about a row, not of it: where it is from, what kind it is.
METADATA = frozenset(
    "id idx index uuid hash url link source origin dataset domain subset split lang language category type "
    "tag tags topic model generator metadata label score level".split()
    + ["generated_from", "来源", "类别", "语言", "编号"]
)


@functools.cache
def is_metadata(column: str) -> bool:
    """Whether a column is known to tell about the row, by its name."""
    name = column.lower()
    return name in METADATA or name.endswith(("_id", "_url", "_source", "_type", "_name"))


def is_empty_number(value: Any) -> bool:
    """NaN, as tables write an empty cell of a column of numbers; an infinity says no more."""
    return isinstance(value, float) and not math.isfinite(value)


def is_number(value: Any) -> bool:
    """A number or boolean that says something."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))  # a bool is an int


def is_given(value: Any) -> bool:
    """Whether a cell holds anything: 0 and false do; NaN, null, an empty text and an empty list do not."""
    if isinstance(value, str):
        return value != ""
    return is_number(value) or (bool(value) and not isinstance(value, float))


def find_given(row: Row, columns: Iterable[str]) -> str | None:
    """The first of these columns that holds anything."""
    for column in columns:
        if is_given(row.get(column)):
            return column
    return None


def write_cell(value: Any) -> Any:
    """A number or boolean (a label, a score) as its text, NaN as null, any other value as it is."""
    if isinstance(value, str):
        return value
    if is_number(value):
        return json.dumps(value)
    return None if is_empty_number(value) else value


def need_text(value: Any, where: str) -> str:
    """write_cell of a value that must be text, `where` it stands. Raises UserError for another."""
    text = write_cell(value)
    if not isinstance(text, str):
        raise UserError(f"{where} holds {str(text)[:40]!r}: text is needed")
    return text


def list_leaves(value: Any) -> Iterator[Any]:
    """The values in lists and objects, however deep; a value itself that is neither."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from list_leaves(part)
    else:
        yield value


def note_written(values: list[Any]) -> list[str]:
    """Notes of a row where one of these was no text and is written as one."""
    if set(map(type, values)) <= {str, NoneType}:
        return []
    lines = any(isinstance(value, list) and value and isinstance(value[0], str) for value in values)
    return [NUMBERS] * any(map(is_number, values)) + [LINES] * lines


def unpack_list(value: Any) -> Any:
    """The list of turns (objects or pairs) that a table stores as its JSON; any other value as it is."""
    if not (isinstance(value, str) and value.startswith(("[{", "[["))):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return value
    return found if all(isinstance(turn, dict | list) for turn in found) else value
