"""Which texts of a row are not trained: in columns that no format reads, in keys that no template shows."""

from typing import Any

from utils.data.cells import is_metadata
from utils.data.preferences import REJECTED
from utils.messages import UNTRAINED, Chat, Messages, Row

LEFT_OUT = ("rejected", *REJECTED)  # said with the format
SHOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", UNTRAINED}  # of a turn
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


def find_unread(row: WatchedRow, chat: Chat) -> tuple[str, ...]:
    """Columns with a text that is in no message: not read, and no copy of one or of the whole chat."""
    left = [
        (name, text.strip())
        for name, value in row.items()
        if name not in row.read and name not in LEFT_OUT and not is_metadata(name)
        for text in list_texts(value)
    ]
    if not left:
        return ()
    said = [message["content"] for message in chat.messages]
    own = [row[name] for name in row.read.copy() if isinstance(row.get(name), str)]
    parts = [text.strip() for text in own if any(text.strip() in content for content in said)] or said
    return tuple(
        dict.fromkeys(
            name
            for name, text in left
            if not any(text in content for content in said) and not all(part in text for part in parts)
        )
    )


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
    if isinstance(value, str):
        return [value] if is_prose(value) else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in list_texts(part)]


def is_prose(text: str) -> bool:
    """A text of several words; one word is a mark (closed_qa), a name or an address."""
    words = [word for word in text.split(maxsplit=20) if any(map(str.isalpha, word))]
    return len(words) > 1 or sum(not letter.isascii() for letter in text[:1000]) >= MIN_UNSPACED
