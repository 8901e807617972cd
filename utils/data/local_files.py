"""A name -> files with rows on this disk: a file, folder, glob, zip file, or a named set's local copy."""

import glob
import re
from pathlib import Path

from utils.arguments import DataArguments
from utils.console import UserError, notice
from utils.data.file_text import is_in_archive, list_archive
from utils.data.named_sets import NAMED_SETS
from utils.data.readers import ROW_SUFFIXES, find_kind
from utils.models.model_scope import download_dataset, is_on_modelscope

ABOUT = re.compile(r"(readme|licen[sc]e|requirements|changelog|citation)(?![a-z]).*\.txt$", re.IGNORECASE)
HUB_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")


def find_files(name: str, data_args: DataArguments, flag: str = "--dataset_name") -> list[Path]:
    """Local files that `name` means, as `flag` gives it: none for a set on the hub."""
    if data_args.load_from_local:
        return find_local_copy(name, data_args.data_dir)
    if is_on_modelscope(name):
        return list_data_files(download_dataset(name, flag), f"{flag} {name}")
    path = Path(name).expanduser()
    if path.is_dir():
        return list_data_files(path, f"{flag} {name}")
    if path.exists() or is_in_archive(path):
        return open_archives([path], flag)
    if glob.has_magic(name) and not re.search(r"/[^/]*\[[\w+:%]*\]$|^[\w-]+\[\w+\]$", name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"{flag} {name} matches no file{name_odd_marks(name)}")
        return open_archives(files, flag)
    looks_local = find_kind(path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    bare = re.sub(r"[:\[].*", "", name)
    if looks_local or name_odd_marks(name) or (bare not in NAMED_SETS and bare.count("/") != 1):
        raise UserError(
            f"{flag} {name}: no such file{name_odd_marks(name)}; use a file, folder or glob of "
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


def open_archives(files: list[Path], flag: str) -> list[Path]:
    """The files, and in the place of each zip file those with rows in it."""
    opened = []
    for path in files:
        if path.suffix.lower() == ".zip":
            opened += select_data_files(list_archive(path), f"{flag} {path}: the zip file", path)
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
        is_about = ABOUT.match(path.name) or path.name in HUB_METADATA
        if find_kind(path) and not is_about:
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
