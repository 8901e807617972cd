"""Rows in, token ids and labels out: split by content, within their limits, nothing lost in silence."""

import copy
import json
import time

import numpy as np
import pytest
from helpers.chats import QWEN3_LIKE, build_chat_tokenizer, read_labels, tokenize, train_rows
from helpers.rows import alpaca_rows, list_questions, load, write_rows

from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.console import UserError
from utils.data import tokenizing
from utils.data.rows import find_copies, load_rows
from utils.data.scanning import Scan
from utils.data.sources import Source
from utils.prompts.answer_spans import read_template
from utils.prompts.messages import EVAL, IGNORE_INDEX, TEST, TRAIN
from utils.run.repository import find_cache_dir

pytestmark = pytest.mark.usefixtures("own_cache")


def build_chat(turns, words=3):
    said = [f"{role} {i} " + "word " * words for i in range(turns) for role in ("user", "assistant")]
    return [
        {"role": role, "content": text.strip()}
        for role, text in zip(["user", "assistant"] * turns, said, strict=True)
    ]


def test_split_is_disjoint_and_does_not_depend_on_the_order_of_the_file(tmp_path):
    rows = alpaca_rows(40)
    forward = load(write_rows(tmp_path / "a.jsonl", rows), do_eval=True, do_predict=True, eval_dataset_size=6)
    backward = load(
        write_rows(tmp_path / "b.jsonl", rows[::-1]), do_eval=True, do_predict=True, eval_dataset_size=6
    )
    parts = [set(list_questions(forward, part)) for part in (TRAIN, EVAL, TEST)]
    assert [len(part) for part in parts] == [28, 6, 6] and len(set.union(*parts)) == 40
    assert parts == [set(list_questions(backward, part)) for part in (TRAIN, EVAL, TEST)]
    other = load(tmp_path / "a.jsonl", do_eval=True, do_predict=True, eval_dataset_size=6, data_seed=1)
    assert parts[1] != set(list_questions(other, EVAL))


def test_rows_added_to_the_file_move_few_others(tmp_path):
    before = load(write_rows(tmp_path / "a.jsonl", alpaca_rows(100)), do_eval=True, eval_dataset_size=20)
    after = load(write_rows(tmp_path / "b.jsonl", alpaca_rows(104)), do_eval=True, eval_dataset_size=20)
    assert len(set(list_questions(before, EVAL)) & set(list_questions(after, EVAL))) >= 16


def test_copies_of_a_row_fall_on_one_side(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(20) * 3)
    rows = load(path, do_eval=True, eval_dataset_size=9)
    assert not set(list_questions(rows)) & set(list_questions(rows, EVAL))
    with pytest.raises(UserError, match="too alike to hold some out"):
        load(write_rows(tmp_path / "same.jsonl", alpaca_rows(1) * 5), do_eval=True, eval_dataset_size=2)


@pytest.mark.parametrize(("size", "count"), [(0.25, 10), (7, 7), (None, 4)])
def test_held_out_size_is_a_share_a_count_or_a_tenth(tmp_path, size, count):
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(40))
    rows = load(path, do_eval=True, eval_dataset_size=size)
    assert (rows.count(TRAIN), rows.count(EVAL)) == (40 - count, count)


def test_a_run_that_only_trains_holds_nothing_out(tmp_path):
    rows = load(write_rows(tmp_path / "rows.jsonl", alpaca_rows(40)), max_train_samples=30)
    assert rows.count(TRAIN) == 30 and rows.count(EVAL) == rows.count(TEST) == 0


def test_named_evaluation_rows_replace_the_held_out_ones(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", alpaca_rows(10))
    held_out = write_rows(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}] * 3)
    rows = load(train, do_eval=True, eval_dataset_name=str(held_out), max_eval_samples=2)
    assert (rows.count(TRAIN), rows.count(EVAL)) == (10, 2)


def alpaca_as_messages(rows):
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in rows
    ]


