"""Who speaks in a turn, by the names that data sets and trainers give, and what is said, as a message."""

import json
from typing import Any

from utils.console import UserError
from utils.data.cells import find_given, need_text, unpack_list, write_cell
from utils.data.media import COLUMNS, holds_media
from utils.prompts.messages import LEARNED, Message, Messages, Row

SPEAKERS = {
    "system": "system developer",
    "user": "human human_user user prompter question 客户 用户",
    "assistant": "assistant gpt chatgpt gpt4 model bing bard bot belle answer 助手 function_call tool_call",
    "tool": "tool function ipython observation observations function_response tool_response",
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names.split()}
CALLS = {"function_call", "tool_call"}  # an assistant's turn that holds a call as JSON
TEXT_PARTS = ("text", "input_text", "output_text")
PART_TEXTS = ("text", "value", "content")  # keys with the text of a part
SYSTEMS = ("system", "system_prompt")  # columns with the system message of a row
# Marks of an answer, OpenAI's, LLaMA-Factory's, axolotl's, ms-swift's, XTuner's; zero or false: context.
MARKS = ("weight", "loss_weight", "train", "training", "loss", "output_with_loss")


def build_message(turn: Message, role_key: str, content_key: str) -> Message:
    """The turn as {role, content, ...}: parts joined, calls as `tool_calls`, marked where it is untrained."""
    name, content = turn.get(role_key), write_cell(turn.get(content_key))
    role = ROLES.get(str(name).lower())
    if role is None:
        raise UserError(f"a turn is spoken by {str(name)[:40]!r}: use system, user, assistant or tool")
    if len(turn) == 2 and isinstance(content, str) and str(name).lower() not in CALLS:  # most turns
        return {"role": role, "content": content}
    content, calls = split_parts(content)
    own = {role_key, content_key, "function_call", *MARKS}
    kept = {key: value for key, value in turn.items() if value is not None and key not in own}
    if str(name).lower() in CALLS and not calls:
        calls, content = read_calls(content), ""
    if turn.get("function_call"):  # OpenAI's before there were several calls
        calls = read_calls(turn["function_call"])
    if role == "assistant":
        check_whole(turn, content_key)
    if calls:
        kept["tool_calls"] = calls
    if not isinstance(content, str) and not (content is None and kept.get("tool_calls")):
        raise UserError(f"the turn of {role} holds {str(content)[:40]!r}: text is needed")
    message = kept | {"role": role, "content": content or ""}
    if any(holds_media(turn.get(name)) for name in COLUMNS):
        raise UserError("a turn names media: only text is trained")
    return message | {LEARNED: False} if role == "assistant" and is_context(turn) else message


def is_context(turn: Message) -> bool:
    """Whether an answer is marked as one that is not learned; UserError for a half."""
    for name in MARKS:
        if turn.get(name) not in (None, 0, 1):
            raise UserError(f"{name} {turn[name]!r}: an answer is learned (1, true) or not (0, false)")
    return any(turn.get(name) is not None and turn[name] == 0 for name in MARKS)


def check_whole(turn: Message, content_key: str) -> None:
    """Raises UserError where a piece of an answer is marked as context, as axolotl's files may have it."""
    parts = turn[content_key] if isinstance(turn.get(content_key), list) else []
    marked = any(isinstance(part, dict) and is_context(part) for part in parts)
    if marked or turn.get("train_detail"):
        where = "a part" if marked else "train_detail"
        raise UserError(f"{where} marks a piece of an answer as not learned: it is learned whole, or not")


def split_parts(content: Any) -> tuple[Any, list[Message]]:
    """(text, calls) of a content given as lines or as parts [{type, text}, ...]; another one as it is.

    Reasoning goes before the text in <think> tags, as reasoning models write it.
    """
    if not isinstance(content, list):
        return content, []
    if all(isinstance(line, str) for line in content):
        return "\n".join(content), []
    texts, calls = [], []
    for part in content:
        if not isinstance(part, dict):
            part = {"text": part} if isinstance(part, str) else {"type": type(part).__name__}
        kind = part.get("type", "text")
        said = next((write_cell(part[key]) for key in PART_TEXTS if part.get(key) is not None), None)
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
        follows = last.get("role") == "assistant" and last.get(LEARNED) == message.get(LEARNED)
        if calls and not message["content"] and follows:
            joined[-1] = last | {"tool_calls": [*last.get("tool_calls", []), *calls]}
        else:
            joined.append(message)
    return joined


def read_system(row: Row) -> Messages:
    """The system message that a row has in a column of its own: one message or none."""
    name = find_given(row, SYSTEMS)
    if name is None:
        return []
    text = need_text(row[name], "a system turn")
    return [{"role": "system", "content": text}] if text.strip() else []


def add_system(row: Row, messages: Messages) -> Messages:
    """The messages behind the row's system message, unless they have their own."""
    return messages if messages and messages[0]["role"] == "system" else read_system(row) + messages


def read_history(row: Row) -> Messages:
    """Earlier turns in the column `history`, [[question, answer], ...]."""
    history = unpack_list(row.get("history")) or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise UserError(f"column 'history' holds {str(history)[:40]!r}: [[question, answer], ...] is needed")
    messages: Messages = []
    for i, text in enumerate(text for pair in history for text in pair):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": need_text("" if text is None else text, f"a {role} turn")})
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
    functions = [
        {"name": call["name"], "arguments": call.get("arguments", call.get("parameters", {}))}
        for call in calls
    ]
    return [{"type": "function", "function": function} for function in functions]


def wrap_tools(tools: list[Message] | None) -> list[Message] | None:
    """Functions in the shape that templates take, {type: function, function: {name, ...}}."""
    return tools and [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
