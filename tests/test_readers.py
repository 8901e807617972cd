"""Files of every kind, whole and damaged: rows in order, or one clear line."""

import csv
import gzip
import json
import random

import pytest

from utils import readers
from utils.console import UserError
from utils.readers import read_file

ROWS = [{"text": f"行 {i} 🎉", "more": 'a,b\n"c"\td'} for i in range(5)]


def write(path, kind):
    if kind == "json":
        data = json.dumps(ROWS, ensure_ascii=False).encode()
    elif kind == "jsonl":
        data = "\r\n".join(json.dumps(row) for row in ROWS).encode()
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, ["text", "more"], delimiter="," if kind == "csv" else "\t")
            table.writeheader()
            table.writerows(ROWS)
        return path.read_bytes()
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path.read_bytes()
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_is_read_plain_and_gzipped(tmp_path, kind):
    data = write(tmp_path / f"rows.{kind}", kind)
    (tmp_path / f"rows.{kind}.gz").write_bytes(gzip.compress(data))
    assert list(read_file(tmp_path / f"rows.{kind}")) == ROWS
    assert list(read_file(tmp_path / f"rows.{kind}.gz")) == ROWS


def test_text_file_gives_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff一\r\n\r\nb\u2028c\n".encode())
    assert list(read_file(tmp_path / "a.txt")) == [{"text": "一"}, {"text": "b\u2028c"}]


@pytest.mark.parametrize("chunk", [3, 17, 1 << 20])
def test_json_array_is_read_the_same_whatever_the_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "JSON_CHUNK", chunk)
    rng, path = random.Random(chunk), tmp_path / "rows.json"
    values = [1, -2.5e-7, "a,]b\n", {"x": [1, {"y": "é🎉"}]}, None, True, '\\"', [[]], {}]
    for _ in range(100):
        rows = rng.choices(values, k=rng.randint(1, 6))
        path.write_text(json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5))
        assert list(read_file(path)) == rows


DAMAGED = {
    "empty.json": (b"", "is empty"),
    "blank.jsonl": (b"\n\n \n", "is empty"),
    "nul.jsonl": (b'{"a": 1}\n\0\n', "line 2 holds a NUL byte"),
    "binary.json": (b"\xff\xfe{}", "no UTF-8 text"),
    "broken.jsonl": (b'{"a": 1}\n\n{"a": \n', "line 3 is no JSON"),
    "broken.json": (b'[{"a": 1},\n{"a": }]', "line 2 is no JSON .*after row 1"),
    "open.json": (b'[{"a": 1},', "after row 1"),
    "comma.json": (b'[{"a": 1} {"a": 2}]', "a comma or ] is missing"),
    "more.json": (b'[{"a": 1}] x', "text after"),
    "deep.jsonl": (b"[" * 3 + b'{"a": ' + b"[" * 200_000, "JSON"),
    "cut.json.gz": (gzip.compress(b'{"a": "xyz"}\n' * 1000)[:-20], "damaged gzip"),
    "no.json.gz": (b'{"a": 1}\n', "damaged gzip"),
    "ragged.csv": (b"a,b\n1,2\n3,4,5\n", r"row 2 \(line 3\) has 3 cells and the header has 2"),
    "quote.csv": (b'a,b\n1,"2\n', "no CSV"),
    "header.csv": (b"\n", "names no columns"),
    "fake.parquet": (b"PAR1 not really", "no parquet file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_one_clear_line(tmp_path, name):
    data, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        list(read_file(tmp_path / name))
    assert "\n" not in str(caught.value) and name in str(caught.value)
