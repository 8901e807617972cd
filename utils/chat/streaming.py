"""A reply as it is generated, piece by piece, from what the conversation's last turn left in the cache."""

import math
import os
import threading
import time
from collections.abc import Generator, Hashable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import DynamicLayer

from utils.arguments import GenerationArguments
from utils.chat.generation import ChatModel, build_generation_config
from utils.chat.model_lock import ModelLock
from utils.fast.decode_loop import stream_tokens
from utils.fast.token_choice import NotCovered, TokenChoice
from utils.messages import Messages
from utils.models.tokenizer import ChatTokenizer, drop_cut_character


@dataclass
class ConversationCache:
    """What a conversation keeps between its turns: keys and values of `ids`; and the last reply's figures.

    `reuse` False: nothing is kept, and closing a stream does not wait for the token under way.
    """

    reuse: bool = True
    ids: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    ended: str = ""  # stop, length, time or interrupted

    def describe(self) -> str:
        speed = self.new_tokens / self.seconds if self.seconds else 0.0
        return f"{self.new_tokens} tokens, {speed:.1f} tokens/s"


class ConversationCaches:
    """Keys and values of the latest conversations of several users; older ones are read anew."""

    def __init__(self, size: int):
        self.size, self.lock = size, threading.Lock()
        self.kept: dict[Hashable, ConversationCache] = {}

    def take(self, key: Hashable) -> ConversationCache:
        """What is kept of this conversation, if anything; out of everyone else's reach until put back."""
        with self.lock:
            return self.kept.pop(key, None) or ConversationCache(reuse=self.size > 0)

    def put_back(self, key: Hashable, kept: ConversationCache) -> None:
        if kept.cache is None:  # of a refused message, say: it would push out a conversation
            return
        with self.lock:
            self.kept[key] = kept
            while len(self.kept) > self.size:
                del self.kept[next(iter(self.kept))]


class ReplyStreamer(TextIteratorStreamer):
    """Text of the reply only: without the prompt and without the stop token, special or not."""

    def __init__(self, tokenizer: ChatTokenizer, kept: ConversationCache):
        super().__init__(tokenizer.raw, skip_prompt=True, skip_special_tokens=tokenizer.skips_special)
        self.stop_ids, self.kept, self.start = tokenizer.stop_ids, kept, time.perf_counter()
        self.came_to_stop = False

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.count_token()
            if value.numel() == 1 and value.item() in self.stop_ids:
                self.came_to_stop = True
                return
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if stream_end and not self.came_to_stop:
            text = drop_cut_character(text)
        super().on_finalized_text(text, stream_end)

    def count_token(self) -> None:
        self.kept.seconds = time.perf_counter() - self.start
        if self.kept.new_tokens == 0:
            self.kept.first_token_seconds = self.kept.seconds
        self.kept.new_tokens += 1


class StopOrYield(StoppingCriteria):
    """After each token: end the reply where asked or too long under way, else let the next in line go on."""

    def __init__(self, lock: ModelLock, tuned: bool, max_seconds: float | None):
        self.lock, self.tuned, self.stopped = lock, tuned, threading.Event()
        self.deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.ends(), device=input_ids.device)

    def ends(self) -> bool:
        done = self.stopped.is_set() or self.late
        if not done:
            self.lock.pass_on(self.tuned)
        return done


