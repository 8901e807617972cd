"""Rows with pictures, sound or film: a text model would learn to answer what it cannot see."""

import re
from typing import Any

from utils.console import UserError
from utils.data.cells import list_leaves

COLUMNS = ("images", "image", "audios", "audio", "videos", "video")
# A tag that stands for a file: at the edge of a line, as publishers write it; not one that a text is about.
TAG = re.compile(r"(?:^|\n)\s*<(image|audio|video)>|<(image|audio|video)>\s*(?:\n|$)")
TOKEN = re.compile(r"<\|(?:image|vision|audio|video)\w*\|>|<img>[^<\n]+</img>")
CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`", re.DOTALL)


def holds_media(value: Any) -> bool:
    """Whether a column names a file or holds one: a number, an empty struct or list does not."""
    return any(isinstance(leaf, str | bytes) and leaf for leaf in list_leaves(value))


def check_media(row: dict[str, Any], texts: list[str]) -> None:
    """Raises UserError for a row that names media, or whose `texts` stand around their tags."""
    for column in COLUMNS:
        if column in row and holds_media(row[column]):
            raise UserError(f"column {column!r} names media: only text is trained")
    for text in texts:
        tag = find_tag(text) if "<" in text else None
        if tag is not None:
            raise UserError(f"the text stands around a {tag}: only text is trained")


def find_tag(text: str) -> str | None:
    prose = CODE.sub(" ", text)
    token = TOKEN.search(prose)
    if token:
        return token.group()
    tag = TAG.search(prose)
    name = tag and (tag[1] or tag[2])
    return f"<{name}>" if name and f"</{name}>" not in prose else None
