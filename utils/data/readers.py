"""A file gives its rows one at a time: JSON, JSON lines, CSV, TSV, parquet and text, each also packed.

Files of several gigabytes are common, so none is held whole: a JSON array is decoded from a window that
holds a million characters of it, CSV and JSON lines are read by the line, parquet by 1,000 rows. A row
comes as the file has it; what its columns mean is told in formats.py. What is wrong with a file is one
line with its place, as in `rows.json: line 12 is no JSON (... after row 11)`.
"""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from utils.console import UserError, notice_once
from utils.data.file_text import damage_explained, measure_size, open_binary, open_text
from utils.data.layouts import NO_TEXTS, TURNS

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
WORKBOOKS = (".xlsx", ".xls", ".ods", ".numbers", ".et")
JSON_CHUNK = 1 << 20  # characters read at once from a JSON array
SPACE = " \t\r\n"
TOOLS = ("tools", "functions")  # lists of objects that are no turns
ROW_LISTS = {*TURNS, *NO_TEXTS}  # columns with the turns of one row


def find_kind(path: Path) -> str | None:
    """`.json`, `.csv`, ... behind an optional .gz; None for a suffix that holds no rows."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in ROW_SUFFIXES else None


def read_file(path: Path) -> Iterator[Any]:
    """Rows of one file, in its order, without holding it in memory. Raises UserError where it is damaged."""
    readers: dict[str | None, Callable[[Path], Iterator[Any]]] = {
        ".csv": read_csv,
        ".tsv": read_csv,
        ".parquet": read_parquet,
        ".txt": read_text,
    }
    if path.suffix.lower() in WORKBOOKS:
        raise UserError(f"{path} is a spreadsheet: save it as CSV in UTF-8 and give that file")
    if measure_size(path) == 0:
        raise UserError(f"{path} is empty: rows are needed")
    with damage_explained(path):
        yield from readers.get(find_kind(path), read_json)(path)


def read_lines(path: Path) -> Iterator[str]:
    """Text lines without their ends; a byte order mark and carriage returns are dropped."""
    with open_text(path, newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if "\0" in line:
                raise UserError(f"{path}: line {number} holds a NUL byte, so the file is binary or damaged")
            yield line.rstrip("\r\n")


def read_json(path: Path) -> Iterator[Any]:
    """A JSON array, JSON lines, objects over several lines, or one object that holds the rows."""
    lines = read_lines(path)
    first = next((line for line in lines if line.strip(SPACE)), None)
    if first is None:
        raise UserError(f"{path} is empty: rows are needed")
    if first.lstrip(SPACE).startswith("["):
        yield from read_json_array(path)
        return
    head, rows = peek(read_json_values(path) if goes_on(first) else read_json_lines(path), 2)
    yield from find_inner_rows(path, head[0]) if len(head) == 1 else rows


def goes_on(line: str) -> bool:
    """Whether a JSON value begins in this line and ends in another."""
    try:
        json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return getattr(error, "pos", 0) >= len(line.rstrip(SPACE))
    return False


def find_inner_rows(path: Path, value: Any) -> list[Any]:
    """The rows of a file that holds this value alone: {"data": [...]} has them in its one list of objects.

    Objects with a speaker, or in a column of turns, are those of a chat, which is a row itself.
    """
    lists = [
        (name, own)
        for name, own in (value.items() if isinstance(value, dict) else ())
        if isinstance(own, list) and own and all(isinstance(row, dict) for row in own)
    ]
    if len(lists) != 1:
        return [value]
    name, rows = lists[0]
    inner = {key for row in rows for key in row}
    if inner & {"role", "from"} or "instruction" in value or (name in ROW_LISTS and not inner & ROW_LISTS):
        return [value]
    notice_once(f"{path}: the rows are those of {name!r}, the one list in the file")
    return rows


def read_json_values(path: Path) -> Iterator[Any]:
    """Values that follow each other, each over any number of lines."""
    with open_text(path) as stream:
        window = Window(path, stream)
        while window.skip_space():
            yield window.decode()


def read_json_lines(path: Path) -> Iterator[Any]:
    """One row a line; empty lines are none."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip(SPACE):
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                raise UserError(f"{path}: line {number} is no JSON ({reason}): mend or remove it") from error


