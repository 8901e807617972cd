"""A reply as it is generated, piece by piece.

reply = open_reply(chat, messages, generation_args)
for piece in stream_text(chat.tokenizer, reply): ...     # closing the iterator cancels the reply
reply.describe(), reply.finish_reason
"""

from collections.abc import Generator, Iterable, Iterator, Sequence

import torch
from transformers import TextStreamer

from utils.arguments import GenerationArguments
from utils.chat.generation import ChatModel, build_generation_config
from utils.decode.reply import Reply
from utils.models.tokenizer import ChatTokenizer, drop_cut_character
from utils.prompts.messages import Chat, Messages


def open_reply(
    chat: ChatModel,
    messages: Messages | Chat,
    generation_args: GenerationArguments,
    tuned: bool = True,
    max_seconds: float | None = None,
    seed: int | None = None,
) -> Reply:
    """Begin the reply to `messages`. `tuned` False: by the base without its adapter."""
    prompt = chat.tokenizer.encode_prompt(messages)
    config = build_generation_config(generation_args, chat.tokenizer)
    return chat.decoder.reply(prompt, config, tuned, seed, max_seconds, generation_args.prompt_lookup)


def stream_text(tokenizer: ChatTokenizer, reply: Reply, stops: Sequence[str] = ()) -> Generator[str]:
    """Pieces of its text, without the stop token or what comes from one of `stops` on.

    A thought comes first, in <think> tags.
    """
    written = tokenizer.tag(decode_pieces(tokenizer, reply.tokens()))
    pieces = cut_at_stops(drop_leading_blanks(written), stops, reply)
    if reply.config.num_beams > 1:  # final only at the end
        pieces = iter(["".join(pieces)])
    try:
        yield from pieces
    finally:
        reply.cancel()


class WholeWords(TextStreamer):
    """Collects text up to the last blank; Chinese characters one by one."""

    def __init__(self, tokenizer: ChatTokenizer):
        super().__init__(tokenizer.raw, skip_special_tokens=tokenizer.skips_special)
        self.found = ""

    def put(self, value: torch.Tensor) -> None:
        """A newline empties the cache of tokens, and LLaMA's decoder takes a blank from what comes first."""
        super().put(value)
        if not self.token_cache:
            self.token_cache = value.tolist()
            self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.found += text

    def take(self) -> str:
        text, self.found = self.found, ""
        return text


def decode_pieces(tokenizer: ChatTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text of the tokens of a reply, up to its stop token, special or not."""
    words, came_to_stop = WholeWords(tokenizer), False
    for token in tokens:
        came_to_stop = token in tokenizer.stop_ids
        if not came_to_stop:
            words.put(torch.tensor([token]))
            yield words.take()
    words.end()
    yield words.take() if came_to_stop else drop_cut_character(words.take())


def drop_leading_blanks(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces without the blanks before the first word: they belong to the template, not to the reply."""
    begun = False
    for piece in pieces:
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        if piece:
            yield piece


def cut_at_stops(pieces: Iterable[str], stops: Sequence[str], reply: Reply) -> Iterator[str]:
    """The pieces up to the first of `stops`, which ends the reply. What may become one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            reply.cancel("stop")
            reply.finish_reason = "stop"  # also where all tokens had come by then
            if min(found):
                yield held[: min(found)]
            return
        ready = len(held) - count_begun(held, stops)
        piece, held = held[:ready], held[ready:]
        if piece:
            yield piece
    if held:
        yield held


def count_begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that one of `stops` begins with."""
    lengths = range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)
