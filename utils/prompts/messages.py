"""What a chat is everywhere: messages of a role and a content, and the names of a data set's parts."""

from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]  # of a data file, by its columns
Message = dict[str, Any]  # {role, content, ...}
Messages = list[Message]
Thinking = Literal["auto", "on", "off"]  # --thinking
TEXT_ROLE = "text"  # a row that is trained whole, without a template
LEARNED = "train"  # the message's key, False where its answer is context and not label
IGNORE_INDEX = -100
TRAIN, EVAL, TEST = "train", "eval", "test"


@dataclass(frozen=True)
class Chat:
    """One row as messages {role, content, ...}; `tools` as transformers' templates take them.

    `cleaned` names what was mended on the way, `unread` the row's columns with a text that is not in it.
    """

    messages: Messages
    tools: list[Any] | None = None
    cleaned: tuple[str, ...] = field(default=())
    unread: tuple[str, ...] = field(default=())


def find_half_character(text: str) -> str | None:
    """The first lone surrogate of `text`: half a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None
