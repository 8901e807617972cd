"""Chats with tools: trained where the template shows them, left out with a reason where it does not."""

import pyarrow
import pytest
from datasets import Dataset
from helpers.chats import TWO_TURNS, assert_prompts_agree, encode_chat, encode_row, read_labels, train_rows
from helpers.rows import load, write_rows
from pyarrow import parquet

from utils.arguments import DataArguments
from utils.data import tokenizing
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.answer_spans import find_stop_tokens, read_template, split_chat, template_names
from utils.prompts.messages import TRAIN, Chat
from utils.prompts.rendering import convert_arguments, render_chat

pytestmark = pytest.mark.usefixtures("own_cache")

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "巴黎"}}}]
CALLED = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
# Tools, calls and results as the Qwen models and most that follow them show them.
HERMES_LIKE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Nothing closes an answer: the user's token follows words, the tool's a call.
GLM_LIKE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    "{{ {'user': '<reponame>', 'tool': '<gh_stars>', 'assistant': '<filename>'}[m.role] + '\n' + m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}</call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<filename>{% endif %}"
)
NO_TOOLS = "the chat template leaves out"


def as_json(chat):
    """The same chat with its arguments as JSON, as OpenAI's files have them."""
    return [convert_arguments(message, str) for message in chat]


@pytest.mark.parametrize("chat", [CALLED, as_json(CALLED)], ids=["objects", "JSON"])
def test_calls_are_trained_as_the_template_shows_them(smol_tokenizer, tmp_path, chat):
    smol_tokenizer.chat_template = HERMES_LIKE
    (row,), counts = train_rows(smol_tokenizer, tmp_path, [{"messages": chat, "tools": [TOOL]}])
    call = '<call>weather {"city": "巴黎"}</call><|im_end|>'
    assert read_labels(smol_tokenizer, row) == f"{call}It is sunny.<|im_end|>" and counts == {}
    whole = smol_tokenizer.apply_chat_template(CALLED, tools=[TOOL], tokenize=False)
    assert whole.startswith(smol_tokenizer.decode(row["input_ids"]))


def test_template_that_adds_arguments_to_a_text_gets_them_as_json(smol_tokenizer):
    smol_tokenizer.chat_template = HERMES_LIKE.replace(
        "{{ call.function.name }} {{ call.function.arguments | tojson }}",
        "{{ call.function.name + ' ' + call.function.arguments }}",
    )
    for chat in (CALLED, as_json(CALLED)):
        assert '<call>weather {"city": "巴黎"}</call>' in render_chat(smol_tokenizer, chat)


ODD_CALLS = ["look", [1], [None], {"name": "look"}, [{"function": "look"}], [{"function": {"name": 7}}], [[]]]


@pytest.mark.parametrize("template", ["hermes", "glm", "chatml", "alpaca"])
def test_calls_of_another_kind_leave_the_row_out_with_a_reason(smol_tokenizer, tmp_path, template):
    layouts = {"hermes": HERMES_LIKE, "glm": GLM_LIKE}
    smol_tokenizer.chat_template = layouts.get(template) or read_template(template)
    rows = [{"messages": [CALLED[0], CALLED[1] | {"tool_calls": calls}]} for calls in ODD_CALLS]
    kept, counts = train_rows(smol_tokenizer, tmp_path, rows)
    assert len(kept) + sum(counts.values()) == len(rows)
    assert all(reason.startswith("dropped: the chat template") for reason in counts)
    assert all("7" in read_labels(smol_tokenizer, row) for row in kept)  # a number is a name to some


def test_call_ends_with_the_token_that_opens_its_result(smol_tokenizer):
    smol_tokenizer.chat_template = GLM_LIKE
    stop_ids, rows = encode_chat(smol_tokenizer, [*CALLED, *TWO_TURNS])
    stops = smol_tokenizer.convert_ids_to_tokens(stop_ids)
    assert stops[0] == "<reponame>" and "<gh_stars>" in stops  # a reply stops at either
    (row,) = rows
    labelled = read_labels(smol_tokenizer, {"labels": row[1]})
    call, words = "<call>weather city=巴黎</call>", ["It is sunny.", "a1", "a2"]
    answers = [f"\n{call}<gh_stars>", *(f"\n{text}<reponame>" for text in words)]
    assert labelled == "".join(answers)
    assert_prompts_agree(smol_tokenizer, [*CALLED, *TWO_TURNS], stop_ids, rows)
    (alone,) = split_chat(smol_tokenizer, Chat(CALLED[:2]), stops)  # a call that no result follows
    assert read_labels(smol_tokenizer, encode_row(smol_tokenizer, alone)) == answers[0]


def test_no_template_loses_tools_in_silence(smol_tokenizer, tmp_path):
    """Of each kind of chat with tools every row is left out with its reason, by every template without them."""
    rows = [
        {"messages": [CALLED[0], CALLED[3]], "tools": [TOOL]},
        {"messages": CALLED[:2]},
        {"messages": TWO_TURNS},
    ]
    for name in (None, *sorted(set(template_names()) - {"chatml"})):
        if name:
            smol_tokenizer.chat_template = read_template(name)
        kept, counts = train_rows(smol_tokenizer, tmp_path, rows)
        assert {read_labels(smol_tokenizer, row).split("<|im_end|>")[0].strip() for row in kept} <= {
            "a1",
            "a2",
        }
        reasons = [reason for reason in counts if reason.startswith(f"dropped: {NO_TOOLS}")]
        assert [reason.split(" (")[0] for reason in reasons] == [
            f"dropped: {NO_TOOLS} the tools",
            f"dropped: {NO_TOOLS} tool calls",
        ]


