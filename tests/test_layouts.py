"""Files as other trainers ship them: exactly their answers are labels, and what is left out says why."""

import json

import pytest
from helpers import ROOT

from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.console import UserError
from utils.data.formats import find_format, read_row
from utils.data.layouts import parse_columns
from utils.data.report import build_report
from utils.data.rows import load_rows
from utils.data.sources import find_sources
from utils.data.tokenizing import tokenize_rows
from utils.models.tokenizer import ChatTokenizer, add_pad_token
from utils.prompts.messages import IGNORE_INDEX
from utils.train.predictions import find_answered

QWEN = (ROOT / "utils" / "prompts" / "templates" / "chatml.jinja").read_text()
CALL = {"name": "look_up", "arguments": {"city": "Lima"}}
TOOL = {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}
CALL_TEXT = '<tool_call>\n{"name": "look_up", "arguments": {"city": "Lima"}}\n</tool_call>'


@pytest.fixture
def learn(smol_tokenizer, tmp_path, capsys, monkeypatch):
    """The answers that rows (or a file) are trained on, each decoded with its stop token; and what was printed."""
    smol_tokenizer.chat_template = QWEN
    add_pad_token(smol_tokenizer)
    stop = smol_tokenizer.convert_tokens_to_ids("<|im_end|>")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))

    def run(rows, **flags):
        path = rows
        if isinstance(rows, list):
            path = tmp_path / "rows.json"
            path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        data_args = DataArguments(dataset_name=str(path), source_max_len=2000, target_max_len=2000, **flags)
        loaded = load_rows(ModelArguments(), data_args, TrainingArguments())
        parts = tokenize_rows(loaded, ChatTokenizer(smol_tokenizer, [stop]), data_args)
        answers = []
        for row in map(parts["train"].__getitem__, range(len(parts["train"]))):
            span = []
            for label in [*row["labels"], IGNORE_INDEX]:
                if label != IGNORE_INDEX:
                    span.append(int(label))
                elif span:
                    answers.append(smol_tokenizer.decode(span))
                    span = []
        run.report = build_report(loaded, parts, len(smol_tokenizer), data_args, TrainingArguments(), False)
        return answers, capsys.readouterr().out

    return run


def ends(*answers):
    return [f"{answer}<|im_end|>" for answer in answers]


