"""Rendered chats -> token ids, cut where answers begin and end.

A chat is tokenized once and as a whole, as a server does it: in "### Response: The sky" the answer's first
token is then " The", which the base has seen everywhere, and not "The" behind a lone blank, which it has seen
nowhere (1.3 to 1.4 times the loss). Where an answer begins follows from characters alone (answer_spans.py).
Where a token would reach across that border (a newline of the prompt merges with one of the answer), the text
is split there and tokenized apart: the prompt of a chat must not depend on the reply that follows it.
"""

import functools
from typing import Any

from utils.prompts.answer_spans import RenderedRow

# (token ids, whether they are trained); None: never, whatever --train_on_source says
Pieces = list[tuple[list[int], bool | None]]
GLUES = ("\n", "\x01")  # characters that hardly any vocabulary merges with what follows


def encode_rows(tokenizer: Any, rows: list[RenderedRow]) -> list[tuple[Pieces, int]]:
    """(pieces, borders where a token had to be split) of each row; a fast tokenizer uses every core."""
    bos = find_own_bos(tokenizer)
    encoded = []
    for row, encoding in zip(rows, encode_batch(tokenizer, [row.text for row in rows]), strict=True):
        # Cut at both ends of each answer; what a piece is follows from the character that it begins with.
        bounds = sorted({0, len(row.text), *(bound for answer in row.answers for bound in answer)})
        ids, splits = cut_at_borders(tokenizer, row.text, bounds[1:-1], encoding)
        if bos and ids[0][:1] != bos:
            ids[0] = bos + ids[0]
        kinds: dict[int, bool | None] = {start: None for start, _ in row.never}
        kinds |= {start: True for start, _ in row.trained}
        encoded.append(([(own, kinds.get(at, False)) for own, at in zip(ids, bounds, strict=False)], splits))
    return encoded


def find_own_bos(tokenizer: Any) -> list[int]:
    """[the BOS] where this tokenizer puts one before any text, [] where it does not."""
    front = tokenizer("").input_ids[:1]
    return front if front == [tokenizer.bos_token_id] else []


def encode_batch(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Encodings (ids and offsets) without special tokens added; of a slow tokenizer lists of ids."""
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer(texts, add_special_tokens=False).input_ids
    return copy_backend(tokenizer).encode_batch(texts, add_special_tokens=False)


@functools.cache
def copy_backend(tokenizer: Any) -> Any:
    """The tokenizers.Tokenizer behind a fast tokenizer, whose offsets tell where each token lies."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    # It adds special tokens, and that of byte-level BPE takes blanks out of the offsets of their tokens.
    backend.post_processor = None
    return backend


def cut_at_borders(
    tokenizer: Any, text: str, borders: list[int], encoding: Any = None
) -> tuple[list[list[int]], int]:
    """Token ids of `text` cut at `borders` (characters), and at how many of them a token had to be split."""
    ids, cuts = find_cuts(tokenizer, text, borders, encoding)
    if None not in cuts:
        bounds = [0, *cuts, len(ids)]
        return [ids[start:end] for start, end in zip(bounds, bounds[1:], strict=False)], 0
    middle = borders[cuts.index(None)]
    head, splits = cut_at_borders(tokenizer, text[:middle], [b for b in borders if b < middle])
    tail, more = encode_continuation(tokenizer, text[middle:], [b - middle for b in borders if b > middle])
    return head + tail, splits + more + 1


def find_cuts(
    tokenizer: Any, text: str, borders: list[int], encoding: Any = None
) -> tuple[list[int], list[int | None]]:
    """Token ids of `text`, and of each border how many of them stand before it; None where one crosses it."""
    encoding = encode_batch(tokenizer, [text])[0] if encoding is None else encoding
    if not isinstance(encoding, list):
        cuts = [find_cut(encoding, border, len(text)) for border in borders]
        for i, border in enumerate(borders):
            if text[:border][-2:].isspace() and looks_ahead(tokenizer) and border < len(text):
                head = encode_batch(tokenizer, [text[:border]])[0].ids
                cuts[i] = cuts[i] if encoding.ids[: cuts[i]] == head else None
        return encoding.ids, cuts
    # A slow tokenizer knows no offsets: what stands before a border is tokenized by itself.
    heads = [tokenizer(text[:border], add_special_tokens=False).input_ids for border in borders]
    return encoding, [len(head) if encoding[: len(head)] == head else None for head in heads]


@functools.cache
def looks_ahead(tokenizer: Any) -> bool:
    """Whether two newlines are other tokens where a word follows them, as GPT-2's and SmolLM2's rule has it.

    A server's prompt ends in such newlines (LLaMA-3's template, Qwen3's empty thought) and no word follows.
    """
    alone, followed = (encoding.ids for encoding in encode_batch(tokenizer, ["a\n\n", "a\n\nb"]))
    return followed[: len(alone)] != alone


def find_cut(encoding: Any, border: int, end: int) -> int | None:
    """How many tokens stand before the character `border`; None where one reaches across it.

    The bytes of one character share its offsets, and a dummy prefix may have none of its own.
    """
    found = (encoding.char_to_token(character) for character in range(border, end))
    index = next((token for token in found if token is not None), len(encoding))
    if index < len(encoding) and encoding.token_to_chars(index)[0] < border:
        return None
    while index and encoding.token_to_chars(index - 1)[0] >= border:
        index -= 1
    return index


def encode_continuation(tokenizer: Any, text: str, borders: list[int]) -> tuple[list[list[int]], int]:
    """cut_at_borders for text that continues another: without the blank that LLaMA's tokenizer opens with."""
    for glue in GLUES if has_dummy_prefix(tokenizer) else ():
        if find_cuts(tokenizer, glue + text, [len(glue)])[1] != [None]:
            shifted = [len(glue), *(border + len(glue) for border in borders)]
            (_, *pieces), splits = cut_at_borders(tokenizer, glue + text, shifted)
            return pieces, splits
    return cut_at_borders(tokenizer, text, borders)


def has_dummy_prefix(tokenizer: Any) -> bool:
    first = tokenizer("a", add_special_tokens=False).input_ids[:1]
    return tokenizer.convert_ids_to_tokens(first)[0].startswith(("▁", "Ġ"))
