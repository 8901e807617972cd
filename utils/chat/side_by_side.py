"""Two texts beside each other in the terminal, row by row as they grow."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest


def measure_width(text: str) -> int:
    """Columns of a terminal that `text` takes; a Chinese character takes two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def wrap_text(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at blanks where there are any. Earlier lines never change."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for character in paragraph:
            if measure_width(line + character) > width:
                head, blank, tail = line.rpartition(" ")
                lines.append(head if blank and character != " " else line)
                line = tail if blank and character != " " else ""
                character = "" if character == " " else character
            line += character
        lines.append(line)
    return lines


def stream_side_by_side(pieces: Iterable[Sequence[str]], width: int) -> Iterator[str]:
    """Rows `left | right` of two growing texts, each as soon as neither side of it can change."""
    texts, shown = ["", ""], 0
    column = (width - 3) // 2

    def rows(end: bool) -> list[tuple[str, str]]:
        left, right = (wrap_text(text.lstrip(), column) for text in texts)
        if end:
            return list(zip_longest(left, right, fillvalue=""))
        return list(zip(left[:-1], right[:-1], strict=False))

    def join(left: str, right: str) -> str:
        return f"{left}{' ' * (column - measure_width(left))} | {right}".rstrip()

    for pair in pieces:
        texts = [text + piece for text, piece in zip(texts, pair, strict=True)]
        ready = rows(end=False)
        yield from (join(*row) for row in ready[shown:])
        shown = max(shown, len(ready))
    yield from (join(*row) for row in rows(end=True)[shown:])
