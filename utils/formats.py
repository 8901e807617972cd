"""A row of any known format -> messages. Its columns tell the format; --dataset_format forces one."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from utils.console import UserError

Row = dict[str, Any]
Messages = list[dict[str, Any]]
TEXT_ROLE = "text"  # a row that is trained whole, without a template
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "belle": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Chat:
    """One row as messages {role, content, ...}; `tools` as transformers' templates take them.

    `cleaned` names what was mended on the way; DataReport counts it.
    """

    messages: Messages
    tools: list[Any] | None = None
    cleaned: tuple[str, ...] = field(default=())


def read_text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise UserError(f"column {column!r} holds {str(value)[:40]!r}: text is needed")
    return value


def build_exchange(row: Row, question: str, answer: str, marker: str, extra: str | None = None) -> Chat:
    """One question and its answer. `extra` names a column that follows the question behind `marker`."""
    asked, added = read_text(row, question), row.get(extra) if extra else None
    if added is not None and not isinstance(added, str):
        raise UserError(f"column {extra!r} holds {str(added)[:40]!r}: text is needed")
    if added and added.strip():
        asked = f"{asked}{marker}{added}" if asked.strip() else added
    turns = [("user", asked), ("assistant", read_text(row, answer))]
    for role, text in turns:
        if not text.strip():
            raise UserError(f"column {(question if role == 'user' else answer)!r} is empty")
    return Chat([{"role": role, "content": text} for role, text in turns])


def read_alpaca(row: Row, marker: str) -> Chat:
    """instruction, input, output; LLaMA-Factory's `history` [[question, answer], ...] and `system`."""
    exchange = build_exchange(row, "instruction", "output", marker, "input")
    if not row.get("history") and not row.get("system"):
        return exchange
    earlier: list[tuple[str, Any]] = []
    if row.get("system"):
        earlier.append(("system", row["system"]))
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise UserError(f"column 'history' holds {str(history)[:40]!r}: [[question, answer], ...] is needed")
    for question, answer in history:
        earlier += [("user", question), ("assistant", answer)]
    return tidy_turns(earlier + [(message["role"], message["content"]) for message in exchange.messages])


def read_dolly(row: Row, marker: str) -> Chat:
    return build_exchange(row, "instruction", "response", marker, "context")


def read_self_instruct(row: Row, marker: str) -> Chat:
    return build_exchange(row, "prompt", "completion", marker)


def read_input_output(row: Row, marker: str) -> Chat:
    return build_exchange(row, "input", "output", marker)


def read_belle(row: Row, marker: str) -> Chat:
    """BELLE's multi-turn rows keep the earlier turns in `instruction`, as Human: and Assistant: lines."""
    turns = split_turns(read_text(row, "instruction"), r"(?:^|\n)\s*(Human|Assistant)[:：]")
    if turns and turns[-1][0] == "assistant" and not turns[-1][1]:
        turns.pop()
    return tidy_turns(turns + [("assistant", read_text(row, "output"))])


def read_guanaco(row: Row, marker: str) -> Chat:
    return tidy_turns(split_turns(read_text(row, "text"), r"### (Human|Assistant):"))


def read_chip2(row: Row, marker: str) -> Chat:
    return tidy_turns(split_turns(read_text(row, "text"), r"(?:^|\n)<(human|bot)>:"))


def read_hh_rlhf(row: Row, marker: str) -> Chat:
    """The preferred conversation; the rejected one is not trained."""
    return tidy_turns(split_turns(read_text(row, "chosen"), r"(?:^|\n\n)(Human|Assistant):"))


def read_plain_text(row: Row, marker: str) -> Chat:
    text = read_text(row, "text")
    if not text.strip():
        raise UserError("column 'text' is empty")
    return Chat([{"role": TEXT_ROLE, "content": text}])


def read_sharegpt(row: Row, marker: str) -> Chat:
    """conversations [{from, value}, ...]; a reply that is a piece of ShareGPT's page becomes Markdown."""
    from utils.html_text import convert_page  # here: its parser takes 0.2 s to import

    turns = read_list(row, "conversations")
    names = ("from", "value") if any("from" in turn for turn in turns) else ("role", "content")
    spoken, notes = [], []
    for turn in turns:
        role, text = find_role(turn.get(names[0])), turn.get(names[1])
        if role == "assistant" and isinstance(text, str):
            text, done = convert_page(text)
            notes += [note for note in done if note not in notes]
        spoken.append((role, text))
    if isinstance(row.get("system"), str) and row["system"].strip():
        spoken.insert(0, ("system", row["system"]))
    return tidy_turns(spoken, notes)