def stream_reply(
    chat: ChatModel,
    messages: Messages,
    generation_args: GenerationArguments,
    kept: ConversationCache | None = None,
    tuned: bool = True,
    max_seconds: float | None = None,
) -> Generator[str]:
    """Pieces of the reply as they are generated, a thought in <think> tags first. Closing it ends the reply.

    `kept` saves reading again what the last turn read. `tuned` False: the base without its adapter.
    """
    kept = ConversationCache() if kept is None else kept
    prompt = chat.tokenizer.encode_prompt(messages)
    config = build_generation_config(generation_args, chat.tokenizer)
    kept.prompt_tokens, kept.new_tokens, kept.first_token_seconds, kept.seconds = len(prompt), 0, 0.0, 0.0
    streamer = ReplyStreamer(chat.tokenizer, kept)
    between, failures = StopOrYield(chat.lock, tuned, max_seconds), []

    def generate() -> None:
        try:
            with chat.lock.hold(tuned), torch.no_grad():
                if not between.stopped.is_set():
                    lookup = generation_args.prompt_lookup
                    generate_streamed(chat, prompt, config, kept, streamer, between, lookup)
        except Exception as error:  # raised again where the reply is read
            failures.append(error)
            kept.ids, kept.cache = [], None
        streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from drop_leading_blanks(chat.tokenizer.tag(streamer))
        thread.join()
    finally:
        between.stopped.set()
        if kept.reuse:
            thread.join()
    if failures:
        raise failures[0]


def drop_leading_blanks(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces without the blanks before the first word: they belong to the template, not to the reply."""
    begun = False
    for piece in pieces:
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        if piece:
            yield piece


def generate_streamed(
    chat: ChatModel,
    prompt: list[int],
    config: GenerationConfig,
    kept: ConversationCache,
    streamer: ReplyStreamer,
    between: StopOrYield,
    lookup: int = 0,
) -> None:
    """Generate into `streamer`, from the keys and values in `kept` on; leaves there those of this turn."""
    beams = config.num_beams > 1  # final only at the end: nothing to stream before it, no one cache to keep
    cache = restore_cache(chat.model, kept, prompt) if not beams else None
    kept.reused_tokens = 0 if cache is None else cache.get_seq_length()
    choice, steps = None if cache is None else find_choice(chat, config), chat.steps
    if choice is not None and steps is not None:
        output, stop_ids = list(prompt), chat.tokenizer.stop_ids
        tokens = stream_tokens(steps, prompt, cache, choice, config.max_new_tokens, stop_ids, lookup)
        streamer.put(torch.tensor(prompt))
        with closing(tokens):
            for token in tokens:
                output.append(token)
                streamer.put(torch.tensor([token]))
                if between.ends():
                    break
    else:
        output = generate_plainly(chat, prompt, config, streamer, between, cache)
    if beams:
        streamer.on_finalized_text(chat.tokenizer.decode_written(output[len(prompt) :]))
        kept.new_tokens, kept.seconds = len(output) - len(prompt), time.perf_counter() - streamer.start
    elif cache is not None and kept.reuse:
        kept.ids, kept.cache = output[: cache.get_seq_length()], cache
    kept.ended = "interrupted" if between.stopped.is_set() else "time" if between.late else "length"
    if output[-1] in chat.tokenizer.stop_ids:
        kept.ended = "stop"


def find_choice(chat: ChatModel, config: GenerationConfig) -> TokenChoice | None:
    """How `config` chooses a token; None where transformers' generate does it."""
    try:
        return None if chat.steps is None else chat.steps.find_choice(config)
    except NotCovered:
        return None


def generate_plainly(
    chat: ChatModel,
    prompt: list[int],
    config: GenerationConfig,
    streamer: ReplyStreamer,
    between: StopOrYield,
    cache: DynamicCache | None,
) -> list[int]:
    """Prompt and reply by transformers' generate: beams, n-grams, models that keep a window of the tokens."""
    input_ids = torch.tensor([prompt], device=chat.model.device)
    return chat.model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([between]),
        **({} if config.num_beams > 1 else {"streamer": streamer}),
        **({} if cache is None else {"past_key_values": cache}),
    )[0].tolist()


def restore_cache(model: Any, kept: ConversationCache, prompt: list[int]) -> DynamicCache | None:
    """The kept cache cut to what `prompt` shares with it, or an empty one; None where none can be kept.

    At least one token of the prompt is left to be read: its logits start the reply.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache, kept.cache = kept.cache if kept.reuse else None, None
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config())
        return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None
    shared = len(os.path.commonprefix([kept.ids, prompt[:-1]]))
    cache.crop(shared - cache.get_seq_length())
    return cache
