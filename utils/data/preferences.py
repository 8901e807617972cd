"""Preference files (DPO, KTO): the answer that is preferred is trained, the other is left out.

That is supervised tuning on the good answers; the rejected ones teach nothing here. Earlier answers of such a
chat are the context that both share, so they are not trained either.
"""

from typing import Any

from utils.console import UserError
from utils.data.roles import build_message
from utils.messages import UNTRAINED, Message

NOT_WANTED = "not to be learned: "  # begins the reason of a row that is left out because its data says so
CONTEXTS = ("conversations", "messages", "conversation", "prompt", "instruction", "question", "query")


def check_desirable(row: dict[str, Any]) -> None:
    """Raises UserError for a row of a KTO file that is marked undesirable: label or kto_tag false."""
    for name in ("label", "kto_tag"):
        if row.get(name) is False:
            raise UserError(f"{NOT_WANTED}column {name!r} is false, so its answer is undesirable")


def read_preferred(row: dict[str, Any], marker: str) -> list[Message]:
    """The context and `chosen` as messages; `chosen` is a text, a turn, or messages of the whole chat."""
    chosen = row.get("chosen")
    if isinstance(chosen, str):
        chosen = {"role": "assistant", "content": chosen}
    turns = [read_turn(turn) for turn in (chosen if isinstance(chosen, list) else [chosen])]
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"column 'chosen' holds {str(row.get('chosen'))[:40]!r}: an answer is needed")
    messages = turns if len(turns) > 1 else [*read_context(row, marker), *turns]
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
        before = [read_turn({"role": "system", "content": row["system"]})] if row.get("system") else []
        return [*before, {"role": "user", "content": asked}]
    if not isinstance(context, list) or not context:
        raise UserError(f"column 'chosen' answers nothing: one of {', '.join(CONTEXTS)} is needed")
    return [read_turn(turn) for turn in context]


def read_turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"a turn is {str(turn)[:40]!r}: an object is needed")
    names = ("from", "value") if "from" in turn else ("role", "content")
    return build_message(turn, *names)
