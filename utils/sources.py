"""Where rows come from: json and json-lines files, named sets, the hub; each row is checked as it is read."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments
from utils.console import UserError, notice
from utils.prompts import FORMAT_COLUMNS, Messages, find_format, read_messages, row_to_messages

# Named sets: hub id of each. OL-CC is not on the hub; its file goes into --data_dir.
NAMED_DATASETS = {
    "alpaca": "tatsu-lab/alpaca",
    "alpaca-clean": "yahma/alpaca-cleaned",
    "oasst1": "timdettmers/openassistant-guanaco",
    "olcc": None,
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where rows came from: kept in run.json, so that a run names its data exactly."""

    name: str
    sha256: str
    dataset_format: str
    rows: list[Row]

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "format": self.dataset_format,
            "rows": len(self.rows),
        }


def load_source(name: str, data_args: DataArguments) -> Source:
    """Checked rows of a json/jsonl file, a named set or a hub id. Raises UserError naming file and row."""
    path = find_file(name, data_args)
    rows, digest = read_rows(path) if path else download_rows(name)
    where = str(path or name)
    dataset_format = data_args.dataset_format or find_format(set(rows[0]))
    if dataset_format is None:
        formats = "; ".join(f"{known}: {', '.join(columns)}" for known, columns in FORMAT_COLUMNS.items())
        raise UserError(f"{where}: no format has the columns {', '.join(rows[0])}; known are {formats}")
    for number, row in enumerate(rows, 1):
        missing = [column for column in FORMAT_COLUMNS[dataset_format] if column not in row]
        if missing:
            raise UserError(
                f"{where}: row {number} lacks {', '.join(map(repr, missing))}, which the format "
                f"{dataset_format} needs; it has {', '.join(row)}"
            )
        try:
            row_to_messages(row, dataset_format, alpaca_input=False)
        except UserError as error:
            raise UserError(f"{where}: row {number}: {error}") from error
    return Source(where, digest, dataset_format, rows)


def find_file(name: str, data_args: DataArguments) -> Path | None:
    """The local file that `name` means, or None for one on the hub."""
    if data_args.load_from_local:
        return find_local_copy(name, data_args.data_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"--dataset_name {name} is a folder: name a .json or .jsonl file in it")
    if path.exists():
        return path
    looks_like_file = path.suffix in (".json", ".jsonl", ".txt", ".csv") or name.startswith((".", "/", "~"))
    if looks_like_file or (name not in NAMED_DATASETS and name.count("/") != 1):
        raise UserError(
            f"--dataset_name {name}: no such file; use a .json or .jsonl file, a hub id, "
            f"or one of {', '.join(NAMED_DATASETS)}"
        )
    return None


def find_local_copy(name: str, data_dir: str | None) -> Path:
    if data_dir is None:
        raise UserError("--load_from_local needs --data_dir, the folder of the local copies")
    folder = Path(data_dir).expanduser()
    hub_name = (NAMED_DATASETS.get(name) or name).split("/")[-1]
    candidates = [
        path
        for stem in (name, hub_name)
        for kind in ("jsonl", "json")
        for path in (
            folder / f"{stem}.{kind}",
            *sorted((folder / stem).glob(f"*train*.{kind}")),
            *sorted((folder / stem).glob(f"*.{kind}")),
        )
    ]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(
            f"--data_dir {data_dir} holds no {name}.json, {name}.jsonl or folder {name}/ with one: "
            f"download it from {NAMED_DATASETS.get(name) or 'its publisher'} and put it there"
        )
    notice(f"{name}: {found}")
    return found


def read_rows(path: Path) -> tuple[list[Row], str]:
    """(rows, sha256 of the file) of a JSON array or of JSON lines, whatever the file is called."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no UTF-8 text (byte {error.start}): JSON or JSON lines are read"
        ) from error
    if "\0" in text or not text.strip():
        raise UserError(
            f"{path} is {'binary' if text.strip() else 'empty'}: JSON or JSON lines with rows are read"
        )
    rows = parse_array(path, text) if text.lstrip().startswith("[") else parse_lines(path, text)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is {str(row)[:40]!r}: an object with columns is needed")
    if not rows:
        raise UserError(f"{path} holds an empty list: rows are needed")
    return rows, hashlib.sha256(raw).hexdigest()


def parse_array(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is no JSON ({error.msg}): mend it") from error


def parse_lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}: line {number} is no JSON ({error.msg}): mend or remove it"
                ) from error
    return rows


def download_rows(name: str) -> tuple[list[Row], str]:
    from utils.checks import reach_hub

    hub_id = NAMED_DATASETS.get(name, name)
    if hub_id is None:
        raise UserError(
            f"--dataset_name {name} is not on the hub: put its file into a folder and add "
            "--load_from_local --data_dir FOLDER"
        )
    reach_hub(f"--dataset_name {name}: no such file, and for {hub_id}")
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(hub_id, split="train")
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"--dataset_name {name}: the hub does not give {hub_id} ({str(error).splitlines()[0]})"
        ) from error
    return dataset.to_list(), dataset._fingerprint


def load_sample_prompts(path: str) -> list[Messages]:
    """Chats of a JSON lines file whose rows hold {prompt} or {messages}."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {path} cannot be read: {error}") from error
    chats = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            chats.append(
                read_messages(row.get("messages") or [{"role": "user", "content": row.get("prompt")}])
            )
        except (ValueError, AttributeError) as error:
            raise UserError(
                f'--sample_prompts {path}: line {number} must be {{"prompt": "..."}} '
                f'or {{"messages": [...]}} ({error})'
            ) from error
    if not chats:
        raise UserError(f"--sample_prompts {path} is empty: write one prompt a line")
    return chats
