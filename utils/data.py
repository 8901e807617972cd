"""Rows -> training and held-out parts -> token ids and labels."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from utils.arguments import DataArguments, TrainingArguments
from utils.console import UserError, notice
from utils.prompts import IGNORE_INDEX, encode_segments, row_to_messages, split_chat
from utils.sources import Row, Source, load_source

MAX_HELD_OUT, MAX_HELD_OUT_SHARE = 1024, 0.1


def split_rows(rows: list[Row], held_out: int, data_seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, `held_out` rows), chosen by a hash of content and seed, not by the file's order."""

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


def encode_rows(
    part: str,
    rows: list[Row],
    dataset_format: str,
    tokenizer: Any,
    stop_ids: list[int],
    data_args: DataArguments,
) -> list[dict[str, list[int]]]:
    """{input_ids, labels} of each row; prints what was cut or dropped. Raises UserError if none is left."""
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
    """The row within its limits: a long prompt loses its beginning, a long answer its end and stop token."""
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
    line = f"{part}: {rows:,} rows -> {len(encoded):,} sequences, {tokens:,} tokens, {trained:,} trained"
    line += f", longest {longest:,}"
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
