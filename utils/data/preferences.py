"""Preference files (DPO, KTO): the answer that is preferred is trained, the other is left out.

That is supervised tuning on the good answers; the rejected ones teach nothing here. Earlier answers of such a
chat are the context that both share, so they are not trained either.
"""

from typing import Any

from utils.console import UserError
from utils.data.cells import find_given, unpack_list, write_cell
from utils.data.roles import add_system, read_history
from utils.data.turns import HUMAN_OR_ASSISTANT, join_input, read_turn, split_turns
from utils.prompts.messages import LEARNED, Message

NOT_WANTED = "not to be learned: "  # begins the reason of a row that is left out because its data says so
CONTEXTS = "conversations messages conversation prompt instruction question query input".split()
CHOSEN = ("chosen", "chosen_messages", "response_chosen")
KTO_COLUMNS = ({"messages"}, {"conversations"}, {"prompt", "completion"})  # beside a `label` that is a mark
FALSE = ("false", "0", "0.0")  # how files and tables write it
REJECTED = ("rejected_response", "rejected_messages", "response_rejected")  # beside the preferred answer


def check_desirable(row: dict[str, Any]) -> None:
    """Raises UserError for a row of a KTO file that is marked undesirable, as a boolean, 0 or 1, or its word.

    `kto_tag` is KTO's own; a `label` is only beside a chat or a completion: elsewhere it is a class.
    """
    for name in ("kto_tag", "label"):
        mark = str(row[name]).strip().lower() if name in row else ""
        if mark in FALSE and (name == "kto_tag" or any(names <= row.keys() for names in KTO_COLUMNS)):
            raise UserError(f"{NOT_WANTED}column {name!r} is {mark}, so its answer is undesirable")


def read_preferred(row: dict[str, Any], marker: str) -> list[Message]:
    """The context and `chosen` as messages; `chosen` is a text, a turn, or messages of the whole chat.

    ms-swift's rows have it as the end of `messages`, or as `response`; ranked ones first in `output`.
    """
    names = ("output",) if is_ranked(row) else (*CHOSEN, "messages", "response")
    name = find_given(row, names) or CHOSEN[0]
    chosen = unpack_list(write_cell(row["output"][0] if is_ranked(row) else row.get(name)))
    if isinstance(chosen, str):
        chosen = {"role": "assistant", "content": chosen}
    turns = [read_turn(turn) for turn in (chosen if isinstance(chosen, list) else [chosen])]
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"column {name!r} holds {str(row.get(name))[:40]!r}: an answer is needed")
    messages = add_system(row, turns if len(turns) > 1 else [*read_context(row, marker), *turns])
    *context, answer = messages
    return [
        message | {LEARNED: False} if message["role"] == "assistant" else message for message in context
    ] + [answer]


def is_ranked(row: dict[str, Any]) -> bool:
    """LLaMA-Factory's older preferences: `output` [the better answer, the worse one].

    Beside a list of questions it is the list of their answers.
    """
    output = row.get("output")
    if not isinstance(output, list) or isinstance(row.get("input"), list):
        return False
    return len(output) > 1 and all(isinstance(text, str) for text in output)


def read_context(row: dict[str, Any], marker: str) -> list[Message]:
    name = find_given(row, CONTEXTS)
    context = write_cell(row.get(name)) if name else None
    if isinstance(context, str):
        asked = join_input(context, row, "input" if name == "instruction" else None, marker)
        return [*read_history(row), *split_prompt(asked)]
    if not isinstance(context, list) or not context:
        raise UserError(f"column 'chosen' answers nothing: one of {', '.join(CONTEXTS)} is needed")
    return [read_turn(turn) for turn in context]


def split_prompt(text: str) -> list[Message]:
    """A question, or the turns of a prompt written as Human: and Assistant: lines (hh-rlhf)."""
    try:
        turns = split_turns(text, HUMAN_OR_ASSISTANT)
    except UserError:
        turns = [("user", text)]
    return [{"role": role, "content": said} for role, said in (turns if turns[-1][1] else turns[:-1])]