def write_set_with_copies(folder):
    """(rows to train on, held-out rows) of a folder whose eval and test files repeat rows of its train file."""
    train = alpaca_rows(30) + alpaca_rows(3)  # the first three twice
    other_answer = [row | {"output": "Another."} for row in alpaca_rows(2, start=10)]
    held_out = alpaca_rows(2) + alpaca_rows(4, start=28) + other_answer
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "eval.jsonl", alpaca_as_messages(held_out[:4]))  # of another format
    write_rows(folder / "test.jsonl", held_out[4:])
    return train, held_out


def list_pairs(rows, part):
    return [
        tuple(message["content"] for message in chat.messages)
        for kept, _, _, chat in rows.read("\n\n")
        if kept == part
    ]


@pytest.mark.parametrize("asked", ["nothing", "do_eval", "do_predict", "both"])
def test_no_copy_of_a_held_out_row_is_trained_on(tmp_path, asked):
    """Whatever the run evaluates: what it trains on does not hang on that, and a later evaluation is clean."""
    train, held_out = write_set_with_copies(tmp_path / "set")
    apart = {(row["instruction"], row["output"]) for row in held_out}
    expected = [pair for row in train if (pair := (row["instruction"], row["output"])) not in apart]
    flags = {"do_eval": asked in ("do_eval", "both"), "do_predict": asked in ("do_predict", "both")}
    rows = load(tmp_path / "set", **flags)
    assert list_pairs(rows, TRAIN) == expected and len(expected) == 27
    assert rows.describe()["held_out_copies"] == rows.held_out_copies == len(train) - 27
    assert set(list_pairs(rows, EVAL) + list_pairs(rows, TEST)) <= apart
    assert rows.count(EVAL) == 4 * flags["do_eval"] and rows.count(TEST) == 4 * flags["do_predict"]


