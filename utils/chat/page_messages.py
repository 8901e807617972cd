"""The conversation, which the browser keeps: checked, cut to what the model reads, shown.

A message is {"role", "content"}, a reply also {"side": "tuned" or "base"} where there is an adapter.
Questions and replies alternate.
"""

import html
import math
import re
from bisect import bisect_left
from itertools import accumulate, takewhile
from typing import Any

from utils.chat.generation import ChatModel
from utils.chat.page_arguments import PageArguments
from utils.console import UserError
from utils.decode.reply import Reply
from utils.prompts.messages import Messages, find_half_character
from utils.prompts.rendering import OPEN, split_tags

CODE = re.compile(  # page.js has it too
    r"(^ {0,3}```[^`\n]*$.*?(?:^ {0,3}```|\Z)|(?<![\\`])`[^`\n]+`(?!`))", re.DOTALL | re.MULTILINE
)
DOLLARS = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\d$])")  # pandoc's rule: $5 is a price
LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
CHARACTERS_PER_TOKEN = 16  # a text longer than this allows is refused without being tokenized
SIDES = ("tuned", "base")


def read_text(value: Any, words: dict[str, str]) -> str:
    """`value` without the blanks around it. Raises UserError where no tokenizer could read it."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(words["no text"])
    check_characters(value, words)
    return value.strip()


def check_characters(text: str, words: dict[str, str]) -> None:
    if find_half_character(text):
        raise UserError(words["half a character"])


def read_numbers(values: list[Any], words: dict[str, str]) -> list[float]:
    """Raises UserError for a setting that is emptied, say."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(words["no number"])
    return values


def read_messages(said: Any, words: dict[str, str]) -> Messages:
    """The conversation as a browser sends it. Raises UserError for what no page of ours has written."""
    broken = UserError(words["no conversation"])
    if not isinstance(said, list) or len(said) % 2:
        raise broken
    messages = []
    for i, message in enumerate(said):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, dict) or message.get("role") != role:
            raise broken
        if not isinstance(message.get("content"), str):
            raise broken
        check_characters(message["content"], words)
        side = {"side": message["side"]} if message.get("side") in SIDES else {}
        if message.get("side") == "both" and isinstance(message.get("base"), str):
            check_characters(message["base"], words)
            side = {"side": "both", "base": message["base"]}
        messages.append({"role": role, "content": message["content"], **side})
    return messages


def fit_turns(
    chat: ChatModel,
    opening: Messages,
    turns: Messages,
    max_new_tokens: int,
    page_args: PageArguments,
    words: dict[str, str],
) -> Messages:
    """The latest of `turns` that are read after `opening`. Raises UserError where the last is too long."""
    limit = page_args.limit_prompt_tokens
    if chat.context is not None:
        limit = min(limit, chat.context - max_new_tokens)
    size = sum(len(message["content"]) for message in [*opening, turns[-1]])
    if size > limit * CHARACTERS_PER_TOKEN:
        raise UserError(words["too long"].format(size=words["characters"].format(size=size), limit=limit))

    def count_tokens(start: int) -> int:
        asked = [
            {"role": message["role"], "content": message["content"]} for message in opening + turns[start:]
        ]
        return len(chat.tokenizer.encode_prompt(asked))

    sizes = accumulate(len(message["content"]) + CHARACTERS_PER_TOKEN for message in reversed(turns[:-1]))
    near = sum(1 for _ in takewhile(lambda size: size <= limit * CHARACTERS_PER_TOKEN, sizes))
    starts = range(len(turns) - 1 - near // 2 * 2, len(turns), 2)
    first = bisect_left(starts, True, key=lambda start: count_tokens(start) <= limit)
    if first == len(starts):
        tokens = words["tokens"].format(size=count_tokens(len(turns) - 1))
        raise UserError(words["too long"].format(size=tokens, limit=limit))
    return turns[starts[first] :]


def describe_reply(reply: Reply, ended: str, dropped: int, page_args: PageArguments, words: dict) -> str:
    """Tokens, speed, why the reply ended if not by itself, and what of the conversation was not read."""
    speed = reply.new_tokens / reply.seconds if reply.seconds else 0.0
    parts = [
        words["speed"].format(tokens=reply.new_tokens, speed=speed),
        words.get(ended, "").format(seconds=page_args.limit_seconds),
        words["dropped"].format(count=dropped) if dropped else "",
    ]
    return " · ".join(part for part in parts if part)


def show_messages(messages: Messages, words: dict[str, str]) -> Messages:
    """What the chatbot shows: markup as text, no pictures fetched from elsewhere, formulas, who answered."""
    return [{"role": message["role"], "content": show_message(message, words)} for message in messages]


def show_message(message: dict[str, str], words: dict[str, str]) -> str:
    if message["role"] == "user":
        return escape_markup(message["content"])
    if message.get("side") == "both":
        texts = {"tuned": message["content"], "base": message["base"]}
        shown = [show_message(message | {"side": side, "content": texts[side]}, words) for side in texts]
        return f'<div class="pair"><div>\n\n{shown[0]}\n\n</div><div>\n\n{shown[1]}\n\n</div></div>'
    name = f'<small class="side">{words[message["side"]]}</small>\n\n' if "side" in message else ""
    thought, answer = "", message["content"]
    if answer.startswith(OPEN):
        thought, answer = split_tags(answer)
    folded = fold_thought(thought, not answer, words) if thought else ""
    return name + folded + escape_markup(mark_formulas(answer))


def fold_thought(thought: str, is_open: bool, words: dict[str, str]) -> str:
    """A thought as plain text that folds away; one line, which Markdown takes for HTML up to its end."""
    text = html.escape(thought).replace("\n", "<br>")
    opened = " open" if is_open else ""
    return f'<details class="thought"{opened}><summary>{words["thought"]}</summary>{text}</details>\n\n'


def mark_formulas(text: str) -> str:
    r"""`$x$` as `\(x\)`, where dollars are no prices."""
    parts = CODE.split(text)
    parts[::2] = [DOLLARS.sub(r"\\(\1\\)", part) for part in parts[::2]]
    return "".join(parts)


def escape_markup(text: str) -> str:
    """`text` whose Markdown works and whose HTML and images are shown as they were written."""
    parts = CODE.split(text)  # code, at odd places, is shown as it is by Markdown itself
    for i in range(0, len(parts), 2):
        part = re.sub(r"&(?=[A-Za-z#])", "&amp;", parts[i])
        parts[i] = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", part).replace("![", "!&#91;")
    return "".join(parts)
