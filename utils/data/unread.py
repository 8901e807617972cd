"""Which texts of a row are not trained: in columns that no format reads, in keys that no template shows."""

from collections.abc import Callable
from typing import Any

from utils.data.cells import is_metadata, list_leaves
from utils.data.layouts import TURNS
from utils.data.preferences import REJECTED
from utils.prompts.messages import LEARNED, Chat, Messages, Row
from utils.prompts.rendering import THOUGHT_KEYS

KNOWN = {"rejected", *REJECTED, *TURNS}  # said with the format, or the chat itself
SHOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", LEARNED, *THOUGHT_KEYS}  # of a turn
MIN_UNSPACED = 8  # letters of a Chinese or Japanese text, which are one word


class WatchedRow(dict[str, Any]):
    """A row that knows which of its columns were read."""

    def __init__(self, row: Row):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def find_unread(row: Row, said: str, read: Callable[[Row], Chat]) -> tuple[str, ...]:
    """Columns with a text that was not read, is not in `said` (the whole chat) and no copy of the whole chat.

    `read` makes the chat of a row: once more, of a watched one, where a text is in no message as it stands.
    """
    left = {
        name: value
        for name, value in row.items()
        if name not in KNOWN and not is_said(value, said) and not is_metadata(name)
    }
    if not left:
        return ()
    watched = WatchedRow(row)
    contents = [message["content"] for message in read(watched).messages]
    own = [row[name].strip() for name in watched.read if isinstance(row.get(name), str)]
    parts = [text for text in own if text in said] or contents
    return tuple(
        name
        for name, value in left.items()
        if name not in watched.read
        and any(
            text.strip() not in said and not all(part in text for part in parts) for text in list_texts(value)
        )
    )


def is_said(value: Any, said: str) -> bool:
    """Whether `said` holds every text in a value."""
    if isinstance(value, str):  # most are
        return value in said
    return all(leaf in said for leaf in list_leaves(value) if isinstance(leaf, str))


def find_hidden(messages: Messages, shown: str) -> list[str]:
    """Keys of turns, as `reasoning_content`, with a text that is not in `shown`, the rendered rows."""
    hidden = [
        key
        for message in messages
        for key in message
        if key not in SHOWN_KEYS and any(text.strip() not in shown for text in list_texts(message[key]))
    ]
    return list(dict.fromkeys(hidden))


def list_texts(value: Any) -> list[str]:
    """The prose in a value, or in the lists and objects that it is made of."""
    return [leaf for leaf in list_leaves(value) if isinstance(leaf, str) and is_prose(leaf)]


def is_prose(text: str) -> bool:
    """A text of several words; one word is a mark (closed_qa), a name or an address."""
    words = [word for word in text.split(maxsplit=20) if any(map(str.isalpha, word))]
    return len(words) > 1 or sum(not letter.isascii() for letter in text[:1000]) >= MIN_UNSPACED
