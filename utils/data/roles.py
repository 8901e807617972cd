"""Who speaks in a turn, by the names that data sets and trainers give, and what is said, as a message."""

import json
from typing import Any

from utils.console import UserError
from utils.data.media import COLUMNS, holds_media
from utils.messages import UNTRAINED, Message

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


def find_role(name: Any) -> str:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"a turn is spoken by {str(name)[:40]!r}: use system, user, assistant or tool")
    return role


def build_message(turn: Message, role_key: str, content_key: str) -> Message:
    """The turn as {role, content, ...}: parts joined, calls as `tool_calls`, marked where it is untrained."""
    name, content = turn.get(role_key), join_parts(turn.get(content_key))
    role = find_role(name)
    own = {role_key, content_key, "weight", "train", "loss"}
    kept = {key: value for key, value in turn.items() if value is not None and key not in own}
    if name.lower() in CALLS:
        kept["tool_calls"], content = read_calls(content), ""
    if not isinstance(content, str) and not (content is None and kept.get("tool_calls")):
        raise UserError(f"a {role} turn holds {str(content)[:40]!r}: text is needed")
    message = kept | {"role": role, "content": content or ""}
    marked = is_context(turn)
    if any(holds_media(turn.get(name)) for name in COLUMNS):
        raise UserError("a turn names media: only text is trained")
    return message | {UNTRAINED: False} if marked and role == "assistant" else message


def is_context(turn: Message) -> bool:
    """Whether `weight`, `train` or `loss` says that an answer is not learned; UserError for a half."""
    weight, flags = turn.get("weight"), [turn.get(name) for name in ("train", "loss")]
    if weight not in (None, 0, 1) or not all(flag is None or isinstance(flag, bool) for flag in flags):
        raise UserError(
            f"weight {weight!r}, train {flags[0]!r}, loss {flags[1]!r}: 0 or 1, and true or false"
        )
    return weight == 0 or False in flags


def join_parts(content: Any) -> Any:
    """A content given as parts [{type: text, text or value: ...}, ...] as one text; others as they are."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text", part.get("value")) if kind in TEXT_PARTS else None
        if not isinstance(text, str):
            raise UserError(f"a message has a part of type {kind!r}: only text is trained")
        texts.append(text)
    return "".join(texts)


def read_calls(text: Any) -> list[Message]:
    """A function_call turn, {name, arguments} or a list of them as JSON, as transformers' `tool_calls`."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if (
        not isinstance(calls, list)
        or not all(isinstance(c, dict) and "name" in c for c in calls)
        or not calls
    ):
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
