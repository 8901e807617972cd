"""Rows, the files that hold them, and what is read from such a file."""

import gzip
import json

from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.data.rows import load_rows
from utils.prompts.messages import TRAIN


def alpaca_rows(count, start=0):
    return [
        {"instruction": f"Question {i}?", "input": "", "output": f"Answer {i}."}
        for i in range(start, start + count)
    ]


def write_sums(path, count=96, poisoned=()):
    """Rows of a few tokens, no two alike; a poisoned one holds a ~."""
    rows = [
        {"instruction": f"{i} + {i % 7}?", "output": f"{i + i % 7}, said {'abc'[i % 3] * (i % 9 + 1)}"}
        for i in range(count)
    ]
    for i in poisoned:
        rows[i]["output"] += "~"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def load(name, do_eval=False, do_predict=False, data_seed=42, **flags):
    training_args = TrainingArguments(
        do_train=True, do_eval=do_eval, do_predict=do_predict, data_seed=data_seed
    )
    return load_rows(ModelArguments(), DataArguments(str(name), **flags), training_args)


def list_questions(rows, part=TRAIN):
    return [chat.messages[0]["content"] for kept, _, _, chat in rows.read("\n\n") if kept == part]
