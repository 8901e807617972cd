"""A row of each format as its publisher has it, the turns it means, and rows that mean nothing."""

from hypothesis import strategies as st

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
