"""--dataset_name names sources of rows: files on this disk, and splits of sets on the hub.

    alpaca-clean,mine.jsonl#500  ->  yahma/alpaca-cleaned[train], all rows; mine.jsonl, 500 of its rows

A source has the format of most of its first 100 rows, and a digest of its bytes: by it runs and caches
tell whether they have seen these rows before. Files and splits that are called eval, valid, dev or test
are kept for evaluation. The rows themselves stay where they are until `read` gives them one by one.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments
from utils.console import UserError, notice
from utils.data.file_text import hash_content
from utils.data.formats import ALIASES, read_row, sniff_format
from utils.data.layouts import INFO_FILE, Layout, explain_unknown, parse_columns, read_info
from utils.data.local_files import find_files, list_names, say_where_to_get
from utils.data.named_sets import NAMED_SETS
from utils.data.readers import drop_nulls, find_kind, peek, read_file
from utils.models.hub import reach_hub
from utils.prompts.messages import EVAL, TEST, TRAIN, Messages
from utils.run.repository import REPOSITORY

HELD_OUT = {"validation": EVAL, "valid": EVAL, "eval": EVAL, "dev": EVAL, "test": TEST}
HELD_OUT_FILE = re.compile(rf"(?<![a-z])({'|'.join(HELD_OUT)})(?![a-z])", re.IGNORECASE)
SNIFFED_ROWS = 100


@dataclass(frozen=True)
class Source:
    """One file, or one split of a hub set. `part` is what its publisher made it for: train, eval or test."""

    entry: str  # the part of --dataset_name or --eval_dataset_name it came from, and its place there
    name: str
    part: str
    digest: str
    dataset_format: str
    sample: int | None = None  # rows drawn from the entry
    path: Path | None = None
    layout: Layout | None = None  # the file's own names of columns
    dataset: Any = None  # datasets.Dataset

    def read(self) -> Iterator[Any]:
        rows = read_file(self.path) if self.path else map(drop_nulls, self.dataset)
        return map(self.layout.apply, rows) if self.layout else rows

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "part": self.part,
            "sha256": self.digest,
            "format": self.dataset_format,
            "sample": self.sample,
        } | ({"columns": self.layout.describe()} if self.layout else {})


def find_sources(
    names: str, data_args: DataArguments, forced_part: str | None = None, flag: str = "--dataset_name"
) -> list[Source]:
    """The sources of a comma-separated list. `forced_part` replaces what files and splits are named.

    Raises UserError for what is neither on this disk nor on the hub, and for rows of no known format.
    """
    entries = [names] if Path(names).expanduser().exists() else [name for name in names.split(",") if name]
    sources = [
        dataclasses.replace(source, entry=f"{flag} {place}. {source.entry}")
        for place, entry in enumerate(entries, 1)
        for source in find_entry(entry.strip(), data_args, flag)
    ]
    if forced_part:
        sources = [dataclasses.replace(source, part=forced_part) for source in sources]
    elif apart := [source.path.name for source in sources if source.path and source.part != TRAIN]:
        notice(f"by their names not trained on: {list_names(apart)} (name a file itself to train on it)")
    return sources


def find_entry(entry: str, data_args: DataArguments, flag: str) -> list[Source]:
    """The sources of one name in the list, `mine.jsonl#500`: files on this disk, else splits of the hub."""
    name, sample = entry, None
    if not Path(entry).exists() and (counted := re.fullmatch(r"(.+)#(\d+)", entry)):
        name, sample = counted.group(1), int(counted.group(2))
        if sample == 0:
            raise UserError(f"{flag} {entry}: a sample of 0 rows is none")
    files = find_files(name, data_args, flag)
    known = NAMED_SETS.get(re.sub(r"\[.*", "", name))
    dataset_format = data_args.dataset_format or (known.dataset_format if known else None)
    asked = parse_columns(data_args.columns)
    if not files:
        return find_hub_sources(name, sample, dataset_format, asked, flag)
    kinds = [HELD_OUT_FILE.search(path.name) for path in files]
    if all(kinds):
        kinds = [None] * len(files)  # named by the user, or nothing else is there
    sources = []
    for path, kind in zip(files, kinds, strict=True):
        part = HELD_OUT[kind[1].lower()] if kind else TRAIN
        layout = asked or load_layout(path)
        if layout:
            warn_of_missing(str(path), layout, "--columns" if asked else INFO_FILE, read_file(path))
        found = data_args.dataset_format or sniff_source(str(path), read_file(path), dataset_format, layout)
        sources.append(Source(name, str(path), part, hash_content(path), found, sample, path, layout))
    return sources


def load_layout(path: Path) -> Layout | None:
    """That of a dataset_info.json beside the file: of its first entry that names the file."""
    info = path.parent / INFO_FILE
    if not info.is_file() or path.name == INFO_FILE:
        return None
    try:
        listed = json.loads(info.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{info} cannot be read ({error}): mend it or move it away") from error
    entries = [
        name
        for name, spec in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(spec, dict) and spec.get("file_name") == path.name
    ]
    if not entries:
        return None
    also = f", the first of {len(entries)} entries ({list_names(entries)})" if len(entries) > 1 else ""
    notice(f"{path} is read by {info}, where it is {entries[0]}{also}")
    return read_info(listed[entries[0]], f"{info}: {entries[0]}")


def warn_of_missing(name: str, layout: Layout, where: str, rows: Iterator[Any]) -> None:
    """A line where the first rows lack a column that the layout names; `where` it does."""
    first = [row for row in peek(rows, SNIFFED_ROWS)[0] if isinstance(row, dict)]
    seen = dict.fromkeys(column for row in first for column in row)
    missing = [theirs for theirs in layout.asked if theirs not in seen]
    if missing:
        notice(f"{name} has no column {', '.join(missing)}, as {where} says; it has {', '.join(seen)}")


def sniff_source(name: str, rows: Iterator[Any], expected: str | None, layout: Layout | None) -> str:
    """The format of a source by its first rows; the one `expected` of a named set where the columns agree."""
    first, _ = peek(rows, SNIFFED_ROWS)
    if not first:
        raise UserError(f"{name} holds no rows")
    if not any(isinstance(row, dict) for row in first):
        raise UserError(f"{name}: row 1 is {str(first[0])[:40]!r}: an object with columns is needed")
    found = sniff_format([layout.apply(row) for row in first] if layout else first)
    if found is None:
        is_table = find_kind(Path(name)) in (".csv", ".tsv")
        objects = [row for row in first if isinstance(row, dict)]
        raise UserError(f"{name}: {explain_unknown(objects, is_table)}")
    if expected and ALIASES.get(expected, expected) != found:
        notice(f"{name}: the rows are {found}, not {expected} as the set's own")
    return expected if expected and ALIASES.get(expected, expected) == found else found


def find_hub_sources(
    name: str, sample: int | None, dataset_format: str | None, layout: Layout | None, flag: str
) -> list[Source]:
    """The splits of a hub set `org/name[:config][[split]]`, or of a named one."""
    parts = re.fullmatch(r"([^:\[]+)(?::([^\[]+))?(?:\[(.+)\])?", name)
    if parts is None:
        raise UserError(f"{flag} {name}: no such file, and the hub's sets are written ORG/NAME:CONFIG[SPLIT]")
    bare, config, split = parts.groups()
    known = NAMED_SETS.get(bare)
    hub_id = known.hub_id if known else bare
    if hub_id is None:
        raise UserError(f"{flag} {name} is not on the hub: {say_where_to_get(bare)}")
    try:
        reach_hub(f"{flag} {name}: no such file, and for the hub's {hub_id}")
    except UserError as error:
        raise UserError(f"{error}; {say_where_to_get(bare)}") from error
    from datasets import load_dataset

    where = {"data_files": known.files, "revision": known.revision} if known else {}
    try:
        splits = load_dataset(hub_id, config, split=split, **where)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{flag} {name}: the hub does not give {hub_id} ({reason})") from error
    splits = {"train": splits} if split else dict(splits)
    if "train" not in splits:
        splits = {"train": next(iter(splits.values()))}
    sources = []
    for part, dataset in splits.items():
        if made_for := ({"train": TRAIN} | HELD_OUT).get(part):
            if layout:
                warn_of_missing(name, layout, "--columns", iter(dataset))
            found = dataset_format or sniff_source(name, iter(dataset), None, layout)
            file, digest = f"{hub_id}[{split or part}]", dataset._fingerprint
            sources.append(
                Source(name, file, made_for, digest, found, sample, layout=layout, dataset=dataset)
            )
    return sources


def load_sample_prompts(path: str) -> list[Messages]:
    """Chats of a file whose rows hold {prompt} or {messages}; a path is looked for in the repository too."""
    file = next((here for here in (Path(path), REPOSITORY / path) if here.is_file()), None)
    if file is None:
        raise UserError(f"--sample_prompts {path}: no such file")
    chats = []
    for number, row in enumerate(read_file(file), 1):
        row = row if isinstance(row, dict) else {}
        asked = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
        asked = asked if isinstance(asked, list) else [asked]
        answered = [*asked, {"role": "assistant", "content": "-"}]
        try:
            chats.append(read_row({"messages": answered}, "messages").messages[:-1])
        except UserError as error:
            raise UserError(
                f'--sample_prompts {path}: row {number} must be {{"prompt": "..."}} '
                f'or {{"messages": [...]}} ({error})'
            ) from error
    return chats