PAIRS = [
    ({"question": "Q?", "answer": "A."}, ["A."]),
    ({"query": "Q?", "response": "A.", "history": [["q", "a"]], "system": "s"}, ["a", "A."]),
    ({"问题": "在吗？", "回答": "在。"}, ["在。"]),
    ({"指令": "翻译", "输入": "你好", "输出": "Hello"}, ["Hello"]),
    ({"prompt": "Q?", "completion": "A."}, ["A."]),
    ({"prompt": "Q?", "response": "A."}, ["A."]),
    ({"instruction": "1 + 2?", "output": 3}, ["3"]),
    ({"question": "Is it?", "answer": True}, ["true"]),
    ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "Q", "assistant": "A"}]}, ["a", "A"]),
    ({"conversation": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}, ["a"]),
    ({"id": 1, "instruction": "Do.", "instances": [{"input": "", "output": "Done."}]}, ["Done."]),
    ({"messages": [{"role": "human_user", "content": "q"}, {"role": "chatgpt", "content": "a"}]}, ["a"]),
    ({"instruction": "Add 1 to it.", "input": 3, "output": "4"}, ["4"]),
    ({"instruction": "Is it so?", "input": False, "output": "No."}, ["No."]),
    ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": True}]}, ["true"]),
    ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": 4.5}]}, ["4.5"]),
    ({"prompt": 3, "chosen": 4, "rejected": 5}, ["4"]),
    ({"query": "Q?", "response": "A.", "history": [[3, 4]]}, ["4", "A."]),
    ({"conversation": [{"human": "q", "assistant": None}, {"human": "Q", "assistant": "A"}]}, ["A"]),
    ({"conversation": [{"human": "q", "assistant": ""}, {"human": "Q", "assistant": "A"}]}, ["A"]),
    ({"conversation": [{"assistant": "a", "human": "q", "user": None, "gpt": None, "system": None}]}, ["a"]),
    ({"messages": [{"human": "q", "assistant": None}, {"human": "Q", "assistant": "A"}]}, ["A"]),
    ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None},
                   {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ["A"]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None},
                        {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ["A"]),
    ({"query": "Q?", "response": "A.", "history": [["q", None], ["p", "a"]]}, ["a", "A."]),
    ({"conversation": [{"system": "s", "input": "q", "output": "a"}, {"system": "s", "input": "Q", "output": "A"}]}, ["a", "A"]),
    ({"conversation": [{"input": "q", "output": "a", "output_with_loss": False}, {"input": "Q", "output": "A"}]}, ["A"]),
    ({"instruction": "Q?", "input": "more", "output": ["Good.", "Bad."]}, ["Good."]),
    ({"conversation": [{"human": "q", "assistant": "a"}]}, ["a"]),
    ({"paragraph": [{"q": "Q one?", "a": ["One.", "", "Two."]}, {"q": "Q?", "a": "A."}]}, ["One.\n\nTwo.", "A."]),
    ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": ["One.", "Two."]}]}, ["One.\nTwo."]),
    ({"input": ["Q one?", "Q two?"], "output": ["A one.", "A two."]}, ["A one.", "A two."]),
    ({"Question": "Q?", "ANSWER": "A.", "Context": "c"}, ["A."]),
    ({"article": "A long text.", "question": "Q?", "answer": "A."}, ["A."]),
    ({"question": "Q?", "response_chosen": "Good.", "response_rejected": "Bad.", "history": [["q", "a"]], "system": "s"}, ["Good."]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "content": "q"}]}, {"role": "assistant", "content": "a"}]}, ["a"]),
    ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, ["a"]),
    ({"prompt": "Q?", "chosen": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, ["a"]),
    ({"query": "Q?", "response": "[[1, 2]]", "history": '[["q", "a"]]'}, ["a", "[[1, 2]]"]),
    ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["a"]),
    ({"messages": [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}]}, ["a"]),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "a "}, {"type": "text", "text": "b"}]},
            ]
        },
        ["a b"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "row, answers", PAIRS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_row_of_a_known_layout_is_trained_on_its_answers(learn, row, answers):
    assert learn([row])[0] == ends(*answers)


@pytest.mark.parametrize("name", ["yayi", "Mimi 2"])
def test_speaker_of_any_name_who_alone_answers_the_user_is_the_model_and_said(learn, name):
    said = [("human", "q"), (name, "a"), ("human", "Q"), (name, "A")]
    row = {"conversations": [{"from": who, "value": text} for who, text in said]}
    assert learn([row])[0] == ends("a", "A")
    assert read_row(row, "sharegpt").cleaned == (f"{name!r} taken for the model's name",)
    third = {"from": "narrator", "value": "n"}
    for turns in ([*row["conversations"], third], [third], [{"from": "gpt", "value": "a"}, third]):
        with pytest.raises(UserError, match="a turn is spoken by"):
            read_row({"conversations": turns}, "sharegpt")


MARKED = [
    ({"prompt": "Q?", "completion": "A.<|endoftext|>"}, "A."),
    ({"instruction": "Q?", "output": "A.</s>\n"}, "A."),
    ({"instruction": "Q?", "output": "Write <s>old</s>"}, "Write <s>old</s>"),
    ({"instruction": "Q?", "output": "<|endoftext|> ends it."}, "<|endoftext|> ends it."),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a <|eot_id|>"}]}, "a "),
]  # fmt: skip


@pytest.mark.parametrize("row, answer", MARKED, ids=[answer for _, answer in MARKED])
def test_end_mark_that_a_publisher_put_behind_an_answer_is_taken_off_and_said(learn, row, answer):
    assert learn([row])[0] == ends(answer)
    given = row.get("completion") or row.get("output") or row["conversations"][1]["value"]
    notes = ("an end mark behind an answer taken off",)
    assert read_row(row, find_format(row)).cleaned == (notes if answer != given else ())
    with pytest.raises(UserError, match="an answer is '</s>' alone"):
        read_row({"instruction": "Q?", "output": "</s> "}, "alpaca")


PIECES = [
    {"content": [{"type": "text", "text": "Think.", "train": False}, {"type": "text", "text": "A.", "train": True}]},
    {"content": [{"type": "text", "text": "Think.", "weight": 0}, {"type": "text", "text": "A."}]},
    {"content": "Think. A.", "train_detail": [{"begin_offset": 0, "end_offset": 5, "train": False}]},
]  # fmt: skip


@pytest.mark.parametrize("answer", PIECES, ids=["train", "weight", "train_detail"])
def test_answer_of_which_a_piece_is_context_is_refused(answer):
    asked = {"role": "user", "content": [{"type": "text", "text": "Q?", "train": False}]}
    with pytest.raises(UserError, match="marks a piece of an answer as not learned"):
        read_row({"messages": [asked, answer | {"role": "assistant"}]}, "messages")
    whole = {"role": "assistant", "content": [{"type": "text", "text": "A.", "train": True}]}
    assert read_row({"messages": [asked, whole]}, "messages").messages[1]["content"] == "A."


def test_text_of_a_turn_that_the_template_does_not_show_is_counted_by_its_key(learn, smol_tokenizer):
    thought = {"role": "assistant", "content": "A.", "reasoning_content": "Let me think."}
    listed = {"role": "assistant", "content": "A.", "steps": [{"type": "text", "text": "One by one."}]}
    marked = {"role": "assistant", "content": "A.", "id": "x1", "kind": "reply"}
    rows = [{"messages": [{"role": "user", "content": "q"}, answer]} for answer in (thought, listed, marked)]
    assert learn(rows)[0] == ends("<think>\nLet me think.\n</think>\n\nA.", "A.", "A.")
    hidden, thought = (
        "rows with a text that the template does not show: ",
        "rows with a thought in a trained answer",
    )
    assert learn.report["parts"]["train"]["findings"] == {thought: 1, f"{hidden}steps": 1}
    smol_tokenizer.chat_template = QWEN.replace(
        "message.content -}}", "(message.reasoning_content or '') + message.content -}}", 2
    )
    assert learn(rows[:1])[0] == ends("Let me think.A.")
    assert learn.report["parts"]["train"]["findings"] == {thought: 1}


def test_what_is_written_as_text_is_said_and_the_question_stays_whole():
    """An input of 0 or false, a question beside an answer that is null, a system message said with each pair."""
    for row, before in (
        ({"instruction": "Add 1.", "input": 0, "output": 1}, ["user: Add 1.\n\n0"]),
        ({"instruction": "Q?", "input": False, "chosen": "A."}, ["user: Q?\n\nfalse"]),
        ({"conversation": [{"system": "s", "input": "q", "output": "a"}] * 2}, ["system: s", "user: q", "assistant: a", "user: q"]),
    ):  # fmt: skip
        *context, _ = read_row(row, find_format(row)).messages
        assert [f"{message['role']}: {message['content']}" for message in context] == before
    for row in (
        {"instruction": "Add 1.", "input": 0, "output": "1"},
        {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "4"}]},
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "4"}]},
    ):
        assert read_row(row, find_format(row)).cleaned == ("numbers and booleans written as text",)


