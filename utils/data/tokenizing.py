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

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from utils.arguments import DataArguments
from utils.console import UserError, is_main_process, notice
from utils.data.cache import find_or_build, hash_code
from utils.data.rows import PARTS, Rows
from utils.data.scanning import LISTED_ROWS
from utils.data.token_rows import TokenRows, TokenWriter, open_rows
from utils.data.unread import find_hidden
from utils.models.encoding import Pieces, encode_rows, find_own_bos
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.answer_spans import RenderedRow, find_input_marker, has_inner_stop, split_chat
from utils.prompts.messages import LEARNED, TEXT_ROLE, Chat, Messages
from utils.prompts.rendering import choose_thoughts, has_thought

LENGTH_STEP = 64
LISTED_FINDINGS = 30  # a template may name each row in its reason
CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 2_000_000

NumberedChat = tuple[str, int, int, Chat]  # part, index of the source, number of the row in it, the chat
Note = Callable[[str], None]  # counts a finding of one row


@dataclass
class TokenizingCounts:
    """What is counted while one part is tokenized; each finding keeps the numbers of its first rows."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    uncut: Counter[int] = field(default_factory=Counter)  # lengths before any cut, rounded up -> rows

    def note(self, number: int, what: str) -> None:
        if what.startswith(REFUSAL) and what not in self.counts and len(self.counts) >= LISTED_FINDINGS:
            what = REFUSED
        self.counts[what] = self.counts.get(what, 0) + 1
        if len(self.rows.setdefault(what, [])) < LISTED_ROWS:
            self.rows[what].append(number)


# Findings, as the report names them.
TOO_LONG = "dropped: too long"
REFUSAL = "dropped: the chat template"  # begins what a template says of a row
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
HIDDEN = "rows with a text that the template does not show: "
LITERAL_NONE = "rows with the literal None as a text"
THOUGHT = "rows with a thought in a trained answer"
NO_THOUGHT = "rows without thoughts"
THOUGHT_LEFT = "rows whose thoughts --thinking off leaves out"
NOT_THOUGHT = "dropped: no thought in it, and --thinking on trains none without"


def tokenize_rows(rows: Rows, tokenizer: ChatTokenizer, data_args: DataArguments) -> dict[str, TokenRows]:
    """TokenRows of every part of the run, from the cache where the same work was done before."""
    raw = tokenizer.raw
    backend = getattr(raw, "backend_tokenizer", None)
    encoder = ChatEncoder(tokenizer, data_args)
    folder, cached = find_or_build(
        "tokens",
        lambda beside: write_parts(beside, rows, encoder),
        rows=rows.describe(),
        tokenizer=backend.to_str() if backend else repr(sorted(raw.get_vocab().items())),
        template=raw.chat_template,
        special=[str(raw.special_tokens_map), tokenizer.stop_ids],
        limits=[data_args.source_max_len, data_args.target_max_len, data_args.model_max_length],
        how=[data_args.truncation, data_args.train_on_source, data_args.train_last_turn_only],
        thinking=tokenizer.thinking,
        code=hash_code(__name__),
    )
    if cached:
        notice(f"tokenized rows are read from {folder}")
    return {part: open_rows(folder / part) for part in PARTS[1:]}


def write_parts(folder: Path, rows: Rows, encoder: "ChatEncoder") -> None:
    writers = {part: TokenWriter(folder / part) for part in PARTS[1:]}
    chats = tqdm(
        rows.read(find_input_marker(encoder.tokenizer.raw)),
        total=sum(map(rows.count, PARTS[1:])),
        unit="row",
        desc="tokenizing",
        disable=not (is_main_process() and sys.stderr.isatty()),
    )
    for part, source, number, signed in encoder.encode(chats):
        writers[part].append(signed, source, number)
    for part, writer in writers.items():
        writer.close(vars(encoder.counts[part]))


@dataclass(frozen=True)
class ChatEncoder:
    """Makes rows of token ids from chats, and counts for each part of the run what was cut or left out."""

    tokenizer: ChatTokenizer
    data_args: DataArguments
    counts: dict[str, TokenizingCounts] = field(
        default_factory=lambda: {part: TokenizingCounts() for part in PARTS[1:]}
    )

    def encode(self, chats: Iterable[NumberedChat]) -> Iterator[tuple[str, int, int, np.ndarray]]:
        """(part, source, number, signed ids as in TokenRows) of each row."""
        with ThreadPoolExecutor(max_workers=1) as beside:
            jobs = (self.render_chunk(chunk, beside) for chunk in cut_chunks(chats))
            # A pair asks for its second job before it gives the first: one is encoded, the next rendered.
            for job, _ in itertools.pairwise(itertools.chain(jobs, [None])):
                assert job is not None
                yield from self.finish_chunk(*job)

    def render_chunk(
        self, chunk: list[NumberedChat], beside: Executor
    ) -> tuple[list[tuple[NumberedChat, RenderedRow]], Future[list[tuple[Pieces, int]]]]:
        """The rows of these chats, each beside its chat, and their encoding, which is under way."""
        rendered = []
        for numbered in chunk:
            part, _, number, chat = numbered
            note = functools.partial(self.counts[part].note, number)
            rendered += [(numbered, row) for row in self.render(chat, note)]
        return rendered, beside.submit(encode_rows, self.tokenizer.raw, [row for _, row in rendered])

    def render(self, chat: Chat, note: Note) -> list[RenderedRow]:
        stops, thinking = self.tokenizer.stops, self.tokenizer.thinking
        if thinking == "off" and any(map(has_thought, chat.messages)):
            note(THOUGHT_LEFT)
        if thinking != "auto":
            chat = replace(chat, messages=choose_thoughts(chat.messages, thinking))
        try:
            rendered = split_chat(self.tokenizer.raw, chat, stops, self.data_args.train_last_turn_only)
        except UserError as error:  # with the template's own reason
            note(f"dropped: {error}".splitlines()[0])
            return []
        if any(len(message) > 2 for message in chat.messages):
            for key in find_hidden(chat.messages, "".join(row.text for row in rendered)):
                note(HIDDEN + key)
        thinks = any(has_thought(message) for message in chat.messages if message.get(LEARNED, True))
        if thinks:
            note(THOUGHT)
        elif thinking != "on" and rendered and self.tokenizer.style.is_thinking:
            note(NO_THOUGHT)
        if has_inner_stop(chat.messages, stops):
            note(STOP_INSIDE)
        if not rendered:
            note(NOT_THOUGHT if thinking == "on" and not thinks else NO_LABELS)
        if any(message["content"].strip() in ("None", "null", "nan") for message in chat.messages):
            note(LITERAL_NONE)
        return rendered

    def finish_chunk(
        self, rendered: list[tuple[NumberedChat, RenderedRow]], encoding: Future[list[tuple[Pieces, int]]]
    ) -> Iterator[tuple[str, int, int, np.ndarray]]:
        """The encoded rows, within the limits and with what is trained of them."""
        for (numbered, row), (pieces, splits) in zip(rendered, encoding.result(), strict=True):
            part, source, number, chat = numbered
            note = functools.partial(self.counts[part].note, number)
            length = sum(len(ids) for ids, _ in pieces)
            self.counts[part].uncut[-(-length // LENGTH_STEP) * LENGTH_STEP] += 1
            if splits:
                note(TOKEN_SPLIT)
            for fitted in self.cut_to_limits(pieces, row, chat, note):
                signed = self.mark_untrained(fitted)
                if (signed[1:] >= 0).any():
                    self.note_ends(fitted, row, note)
                    yield part, source, number, signed
                else:
                    note(NO_LABELS)

    def cut_to_limits(
        self, pieces: Pieces, row: RenderedRow, chat: Chat, note: Note, is_piece: bool = False
    ) -> Iterator[Pieces]:
        """The row as rows within the limits: as it is, cut, split between its turns, or not at all.

        `is_piece`: of a longer chat, which was split. So it is no single turn, and only the sum of the limits
        counts for it too.
        """
        limit, data_args = self.data_args.max_len, self.data_args
        if row.messages[0]["role"] == TEXT_ROLE:
            ids = pieces[0][0]
            for start in range(0, len(ids), limit):
                yield [(ids[start : start + limit], True)]
            return
        sizes = [len(ids) for ids, _ in pieces]
        is_single = len(pieces) == 2 and not (is_piece or row.turn_by_turn or data_args.model_max_length)
        if is_single and sizes[0] <= data_args.source_max_len and sizes[1] <= data_args.target_max_len:
            yield pieces
        elif not is_single and sum(sizes) <= limit:
            yield pieces
        elif data_args.truncation == "drop":
            note(TOO_LONG)
        else:
            system, exchanges = split_exchanges(row.messages)
            if len(exchanges) == 1:
                yield cut_exchange(pieces, self.choose_room(sizes, is_single), self.tokenizer.raw, note)
                return
            newest_only = row.turn_by_turn or data_args.train_last_turn_only
            kept = [exchanges[-count_fitting(exchanges[::-1], limit / sum(sizes)) :]]
            if not newest_only and data_args.truncation == "prompt":
                first = count_fitting(exchanges, limit / sum(sizes))
                kept = [exchanges[:first], exchanges[first:]]
            if not is_piece:
                note(TURNS_CUT if len(kept) == 1 else CHAT_SPLIT)
            for part in kept:
                messages = system + [message for exchange in part for message in exchange]
                yield from self.encode_piece(Chat(messages, chat.tools), newest_only, note)

    def encode_piece(self, chat: Chat, last_only: bool, note: Note) -> Iterator[Pieces]:
        """The rows of a piece of a chat that was too long, each within the limits."""
        rows = split_chat(self.tokenizer.raw, chat, self.tokenizer.stops, last_only)
        for row, (pieces, _) in zip(rows, encode_rows(self.tokenizer.raw, rows), strict=True):
            yield from self.cut_to_limits(pieces, row, chat, note, is_piece=True)

    def choose_room(self, sizes: list[int], is_single: bool) -> tuple[int, int]:
        """Tokens left to the prompt and to what follows it."""
        if is_single:
            return self.data_args.source_max_len, self.data_args.target_max_len
        limit = self.data_args.max_len
        prompt = min(sizes[0], max(limit - sum(sizes[1:]), limit // 2))
        return prompt, limit - prompt

    def mark_untrained(self, pieces: Pieces) -> np.ndarray:
        """Token ids, complemented where they are not trained  # int32 [tokens]"""
        signed = []
        for ids, answer in pieces:
            own = np.array(ids, np.int32)
            is_label = answer or (self.data_args.train_on_source and answer is not None)
            signed.append(own if is_label else ~own)
        return np.concatenate(signed)

    def note_ends(self, pieces: Pieces, row: RenderedRow, note: Note) -> None:
        """Count what the first and the last tokens of a row tell."""
        if pieces[-1][0][-1] not in self.tokenizer.stop_ids and row.messages[0]["role"] != TEXT_ROLE:
            note(NO_STOP)
        front = pieces[0][0][:2]
        if front == front[::-1] and front == [self.tokenizer.raw.bos_token_id] * 2:
            note(TWO_BOS)
        if row.turn_by_turn:
            note(TURN_BY_TURN)


def cut_exchange(pieces: Pieces, room: tuple[int, int], tokenizer: Any, note: Note) -> Pieces:
    """The prompt without its beginning (a BOS stays), what follows without its end: that of an answer."""
    (prompt, trained), *rest = pieces
    if len(prompt) > room[0]:
        note(PROMPT_CUT)
        front = prompt[:1] if begins_with_bos(prompt, tokenizer) and room[0] > 1 else []
        prompt = front + prompt[len(prompt) - room[0] + len(front) :]
    kept, left = [(prompt, trained)], room[1]
    for ids, answer in rest:
        if len(ids) > left:
            note(ANSWER_CUT)
            if answer and left:
                kept.append((ids[:left], answer))
            break
        kept.append((ids, answer))
        left -= len(ids)
    return kept


def begins_with_bos(prompt: list[int], tokenizer: Any) -> bool:
    """Whether a BOS opens the whole prompt. SmolLM2's opens each turn: kept, it would be half of a header."""
    bos = tokenizer.bos_token_id
    return prompt[0] == bos and (prompt.count(bos) == 1 or find_own_bos(tokenizer) == [bos])


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


def cut_chunks(chats: Iterable[NumberedChat]) -> Iterator[list[NumberedChat]]:
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
