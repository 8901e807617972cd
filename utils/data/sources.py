"""What --dataset_name means -> sources of rows: named sets, hub ids, local files, folders and globs."""

import dataclasses
import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments
from utils.console import UserError, notice
from utils.data.file_text import hash_file, is_in_archive, list_archive
from utils.data.formats import ALIASES, read_row, sniff_format
from utils.data.layouts import INFO_FILE, Layout, find_layout, parse_columns, suggest_flag
from utils.data.named_sets import NAMED_SETS
from utils.data.readers import ROW_SUFFIXES, find_kind, peek, read_file
from utils.messages import EVAL, TEST, TRAIN, Messages
from utils.models.hub import reach_hub
from utils.repository import REPOSITORY

HELD_OUT_FILE = re.compile(r"(?<![a-z])(eval|valid|validation|dev|test)(?![a-z])", re.IGNORECASE)
HUB_SPLITS = {"train": TRAIN, "validation": EVAL, "valid": EVAL, "eval": EVAL, "dev": EVAL, "test": TEST}
HUB_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")
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
        rows = read_file(self.path) if self.path else iter(self.dataset)
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
        for source in find_entry(entry.strip(), data_args)
    ]
    if forced_part:
        sources = [dataclasses.replace(source, part=forced_part) for source in sources]
    elif apart := [source.path.name for source in sources if source.path and source.part != TRAIN]:
        notice(f"by their names not trained on: {list_names(apart)} (name a file itself to train on it)")
    return sources


def find_entry(entry: str, data_args: DataArguments) -> list[Source]:
    name, sample = entry, None
    if not Path(entry).exists() and (counted := re.fullmatch(r"(.+)#(\d+)", entry)):
        name, sample = counted.group(1), int(counted.group(2))
        if sample == 0:
            raise UserError(f"{entry}: a sample of 0 rows is none")
    files = find_files(name, data_args)
    known = NAMED_SETS.get(re.sub(r"\[.*", "", name))
    dataset_format = data_args.dataset_format or (known.dataset_format if known else None)
    asked = parse_columns(data_args.columns)
    if not files:
        return find_hub_sources(name, sample, dataset_format, asked)
    held_out = [bool(HELD_OUT_FILE.search(path.name)) for path in files]
    if all(held_out):
        held_out = [False] * len(files)  # named by the user, or nothing else is there
    parts = [
        (TEST if "test" in path.name.lower() else EVAL) if out else TRAIN
        for path, out in zip(files, held_out, strict=True)
    ]
    sources = []
    for path, part in zip(files, parts, strict=True):
        layout, rows = asked or load_layout(path), read_file(path)
        if asked:
            warn_of_missing(str(path), asked, read_file(path))
        rows = map(layout.apply, rows) if layout else rows
        found = data_args.dataset_format or sniff_source(str(path), rows, dataset_format)
        sources.append(Source(name, str(path), part, hash_file(path), found, sample, path, layout))
    return sources


def load_layout(path: Path) -> Layout | None:
    """That of a dataset_info.json beside the file, if it names the file."""
    found = find_layout(path)
    if found:
        notice(f"{path} is read by {path.parent / INFO_FILE}, where it is {found[1]}")
    return found[0] if found else None


def warn_of_missing(name: str, asked: Layout, rows: Iterator[Any]) -> None:
    """A line where the first rows lack a column that --columns names."""
    first = [row for row in peek(rows, SNIFFED_ROWS)[0] if isinstance(row, dict)]
    seen = dict.fromkeys(column for row in first for column in row)
    missing = [theirs for _, theirs in asked.columns if theirs not in seen]
    if missing:
        notice(f"{name} has no column {', '.join(missing)}, as --columns says; it has {', '.join(seen)}")