NAN = float("nan")


@pytest.mark.parametrize("empty", [NAN, float("inf"), None])
def test_empty_cell_of_a_table_is_no_text(learn, empty):
    rows = [{"instruction": "Q?", "input": empty, "output": "A.", "system": empty, "history": empty}] * 5
    learned, _ = learn([*rows, {"instruction": "q", "output": empty}, {"instruction": empty, "output": "a"}])
    assert learned == ends("A.") * 5 and learn.report["sources"][0]["rows"] == 7
    assert [message["content"] for message in read_row(rows[0], "alpaca").messages] == ["Q?", "A."]
    for row in (
        {"question": "Q?", "answer": empty},
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": empty}]},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": empty}]},
        {"prompt": "Q?", "chosen": empty, "rejected": "A."},
        {"prompt": empty, "chosen": "A.", "rejected": "B."},
    ):
        with pytest.raises(UserError):
            read_row(row, find_format(row))


def test_empty_cells_of_a_parquet_file_are_left_out(learn, tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {"question": ["1 + 1?", "1 / 0?", "2 + 2?"] * 3, "answer": [2.0, NAN, None] + [4.0] * 6}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    learned, printed = learn(tmp_path / "rows.parquet")
    assert learned == ends("2.0", *["4.0"] * 6) and "2 left out, row 2 first" in printed


UNREAD = [
    ({"problem": "What is 6 x 7?", "solution": "We count: it is 42.", "answer": "42"}, ["solution"]),
    ({"instruction": "Be brief.", "query": "What is it?", "response": "A cat."}, ["query"]),
    ({"instruction": "Q?", "context": "A long text.", "input": "Another text.", "response": "A."}, ["input"]),
    ({"prompt": "Q?", "input": "Some more.", "chosen": "A.", "rejected": "Not this one."}, ["input"]),
    ({"system": "Be kind.", "messages": [("system", "No."), ("user", "q"), ("assistant", "a")]}, ["system"]),
    ({"问题": "在吗？", "回答": "在。", "解释": "因为今天是工作日，所以我在。"}, ["解释"]),
    ({"text": "A whole text.", "summary": "In short."}, ["summary"]),
    ({"question": "Which one?", "choices": ["a cat", "a dog"], "answer": "The third."}, ["choices"]),
    ({"question": "Q?", "answer": "A.", "more": {"note": ["A long text."]}}, ["more"]),
    ({"instruction": "Q?", "output": "A.", "source": "From the web.", "id": "row 1", "kind": "closed_qa", "page_url": "a b"}, []),
    ({"instruction": "Say it.", "input": "Hello you.", "output": "Hi.", "text": "Below: Say it. Input: Hello you. Reply: Hi."}, []),
    ({"prompt": "Who are you?", "messages": [("user", "Who are you?"), ("assistant", "a")]}, []),
    ({"chosen": "\n\nHuman: Q one?\n\nAssistant: A.", "rejected": "\n\nHuman: Q one?\n\nAssistant: No way."}, []),
    ({"text": "### Human: Who are you?### Assistant: It is me."}, []),
    ({"instruction": "Human: Who are you?\nAssistant:", "output": "It is me."}, []),
    ({"question": "Q?", "answer": "A long answer.</s>", "score": NAN}, []),
    ({"instruction": "Q?", "output": "A.", "note": None, "more": "", "number": 3, "time": "2023-01-01 12:00"}, []),
]  # fmt: skip


@pytest.mark.parametrize(
    "row, columns", UNREAD, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_text_that_no_format_reads_is_named_once_with_its_rows(learn, row, columns):
    row = row | {
        name: [{"role": role, "content": text} for role, text in row[name]]
        for name in row
        if name == "messages"
    }
    assert list(read_row(row, find_format(row)).unread) == columns
    empty = {name: "" for name in columns}
    _, printed = learn([row | empty, row, row])
    lines = [line for line in printed.splitlines() if "texts that are not trained" in line]
    said = f"  texts that are not trained: {', '.join(columns)} (2 rows); --columns says which column is what"
    assert lines == ([said] if columns else [])
    found = learn.report["sources"][0]["not_trained"]
    assert found == {name: [2, [2, 3]] for name in columns}


def test_untrained_texts_are_named_as_the_file_calls_them(learn):
    rows = [{"frage": "Q?", "mehr": "A long text.", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]  # fmt: skip
    _, printed = learn(rows, columns="input=mehr")
    assert "texts that are not trained: mehr (1 rows)" in printed
    rows = [{"problem": "Q?", "solution": "Think: A.", "answer": "A."}]
    learned, printed = learn(rows, columns="output=solution")
    assert learned == ends("Think: A.") and "not trained" not in printed


CALLED = [
    {"from": "human", "value": "Weather in Lima?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "It is sunny."},
]


def test_calls_of_sharegpt_are_trained_as_calls(learn):
    row = {"conversations": CALLED, "tools": json.dumps([TOOL])}
    assert learn([row])[0] == ends(CALL_TEXT, "It is sunny.")
    chat = read_row(row, "sharegpt")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.tools == [{"type": "function", "function": TOOL}]
    named = [{"role": turn["from"], "content": turn["value"]} for turn in CALLED]
    named[1]["role"], named[2]["role"] = "tool_call", "tool_response"
    assert read_row({"messages": named, "tools": [TOOL]}, "messages") == chat


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_function_call_of_a_turn_and_functions_of_a_row_are_a_call_and_tools(learn, key):
    """As OpenAI's files had them before there were tool_calls and tools."""
    called = {
        "name": "look_up",
        key: json.dumps(CALL["arguments"]) if key == "arguments" else CALL["arguments"],
    }
    messages = [
        {"role": "user", "content": "Weather in Lima?"},
        {"role": "assistant", "content": None, "function_call": called},
        {"role": "function", "name": "look_up", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny.", "function_call": None},
    ]
    row = {"messages": messages, "functions": [TOOL]}
    assert learn([row])[0] == ends(CALL_TEXT, "It is sunny.")
    assert read_row(row, "messages").tools == [{"type": "function", "function": TOOL}]


def test_call_that_is_no_json_is_a_bad_row():
    turns = [CALLED[0], {"from": "function_call", "value": "look(1)"}, *CALLED[2:]]
    with pytest.raises(UserError, match="a call holds 'look\\(1\\)': JSON with name and arguments"):
        read_row({"conversations": turns}, "sharegpt")


def test_columns_of_any_name_are_said_by_a_flag(learn):
    rows = [{"frage": "Q?", "antwort": "A.", "note": "x"}]
    with pytest.raises(
        UserError, match="columns frage, antwort, note: .*--columns instruction=frage,output=antwort"
    ):
        learn(rows)
    assert learn(rows, columns="instruction=frage,output=antwort")[0] == ends("A.")
    rows = [{"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "assistant", "text": "a"}]}]
    with pytest.raises(UserError, match="--columns messages=dialog,role=speaker,content=text"):
        learn(rows)
    assert learn(rows, columns="messages=dialog,role=speaker,content=text")[0] == ends("a")


def test_columns_are_part_of_what_a_run_is_known_by(learn):
    """Also of the cache: the same file under other columns is other rows."""
    rows = [{"a": "Q?", "b": "A."}]
    assert learn(rows, columns="instruction=a,output=b")[0] == ends("A.")
    assert learn(rows, columns="instruction=b,output=a")[0] == ends("Q?")


def test_columns_that_a_file_lacks_are_said(learn):
    learned, printed = learn([{"question": "Q?", "answer": "A."}], columns="instruction=frage")
    assert learned == ends("A.")
    assert "has no column frage, as --columns says; it has " in printed


def test_bad_columns_are_one_line():
    for text in ("question=frage", "instruction", "instruction="):
        with pytest.raises(UserError, match="is not NAME=COLUMN with a NAME of instruction"):
            parse_columns(text)


INFO = {
    "plain": {"file_name": "plain.json", "columns": {"prompt": "ask", "query": "more", "response": "say"}},
    "shared": {
        "file_name": "shared.json",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "system": "rules"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "asker", "assistant_tag": "sayer"},
    },
    "ranked": {"file_name": "ranked.json", "ranking": True, "columns": {"prompt": "ask", "chosen": "good"}},
    "default": {"file_name": "default.json"},
}
INFO_ROWS = {
    "plain": ({"ask": "Q?", "more": "m", "say": "A.", "other": "x"}, ["A."]),
    "shared": (
        {"dialog": [{"who": "asker", "what": "q"}, {"who": "sayer", "what": "a"}], "rules": "s"},
        ["a"],
    ),
    "ranked": ({"ask": "Q?", "good": "Good.", "rejected": "Bad."}, ["Good."]),
    "default": ({"instruction": "Q?", "output": "A."}, ["A."]),
}


@pytest.mark.parametrize("name", INFO)
def test_file_is_read_by_the_dataset_info_beside_it(learn, tmp_path, name):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    row, answers = INFO_ROWS[name]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps([row]))
    learned, printed = learn(path)
    assert learned == ends(*answers)
    assert f"{path} is read by {tmp_path / 'dataset_info.json'}, where it is {name}" in printed


BAD_INFO = [
    ({"columns": ["a"]}, "columns \"\\['a'\\]\" is no object of names"),
    ({"columns": {"prompt": 3}}, "columns \"{'prompt': 3}\" is no object of names"),
    ({"tags": "no", "formatting": "sharegpt"}, "tags 'no' is no object of names"),
    ({"tags": {"role_tag": ["a"]}, "formatting": "sharegpt"}, "is no object of names"),
    ({"formatting": "shregpt"}, "formatting 'shregpt' is none of alpaca, sharegpt, openai"),
    ({"formatting": ["alpaca"]}, "is none of alpaca, sharegpt, openai"),
]


@pytest.mark.parametrize("spec, reason", BAD_INFO)
def test_bad_entry_of_a_dataset_info_is_one_line(learn, tmp_path, spec, reason):
    info, path = tmp_path / "dataset_info.json", tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "Q?", "output": "A."}]))
    info.write_text(json.dumps({"mine": {"file_name": "rows.json"} | spec}))
    with pytest.raises(UserError, match=f"{info}: mine: .*{reason}.*: mend it or move it away"):
        learn(path)


def test_entry_of_a_dataset_info_may_mark_undesirable_rows_in_any_column(learn, tmp_path):
    info, path = tmp_path / "dataset_info.json", tmp_path / "rows.json"
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "good"}
    info.write_text(json.dumps({"mine": {"file_name": "rows.json", "columns": columns}}))
    rows = [{"instruction": f"q{i}", "output": f"a{i}", "good": i % 2 == 1} for i in range(4)]
    path.write_text(json.dumps(rows))
    assert learn(path)[0] == ends("a1", "a3")