def test_line_of_held_out_rows_counts_each_part_with_its_copies(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", alpaca_rows(40) + alpaca_rows(20) * 2)
    rows = load(path, do_eval=True, do_predict=True)
    told = f"held out of 80 rows: {rows.count(EVAL)} for evaluation, {rows.count(TEST)} for prediction"
    assert told in capsys.readouterr().out and rows.count(EVAL) + rows.count(TEST) + rows.count(TRAIN) == 80


def test_counts_and_samples_are_of_rows_without_copies(tmp_path):
    write_set_with_copies(tmp_path / "set")
    assert load(tmp_path / "set", max_train_samples=20).count(TRAIN) == 20
    drawn = load(f"{tmp_path}/set#25")
    assert drawn.count(TRAIN) == 25 and set(list_questions(drawn)).isdisjoint(["Question 0?", "Question 29?"])


def test_rows_named_for_evaluation_are_not_trained_on(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", alpaca_rows(10) + alpaca_rows(2))
    more = write_rows(tmp_path / "b.jsonl", alpaca_as_messages(alpaca_rows(4, start=8)))
    held_out = write_rows(tmp_path / "c.jsonl", alpaca_as_messages(alpaca_rows(3)))
    rows = load(f"{train},{more}", do_eval=True, eval_dataset_name=str(held_out), max_eval_samples=1)
    assert list_questions(rows) == [f"Question {i}?" for i in (3, 4, 5, 6, 7, 8, 9, 8, 9, 10, 11)]
    assert rows.held_out_copies == 5 and rows.count(EVAL) == 1
    with pytest.raises(UserError, match="leaves no row to train on: 12 of them are held out"):
        load(train, do_eval=True, eval_dataset_name=str(train))


def test_million_rows_are_held_against_the_held_out_ones_in_a_second():
    hashes = np.random.default_rng(0).integers(1, 2**64, 1_000_000, np.uint64)
    apart = np.concatenate([hashes[::1000], np.zeros(5, np.uint64)])
    sources = [Source("set", "set", part, "", "alpaca") for part in (TRAIN, TEST)]
    start = time.perf_counter()
    copies = find_copies(sources, [Scan(np.append(hashes, np.uint64(0))), Scan(apart)])
    found, none = np.split(copies, [1_000_001])
    assert time.perf_counter() - start < 2 and not none.any()
    assert np.flatnonzero(found).tolist() == list(range(0, 1_000_000, 1000))


def test_held_out_file_without_usable_rows_stops_only_a_run_that_needs_it(tmp_path):
    write_rows(tmp_path / "set" / "train.jsonl", alpaca_rows(3))
    write_rows(tmp_path / "set" / "test.jsonl", [{"instruction": "q", "output": ""}])  # answers kept back
    assert load(tmp_path / "set").count(TRAIN) == 3
    with pytest.raises(UserError, match="test.jsonl: no row can be used"):
        load(tmp_path / "set", do_predict=True)


def evaluate_later(run, name, **flags):
    """Rows of a later evaluation of `run`, a folder with its run.json."""
    training_args = TrainingArguments(do_eval=True)
    return load_rows(
        ModelArguments(checkpoint_dir=str(run)), DataArguments(str(name), **flags), training_args
    )


def write_record(run, name, rows, older=False):
    run.mkdir(exist_ok=True)
    data = rows.describe()
    if older:
        del data["held_out_copies"]
    arguments = vars(DataArguments(str(name))) | {"data_seed": 42}
    record = {"data": data, "arguments": arguments, "status": "finished"}
    (run / "run.json").write_text(json.dumps(record))
    return record


def test_later_evaluation_says_what_the_run_trained_on_all_the_same(tmp_path, capsys):
    train, _ = write_set_with_copies(tmp_path / "set")
    write_record(tmp_path / "run", tmp_path / "set", load(tmp_path / "set"))
    assert evaluate_later(tmp_path / "run", tmp_path / "set").count(EVAL) == 4
    assert "careful" not in capsys.readouterr().out
    other = write_rows(tmp_path / "other.jsonl", alpaca_rows(3, start=4))
    evaluate_later(tmp_path / "run", tmp_path / "set", eval_dataset_name=str(other))
    assert (
        "careful: 3 rows of the run's data hold the chat of a row that is evaluated now"
        in capsys.readouterr().out
    )
    write_record(tmp_path / "run", tmp_path / "set", load(tmp_path / "set"), older=True)
    capsys.readouterr()
    evaluate_later(tmp_path / "run", tmp_path / "set")
    assert f"careful: {len(train) - 27} rows" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["nothing", "do_eval", "do_predict", "both"])
def test_report_measures_the_rows_that_the_run_held_out(tmp_path, smol_tokenizer, asked):
    from types import SimpleNamespace

    from eval.measures.held_out import load_held_out

    write_set_with_copies(tmp_path / "set")
    wanted = {"do_eval": asked in ("do_eval", "both"), "do_predict": asked in ("do_predict", "both")}
    rows, datasets = tokenize(smol_tokenizer, tmp_path / "set", **wanted)
    record = write_record(tmp_path / "run", tmp_path / "set", rows)
    chat = SimpleNamespace(tokenizer=build_chat_tokenizer(smol_tokenizer))
    found = load_held_out(record, chat, 100)
    read, trained = ([row["input_ids"].tolist() for row in part] for part in (found.encoded, datasets[TRAIN]))
    assert found.reason is None and len(read) == 4 and not [row for row in read if row in trained]
    part = {"do_eval": EVAL, "do_predict": TEST, "both": EVAL, "nothing": EVAL}[asked]
    if asked != "nothing":
        assert read == [row["input_ids"].tolist() for row in datasets[part]]
    older = write_record(tmp_path / "run", tmp_path / "set", rows, older=True)
    assert (
        "6 rows of the run's data hold the chat of a held-out row" in load_held_out(older, chat, 100).reason
    )


def test_rows_become_prompt_and_labelled_answer(tmp_path, smol_tokenizer):
    (row,), counts = train_rows(smol_tokenizer, tmp_path, [{"instruction": "问", "output": "答 🎉"}])
    assert read_labels(smol_tokenizer, row) == "答 🎉<|im_end|>" and counts == {}
    assert smol_tokenizer.decode(row["input_ids"]).endswith(
        "问<|im_end|>\n<|im_start|>assistant\n答 🎉<|im_end|>"
    )


def test_every_answer_is_trained_or_the_last_alone(tmp_path, smol_tokenizer):
    rows = [{"messages": build_chat(3, words=0)}]
    (row,), _ = train_rows(smol_tokenizer, tmp_path, rows)
    assert read_labels(smol_tokenizer, row) == "".join(f"assistant {i}<|im_end|>" for i in range(3))
    (last,), _ = train_rows(smol_tokenizer, tmp_path, rows, train_last_turn_only=True)
    assert (
        read_labels(smol_tokenizer, last) == "assistant 2<|im_end|>" and last["input_ids"] == row["input_ids"]
    )


def test_long_answer_loses_its_end_and_is_counted(tmp_path, smol_tokenizer):
    rows = [{"instruction": "Count.", "output": " ".join(map(str, range(200)))}, *alpaca_rows(1)]
    (long, short), counts = train_rows(smol_tokenizer, tmp_path, rows, target_max_len=20)
    assert sum(label != IGNORE_INDEX for label in long["labels"]) == 20
    assert long["labels"][-1] != smol_tokenizer.eos_token_id == short["labels"][-1]
    assert counts == {tokenizing.ANSWER_CUT: 1, tokenizing.NO_STOP: 1}


def test_long_prompt_loses_its_beginning_never_the_question(tmp_path, smol_tokenizer):
    rows = [{"instruction": "word " * 300 + "What?", "output": "Yes."}]
    (row,), counts = train_rows(smol_tokenizer, tmp_path, rows, source_max_len=30)
    prompt = [token for token, label in zip(*row.values(), strict=True) if label == IGNORE_INDEX]
    assert len(prompt) == 30 and counts == {tokenizing.PROMPT_CUT: 1}
    said = smol_tokenizer.decode(
        prompt
    )  # its BOS opens each turn: alone at the front it would be half of one
    assert said.startswith(" word word") and said.endswith("What?<|im_end|>\n<|im_start|>assistant\n")
    (row,), counts = train_rows(smol_tokenizer, tmp_path, rows, model_max_length=40)
    assert len(row["input_ids"]) == 40 and read_labels(smol_tokenizer, row) == "Yes.<|im_end|>"
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.bos_token, tokenizer.chat_template = (
        "<|endoftext|>",
        "{{ bos_token }}" + tokenizer.chat_template,
    )
    (row,), _ = train_rows(tokenizer, tmp_path, rows, source_max_len=30)
    prompt = [token for token, label in zip(*row.values(), strict=True) if label == IGNORE_INDEX]
    assert len(prompt) == 30 and tokenizer.decode(prompt).startswith("<|endoftext|> word word")


def test_only_the_sum_counts_for_longer_chats(tmp_path, smol_tokenizer):
    (row,), counts = train_rows(
        smol_tokenizer,
        tmp_path,
        [{"messages": build_chat(2, words=10)}],
        source_max_len=16,
        target_max_len=200,
    )
    assert counts == {} and len(row["input_ids"]) > 80


def test_long_chat_is_split_between_its_turns_and_loses_no_answer(tmp_path, smol_tokenizer):
    chat = [{"role": "system", "content": "Be kind."}, *build_chat(12, words=8)]
    rows, counts = train_rows(smol_tokenizer, tmp_path, [{"messages": chat}], model_max_length=128)
    assert len(rows) > 2 and counts == {tokenizing.CHAT_SPLIT: 1}
    answers = "".join(read_labels(smol_tokenizer, row) for row in rows)
    assert answers == "".join(f"{m['content']}<|im_end|>" for m in chat if m["role"] == "assistant")
    for row in rows:
        assert len(row["input_ids"]) <= 128
        assert smol_tokenizer.decode(row["input_ids"]).startswith(
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
        )


def test_pieces_of_a_split_chat_have_the_room_of_both_limits(tmp_path, smol_tokenizer):
    """Each question with its answer fits 60 + 40 tokens, no answer fits 40 alone."""
    chat = build_chat(6, words=30)
    chat = [
        message | {"content": message["content"][:20]} if i % 2 == 0 else message
        for i, message in enumerate(chat)
    ]
    limits = {"source_max_len": 60, "target_max_len": 40}
    rows, counts = train_rows(smol_tokenizer, tmp_path, [{"messages": chat}], **limits)
    assert counts == {tokenizing.CHAT_SPLIT: 1} and len(rows) == 6
    assert all(40 < len(row["input_ids"]) <= 100 for row in rows)
    answers = "".join(read_labels(smol_tokenizer, row) for row in rows)
    assert answers == "".join(f"{m['content']}<|im_end|>" for m in chat if m["role"] == "assistant")


def test_oldest_turns_go_first_when_asked(tmp_path, smol_tokenizer):
    flags = {"model_max_length": 128, "truncation": "oldest_turns"}
    (row,), counts = train_rows(smol_tokenizer, tmp_path, [{"messages": build_chat(12, words=8)}], **flags)
    assert counts == {tokenizing.TURNS_CUT: 1} and 64 < len(row["input_ids"]) <= 128
    assert "assistant 11" in read_labels(smol_tokenizer, row) and "assistant 2 " not in read_labels(
        smol_tokenizer, row
    )


def test_rows_that_are_too_long_are_dropped_when_asked(tmp_path, smol_tokenizer):
    rows = [{"messages": build_chat(12, words=8)}, {"messages": build_chat(1)}]
    kept, counts = train_rows(smol_tokenizer, tmp_path, rows, model_max_length=100, truncation="drop")
    assert len(kept) == 1 and counts == {tokenizing.TOO_LONG: 1}


def test_template_that_rewrites_answers_gives_a_row_an_answer(tmp_path, smol_tokenizer):
    smol_tokenizer.chat_template = QWEN3_LIKE
    rows, counts = train_rows(
        smol_tokenizer, tmp_path, [{"messages": build_chat(6, words=8)}], model_max_length=80
    )
    assert counts[tokenizing.TURN_BY_TURN] == len(rows) == 6 and counts[tokenizing.TURNS_CUT] == 4
    for i, row in enumerate(rows):
        assert read_labels(smol_tokenizer, row).endswith(f"assistant {i} " + "word " * 7 + "word<|im_end|>")
        assert len(row["input_ids"]) <= 80


def test_plain_text_is_trained_whole_in_windows(tmp_path, smol_tokenizer):
    text = " ".join(f"line {i}" for i in range(100))
    rows, counts = train_rows(smol_tokenizer, tmp_path, [{"text": text}], model_max_length=64)
    assert smol_tokenizer.decode([t for row in rows for t in row["input_ids"]]) == text + "<|im_end|>"
    assert all(row["labels"] == row["input_ids"] for row in rows) and counts == {}


def test_row_that_the_template_refuses_is_counted_not_fatal(tmp_path, smol_tokenizer):
    smol_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [{"prompt": "bad", "completion": "x"}, {"prompt": "good", "completion": "y"}]
    kept, counts = train_rows(smol_tokenizer, tmp_path, rows)
    assert len(kept) == 1 and counts == {"dropped: the chat template refuses these messages: no": 1}


def test_origins_tell_the_source_and_row_of_every_sequence(tmp_path, smol_tokenizer):
    first = write_rows(tmp_path / "a.jsonl", [{"instruction": "q", "output": None}, *alpaca_rows(2)])
    second = write_rows(tmp_path / "b.jsonl", alpaca_rows(1, start=2))
    _, datasets = tokenize(smol_tokenizer, f"{first},{second}")
    assert datasets[TRAIN].origins.tolist() == [[0, 2], [0, 3], [1, 1]]


def test_same_work_is_read_from_the_cache_and_changed_work_is_not(tmp_path, smol_tokenizer, capsys):
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(30))
    _, first = tokenize(smol_tokenizer, path)
    assert "are read from" not in capsys.readouterr().out
    _, again = tokenize(smol_tokenizer, path)
    assert "are read from" in capsys.readouterr().out
    assert np.array_equal(first[TRAIN].tokens, again[TRAIN].tokens)
    tokenize(smol_tokenizer, path, source_max_len=99)
    tokenize(smol_tokenizer, path, max_train_samples=5)
    smol_tokenizer.chat_template = read_template("alpaca")
    tokenize(smol_tokenizer, path)
    write_rows(path, alpaca_rows(31))
    tokenize(smol_tokenizer, path)
    assert "are read from" not in capsys.readouterr().out
    assert len(list(find_cache_dir().glob("tokens-*"))) == 5


