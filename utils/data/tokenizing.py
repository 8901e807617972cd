"""Chats -> token ids and labels, within the limits of --source_max_len and --target_max_len.

A chat is rendered to one text by its template, and the text is tokenized as a whole
(utils/models/encoding.py). Tokens of answers and of the stop behind them are trained, all others are only
read:

    <|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n
                                                             ^^^^^^^^^^^ trained

What is too long is split between two exchanges, then cut, and every cut is counted for the data report. This
process renders while the tokenizer's threads encode the chunk before; the result is kept on disk under a hash
of the rows, the limits, the tokenizer and the code that made it.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from utils.arguments import DataArguments
from utils.console import UserError, is_main_process, notice
from utils.data.cache import build_key, find_or_build, hash_code
from utils.data.rows import PARTS, Rows
from utils.data.scanning import LISTED_ROWS
from utils.data.token_rows import TokenRows, TokenWriter, open_rows
from utils.messages import TEXT_ROLE, Chat, Messages
from utils.models.encoding import Pieces, encode_rows
from utils.models.tokenizer import ChatTokenizer
from utils.prompts import RenderedRow, find_input_marker, has_inner_stop, split_chat

LENGTH_STEP = 64
LISTED_FINDINGS = 30  # a template may name each row in its reason
CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 2_000_000


@dataclass
class Found:
    """What is counted while one part is tokenized; each finding keeps the numbers of its first rows."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    uncut: Counter[int] = field(default_factory=Counter)  # lengths before any cut, rounded up -> rows

    def note(self, what: str, number: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        if len(self.rows.setdefault(what, [])) < LISTED_ROWS:
            self.rows[what].append(number)


# Findings, as the report names them.
TOO_LONG = "dropped: too long"
REFUSED = "dropped: refused by the chat template for other reasons"
NO_LABELS = "dropped: nothing to train on"
PROMPT_CUT = "prompts that lost their beginning"
ANSWER_CUT = "answers that lost their end and stop token"
TURNS_CUT = "chats that lost their oldest turns"
CHAT_SPLIT = "chats split between their turns"
TURN_BY_TURN = "rows rendered turn by turn"
NO_STOP = "rows without a stop token in their labels"
STOP_INSIDE = "answers that hold a stop token and are trained up to it"
TOKEN_SPLIT = "rows where a token was split, as it reached from a prompt into its answer"
TWO_BOS = "rows with two BOS at the front"
LITERAL_NONE = "rows with the literal None as a text"


def tokenize_rows(rows: Rows, tokenizer: ChatTokenizer, data_args: DataArguments) -> dict[str, TokenRows]:
    """TokenRows of every part of the run, from the cache where the same work was done before."""
    raw = tokenizer.raw
    backend = getattr(raw, "backend_tokenizer", None)
    key = build_key(
        rows=rows.describe(),
        tokenizer=backend.to_str() if backend else repr(sorted(raw.get_vocab().items())),
        template=raw.chat_template,
        special=[str(raw.special_tokens_map), tokenizer.stop_ids],
        limits=[data_args.source_max_len, data_args.target_max_len, data_args.model_max_length],
        how=[data_args.truncation, data_args.train_on_source, data_args.train_last_turn_only],
        code=hash_code(__name__),
    )
    maker = RowMaker(tokenizer, data_args)
    folder, cached = find_or_build("tokens", key, lambda beside: write_parts(beside, rows, maker))
    if cached:
        notice(f"tokenized rows are read from {folder}")
    return {part: open_rows(folder / part) for part in PARTS[1:]}


def write_parts(folder: Path, rows: Rows, maker: "RowMaker") -> None:
    writers = {part: TokenWriter(folder / part) for part in PARTS[1:]}
    found = {part: Found() for part in PARTS[1:]}
    total = sum(rows.count(part) for part in PARTS[1:])
    bar = tqdm(
        total=total, unit="row", desc="tokenizing", disable=not (is_main_process() and sys.stderr.isatty())
    )
    with bar:
        chats = rows.read(find_input_marker(maker.tokenizer.raw))
        for part, source, number, signed in maker.make_rows(chats, found, bar):
            writers[part].append(signed, source, number)
    for part, writer in writers.items():
        writer.close(vars(found[part]))


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of signed token ids (see TokenRows) from chats."""

    tokenizer: ChatTokenizer
    data_args: DataArguments

    def make_rows(
        self, chats: Iterable[tuple[str, int, int, Chat]], found: dict[str, Found], bar: Any
    ) -> Iterator[tuple[str, int, int, np.ndarray]]:
        """(part, source, number, signed ids) of each row. While one chunk is encoded the next is rendered."""
        with ThreadPoolExecutor(max_workers=1) as beside:
            waiting = None
            for chunk in cut_chunks(chats):
                rendered = [self.render(part, number, chat, found) for part, _, number, chat in chunk]
                encoding = beside.submit(
                    encode_rows, self.tokenizer.raw, [row for rows in rendered for row in rows]
                )
                if waiting:
                    yield from self.finish(*waiting, found, bar)
                waiting = (chunk, rendered, encoding)
            if waiting:
                yield from self.finish(*waiting, found, bar)

    def render(self, part: str, number: int, chat: Chat, found: dict[str, Found]) -> list[RenderedRow]:
        stops = self.tokenizer.stops
        try:
            rendered = split_chat(self.tokenizer.raw, chat, stops, self.data_args.train_last_turn_only)
        except UserError as error:  # with the template's own reason
            reason = f"dropped: {error}".splitlines()[0]
            listed = reason in found[part].counts or len(found[part].counts) < LISTED_FINDINGS
            found[part].note(reason if listed else REFUSED, number)
            return []
        if has_inner_stop(chat.messages, stops):
            found[part].note(STOP_INSIDE, number)
        if not rendered:
            found[part].note(NO_LABELS, number)
        if any(message["content"].strip() in ("None", "null", "nan") for message in chat.messages):
            found[part].note(LITERAL_NONE, number)
        return rendered

    def finish(
        self,
        chunk: list[Any],
        rendered: list[list[RenderedRow]],
        encoding: Any,
        found: dict[str, Found],
        bar: Any,
    ) -> Iterator[tuple[str, int, int, np.ndarray]]:
        encoded = iter(encoding.result())
        for (part, source, number, chat), rows in zip(chunk, rendered, strict=True):
            for row in rows:
                pieces, splits = next(encoded)
                length = sum(len(own) for own, _ in pieces)
                found[part].uncut[-(-length // LENGTH_STEP) * LENGTH_STEP] += 1
                if splits:
                    found[part].note(TOKEN_SPLIT, number)
                for fitted in self.fit(pieces, row, chat, number, found[part]):
                    signed = self.sign(fitted)
                    if (signed[1:] >= 0).any():
                        self.check(fitted, row, number, found[part])
                        yield part, source, number, signed
                    else:
                        found[part].note(NO_LABELS, number)
        bar.update(len(chunk))

    def fit(
        self, pieces: Pieces, row: RenderedRow, chat: Chat, number: int, found: Found, noted: bool = False
    ) -> Iterator[Pieces]:
        """The pieces as rows within the limits: as they are, cut, split, or not at all. Notes what it did."""
        limit, data_args = self.data_args.max_len, self.data_args
        if row.messages[0]["role"] == TEXT_ROLE:
            ids = pieces[0][0]
            for start in range(0, len(ids), limit):
                yield [(ids[start : start + limit], True)]
            return
        sizes = [len(ids) for ids, _ in pieces]
        # A piece of a longer chat is none of a single turn: only the sum of the limits counts for it too.
        single = len(pieces) == 2 and not (noted or row.turn_by_turn or data_args.model_max_length)
        if single and sizes[0] <= data_args.source_max_len and sizes[1] <= data_args.target_max_len:
            yield pieces
        elif not single and sum(sizes) <= limit:
            yield pieces
        elif data_args.truncation == "drop":
            found.note(TOO_LONG, number)
        else:
            system, exchanges = split_exchanges(row.messages)
            if len(exchanges) == 1:
                yield cut_exchange(pieces, self.choose_room(sizes, single), self.tokenizer.raw, number, found)
                return
            newest_only = row.turn_by_turn or data_args.train_last_turn_only
            kept = [exchanges[-count_fitting(exchanges[::-1], limit / sum(sizes)) :]]
            if not newest_only and data_args.truncation == "prompt":
                first = count_fitting(exchanges, limit / sum(sizes))
                kept = [exchanges[:first], exchanges[first:]]
            if not noted:
                found.note(TURNS_CUT if len(kept) == 1 else CHAT_SPLIT, number)
            for part in kept:
                messages = system + [message for exchange in part for message in exchange]
                yield from self.refit(Chat(messages, chat.tools), newest_only, number, found)

    def refit(self, chat: Chat, last_only: bool, number: int, found: Found) -> Iterator[Pieces]:
        rows = split_chat(self.tokenizer.raw, chat, self.tokenizer.stops, last_only)
        for row, (pieces, _) in zip(rows, encode_rows(self.tokenizer.raw, rows), strict=True):
            yield from self.fit(pieces, row, chat, number, found, noted=True)

    def choose_room(self, sizes: list[int], single: bool) -> tuple[int, int]:
        """Tokens left to the prompt and to what follows it."""
        if single:
            return self.data_args.source_max_len, self.data_args.target_max_len
        limit = self.data_args.max_len
        prompt = min(sizes[0], max(limit - sum(sizes[1:]), limit // 2))
        return prompt, limit - prompt

    def sign(self, pieces: Pieces) -> np.ndarray:
        """Token ids, complemented where they are not trained  # int32 [tokens]"""
        signed = np.array([token for ids, _ in pieces for token in ids], np.int32)
        start = 0
        for ids, answer in pieces:
            if not (answer or (self.data_args.train_on_source and answer is not None)):
                np.invert(signed[start : start + len(ids)], out=signed[start : start + len(ids)])
            start += len(ids)
        return signed

    def check(self, pieces: Pieces, row: RenderedRow, number: int, found: Found) -> None:
        if pieces[-1][0][-1] not in self.tokenizer.stop_ids and row.messages[0]["role"] != TEXT_ROLE:
            found.note(NO_STOP, number)
        if pieces[0][0][:2] == [self.tokenizer.raw.bos_token_id] * 2:
            found.note(TWO_BOS, number)
        if row.turn_by_turn:
            found.note(TURN_BY_TURN, number)


def cut_exchange(pieces: Pieces, room: tuple[int, int], tokenizer: Any, number: int, found: Found) -> Pieces:
    """The prompt without its beginning (a BOS stays), what follows without its end: that of an answer."""
    (prompt, trained), *rest = pieces
    if len(prompt) > room[0]:
        found.note(PROMPT_CUT, number)
        front = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room[0] > 1 else []
        prompt = front + prompt[len(prompt) - room[0] + len(front) :]
    kept, left = [(prompt, trained)], room[1]
    for ids, answer in rest:
        if len(ids) > left:
            found.note(ANSWER_CUT, number)
            if answer and left:
                kept.append((ids[:left], answer))
            break
        kept.append((ids, answer))
        left -= len(ids)
    return kept


def split_exchanges(messages: Messages) -> tuple[Messages, list[Messages]]:
    """(system messages at the front, the rest cut before each user message but the first)."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[Messages] = [[]]
    for message in messages[start:]:
        if message["role"] == "user" and any(kept["role"] == "user" for kept in exchanges[-1]):
            exchanges.append([])
        exchanges[-1].append(message)
    return messages[:start], exchanges


def count_fitting(exchanges: list[Messages], share: float) -> int:
    """How many exchanges from the front make up this share of the text: at least one, never all."""
    sizes = [sum(len(message["content"]) for message in exchange) for exchange in exchanges]
    room, count = share * sum(sizes), 0
    while count < len(sizes) - 1 and (count == 0 or sizes[count] <= room):
        room -= sizes[count]
        count += 1
    return count


def cut_chunks(
    chats: Iterable[tuple[str, int, int, Chat]],
) -> Iterator[list[tuple[str, int, int, Chat]]]:
    """Lists of chats that are encoded together: bounded in rows and in text."""
    chunk, characters = [], 0
    for item in chats:
        chunk.append(item)
        characters += sum(len(message["content"]) for message in item[3].messages)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