def test_entry_of_a_dataset_info_with_a_prompt_alone_is_text_to_continue(learn, tmp_path):
    info = {"lines": {"file_name": "lines.txt", "columns": {"prompt": "text"}}}
    info["pages"] = {"file_name": "pages.json", "columns": {"prompt": "page"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "lines.txt").write_text("One line.\nAnother one.\n")
    (tmp_path / "pages.json").write_text(json.dumps([{"page": "A page."}]))
    assert learn(tmp_path / "lines.txt")[0] == ends("One line.", "Another one.")
    assert learn(tmp_path / "pages.json")[0] == ends("A page.")


def test_entries_of_a_dataset_info_that_fit_no_row_or_one_file_are_said(learn, tmp_path):
    info, path = tmp_path / "dataset_info.json", tmp_path / "rows.json"
    path.write_text(json.dumps([{"ask": "Q?", "say": "A.", "note": "x"}]))
    first = {"file_name": "rows.json", "columns": {"prompt": "ask", "response": "say", "system": None}}
    info.write_text(json.dumps({"first": first, "other": {"file_name": "rows.json"}}))
    learned, printed = learn(path)
    assert learned == ends("A.") and "has no column" not in printed
    assert "where it is first, the first of 2 entries (first, other)" in printed
    first["columns"]["query"] = "more"
    info.write_text(json.dumps({"first": first}))
    learned, printed = learn(path)
    assert learned == ends("A.") and "of 2 entries" not in printed
    assert "has no column more, as dataset_info.json says; it has ask, say, note" in printed
    first["columns"]["prompt"] = "aks"
    info.write_text(json.dumps({"first": first}))
    with pytest.raises(
        UserError, match="has the columns ask, say, note: .*--columns instruction=ask,output=say"
    ):
        learn(path)


SPOKEN = [
    {"conversations": [{"who": "user", "what": "q"}, {"who": "bot", "what": "a"}]},
    {"conversation": [{"who": "user", "what": "q"}, {"who": "bot", "what": "a"}]},
    {"dialog": [{"who": "user", "what": "q"}, {"who": "bot", "what": "a"}], "tools": [{"who": "f", "what": "g"}]},
    {"messages": [{"who": "user", "what": "q"}, {"who": "bot", "what": "a"}]},
    {"messages": [{"who": "user", "what": "q"}], "chosen_messages": [{"who": "user", "what": "q"}, {"who": "bot", "what": "a"}]},
    {"conversations": [{"who": "user", "what": "q"}], "chosen": {"who": "bot", "what": "a"}},
]  # fmt: skip


@pytest.mark.parametrize("row", SPOKEN, ids="-".join)
def test_keys_of_turns_are_said_by_a_flag_whatever_their_column_is_called(learn, row):
    layout = parse_columns("role=who,content=what")
    renamed = layout.apply(row)
    chat = read_row(renamed | {"tools": None}, find_format(renamed))
    assert [message["content"] for message in chat.messages] == ["q", "a"]
    assert renamed.get("tools") == row.get("tools")
    if "tools" not in row:
        assert learn([row], columns="role=who,content=what")[0] == ends("a")


def test_messages_said_by_a_flag_may_have_any_known_keys(learn):
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 2
    assert learn(rows, columns="messages=conversations")[0] == ends("a", "a")
    pairs = [{"talk": [{"human": "q", "assistant": "a"}]}]
    assert learn(pairs, columns="messages=talk")[0] == ends("a")


def test_column_given_twice_is_refused():
    with pytest.raises(UserError, match="instruction is given twice: keep a or b"):
        parse_columns("instruction=a,output=c,instruction=b")
    with pytest.raises(UserError, match="role is given twice"):
        parse_columns("role=a,role=a")


def test_mistyped_column_is_answered_with_the_file_s_own(learn):
    rows = [{"id": "x 1", "frage": "Q?", "antwort": "A.", "mehr": None}]
    with pytest.raises(UserError) as caught:
        learn(rows, columns="instruction=farge,output=antwort")
    assert "has the columns id, frage, antwort, mehr: say which is which" in str(caught.value)
    assert "--columns instruction=frage,output=antwort (" in str(caught.value)


@pytest.mark.parametrize("mark", ",;")
@pytest.mark.parametrize("row", [("你是谁？", "我是一个模型。"), ("你好", "在"), ("Name a colour", "Blue")])
def test_table_whose_first_line_is_a_row_is_told_to_name_its_columns(learn, tmp_path, row, mark):
    """However short its cells; as advised it is read. Rows of other files have names, with or without marks."""
    path = tmp_path / "rows.csv"
    path.write_text(f"{mark.join(row)}\n" * 2, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        find_sources(str(path), DataArguments())
    advice = "put the columns' names above it, separated as it is; else say which is which, as in --columns"
    assert f"the columns {', '.join(row)}: if that line is a row, {advice}" in str(caught.value)
    path.write_text(f"instruction{mark}output\n{mark.join(row)}\n", encoding="utf-8")
    assert learn(path)[0] == ends(row[1])
    with pytest.raises(
        UserError, match="columns Frage\\?, Antwort.: say which is which, as in --columns instr"
    ):
        learn([{"Frage?": "Wer ist da?", "Antwort.": "Ich."}])


GUESSED = [
    ({"answer": "A.", "frage": "Q?"}, "instruction=frage,output=answer"),
    ({"id": "x", "source": "y", "frage": "Q?", "zahl": 3}, "instruction=frage,output=zahl"),
    ({"n": 3, "query": "Q?", "antwort": "A."}, "instruction=query,output=antwort"),
    ({"dialog": [{"id": 7, "text": "Hi there", "speaker": "bot"}], "x": "y"}, "messages=dialog,role=speaker,content=text"),
    ({"tools": [{"name": "f", "parameters": {}}], "frage": "Q?", "antwort": "A."}, "instruction=frage,output=antwort"),
    ({"x": [3]}, "instruction=COLUMN,output=COLUMN"),
]  # fmt: skip


@pytest.mark.parametrize("row, guess", GUESSED, ids=[guess for _, guess in GUESSED])
def test_columns_of_no_format_are_answered_with_the_flag_filled_in(learn, row, guess):
    with pytest.raises(UserError, match=f"as in --columns {guess} \\("):
        learn([{name: None for name in row}, row])


@pytest.mark.parametrize("count", [1, 2])
def test_texts_without_a_template_and_tokens_are_refused_by_name(learn, count):
    rows = [{"segments": [{"label": False, "text": "<s>Q?"}, {"label": True, "text": "A.</s>"}]}] * count
    with pytest.raises(
        UserError, match="column 'segments' holds axolotl's texts without a template.*as messages"
    ):
        learn(rows)
    with pytest.raises(UserError, match="column 'input_ids' holds tokens of some tokenizer"):
        learn([{"input_ids": [1, 2], "labels": [-100, 2]}] * count)


CONTEXT = [
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "earlier"},
    {"from": "human", "value": "Q"},
]
PREFERENCES = [
    {"conversations": CONTEXT, "chosen": {"from": "gpt", "value": "Good."}, "rejected": {"from": "gpt", "value": "Bad."}},
    {"prompt": "Q?", "chosen": "Good.", "rejected": "Bad."},
    {"instruction": "Q?", "input": "more", "chosen": "Good.", "rejected": "Bad."},
    {
        "prompt": "Q?",
        "chosen": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Bad."}],
    },
    {"prompt": [{"role": "user", "content": "Q?"}], "chosen": [{"role": "assistant", "content": "Good."}]},
]  # fmt: skip


PREFERENCES.append(
    {"query": "Q?", "history": [["q", "earlier"]], "chosen": "Good.", "rejected": "Bad."},
)
PREFERENCES.append(
    {"prompt": "\n\nHuman: q\n\nAssistant: earlier\n\nHuman: Q?\n\nAssistant:", "chosen": "Good."},
)


@pytest.mark.parametrize(
    "row", PREFERENCES, ids=["conversations", "texts", "alpaca", "messages", "trl", "history", "hh prompt"]
)
def test_of_a_preference_the_chosen_answer_alone_is_trained(learn, row):
    learned, printed = learn([row])
    assert learned == ends("Good.")
    assert (
        "format preference" in printed and "the chosen answers are trained, the rejected left out" in printed
    )


def test_undesirable_rows_of_a_kto_file_are_left_out_and_no_loss(learn):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(6)]
    rows += [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
            "label": False,
        }
    ]
    learned, printed = learn(rows[:6])
    assert learned == ends("a0", "a2", "a4")
    assert "3 left out, row 2 first: not to be learned: column 'label' is false" in printed
    assert learn.report["red"] == []
    with pytest.raises(UserError, match="not to be learned: column 'label' is false"):
        read_row(rows[6], "messages")


