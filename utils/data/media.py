"""Rows with pictures, sound or film: a text model would learn to answer what it cannot see."""

import re
from typing import Any

from utils.console import UserError

COLUMNS = ("images", "image", "audios", "audio", "videos", "video", "objects")
TAG = re.compile(r"<(image|audio|video)>")


def check_media(row: dict[str, Any], texts: list[str]) -> None:
    """Raises UserError for a row that names media, or whose `texts` stand around their tags."""
    column = next((name for name in COLUMNS if row.get(name)), None)
    if column is not None:
        raise UserError(f"column {column!r} names media: only text is trained")
    tag = next((found.group() for text in texts if (found := TAG.search(text))), None)
    if tag is not None:
        raise UserError(f"the text stands around a {tag}: only text is trained")
