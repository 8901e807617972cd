"""Rows in, token ids and labels out: nothing lost, nothing trained by accident."""

import json

import pytest

from utils.arguments import DataArguments, TrainingArguments
from utils.console import UserError
from utils.data import Rows, encode_rows, load_rows, split_rows
from utils.packing import PackingCollator, PaddingCollator
from utils.prompts import IGNORE_INDEX, find_stop_tokens
from utils.sources import load_source

ALPACA = [{"instruction": f"Question {i}?", "input": "", "output": f"Answer {i}."} for i in range(40)]


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def load(path, **flags):
    return load_source(str(path), DataArguments(dataset_name=str(path), **flags))


FORMATS = {
    "alpaca": ({"instruction": "问", "input": "", "output": "答"}, "问", "答"),
    "self-instruct": ({"prompt": "问", "completion": "答"}, "问", "答"),
    "input-output": ({"input": "问", "output": "答"}, "问", "答"),
    "oasst1": ({"text": "### Human: 问### Assistant: 答"}, "问", "答"),
    "messages": (
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        "问",
        "答",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_found_from_the_columns(tmp_path, smol_tokenizer, name):
    row, question, answer = FORMATS[name]
    source = load(write_lines(tmp_path / "rows.jsonl", [row | {"id": 7}]))
    assert source.dataset_format == name and len(source.rows) == 1 and len(source.sha256) == 64
    stop_ids = find_stop_tokens(smol_tokenizer, [])
    (example,) = encode_rows("train", source.rows, name, smol_tokenizer, stop_ids, DataArguments())
    labels = [label for label in example["labels"] if label != IGNORE_INDEX]
    assert smol_tokenizer.decode(labels) == f"{answer}<|im_end|>"
    assert question in smol_tokenizer.decode(example["input_ids"])


def test_json_array_and_lines_are_read_whatever_the_ending(tmp_path):
    (tmp_path / "array.jsonl").write_text(json.dumps(ALPACA))
    write_lines(tmp_path / "lines.json", ALPACA)
    assert load(tmp_path / "array.jsonl").rows == load(tmp_path / "lines.json").rows == ALPACA


def test_byte_order_mark_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(row).encode() for row in ALPACA) + b"\n\n")
    assert load(path).rows == ALPACA


def test_named_set_is_found_in_the_local_folder(tmp_path, capsys):
    (tmp_path / "oasst1").mkdir()
    write_lines(tmp_path / "oasst1" / "openassistant_best_replies_train.jsonl", [FORMATS["oasst1"][0]])
    source = load_source("oasst1", DataArguments("oasst1", data_dir=str(tmp_path), load_from_local=True))
    assert source.dataset_format == "oasst1"
    assert "openassistant_best_replies_train.jsonl" in capsys.readouterr().out


def test_named_set_that_is_not_there_says_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match="holds no olcc.json"):
        load_source("olcc", DataArguments("olcc", data_dir=str(tmp_path), load_from_local=True))


def test_split_is_disjoint_and_does_not_depend_on_the_order_of_the_file():
    train, held_out = split_rows(ALPACA, 8, data_seed=1)
    again_train, again_held_out = split_rows(ALPACA[::-1], 8, data_seed=1)
    assert len(train) == 32 and len(held_out) == 8
    assert not [row for row in held_out if row in train]
    assert sorted(map(str, held_out)) == sorted(map(str, again_held_out))
    assert split_rows(ALPACA, 8, data_seed=2)[1] != held_out


@pytest.mark.parametrize(("size", "count"), [(0.25, 10), (7, 7), (None, 4)])
def test_held_out_size_is_a_share_a_count_or_a_tenth(tmp_path, size, count):
    path = write_lines(tmp_path / "rows.jsonl", ALPACA)
    rows = load_rows(
        DataArguments(str(path), eval_dataset_size=size), TrainingArguments(do_train=True, do_eval=True)
    )
    assert (len(rows.train), len(rows.held_out)) == (40 - count, count)


def test_a_run_that_only_trains_holds_nothing_out(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ALPACA)
    rows = load_rows(DataArguments(str(path), max_train_samples=30), TrainingArguments())
    assert isinstance(rows, Rows) and len(rows.train) == 30 and rows.held_out == []


def encode(tokenizer, rows, **flags):
    return encode_rows(
        "train", rows, "alpaca", tokenizer, find_stop_tokens(tokenizer, []), DataArguments(**flags)
    )


def test_long_answer_loses_its_end_and_is_counted(smol_tokenizer, capsys):
    rows = [{"instruction": "Count.", "output": " ".join(map(str, range(200)))}, ALPACA[0]]
    long, short = encode(smol_tokenizer, rows, target_max_len=20)
    assert sum(label != IGNORE_INDEX for label in long["labels"]) == 20
    assert long["labels"][-1] != smol_tokenizer.eos_token_id == short["labels"][-1]
    assert "1 cut" in capsys.readouterr().out


def test_long_prompt_loses_its_beginning_never_the_question_mark(smol_tokenizer):
    rows = [{"instruction": "word " * 300 + "What?", "output": "Yes."}]
    (example,) = encode(smol_tokenizer, rows, source_max_len=30)
    prompt = [token for token, label in zip(*example.values(), strict=True) if label == IGNORE_INDEX]
    assert len(prompt) == 30
    assert smol_tokenizer.decode(prompt).endswith("What?<|im_end|>\n<|im_start|>assistant\n")


def test_only_the_sum_counts_for_longer_chats(smol_tokenizer):
    chat = [{"role": role, "content": f"{role} says {i}"} for i in range(4) for role in ("user", "assistant")]
    flags = DataArguments(source_max_len=16, target_max_len=60)
    stop_ids = find_stop_tokens(smol_tokenizer, [])
    (example,) = encode_rows("train", [{"messages": chat}], "messages", smol_tokenizer, stop_ids, flags)
    assert len(example["input_ids"]) == 76


def test_rows_that_would_train_on_nothing_are_refused(smol_tokenizer):
    rows = [{"instruction": "word " * 300, "output": "Yes."}]
    with pytest.raises(UserError, match="train on nothing"):
        encode(smol_tokenizer, rows, model_max_length=20)


def test_padding_masks_by_length_although_an_answer_ends_with_the_pad_id():
    batch = PaddingCollator(pad_token_id=2)(
        [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [5, 2], "labels": [-100, 2]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert batch["label_positions"].tolist() == [0, 1] and batch["num_tokens"] == 5


def test_packing_restarts_positions_and_labels_no_first_token():
    batch = PackingCollator(pad_token_id=0, multiple=8)(
        [{"input_ids": [5, 6, 2], "labels": [5, 6, 2]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7, 8, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, 8, -100, -100, -100]]
    assert batch["label_positions"].tolist() == [0, 1, 3] and batch["num_tokens"] == 5