def sniff_source(name: str, rows: Iterator[Any], expected: str | None) -> str:
    """The format of a source by its first rows; the one `expected` of a named set where the columns agree."""
    first, _ = peek(rows, SNIFFED_ROWS)
    if not first:
        raise UserError(f"{name} holds no rows")
    if not any(isinstance(row, dict) for row in first):
        raise UserError(f"{name}: row 1 is {str(first[0])[:40]!r}: an object with columns is needed")
    found = sniff_format(first)
    if found is None:
        row = next(row for row in first if isinstance(row, dict))
        raise UserError(
            f"{name}: no known format has the columns {', '.join(map(str, row))}: say which is which, as in "
            f"{suggest_flag(row)} (data/README.md has the known layouts)"
        )
    if expected and ALIASES.get(expected, expected) != found:
        notice(f"{name}: the rows are {found}, not {expected} as the set's own")
    return expected if expected and ALIASES.get(expected, expected) == found else found


def find_files(name: str, data_args: DataArguments) -> list[Path]:
    """Local files that `name` means: none for a set on the hub."""
    if data_args.load_from_local:
        return find_local_copy(name, data_args.data_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return list_data_files(path, f"--dataset_name {name}")
    if path.exists() or is_in_archive(path):
        return open_archives([path])
    if glob.has_magic(name) and not re.search(r"/[^/]*\[[\w+:%]*\]$|^[\w-]+\[\w+\]$", name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"--dataset_name {name} matches no file{name_odd_marks(name)}")
        return open_archives(files)
    looks_local = find_kind(path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    bare = re.sub(r"[:\[].*", "", name)
    if looks_local or name_odd_marks(name) or (bare not in NAMED_SETS and bare.count("/") != 1):
        raise UserError(
            f"--dataset_name {name}: no such file{name_odd_marks(name)}; use a file, folder or glob of "
            f"{', '.join(ROW_SUFFIXES)} (.gz and .zip too), a hub id, or one of {', '.join(NAMED_SETS)}"
        )
    return []


# What stands in a list of files where a comma, a number sign or nothing is meant.
ODD_MARKS = {"，": ",", "、": ",", "；": ",", ";": ",", "＃": "#"} | dict.fromkeys(
    "“”‘’「」『』\"'", "nothing"
)


def name_odd_marks(name: str) -> str:
    odd = [mark for mark in ODD_MARKS if mark in name]
    return "".join(f"; it holds {mark} where {ODD_MARKS[mark]} is meant" for mark in odd)


def open_archives(files: list[Path]) -> list[Path]:
    """The files, and in the place of each zip file those with rows in it."""
    opened = []
    for path in files:
        if path.suffix.lower() == ".zip":
            opened += select_data_files(list_archive(path), f"--dataset_name {path}: the zip file", path)
        else:
            opened.append(path)
    return opened


def list_data_files(folder: Path, flag: str) -> list[Path]:
    """Files with rows under a folder, metadata of the hub's own left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return select_data_files(files, f"{flag}: the folder", folder)


def select_data_files(files: list[Path], where: str, folder: Path) -> list[Path]:
    """Those that hold rows by their names; the others are said, but for hidden ones."""
    chosen: list[Path] = []
    others: list[str] = []
    for path in files:
        name = path.relative_to(folder)
        if find_kind(path) and path.name not in HUB_METADATA:
            chosen.append(path)
        elif not any(part.startswith(".") for part in name.parts):
            others.append(str(name))
    if not chosen:
        found = f", but {list_names(others)}" if others else ""
        raise UserError(f"{where} holds no {', '.join(ROW_SUFFIXES)} file (.gz too){found}")
    if others:
        notice(f"{folder}: by their names no files of rows: {list_names(others)}")
    return chosen


def list_names(names: list[str], count: int = 6) -> str:
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# Behind a set's name in its files' names, as in alpaca-train-00001-of-00002.parquet; alpaca-clean is another.
SPLIT_OF_A_SET = r"([._-](data|train|test|eval|valid|validation|dev|of|\d+))*(\.[a-z]+){1,2}"


def find_local_copy(name: str, data_dir: str | None) -> list[Path]:
    """A named set's files under --data_dir: in a folder of its own, or beside the others."""
    if data_dir is None:
        raise UserError("--load_from_local needs --data_dir, the folder of the local copies")
    folder, known = Path(data_dir).expanduser(), NAMED_SETS.get(name)
    stems = [name]
    if known and known.hub_id:
        stems += [known.hub_id, known.hub_id.split("/")[-1]]
    if known and known.files and "*" not in known.files:
        stems.append(known.files.split(".")[0])
    for stem in stems:
        if (folder / stem).is_dir():
            files = list_data_files(folder / stem, f"--data_dir {folder / stem}")
            if known and known.files and known.revision is None:  # of a clone that holds other sets too
                files = [path for path in files if path.name == known.files] or files
            notice(f"{name}: {folder / stem if len(files) > 1 else files[0]}")
            return files
        beside = [path for path in sorted(folder.glob(f"{stem}*")) if path.is_file() and find_kind(path)]
        wanted = re.compile(rf"{re.escape(Path(stem).name)}{SPLIT_OF_A_SET}")
        exact = [path for path in beside if wanted.fullmatch(path.name)]
        if exact:
            notice(f"{name}: {', '.join(map(str, exact))}")
            return exact
    raise UserError(f"--data_dir {data_dir} holds no {' or '.join(stems)}: {say_where_to_get(name)}")


def say_where_to_get(name: str) -> str:
    known = NAMED_SETS.get(name)
    where = f"huggingface.co/datasets/{known.hub_id if known else name}"
    if known and known.hub_id is None:
        where = known.about
    files = f", file {known.files}" if known and known.files and known.revision is None else ""
    short = name.split("/")[-1]
    return f"download {where}{files} into DIR/{short}/ and add --load_from_local --data_dir DIR"


def find_hub_sources(
    name: str, sample: int | None, dataset_format: str | None, layout: Layout | None
) -> list[Source]:
    """The splits of a hub set `org/name[:config][[split]]`, or of a named one."""
    bare, config, split = re.fullmatch(r"([^:\[]+)(?::([^\[]+))?(?:\[(.+)\])?", name).groups()
    known = NAMED_SETS.get(bare)
    hub_id = known.hub_id if known else bare
    if hub_id is None:
        raise UserError(f"--dataset_name {name} is not on the hub: {say_where_to_get(bare)}")
    try:
        reach_hub(f"--dataset_name {name}: no such file, and for the hub's {hub_id}")
    except UserError as error:
        raise UserError(f"{error}; {say_where_to_get(bare)}") from error
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    where = {"data_files": known.files, "revision": known.revision} if known else {}
    try:
        splits = load_dataset(hub_id, config, split=split, **where)
    except (DatasetNotFoundError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--dataset_name {name}: the hub does not give {hub_id} ({reason})") from error
    splits = {"train": splits} if split else dict(splits)
    if not any(HUB_SPLITS.get(part) == TRAIN for part in splits):
        splits = {"train": next(iter(splits.values()))}
    sources = []
    for part, dataset in splits.items():
        if part in HUB_SPLITS:
            if layout:
                warn_of_missing(name, layout, iter(dataset))
            rows = map(layout.apply, dataset) if layout else iter(dataset)
            found = dataset_format or sniff_source(name, rows, dataset_format)
            sources.append(
                Source(
                    name,
                    f"{hub_id}[{split or part}]",
                    HUB_SPLITS[part],
                    dataset._fingerprint,
                    found,
                    sample,
                    layout=layout,
                    dataset=dataset,
                )
            )
    return sources


def load_sample_prompts(path: str) -> list[Messages]:
    """Chats of a file whose rows hold {prompt} or {messages}; a path is looked for in the repository too."""
    file = next((here for here in (Path(path), REPOSITORY / path) if here.is_file()), None)
    if file is None:
        raise UserError(f"--sample_prompts {path}: no such file")
    chats = []
    for number, row in enumerate(read_file(file), 1):
        messages = row.get("messages") if isinstance(row, dict) else None
        asked = messages or [
            {"role": "user", "content": row.get("prompt") if isinstance(row, dict) else None}
        ]
        answered = (
            {"messages": [*asked, {"role": "assistant", "content": "-"}]} if isinstance(asked, list) else {}
        )
        try:
            chats.append(read_row(answered, "messages").messages[:-1])
        except UserError as error:
            raise UserError(
                f'--sample_prompts {path}: row {number} must be {{"prompt": "..."}} '
                f'or {{"messages": [...]}} ({error})'
            ) from error
    return chats