def test_batches_of_any_size_give_the_same_tokens(tmp_path, smol_tokenizer, monkeypatch):
    rows = alpaca_rows(25) + [{"instruction": "长" * 50, "output": "答" * 50}]
    whole, _ = train_rows(smol_tokenizer, tmp_path, rows)
    monkeypatch.setattr(tokenizing, "CHUNK_ROWS", 4)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "other"))
    assert train_rows(smol_tokenizer, tmp_path, rows)[0] == whole
    assert json.dumps(whole)


def test_tool_chat_that_fills_its_limit_exactly_is_cut_there(smol_tokenizer, tmp_path):
    """An answer may end on the last token there is room for, with a tool's result and an answer behind it."""
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
    chat = [
        {"role": "user", "content": "How is the weather in Paris?"},
        {"role": "assistant", "content": "Let me look that up for you. " * 8, "tool_calls": call},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    smol_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (whole,), _ = train_rows(smol_tokenizer, tmp_path, [{"messages": chat}], model_max_length=500)
    stop = smol_tokenizer.eos_token_id
    first_end = whole["labels"].index(stop) + 1
    (row,), counts = train_rows(smol_tokenizer, tmp_path, [{"messages": chat}], model_max_length=first_end)
    assert row["input_ids"] == whole["input_ids"][:first_end]
    assert row["labels"][-1] == stop and counts == {tokenizing.ANSWER_CUT: 1}
    for limit in range(8, len(whole["input_ids"]), 3):
        train_rows(smol_tokenizer, tmp_path, [{"messages": chat}], model_max_length=limit)


ASKED = {"role": "user", "content": "Two and two?"}
EARLIER = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def said(text="Four.", **keys):
    return {"role": "assistant", "content": text, **keys}


def called(**changes):
    function = {"name": "add", "arguments": {"a": 2}} | changes.pop("function", {})
    calls = [{"type": "function", "function": function, **changes}]
    return [said("", tool_calls=calls), {"role": "tool", "content": "4"}, said()]


ONE_CHAT_TWICE = {
    "thought in a key and in tags": (
        {"messages": [ASKED, said(reasoning_content="Count.")]},
        {"instruction": "Two and two?", "output": "<think>\nCount.\n</think>\n\nFour."},
    ),
    "thought in a column": (
        {"messages": [ASKED, said(reasoning="Two and two.")]},
        {"question": "Two and two?", "answer": "Four.", "cot": "Two and two."},
    ),
    "preferred and plain": (
        {"messages": [*EARLIER, ASKED, said()]},
        {"prompt": [*EARLIER, ASKED], "chosen": [said()], "rejected": [said("Five.")]},
    ),
    "weighed and not": (
        {"messages": [*EARLIER, ASKED, said()]},
        {"messages": [EARLIER[0], EARLIER[1] | {"weight": 0}, ASKED, said()]},
    ),
    "arguments as text": (
        {"messages": [ASKED, *called()]},
        {"messages": [ASKED, *called(function={"arguments": '{"a": 2}'})]},
    ),
    "call with an id": ({"messages": [ASKED, *called()]}, {"messages": [ASKED, *called(id="call_1")]}),
    "turns with ids": ({"messages": [ASKED, said()]}, {"messages": [ASKED | {"id": "u1"}, said(id="a1")]}),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ONE_CHAT_TWICE)
def test_chat_that_is_written_in_two_ways_is_not_trained_where_it_is_held_out(tmp_path, name, turned):
    """In the file of the training rows and in that of the held-out ones: a template makes one text of both."""
    held_out, trained = ONE_CHAT_TWICE[name][:: -1 if turned else 1]
    files = [write_rows(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate((trained, held_out))]
    rest = write_rows(tmp_path / "rest.jsonl", alpaca_rows(5))
    rows = load(f"{files[0]},{rest}", do_eval=True, eval_dataset_name=str(files[1]))
    assert (rows.count(TRAIN), rows.count(EVAL), rows.held_out_copies) == (5, 1, 1)


def test_count_behind_a_name_is_of_rows_whatever_repeats(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(5) * 20)
    rows = load(f"{path}#8")
    assert rows.count(TRAIN) == 8 and load(f"{path}#8").count(TRAIN) == 8