def test_answer_of_no_weight_is_context_and_no_label(learn):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for mark in ({"weight": 0}, {"train": False}, {"loss": False}):
        assert learn([{"messages": [messages[0], messages[1] | mark, *messages[2:]]}])[0] == ends("a2")
        assert learn([{"messages": [*messages[:3], messages[3] | mark]}])[0] == ends("a1")
    kept = [messages[0], messages[1] | {"weight": 1}, messages[2], messages[3] | {"train": True}]
    assert learn([{"messages": kept}])[0] == ends("a1", "a2")
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
    said += [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert learn([{"conversations": said}])[0] == ends("A")


def test_answer_of_no_weight_is_no_label_with_its_source_either(learn):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (whole,) = learn([{"messages": messages}], train_on_source=True)[0]
    assert all(text in whole for _, text in turns)
    marked = [messages[0], messages[1] | {"weight": 0}, *messages[2:]]
    spans = learn([{"messages": marked}], train_on_source=True)[0]
    before, after = whole.split("a1<|im_end|>")
    assert spans == [before, after]
    pair = {"messages": messages[:3], "chosen": "a2", "rejected": "x"}  # what both share is context
    assert learn([pair], train_on_source=True)[0] == spans
    greeted = [{"role": "assistant", "content": "a1", "train": False}, *messages[2:]]
    assert learn([{"messages": greeted}], train_on_source=True)[0] == ends("a2")


def test_prompt_that_hides_an_answer_of_no_weight_is_no_label(learn, smol_tokenizer):
    """A template that rewrites earlier answers gives each answer a row, whose prompt holds those before it."""
    smol_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ 'once ' if m.role == 'assistant' and not loop.last }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), ("user", "q3"), ("assistant", "a3")]  # fmt: skip
    messages = [{"role": role, "content": text} for role, text in turns]
    learned = learn([{"messages": messages}], train_on_source=True)[0]
    assert ["once a1" in text for text in learned] == [False, True, True]
    messages[3] |= {"loss": False}
    first, last = learn([{"messages": messages}], train_on_source=True)[0]
    assert first.endswith("q1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>") and last == "a3<|im_end|>"