def read_json_array(path: Path) -> Iterator[Any]:
    """Elements of a top-level array, decoded one by one from a window of text."""
    with open_text(path) as stream:
        window = Window(path, stream)
        window.skip_space()
        window.at += 1  # the opening bracket
        while (character := window.skip_space()) != "]":
            if window.rows:
                if character != ",":
                    raise window.fail("a comma or ] is missing", window.at)
                window.at += 1
                window.skip_space()
            yield window.decode()
        window.at += 1
        if window.skip_space():
            raise window.fail("text after the closing ]", window.at)


class Window:
    """The part of a JSON text that is being decoded: `text` from `at` on is still to come."""

    def __init__(self, path: Path, stream: IO[str]):
        self.path, self.stream, self.decoder = path, stream, json.JSONDecoder()
        self.text, self.at, self.ended, self.line, self.rows = "", 0, False, 1, 0

    def refill(self) -> None:
        more = self.stream.read(max(JSON_CHUNK, len(self.text) - self.at))
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at, self.ended = self.text[self.at :] + more, 0, not more

    def skip_space(self) -> str:
        """The next character that is no space, or an empty string at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.refill()

    def decode(self) -> Any:
        """The value that starts here."""
        while True:
            try:
                row, end = self.decoder.raw_decode(self.text, self.at)
                if end + 4 < len(self.text) or self.ended:  # a number near the end may go on
                    self.at, self.rows = end, self.rows + 1
                    return row
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if self.ended or not cut_off:
                    raise self.fail(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.fail("nested too deeply", self.at) from error
            self.refill()

    def fail(self, reason: str, position: int) -> UserError:
        line = self.line + self.text.count("\n", 0, min(position, len(self.text.rstrip())))
        return UserError(f"{self.path}: line {line} is no JSON ({reason} after row {self.rows}): mend it")


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """One row a record, by the columns that the first line names."""
    csv.field_size_limit(1 << 30)
    first, lines = peek((line + "\n" for line in read_lines(path)), 1)
    table = csv.reader(lines, delimiter=find_separator(path, "".join(first)), strict=True)
    try:
        header = next(table, None)
        if not header:
            raise UserError(f"{path}: the first line names no columns")
        for number, cells in enumerate(table, 1):
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{path}: row {number} (line {table.line_num}) has {len(cells)} cells and the header has "
                    f"{len(header)}: quote cells that hold the separator"
                )
            if cells:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {table.line_num} is no CSV ({error}): mend its quotes") from error


def find_separator(path: Path, header: str) -> str:
    """What stands between the cells; Excel writes semicolons where a comma is the decimal point."""
    own = "\t" if find_kind(path) == ".tsv" else ","
    others = [mark for mark in ",;\t" if mark in header and own not in header]
    if others:
        notice_once(f"{path}: its first line is separated by {others[0]!r}, so the file is read so")
    return (others or [own])[0]


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(
            path if path.is_file() and path.suffix != ".gz" else io.BytesIO(open_binary(path).read())
        )
        decode = find_decoder(file.schema_arrow.metadata or {})
        for batch in file.iter_batches(batch_size=1000):
            yield from map(decode, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no parquet file ({reason}): download it again") from error


def find_decoder(metadata: dict[bytes, bytes]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """From a table's row to the file's: `datasets` keeps Json columns as texts, and notes which they are."""
    features = (json.loads(metadata.get(b"huggingface", b"{}")).get("info") or {}).get("features")
    if '"Json"' not in json.dumps(features):
        return drop_nulls
    from datasets import Features

    return Features.from_dict(features).decode_example


def drop_nulls(value: Any, depth: int = 0) -> Any:
    """A row without the keys that a table gives each object because another row's object has them.

    Else calls and tools are trained with arguments nobody gave. Columns, and keys of turns, stay as nulls.
    """
    if isinstance(value, list):
        return [drop_nulls(item, depth) for item in value]
    if isinstance(value, dict):
        inner = {name: drop_nulls(item, depth + 1 + (name in TOOLS)) for name, item in value.items()}
        return {name: item for name, item in inner.items() if depth < 2 or item is not None}
    return value


def read_text(path: Path) -> Iterator[dict[str, str]]:
    """One row a line."""
    yield from ({"text": line} for line in read_lines(path) if line.strip())


def peek(rows: Iterator[Any], count: int) -> tuple[list[Any], Iterator[Any]]:
    """(the first `count` rows, all rows)."""
    first = list(itertools.islice(rows, count))
    return first, itertools.chain(first, rows)
