"""Which texts of a row are not trained: columns that its format does not read."""

from typing import Any

from utils.data.cells import is_metadata
from utils.data.preferences import REJECTED
from utils.messages import Chat, Row

LEFT_OUT = ("rejected", *REJECTED)  # said with the format
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
        (name, value.strip())
        for name, value in row.items()
        if name not in row.read and name not in LEFT_OUT and not is_metadata(name) and is_prose(value)
    ]
    if not left:
        return ()
    said = [message["content"] for message in chat.messages]
    own = [row[name] for name in row.read.copy() if isinstance(row.get(name), str)]
    parts = [text.strip() for text in own if any(text.strip() in content for content in said)] or said
    return tuple(
        name
        for name, text in left
        if not any(text in content for content in said) and not all(part in text for part in parts)
    )


def is_prose(value: Any) -> bool:
    """A text of several words; one word is a mark (closed_qa), a name or an address."""
    if not isinstance(value, str):
        return False
    words = [word for word in value.split(maxsplit=20) if any(map(str.isalpha, word))]
    return len(words) > 1 or sum(not letter.isascii() for letter in value[:1000]) >= MIN_UNSPACED