MEDIA = [
    ({"instruction": "What is it?", "output": "A cat.", "images": ["cat.png"]}, "column 'images' names media"),
    ({"question": "What?", "answer": "A cat.", "image": "cat.png"}, "column 'image' names media"),
    (
        {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]},
        "the text stands around a <image>",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "A cat."},
            ]
        },
        "a part of type 'image_url': only text is trained",
    ),
]  # fmt: skip


@pytest.mark.parametrize("row, reason", MEDIA, ids=["images", "image", "tag", "part"])
def test_row_with_media_is_refused_and_counted_as_lost(learn, row, reason):
    with pytest.raises(UserError, match=reason):
        read_row(row, find_format(row))
    good = {name: None if name.startswith("image") else value for name, value in row.items()}
    if "messages" in row:
        turns = [("user", "Q?"), ("assistant", "A cat.")]
        good = {"messages": [{"role": role, "content": text} for role, text in turns]}
    learned, printed = learn([good, good, row])
    assert (
        learned == ends("A cat.", "A cat.") and "1 left out, row 3 first: " in printed and reason in printed
    )
    assert "1 of 3 rows are lost" in learn.report["red"]


BESIDE = [
    ({"instruction": "Sum up.", "input": "A long text.", "response": "Short."}, ["user: Sum up.\n\nA long text."]),
    ({"instruction": "Q?", "response": "A.", "system": "Be kind."}, ["system: Be kind.", "user: Q?"]),
    ({"prompt": "Q?", "completion": "A.", "system": "Be kind."}, ["system: Be kind.", "user: Q?"]),
    ({"input": "Q?", "output": "A.", "history": [["q", "a"]]}, ["user: q", "assistant: a", "user: Q?"]),
    ({"system_prompt": "Be kind.", "question": "Q?", "response": "A."}, ["system: Be kind.", "user: Q?"]),
    ({"instruction": "Q?", "history": [["q", "a"]], "chosen": "A."}, ["user: q", "assistant: a", "user: Q?"]),
    ({"system": "Be kind.", "input": "Q?", "chosen": "A.", "rejected": "B."}, ["system: Be kind.", "user: Q?"]),
    (
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Q?"}], "chosen": "A."},
        ["system: Be kind.", "user: Q?"],
    ),
    (
        {"system": "No.", "conversations": [
            {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."},
        ]},
        ["system: Be kind.", "user: Q?"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "row, before", BESIDE, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_what_stands_beside_a_question_is_read_in_every_layout(row, before):
    *context, answer = read_row(row, find_format(row)).messages
    assert [f"{message['role']}: {message['content']}" for message in context] == before
    assert answer == {"role": "assistant", "content": "Short." if "Short." in row.values() else "A."}


def test_answers_marked_by_any_trainer_are_context(learn):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for mark in ({"loss_weight": 0.0}, {"training": False}, {"loss": 0}):
        assert learn([{"messages": [messages[0], messages[1] | mark, *messages[2:]]}])[0] == ends("a2")
    weighted = [message | {"loss_weight": float(message["role"] == "assistant")} for message in messages]
    assert learn([{"messages": weighted}])[0] == ends("a1", "a2")


def test_parts_with_reasoning_and_calls_are_trained(learn):
    def part(kind, value):
        return {"type": kind, "value": value if isinstance(value, str) else json.dumps(value)}

    calls = [CALL, CALL | {"arguments": {"city": "Oslo"}}]
    messages = [
        {"role": "user", "content": [part("text", "Weather in Lima and Oslo?")]},
        {"role": "assistant", "content": [part("reasoning", "Two."), *(part("tool_call", call) for call in calls)]},
        {"role": "tool", "content": [part("text", "sunny, rain")]},
        {"role": "assistant", "content": [part("reasoning", "Done."), part("text", "Sun and rain.")]},
    ]  # fmt: skip
    both = f"{CALL_TEXT}\n{CALL_TEXT.replace('Lima', 'Oslo')}"
    answers = [f"<think>\nTwo.\n</think>\n\n\n{both}", "<think>\nDone.\n</think>\n\nSun and rain."]
    learned, _ = learn([{"messages": messages, "tools": json.dumps([TOOL])}])
    assert learned == ends(*answers)


def test_calls_with_turns_of_their_own_are_one_answer(learn):
    """ms-swift gives each of several calls, and the text before them, a turn."""
    turns = [("user", "Lima and Oslo?"), ("assistant", "I look."), ("tool_call", json.dumps(CALL))]
    turns += [("tool_call", json.dumps(CALL)), ("tool_response", "sunny"), ("assistant", "Sunny.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "tools": [TOOL]}
    assert learn([row])[0] == ends(f"I look.\n{CALL_TEXT}\n{CALL_TEXT}", "Sunny.")


MORE_PREFERENCES = [
    {"chosen_messages": [("user", "Q?"), ("assistant", "Good.")], "rejected_messages": [("user", "Q?"), ("assistant", "Bad.")]},
    {"messages": [("user", "q"), ("assistant", "earlier"), ("user", "Q?"), ("assistant", "Good.")], "rejected_response": "Bad."},
    {"query": "Q?", "response": "Good.", "rejected_response": "Bad."},
]  # fmt: skip


@pytest.mark.parametrize("row", MORE_PREFERENCES, ids="-".join)
def test_preferences_of_llama_factory_v1_and_ms_swift(learn, row):
    spelled = {
        name: [{"role": role, "content": text} for role, text in value] if isinstance(value, list) else value
        for name, value in row.items()
    }
    learned, printed = learn([spelled])
    assert learned == ends("Good.")
    assert "the chosen answers are trained, the rejected left out" in printed


def test_undesirable_rows_of_a_table_are_left_out(learn, tmp_path):
    path = tmp_path / "kto.csv"
    path.write_text("prompt,completion,label\nq1,a1,True\nq2,a2,False\n")
    assert learn(path)[0] == ends("a1")


@pytest.mark.parametrize("good, bad", [(1, 0), (1.0, 0.0), ("1", "0"), ("TRUE", "False"), (True, False)])
def test_mark_of_kto_may_be_a_number(learn, good, bad):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": good if i % 2 else bad} for i in range(4)]
    learned, printed = learn(rows)
    assert learned == ends("a1", "a3")
    assert f"2 left out, row 1 first: not to be learned: column 'label' is {str(bad).lower()}" in printed
    with pytest.raises(UserError, match="not to be learned: column 'kto_tag'"):
        read_row({"instruction": "q", "output": "a", "kto_tag": bad}, "alpaca")


def test_ranked_answers_are_a_preference(learn):
    learned, printed = learn([{"instruction": "Q?", "input": "", "output": ["Good.", "Bad."]}])
    assert learned == ends("Good.") and "format preference" in printed
    row = {"instruction": "Q?", "output": ["Good.", "Bad."], "history": [["q", "a"]], "system": "s"}
    chat = read_row(row, "alpaca")  # whatever format is forced
    assert [message["content"] for message in chat.messages] == ["s", "q", "a", "Q?", "Good."]
    assert learn([row])[0] == ends("Good.")


def test_context_of_a_preference_is_whole():
    for row in PREFERENCES[-2:]:
        said = [message["content"] for message in read_row(row, "preference").messages]
        assert said == ["q", "earlier", "Q?", "Good."]
    pair = PREFERENCES[0]
    assert read_row(pair, "sharegpt") == read_row(pair, "preference")  # whatever format is forced


def test_lists_of_messages_as_prompt_and_completion_are_read(learn):
    row = {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert learn([row])[0] == ends("a")
    with pytest.raises(UserError, match="not to be learned"):
        read_row(row | {"label": False}, "self-instruct")


def test_label_is_a_mark_of_kto_only_beside_a_completion(learn):
    assert learn([{"instruction": "Is it spam?", "output": "No.", "label": False}])[0] == ends("No.")
    with pytest.raises(UserError, match="'label' is false"):  # as a table has it
        read_row({"prompt": "q", "completion": "a", "label": "False"}, "self-instruct")
    with pytest.raises(UserError, match="'kto_tag' is false"):
        read_row({"instruction": "q", "output": "a", "kto_tag": False}, "alpaca")


@pytest.mark.parametrize(
    "text",
    [
        "How do I centre the <video> tag?",
        "<video>\n  <source>\n</video>\nWhat is wrong here?",
        "```html\n<image>\n```\nWhat is wrong here?",
        "`<image>` is no tag of HTML.",
    ],
)
def test_text_about_tags_is_trained(learn, text):
    assert learn([{"instruction": text, "output": "A."}])[0] == ends("A.")


@pytest.mark.parametrize(
    "text", ["<image>\nWhat is it?", "What is it?<image>", "<|image_pad|>What?", "<img>cat.png</img>What?"]
)
def test_tags_that_stand_for_files_are_refused(text):
    with pytest.raises(UserError, match="the text stands around a <"):
        read_row({"instruction": text, "output": "A cat."}, "alpaca")
    turns = [
        {"role": "user", "content": "What?", "images": ["cat.png"]},
        {"role": "assistant", "content": "A."},
    ]
    with pytest.raises(UserError, match="a turn names media"):
        read_row({"messages": turns}, "messages")


@pytest.mark.parametrize("empty", [None, [], {"bytes": None, "path": None}, 3, float("nan"), ""])
def test_media_columns_that_hold_nothing_do_no_harm(empty):
    assert read_row({"instruction": "Q?", "output": "A.", "image": empty}, "alpaca").messages


def test_weight_between_is_refused_and_a_tail_of_context_is_left_out(learn, smol_tokenizer):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    with pytest.raises(UserError, match="weight 0.5: an answer is learned"):
        read_row({"messages": [messages[0], messages[1] | {"weight": 0.5}]}, "messages")
    with pytest.raises(UserError, match="no answer to train on: all are marked as context"):
        read_row({"messages": [messages[0], messages[1] | {"train": False}]}, "messages")
    marked = {"messages": [*messages[:3], messages[3] | {"train": False}]}
    assert learn([marked], train_last_turn_only=True)[0] == ends("a1")
    assert find_answered([read_row(marked, "messages")]) == []