QWEN_TOOLS = (
    "<|im_start|>system\nBe kind.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "巴黎"}}\n</tool_call>'


@pytest.mark.parametrize("said", ["", "Let me look."])
def test_chatml_shows_tools_as_the_qwen_models_do(smol_tokenizer, tmp_path, said):
    smol_tokenizer.chat_template = read_template("chatml")
    calling = CALLED[1] | {"content": said, "tool_calls": CALLS * 2}
    chat = [{"role": "system", "content": "Be kind."}, CALLED[0], calling, CALLED[2], CALLED[2], CALLED[3]]
    answer = f"{said}\n{QWEN_CALL}\n{QWEN_CALL}".strip() + "<|im_end|>"
    result = "\n<tool_response>\nsunny\n</tool_response>"
    expected = (
        f"{QWEN_TOOLS}<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\n{answer}\n"
        f"<|im_start|>user{result * 2}<|im_end|>\n<|im_start|>assistant\nIt is sunny.<|im_end|>"
    )
    (row,), counts = train_rows(smol_tokenizer, tmp_path, [{"messages": chat, "tools": [TOOL]}])
    assert smol_tokenizer.decode(row["input_ids"]) == expected and counts == {}
    assert read_labels(smol_tokenizer, row) == f"{answer}It is sunny.<|im_end|>"


def test_results_that_the_template_does_not_show_leave_the_row_out(smol_tokenizer, tmp_path):
    smol_tokenizer.chat_template = HERMES_LIKE.replace(
        "{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
    )
    kept, counts = train_rows(smol_tokenizer, tmp_path, [{"messages": CALLED}])
    assert kept == [] and "results of tools" in next(iter(counts))


def test_call_behind_an_opened_thought_is_left_out_and_not_trained_empty(smol_tokenizer, tmp_path):
    smol_tokenizer.chat_template = HERMES_LIKE.removesuffix("{% endif %}") + "<think>\n{% endif %}"
    kept, counts = train_rows(smol_tokenizer, tmp_path, [{"messages": CALLED}])
    assert kept == [] and "opens a thought" in next(iter(counts))


def test_stop_token_inside_an_answer_is_a_finding(smol_tokenizer, tmp_path):
    answers = ["plain", "one<|im_end|>two", "at its end<|im_end|>\n"]
    rows = [{"instruction": f"q{i}", "output": answer} for i, answer in enumerate(answers)]
    kept, counts = train_rows(smol_tokenizer, tmp_path, rows)
    assert counts == {tokenizing.STOP_INSIDE: 1}
    trained = [read_labels(smol_tokenizer, row) for row in kept]
    assert trained == ["plain<|im_end|>", "one<|im_end|>", "at its end<|im_end|>"]


def test_stop_tokens_of_a_template_that_closes_its_calls_are_no_others(smol_tokenizer):
    for template in (smol_tokenizer.chat_template, HERMES_LIKE, read_template("alpaca")):
        smol_tokenizer.chat_template = template
        assert smol_tokenizer.convert_ids_to_tokens(find_stop_tokens(smol_tokenizer, [])) == ["<|im_end|>"]


def test_reasons_that_name_each_row_are_counted_together(smol_tokenizer):
    smol_tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].content) }}"
    tokenizer = ChatTokenizer(smol_tokenizer, [smol_tokenizer.eos_token_id])
    encoder = tokenizing.ChatEncoder(tokenizer, DataArguments())
    chats = [Chat([{"role": "user", "content": f"q{number}"}, CALLED[3]]) for number in range(100)]
    numbered = [(TRAIN, 0, number, chat) for number, chat in enumerate(chats, 1)]
    assert list(encoder.encode(numbered)) == []
    counts = encoder.counts[TRAIN].counts
    assert "dropped: the chat template refuses these messages: no q0" in counts
    assert len(counts) < 40 and sum(counts.values()) == 100 and counts[tokenizing.REFUSED] == 70


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("writer", ["pyarrow", "datasets"])
def test_table_gives_no_call_the_arguments_of_another_row(tmp_path, writer):
    """A table's objects have the keys of all its rows: those that a row did not have are nulls there."""
    rows = []
    for name, arguments in (("add", {"a": 3, "b": 4}), ("weather", {"city": "Rome"})):
        tool = {
            "name": name,
            "parameters": {"type": "object", "properties": dict.fromkeys(arguments, {"x": "y"})},
        }
        messages = [{"role": "user", "content": f"{name}?"}]
        messages += [{"role": "assistant", "content": "", "tool_calls": [call(name, **arguments)]}]
        messages += [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "It is 7."}]
        rows.append({"messages": messages, "tools": [{"type": "function", "function": tool}]})
    if writer == "pyarrow":
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    else:
        written = write_rows(tmp_path / "written.jsonl", rows)
        table = Dataset.from_json(str(written), cache_dir=str(tmp_path / "cache"))
        table.to_parquet(tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", rows)
    found, expected = (
        [(chat.messages, chat.tools) for *_, chat in load(tmp_path / f"rows.{kind}").read("\n\n")]
        for kind in ("parquet", "jsonl")
    )
    for (messages, tools), (own_messages, own_tools) in zip(found, expected, strict=True):
        assert [message.get("tool_calls") or None for message in messages] == [
            message.get("tool_calls") for message in own_messages
        ]
        assert tools == own_tools
