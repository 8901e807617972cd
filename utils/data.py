"""Sources -> rows -> token ids and labels; the collator that pads a batch."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments, TrainingArguments
from utils.console import UserError, notice
from utils.prompts import (
    FORMAT_COLUMNS,
    IGNORE_INDEX,
    Messages,
    encode_segments,
    find_format,
    read_messages,
    row_to_messages,
    split_chat,
)

# Named sets: hub id of each. OL-CC is not on the hub; its file goes into --data_dir.
NAMED_DATASETS = {
    "alpaca": "tatsu-lab/alpaca",
    "alpaca-clean": "yahma/alpaca-cleaned",
    "oasst1": "timdettmers/openassistant-guanaco",
    "olcc": None,
}
MAX_HELD_OUT, MAX_HELD_OUT_SHARE = 1024, 0.1
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


# --- sources ---------------------------------------------------------------------------------------------------


def load_source(name: str, data_args: DataArguments) -> Source:
    """Rows of a json/jsonl file, a named set or a hub id, each checked. Raises UserError that names file and row."""
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


# --- splits ----------------------------------------------------------------------------------------------------


def split_rows(rows: list[Row], held_out: int, data_seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, `held_out` rows), chosen by a hash of content and seed: the order of the file plays no part."""

    def key(i: int) -> str:
        content = json.dumps(rows[i], sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(f"{data_seed}\n{content}".encode()).hexdigest()

    chosen = set(sorted(range(len(rows)), key=key)[:held_out])
    return (
        [row for i, row in enumerate(rows) if i not in chosen],
        [row for i, row in enumerate(rows) if i in chosen],
    )


def count_held_out(total: int, data_args: DataArguments) -> int:
    size = data_args.eval_dataset_size
    if size is None:
        count = max(1, min(MAX_HELD_OUT, int(total * MAX_HELD_OUT_SHARE)))
        notice(f"{count} of {total} rows are held out for evaluation (--eval_dataset_size changes it)")
    else:
        count = max(1, round(size * total)) if size < 1 else int(size)
    if count >= total:
        raise UserError(
            f"--eval_dataset_size {size} leaves nothing of {total} rows to train on: use a smaller "
            "count, or a share such as 0.1"
        )
    return count


@dataclass(frozen=True)
class Rows:
    """What is trained and evaluated on, before tokenizing."""

    train: list[Row]
    held_out: list[Row]
    sources: list[Source]

    @property
    def train_format(self) -> str:
        return self.sources[0].dataset_format

    @property
    def held_out_format(self) -> str:
        return self.sources[-1].dataset_format

    def describe(self) -> dict[str, Any]:
        return {
            "sources": [source.describe() for source in self.sources],
            "train_rows": len(self.train),
            "held_out_rows": len(self.held_out),
        }


def load_rows(data_args: DataArguments, training_args: TrainingArguments) -> Rows:
    """Every row of the run, split. Plain Python only: bad files fail before anything heavy is imported."""
    needs_eval = training_args.do_eval or training_args.do_predict or training_args.eval_strategy != "no"
    sources = [load_source(data_args.dataset_name, data_args)]
    train, held_out = sources[0].rows, []
    if needs_eval and data_args.eval_dataset_name:
        sources.append(load_source(data_args.eval_dataset_name, data_args))
        held_out = sources[1].rows
    elif needs_eval:
        train, held_out = split_rows(train, count_held_out(len(train), data_args), training_args.data_seed)
    return Rows(train[: data_args.max_train_samples], held_out[: data_args.max_eval_samples], sources)


# --- tokenizing ------------------------------------------------------------------------------------------------


def encode_rows(
    part: str,
    rows: list[Row],
    dataset_format: str,
    tokenizer: Any,
    stop_ids: list[int],
    data_args: DataArguments,
) -> list[dict[str, list[int]]]:
    """{input_ids, labels} of each row; prints what was cut or dropped. Raises UserError if nothing is left."""
    stops = tokenizer.convert_ids_to_tokens(stop_ids)
    alpaca_input = "### Input:" in tokenizer.chat_template
    encoded, cut, dropped, split = [], 0, 0, 0
    for row in rows:
        chats = split_chat(tokenizer, row_to_messages(row, dataset_format, alpaca_input), stops)
        split += len(chats) - 1 if chats else 0
        dropped += not chats
        for segments in chats:
            example = encode_segments(tokenizer, segments, data_args.train_on_source)
            prompt_len = len(encode_segments(tokenizer, segments[:-1])["input_ids"])
            shorter = cut_to_length(example, prompt_len, len(segments) == 2, data_args)
            cut += len(shorter["input_ids"]) < len(example["input_ids"])
            trained = any(label != IGNORE_INDEX for label in shorter["labels"][1:])
            encoded += [shorter] if trained else []
            dropped += not trained
    report_encoding(part, encoded, len(rows), cut, dropped, split, data_args)
    return encoded


def cut_to_length(
    example: dict[str, list[int]], prompt_len: int, single_turn: bool, data_args: DataArguments
) -> dict[str, list[int]]:
    """The row within its limits: a long prompt loses its beginning, a long answer its end and so its stop token."""
    if single_turn and data_args.model_max_length is None:
        first = max(0, prompt_len - data_args.source_max_len)
        last = prompt_len + data_args.target_max_len
    else:
        first, last = 0, data_args.max_len
    return {name: ids[first:last] for name, ids in example.items()}


def report_encoding(
    part: str,
    encoded: list[dict[str, list[int]]],
    rows: int,
    cut: int,
    dropped: int,
    split: int,
    data_args: DataArguments,
) -> None:
    if not encoded:
        raise UserError(
            f"all {rows} rows would train on nothing: --source_max_len {data_args.source_max_len} and "
            f"--target_max_len {data_args.target_max_len} leave no answer, or no row has one"
        )
    tokens = sum(len(example["input_ids"]) for example in encoded)
    trained = sum(label != IGNORE_INDEX for example in encoded for label in example["labels"])
    longest = max(len(example["input_ids"]) for example in encoded)
    line = f"{part}: {rows:,} rows -> {len(encoded):,} sequences, {tokens:,} tokens, {trained:,} trained, longest {longest:,}"
    if split:
        line += f"; {split:,} more sequences because the template rewrites earlier answers"
    if cut:
        line += f"; {cut:,} cut to {data_args.max_len:,} tokens"
    if dropped:
        line += f"; {dropped:,} dropped without an answer to train on"
    notice(line)


def encode_datasets(
    rows: Rows,
    tokenizer: Any,
    stop_ids: list[int],
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """(training, held-out) sequences, of the parts that this run uses."""
    train = (
        encode_rows("train", rows.train, rows.train_format, tokenizer, stop_ids, data_args)
        if training_args.do_train
        else []
    )
    held_out = (
        encode_rows("held out", rows.held_out, rows.held_out_format, tokenizer, stop_ids, data_args)
        if rows.held_out
        else []
    )
    return train, held_out