def read_chat_messages(row: Row, marker: str) -> Chat:
    """messages [{role, content, ...}, ...]; tool calls and tool turns are kept for the template to render."""
    messages = []
    for turn in read_list(row, "messages"):
        content = turn.get("content")
        if isinstance(content, list):  # parts of a multi-modal chat: text only
            content = "".join(read_text(part, "text") for part in content if isinstance(part, dict))
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise UserError(f"a message's content is {str(content)[:40]!r}: text is needed")
        kept = {name: value for name, value in turn.items() if value is not None}
        messages.append(kept | {"role": find_role(turn.get("role")), "content": content or ""})
    ordered, notes = keep_ordered(messages)
    return Chat(ordered, read_tools(row), tuple(notes))


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The functions that a chat may call, a list or its JSON, as tables store it."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except json.JSONDecodeError as error:
            raise UserError(f"column 'tools' is no JSON ({error})") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"column 'tools' holds {str(tools)[:40]!r}: a list of objects is needed")
    return tools


FORMATS: dict[str, Callable[[Row, str], Chat]] = {
    "messages": read_chat_messages,
    "sharegpt": read_sharegpt,
    "hh-rlhf": read_hh_rlhf,
    "dolly": read_dolly,
    "belle": read_belle,
    "alpaca": read_alpaca,
    "self-instruct": read_self_instruct,
    "input-output": read_input_output,
    "oasst1": read_guanaco,
    "chip2": read_chip2,
    "text": read_plain_text,
}
ALIASES = {
    "vicuna": "sharegpt",
    "evol_instruct": "sharegpt",
    "guanaco": "oasst1",
    "olcc": "alpaca",
    "longform": "input-output",
}


def find_format(row: Any) -> str | None:
    """The format that a row has the columns of, by its text where several share them."""
    if not isinstance(row, dict):
        return None
    columns = row.keys()
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if "chosen" in columns:
        return "hh-rlhf"
    if columns >= {"instruction", "response"}:
        return "dolly"
    if columns >= {"instruction", "output"}:
        return "belle" if str(row["instruction"]).lstrip().startswith(("Human:", "Human：")) else "alpaca"
    if columns >= {"prompt", "completion"}:
        return "self-instruct"
    if columns >= {"input", "output"}:
        return "input-output"
    if "text" in columns:
        start = str(row["text"]).lstrip()
        return (
            "oasst1"
            if start.startswith("### Human:")
            else "chip2"
            if start.startswith("<human>:")
            else "text"
        )
    return None


def sniff_format(rows: list[Any]) -> str | None:
    """The format most of these rows have."""
    found = Counter(filter(None, map(find_format, rows)))
    return found.most_common(1)[0][0] if found else None


def read_row(row: Any, dataset_format: str, marker: str = "\n\n") -> Chat:
    """One row as a Chat. `marker` goes between a question and its input. Raises UserError for a bad row."""
    if not isinstance(row, dict):
        raise UserError(f"holds {str(row)[:40]!r}: an object with columns is needed")
    chat = FORMATS[ALIASES.get(dataset_format, dataset_format)](row, marker)
    if not any(message["role"] in ("assistant", TEXT_ROLE) for message in chat.messages):
        raise UserError("has no answer to train on")
    try:
        "".join(message["content"] for message in chat.messages).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"holds half of a surrogate pair ({error.object[error.start]!r})") from error
    return chat


def read_list(row: Row, column: str) -> list[Row]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"column {column!r} holds {str(turns)[:40]!r}: a list of turns is needed")
    return turns


def find_role(name: Any) -> str:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"a turn is spoken by {str(name)[:40]!r}: use system, user, assistant or tool")
    return role


def split_turns(text: str, speaker: str) -> list[tuple[str, str]]:
    """(role, text) of each turn; `speaker` matches what stands before a turn and captures who speaks."""
    before, *parts = re.split(speaker, text)
    if before.strip() or not parts:
        raise UserError(f"holds {text[:40]!r}, which no speaker begins")
    return [(ROLES[who.lower()], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def tidy_turns(turns: list[tuple[str, Any]], notes: list[str] | None = None) -> Chat:
    """Turns as messages: without empty ones, and up to the first that is out of order."""
    notes = notes or []
    for role, text in turns:
        if not isinstance(text, str):
            raise UserError(f"a {role} turn holds {str(text)[:40]!r}: text is needed")
    spoken = [(role, text) for role, text in turns if text.strip()]
    if len(spoken) < len(turns):
        notes = [*notes, "empty turns taken out"]
    messages, order = keep_ordered([{"role": role, "content": text} for role, text in spoken])
    return Chat(messages, cleaned=(*notes, *order))


def keep_ordered(messages: Messages) -> tuple[Messages, list[str]]:
    """(the messages before the first out of order, a note of it).

    In order: a system message first, then user and assistant in turn, tools after an assistant.
    """
    before: dict[str, Any] = {"role": None}
    for i, message in enumerate(messages):
        follows = {
            "system": (None,),
            "user": (None, "system", "assistant"),
            "assistant": (None, "system", "user", "tool"),
            "tool": ("assistant", "tool"),
        }[message["role"]]
        if before["role"] not in follows and not (
            message["role"] == "assistant" and before.get("tool_calls")
        ):
            return messages[:i], ["roles out of order, the rest cut"]
        before = message
    return messages, []
