"""Files of every kind, whole and damaged: rows in order, or one clear line."""

import csv
import gzip
import json
import random
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from utils.console import UserError
from utils.data import readers
from utils.data.file_text import list_archive
from utils.data.readers import read_file

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
def test_every_kind_is_read_plain_gzipped_and_zipped(tmp_path, kind):
    data = write(tmp_path / f"rows.{kind}", kind)
    (tmp_path / f"rows.{kind}.gz").write_bytes(gzip.compress(data))
    with ZipFile(tmp_path / "both.ZIP", "w", ZIP_DEFLATED) as archive:
        archive.writestr(f"数据/rows.{kind}", data)
        archive.writestr(f"more.{kind}.gz", gzip.compress(data))
    for path in list_archive(tmp_path / "both.ZIP"):
        assert list(read_file(path)) == ROWS
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


@pytest.mark.parametrize(("mark", "name"), [(";", "a.csv"), ("\t", "a.csv"), (",", "a.tsv"), (";", "a.tsv")])
def test_table_of_another_separator_is_read_by_it_and_said(tmp_path, mark, name, capsys):
    """As Excel writes them where a comma is the decimal point; cells that hold one are quoted."""
    rows = [["instruction", "output"], ["Half of one?", "0,5"], ["1,5; or\t2?", "both"]]
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=mark).writerows(rows)
    assert list(read_file(tmp_path / name)) == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert f"separated by {mark!r}" in capsys.readouterr().out


DAMAGED = {
    "empty.json": (b"", "is empty"),
    "blank.jsonl": (b"\n\n \n", "is empty"),
    "nul.jsonl": (b'{"a": 1}\n\0\n', "line 2 holds a NUL byte"),
    "binary.json": (b"\xff{}", "no UTF-8 text, nor UTF-16 or GBK .*at byte 0"),
    "late.jsonl": (b'{"a": 1}\n' * 200_000 + b'{"a": "\xff"}', "at byte 1800007"),
    "half.jsonl": ('{"a": "二"}'.encode("utf-16")[:-1], "no UTF-8 text"),
    "latin.jsonl": ('{"a": "Das natürlich größte Café, voilà"}'.encode("latin-1"), "save it as UTF-8"),
    "big5.csv": ("問題,答案\n你好嗎,我很好，謝謝您的關心\n".encode("big5"), "save it as UTF-8"),
    "rows.xlsx": (b"PK\x03\x04", "is a spreadsheet: save it as CSV"),
    "open-object.json": (b'{\n "a": 1,\n "b": [', "no JSON"),
    "broken.jsonl": (b'{"a": 1}\n\n{"a": \n', "line 3 is no JSON"),
    "alone.jsonl": (b'{"a":\n', "line 1 is no JSON"),
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


ENCODED = json.dumps(
    [{"问题": "北京的首都机场在哪里？", "回答": "在顺义区，①—②号航站楼。"}] * 3, ensure_ascii=False
)


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_encodings_of_chinese_windows_are_read_with_a_line(tmp_path, encoding, capsys):
    rows = json.loads(ENCODED)
    table = "问题,回答\r\n" + "".join(f"{row['问题']},{row['回答']}\r\n" for row in rows)
    files = {"a.json": ENCODED, "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)}
    if encoding not in (
        "utf-16-le",
        "utf-16-be",
    ):  # without a mark, a first character beyond ASCII tells nothing
        files |= {"a.csv": table, "a.tsv": table.replace(",", "\t")}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode(encoding)))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert list(read_file(path)) == list(read_file(path)) == rows
            said = capsys.readouterr().out
            assert said.count(str(path)) == (encoding != "utf-8-sig")
            assert ("GB18030" in said) == encoding.startswith("gb") and ("UTF-16" in said) == (
                "16" in encoding
            )


def test_gbk_far_behind_the_start_of_a_file_is_found(tmp_path):
    """The first megabytes are ASCII, and a character lies across a border between the pieces that are decoded."""
    row = '{"a": "plain"}\n'
    start = row * ((1 << 20) // len(row))
    text = start + "\n" * ((1 << 20) - len(start) - len('{"a": "') - 1) + '{"a": "中文"}\n'
    for encoding in ("gbk", "utf-8"):
        (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
        assert list(read_file(tmp_path / "a.jsonl"))[-1] == {"a": "中文"}


INNER = [{"instruction": f"q{i}", "output": "a"} for i in range(3)]
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": 1}
PAIR = {"human": "q", "assistant": "a"}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ({"data": INNER}, INNER),
        ({"version": "1.0", "tags": ["x"], "例子": INNER}, INNER),
        (INNER[0], INNER[:1]),
        (CHAT, [CHAT]),
        (
            {"conversations": [{"from": "human", "value": "q"}]},
            [{"conversations": [{"from": "human", "value": "q"}]}],
        ),
        ({"id": 1, "conversation": [PAIR]}, [{"id": 1, "conversation": [PAIR]}]),
        ({"segments": [{"text": "a"}]}, [{"segments": [{"text": "a"}]}]),
        ({"instruction": "q", "instances": [PAIR]}, [{"instruction": "q", "instances": [PAIR]}]),
        ({"type": "text2text", "instances": INNER}, INNER),
        ({"conversations": [CHAT, CHAT]}, [CHAT, CHAT]),
        ({"train": INNER, "test": INNER}, [{"train": INNER, "test": INNER}]),
        ({"data": []}, [{"data": []}]),
    ],
)
def test_one_object_is_a_row_or_holds_the_rows(tmp_path, value, rows, indent):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert list(read_file(tmp_path / "a.json")) == rows


def test_objects_over_several_lines_follow_each_other(tmp_path):
    for rows in (INNER, [CHAT, CHAT]):
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
        assert list(read_file(tmp_path / "a.jsonl")) == rows
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"data": INNER}) for _ in range(2)))
    assert list(read_file(tmp_path / "b.jsonl")) == [{"data": INNER}] * 2
