"""A chat's turns, in the shapes that data sets give them, as messages in order."""

import re
from typing import Any

from utils.console import UserError
from utils.data.cells import is_given, need_text, unpack_list, write_cell
from utils.data.roles import MARKS, ROLES, build_message
from utils.prompts.messages import Chat, Message, Messages, Row

# Of a question and its answer in one turn.
PAIR_ROLES = ROLES | {"input": "user", "output": "assistant", "q": "user", "a": "assistant"}


HUMAN_OR_ASSISTANT = r"(?:^|\n\n)(Human|Assistant):"  # before the turns of hh-rlhf


def read_list(row: Row, column: str) -> list[Row]:
    turns = unpack_list(row.get(column))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"column {column!r} holds {str(turns)[:40]!r}: a list of turns is needed")
    return turns


def find_keys(turn: Row) -> tuple[str, str]:
    """The keys of (who speaks, what is said): from and value, or role and content, or one of each.

    In a parquet file a turn has the keys of all others too, as nulls.
    """
    who = "from" if turn.get("from") is not None else "role"
    return who, "value" if "value" in turn and turn.get("content") is None else "content"


def find_said(turn: Row) -> Any:
    return turn.get(find_keys(turn)[1])


def read_turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"a turn is {str(turn)[:40]!r}: an object is needed")
    return build_message(turn, *find_keys(turn))


def blank_null(turn: Row) -> Row:
    """The turn with an empty text where its text is null: it is taken out, as an empty one is."""
    key = find_keys(turn)[1]
    return turn | {key: ""} if key in turn and write_cell(turn[key]) is None else turn


def name_model(turns: list[Row]) -> tuple[list[Row], list[str]]:
    """(turns, notes): a speaker of unknown name, as `yayi`, is the model where it alone answers a user."""
    who = find_keys(turns[0])[0]
    names = {turn[who] for turn in turns if isinstance(turn.get(who), str)}
    unknown = [name for name in names if name.lower() not in ROLES]
    known = {ROLES.get(name.lower()) for name in names if name not in unknown}
    if len(unknown) != 1 or not {"user"} <= known <= {"user", "system"}:
        return turns, []
    named = [turn | {who: "assistant"} if turn.get(who) == unknown[0] else turn for turn in turns]
    return named, [f"{unknown[0]!r} taken for the model's name"]


def names_speaker(turn: Row) -> bool:
    return "from" in turn or "role" in turn


def split_pairs(turns: list[Row]) -> list[Row]:
    """[{human: ..., assistant: ...}, ...] -> one turn a speaker; a system message is said once."""
    spoken: list[Row] = []
    for turn in turns:
        said: Row = {}
        for name, text in turn.items():
            if role := PAIR_ROLES.get(name.lower()):
                said[role] = text if is_given(text) else said.get(role, "")
        system = {"role": "system", "content": said.pop("system", "")}
        if is_given(system["content"]) and system not in spoken:
            spoken.append(system)
        marks = {mark: turn[mark] for mark in MARKS if mark in turn}
        order = [role for role in ("user", "assistant", "tool") if role in said]
        spoken += [{"role": role, "content": said[role]} | marks for role in order]
    if not spoken:
        raise UserError(f"a turn has the columns {', '.join(turns[0])}: from and value, or role and content")
    return spoken


def join_input(asked: str, row: Row, extra: str | None, marker: str) -> str:
    """The question, and behind `marker` what the column `extra` holds."""
    added = need_text(row[extra], f"column {extra!r}") if extra and is_given(row.get(extra)) else ""
    if not added.strip():
        return asked
    return f"{asked}{marker}{added}" if asked.strip() else added


def split_turns(text: str, speaker: str) -> list[tuple[str, str]]:
    """(role, text) of each turn; `speaker` matches what stands before a turn and captures who speaks."""
    before, *parts = re.split(speaker, text)
    if before.strip() or not parts:
        raise UserError(f"holds {text[:40]!r}, which no speaker begins")
    return [(ROLES[who.lower()], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def tidy_turns(turns: list[tuple[str, Any]]) -> Chat:
    """tidy_messages of (role, text)."""
    messages: Messages = [
        {"role": role, "content": need_text(text, f"a {role} turn")} for role, text in turns
    ]
    return tidy_messages(messages, [])


def tidy_messages(messages: Messages, notes: list[str], tools: list[Any] | None = None) -> Chat:
    """The messages without empty ones, and up to the first that is out of order."""
    spoken = take_out_empty(messages)
    if len(spoken) < len(messages):
        notes = [*notes, "empty turns taken out"]
    ordered, order = keep_ordered(spoken)
    return Chat(ordered, tools, (*notes, *order))


def take_out_empty(messages: Messages) -> Messages:
    """The messages that say something; a question whose answer is empty goes with it."""
    spoken: Messages = []
    is_unanswered = False
    for message in messages:
        if not message["content"].strip() and not message.get("tool_calls"):
            is_unanswered = is_unanswered or message["role"] == "assistant"
            continue
        if is_unanswered and message["role"] == "user" and spoken and spoken[-1]["role"] == "user":
            spoken.pop()
        is_unanswered = False
        spoken.append(message)
    return spoken


def keep_ordered(messages: Messages) -> tuple[Messages, list[str]]:
    """(the messages before the first out of order, notes of that and of a last turn without an answer).

    In order: a system message first, then user and assistant in turn, tools after an assistant.
    """
    end = find_disorder(messages)
    if end < len(messages):
        return messages[:end], ["roles out of order, the rest cut"]
    is_answered = not messages or messages[-1]["role"] == "assistant"
    return messages, [] if is_answered else ["a last turn that has no answer left out"]


def find_disorder(messages: Messages) -> int:
    """The place of the first message out of order; their number where there is none."""
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
            return i
        before = message
    return len(messages)
