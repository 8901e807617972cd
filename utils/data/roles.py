"""Who speaks in a turn, by the names that data sets and trainers give, and what is said, as a message."""

import json
from typing import Any

from utils.console import UserError
from utils.data.cells import is_given, write_cell
from utils.data.media import COLUMNS, holds_media
from utils.messages import UNTRAINED, Message, Messages, Row

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "human_user": "user",
    "user": "user",
    "prompter": "user",
    "question": "user",
    "客户": "user",
    "用户": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "gpt4": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "belle": "assistant",
    "answer": "assistant",
    "助手": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLS = {"function_call", "tool_call"}  # an assistant's turn that holds a call as JSON
TEXT_PARTS = ("text", "input_text", "output_text")
SYSTEMS = ("system", "system_prompt")  # columns with the system message of a row
# Marks of an answer, OpenAI's, LLaMA-Factory's, axolotl's, ms-swift's, XTuner's; zero or false: context.
MARKS = ("weight", "loss_weight", "train", "training", "loss", "output_with_loss")


def find_role(name: Any) -> str:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"a turn is spoken by {str(name)[:40]!r}: use system, user, assistant or tool")
    return role


def build_message(turn: Message, role_key: str, content_key: str) -> Message:
    """The turn as {role, content, ...}: parts joined, calls as `tool_calls`, marked where it is untrained."""
    name, (content, calls) = turn.get(role_key), split_parts(write_cell(turn.get(content_key)))
    role = find_role(name)
    own = {role_key, content_key, *MARKS}
    kept = {key: value for key, value in turn.items() if value is not None and key not in own}
    if name.lower() in CALLS and not calls:
        calls, content = read_calls(content), ""
    if calls:
        kept["tool_calls"] = calls
    if not isinstance(content, str) and not (content is None and kept.get("tool_calls")):
        raise UserError(f"a {role} turn holds {str(content)[:40]!r}: text is needed")
    message = kept | {"role": role, "content": content or ""}
    if any(holds_media(turn.get(name)) for name in COLUMNS):
        raise UserError("a turn names media: only text is trained")
    return message | {UNTRAINED: False} if role == "assistant" and is_context(turn) else message


def is_context(turn: Message) -> bool:
    """Whether an answer is marked as one that is not learned; UserError for a half."""
    for name in MARKS:
        if turn.get(name) not in (None, 0, 1):
            raise UserError(f"{name} {turn[name]!r}: an answer is learned (1, true) or not (0, false)")
    return any(turn.get(name) is not None and turn[name] == 0 for name in MARKS)


def split_parts(content: Any) -> tuple[Any, list[Message]]:
    """(text, calls) of a content given as parts [{type, text or value}, ...]; another one as it is.

    Reasoning goes before the text in <think> tags, as reasoning models write it.
    """
    if not isinstance(content, list):
        return content, []
    texts, calls = [], []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        said = write_cell(part.get("text", part.get("value"))) if isinstance(part, dict) else None
        if kind == "tool_call":
            calls += read_calls(said)
        elif kind in (*TEXT_PARTS, "reasoning") and isinstance(said, str):
            texts.append(f"<think>\n{said}\n</think>\n\n" if kind == "reasoning" else said)
        else:
            raise UserError(f"a message has a part of type {kind!r}: only text is trained")
    return "".join(texts), calls


def join_calls(messages: Messages) -> Messages:
    """Calls that follow an answer or other calls belong to that turn; some files give each its own."""
    joined: Messages = []
    for message in messages:
        last = joined[-1] if joined else {}
        calls = message.get("tool_calls")
        follows = last.get("role") == "assistant" and last.get(UNTRAINED) == message.get(UNTRAINED)
        if calls and not message["content"] and follows:
            joined[-1] = last | {"tool_calls": [*last.get("tool_calls", []), *calls]}
        else:
            joined.append(message)
    return joined


def read_system(row: Row) -> Messages:
    """The system message that a row has in a column of its own: one message or none."""
    name = next((name for name in SYSTEMS if is_given(row.get(name))), None)
    if name is None:
        return []
    text = write_cell(row[name])
    if not isinstance(text, str):
        raise UserError(f"a system turn holds {str(text)[:40]!r}: text is needed")
    return [{"role": "system", "content": text}] if text.strip() else []


def add_system(row: Row, messages: Messages) -> Messages:
    """The messages behind the row's system message, unless they have their own."""
    return messages if messages and messages[0]["role"] == "system" else read_system(row) + messages


def read_history(row: Row) -> Messages:
    """Earlier turns in the column `history`, [[question, answer], ...]."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise UserError(f"column 'history' holds {str(history)[:40]!r}: [[question, answer], ...] is needed")
    messages: Messages = []
    for i, text in enumerate(text for pair in history for text in pair):
        role, text = "assistant" if i % 2 else "user", "" if text is None else write_cell(text)
        if not isinstance(text, str):
            raise UserError(f"a {role} turn holds {str(text)[:40]!r}: text is needed")
        messages.append({"role": role, "content": text})
    return messages


def read_calls(text: Any) -> list[Message]:
    """A function_call turn, {name, arguments} or a list of them as JSON, as transformers' `tool_calls`."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    is_list = isinstance(calls, list) and bool(calls)
    if not is_list or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f"a call holds {str(text)[:40]!r}: JSON with name and arguments is needed")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def wrap_tools(tools: list[Message] | None) -> list[Message] | None:
    """Functions in the shape that templates take, {type: function, function: {name, ...}}."""
    return tools and [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
