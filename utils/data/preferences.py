"""Preference files (DPO, KTO): the answer that is preferred is trained, the other is left out.

That is supervised tuning on the good answers; the rejected ones teach nothing here. Earlier answers of such a
chat are the context that both share, so they are not trained either.
"""

import re
from typing import Any

from utils.console import UserError
from utils.data.roles import add_system, build_message, read_history
from utils.messages import UNTRAINED, Message

NOT_WANTED = "not to be learned: "  # begins the reason of a row that is left out because its data says so
CONTEXTS = (
    "conversations",
    "messages",
    "conversation",
    "prompt",
    "instruction",
    "question",
    "query",
    "input",
)
CHOSEN = ("chosen", "chosen_messages")
REJECTED = ("rejected_response", "rejected_messages")  # ms-swift's, beside `messages` or `response`


def check_desirable(row: dict[str, Any]) -> None:
    """Raises UserError for a row of a KTO file that is marked undesirable, as a boolean or its word.

    `kto_tag` is KTO's own; a `label` is only beside a chat or a completion: elsewhere it is a class.
    """
    is_kto = "messages" in row or "conversations" in row or {"prompt", "completion"} <= row.keys()
    for name in ("kto_tag", *(["label"] if is_kto else [])):
        if row.get(name) is False or str(row.get(name)).strip().lower() == "false":
            raise UserError(f"{NOT_WANTED}column {name!r} is false, so its answer is undesirable")


def read_preferred(row: dict[str, Any], marker: str) -> list[Message]:
    """The context and `chosen` as messages; `chosen` is a text, a turn, or messages of the whole chat.

    ms-swift's rows have it as the end of `messages`, or as `response`.
    """
    name = next((name for name in (*CHOSEN, "messages", "response") if row.get(name)), CHOSEN[0])
    chosen = row.get(name)
    if isinstance(chosen, str):
        chosen = {"role": "assistant", "content": chosen}
    turns = [read_turn(turn) for turn in (chosen if isinstance(chosen, list) else [chosen])]
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"column {name!r} holds {str(row.get(name))[:40]!r}: an answer is needed")
    messages = add_system(row, turns if len(turns) > 1 else [*read_context(row, marker), *turns])
    *context, answer = messages
    return [
        message | {UNTRAINED: False} if message["role"] == "assistant" else message for message in context
    ] + [answer]


def read_context(row: dict[str, Any], marker: str) -> list[Message]:
    name = next((name for name in CONTEXTS if row.get(name)), None)
    context = row.get(name) if name else None
    if isinstance(context, str):
        extra = row.get("input")
        asked = f"{context}{marker}{extra}" if name == "instruction" and extra else context
        return [*read_history(row), *split_prompt(asked)]
    if not isinstance(context, list) or not context:
        raise UserError(f"column 'chosen' answers nothing: one of {', '.join(CONTEXTS)} is needed")
    return [read_turn(turn) for turn in context]


def split_prompt(text: str) -> list[Message]:
    """A question, or the turns of a prompt written as Human: and Assistant: lines (hh-rlhf)."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 3 or parts[0].strip():
        return [{"role": "user", "content": text}]
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns if turns[-1]["content"] else turns[:-1]


def read_turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"a turn is {str(turn)[:40]!r}: an object is needed")
    names = ("from", "value") if "from" in turn else ("role", "content")
    return build_message(turn, *names)
