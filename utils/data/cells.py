"""What a cell of a row holds: text, a number that is text there too, or nothing."""

import json
import math
from collections.abc import Iterable
from typing import Any

NUMBERS = "numbers and booleans written as text"
LINES = "lists of lines joined to one text"

# Columns about a row, not of it: where it is from, what kind it is.
METADATA = frozenset(
    "id idx index uuid hash url link source origin dataset domain subset split lang language category type "
    "tag tags topic model generator metadata label score level".split()
    + ["generated_from", "来源", "类别", "语言", "编号"]
)


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
    return is_number(value) or (bool(value) and not isinstance(value, float))


def write_cell(value: Any) -> Any:
    """A number or boolean (a label, a score) as its text, NaN as null, any other value as it is."""
    if is_number(value):
        return json.dumps(value)
    return None if is_empty_number(value) else value


def note_written(values: Iterable[Any]) -> list[str]:
    """Notes of a row where one of these was no text and is written as one."""
    values = list(values)
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
