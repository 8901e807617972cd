"""Every format's real shape becomes the right messages; whatever else comes is refused with a reason."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.arguments import DataArguments
from utils.console import UserError
from utils.data.formats import ALIASES, FORMATS, find_format, read_row, sniff_format
from utils.data.named_sets import NAMED_SETS

PAGE = (
    '<div class="markdown prose"><p>Use <code>print</code> &amp; run:</p><pre><div><span>python</span>'
    '<button>Copy code</button></div><code class="language-python">if 1 &lt; 2:\n    print("&lt;p&gt;")\n</code>'
    "</pre><ol><li>one</li><li><strong>two</strong></li></ol></div>"
)
MARKDOWN = 'Use `print` & run:\n\n```python\nif 1 < 2:\n    print("<p>")\n```\n\n1. one\n2. **two**'
# format -> (row as its publisher has it, the turns it means: u user, a assistant, s system, t tool, x text)
GOLDEN = {
    "alpaca": (
        {
            "instruction": "翻译成英文。",
            "input": "你好 🎉",
            "output": "Hello 🎉",
            "history": [["你是谁？", "我是 Guanaco。"]],
            "system": "简短回答。",
        },
        [
            "s:简短回答。",
            "u:你是谁？",
            "a:我是 Guanaco。",
            "u:翻译成英文。\n\n你好 🎉",
            "a:Hello 🎉",
        ],
    ),
    "belle": (
        {
            "instruction": "Human:你好\nAssistant:你好！\nHuman：再见 👋\nAssistant:",
            "input": "",
            "output": "下次见。",
        },
        ["u:你好", "a:你好！", "u:再见 👋", "a:下次见。"],
    ),
    "chip2": (
        {
            "text": "<human>: Name a fruit 🍎\nin one word.\n<bot>: Apple.\n<human>: 再来一个\n<bot>: 梨",
            "metadata": "",
        },
        ["u:Name a fruit 🍎\nin one word.", "a:Apple.", "u:再来一个", "a:梨"],
    ),
    "dolly": (
        {
            "instruction": "When?",
            "context": "It began in 2000.",
            "response": "2000 年。",
            "category": "closed_qa",
        },
        ["u:When?\n\nIt began in 2000.", "a:2000 年。"],
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: 天气？\n\nAssistant: ☀️",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
        },
        ["u:Hi", "a:Hello!", "u:天气？", "a:☀️"],
    ),
    "input-output": ({"input": "问", "output": "答", "source": "wiki", "subset": "x"}, ["u:问", "a:答"]),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "Use tools."},
                {"role": "user", "content": [{"type": "text", "text": "天气？"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
                },
                {"role": "tool", "name": "f", "content": "21"},
                {"role": "assistant", "content": "21 °C 🌤"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        ["s:Use tools.", "u:天气？", "a:", "t:21", "a:21 °C 🌤"],
    ),
    "oasst1": (
        {"text": "### Human: ¿Qué?### Assistant: Nada.\n### Human: 好### Assistant: 嗯 🙂"},
        ["u:¿Qué?", "a:Nada.", "u:好", "a:嗯 🙂"],
    ),
    "preference": (
        {
            "conversations": [{"from": "human", "value": "天气？"}],
            "chosen": {"from": "gpt", "value": "☀️"},
            "rejected": {"from": "gpt", "value": "不知道"},
        },
        ["u:天气？", "a:☀️"],
    ),
    "question-answer": (
        {"问题": "再见用英语怎么说？", "回答": "Goodbye 👋", "来源": "x"},
        ["u:再见用英语怎么说？", "a:Goodbye 👋"],
    ),
    "seed-task": (
        {"id": "s1", "instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}]},
        ["u:Add.\n\n1 + 1", "a:2"],
    ),
    "self-instruct": ({"prompt": "Say hi.", "completion": "hi 你好"}, ["u:Say hi.", "a:hi 你好"]),
    "sharegpt": (
        {
            "id": "x_0",
            "conversations": [
                {"from": "human", "value": "怎么做？"},
                {"from": "gpt", "value": PAGE},
                {"from": "human", "value": "谢谢 🙏"},
                {"from": "gpt", "value": "不客气"},
            ],
        },
        ["u:怎么做？", f"a:{MARKDOWN}", "u:谢谢 🙏", "a:不客气"],
    ),
    "text": ({"text": "只是文字 📖"}, ["x:只是文字 📖"]),
}
LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t", "text": "x"}


def list_turns(chat):
    return [f"{LETTERS[message['role']]}:{message['content']}" for message in chat.messages]


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
    "no content": ({"messages": [{"role": "user"}]}, "messages", "a user turn holds 'None'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_refused_with_its_reason(case):
    row, dataset_format, reason = BAD[case]
    with pytest.raises(UserError, match=reason):
        read_row(row, dataset_format)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(st.characters(), max_size=30)
    | st.sampled_from(["\ud800", "### Human: a### Assistant: b", "<human>: a\n<bot>: b", "human", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "messages conversations role content from value instruction input output text".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
COLUMNS = (
    "messages conversations chosen instruction input output response context prompt completion text history "
    "system tools conversation instances question answer label images rejected"
)


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
