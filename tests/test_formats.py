"""Every format's real shape becomes the right messages; whatever else comes is refused with a reason."""

import json
import re

import pytest
from helpers import ROOT
from helpers.formats import COLUMNS, GOLDEN, JUNK, LETTERS, list_turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.arguments import DataArguments
from utils.console import UserError
from utils.data.formats import ALIASES, FORMATS, find_format, read_row, sniff_format
from utils.data.named_sets import NAMED_SETS


def test_every_format_has_a_golden_row_and_a_flag_value():
    choices = [action for action in _list_format_choices()]
    assert set(GOLDEN) == set(FORMATS) and sorted(choices) == sorted([*FORMATS, *ALIASES])
    assert all(known.dataset_format in choices for known in NAMED_SETS.values())


def _list_format_choices():
    from utils.flags.strict_parser import StrictParser

    (action,) = (
        action for action in StrictParser([DataArguments], "")._actions if action.dest == "dataset_format"
    )
    return action.choices


@pytest.mark.parametrize("name", GOLDEN)
def test_row_of_each_format_is_recognised_and_read(name):
    row, turns = GOLDEN[name]
    assert find_format(row) == name
    assert list_turns(read_row(row, name)) == turns


def test_rows_of_the_readme_are_of_the_format_beside_them_and_trained():
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w-]+)` \| `(\{.+?\})` \| .+ \|$", page, re.MULTILINE)
    assert {name for name, _ in table} == set(FORMATS) and len(table) > 25
    for name, row in table:
        row = json.loads(row.replace("\\|", "|"))
        *_, answer = read_row(row, name).messages
        assert find_format(row) == name and answer["role"] in ("assistant", "text")


def test_tools_may_be_json_as_tables_store_them():
    turns = [{"role": "user", "content": "天气？"}, {"role": "assistant", "content": "21 °C"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read_row({"messages": turns, "tools": json.dumps(tools)}, "messages").tools == tools
    assert read_row({"messages": turns, "tools": "[]"}, "messages").tools is None
    for bad, says in (("[{", "no JSON"), ('{"a": 1}', "a list of objects"), (["f"], "a list of objects")):
        with pytest.raises(UserError, match=says):
            read_row({"messages": turns, "tools": bad}, "messages")


def test_tools_and_tool_calls_reach_the_template():
    chat = read_row(GOLDEN["messages"][0], "messages")
    assert chat.tools[0]["function"]["name"] == "f" and chat.messages[2]["tool_calls"]


def test_role_and_content_inside_conversations_are_read():
    row = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert list_turns(read_row(row, "sharegpt")) == ["u:q", "a:a"]


def test_most_common_format_of_the_first_rows_wins():
    assert sniff_format([{"x": 1}, GOLDEN["dolly"][0], GOLDEN["dolly"][0], GOLDEN["alpaca"][0]]) == "dolly"
    assert sniff_format([{"x": 1}, 3, None]) is None


def test_sharegpt_cleaning_is_done_and_named():
    turns = [
        ("gpt", "Welcome"),
        ("human", "q"),
        ("gpt", "a"),
        ("gpt", " "),
        ("human", "x"),
        ("human", "y"),
        ("gpt", "z"),
    ]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    chat = read_row(row, "sharegpt")
    assert list_turns(chat) == ["a:Welcome", "u:q", "a:a", "u:x"]
    assert chat.cleaned == ("empty turns taken out", "roles out of order, the rest cut")
    turns = [{"from": who, "value": who} for who in ("human", "gpt", "human")]
    assert read_row({"conversations": turns}, "sharegpt").cleaned == (
        "a last turn that has no answer left out",
    )
    assert read_row(GOLDEN["sharegpt"][0], "sharegpt").cleaned == (
        "HTML turned into Markdown",
        "labels and buttons of HTML code blocks taken out",
    )


BAD = {
    "null answer": ({"instruction": "q", "output": None}, "alpaca", "'output' holds 'None'"),
    "empty answer": ({"instruction": "q", "output": "  "}, "alpaca", "'output' is empty"),
    "list": ({"prompt": [3], "completion": "x"}, "self-instruct", r"'prompt' holds '\[3\]'"),
    "no pair": ({"a": "q", "b": "x"}, "question-answer", "no column of a, b is known as a question"),
    "nothing chosen": ({"prompt": "q"}, "preference", "a turn is 'None': an object"),
    "chosen of nothing": ({"chosen": "a"}, "preference", "'chosen' answers nothing"),
    "history": ({"instruction": "q", "output": "a", "history": ["x"]}, "alpaca", "'history'"),
    "no turns": ({"conversations": []}, "sharegpt", "list of turns"),
    "unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "messages",
        "spoken by 'narrator'",
    ),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "messages", "no answer"),
    "lone surrogate": ({"instruction": "q\ud800", "output": "a"}, "alpaca", "surrogate"),
    "no object": ("text", "alpaca", "an object with columns"),
    "no speaker": ({"text": "hello"}, "oasst1", "no speaker begins"),
    "no content": ({"messages": [{"role": "user"}]}, "messages", "the turn of user holds 'None'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_refused_with_its_reason(case):
    row, dataset_format, reason = BAD[case]
    with pytest.raises(UserError, match=reason):
        read_row(row, dataset_format)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(row=st.dictionaries(st.sampled_from(COLUMNS.split()), JUNK, max_size=6) | JUNK)
def test_no_row_whatever_it_holds_breaks_a_format(row):
    for name in [*FORMATS, find_format(row)]:
        if name is None:
            continue
        try:
            chat = read_row(row, name)
        except UserError as error:
            assert "\n" not in str(error).replace("\\n", "")[:1] and str(error)
        else:
            assert all(
                isinstance(message["content"], str) and message["role"] in LETTERS
                for message in chat.messages
            )
            assert any(message["role"] in ("assistant", "text") for message in chat.messages)
