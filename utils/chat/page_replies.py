"""A message to the page is answered: what a browser sent is checked, cut to the limits, and streamed back."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import gradio as gr

from utils.arguments import GenerationArguments
from utils.chat.generation import SAMPLING_DEFAULTS, ChatModel
from utils.chat.page_arguments import PageArguments
from utils.chat.page_messages import (
    describe_reply,
    fit_turns,
    read_messages,
    read_numbers,
    read_text,
    show_messages,
)
from utils.chat.page_parts import MAX_BEAMS, MAX_TEMPERATURE, MIN_TOP_P, busy_box
from utils.chat.streaming import open_reply, stream_text
from utils.console import UserError
from utils.prompts.messages import Messages

Wish = Callable[[], str | None]  # "", "stop" or "clear": what to do with the reply under way
SHOW_SECONDS = 0.04  # eight fast replies would keep the server at work with showing them
STORE_SECONDS = 1.0  # the browser encrypts what it stores: not with each token of a long conversation


@dataclasses.dataclass(frozen=True)
class Sent:
    """What a browser sent, not checked yet; `words` are the page's in its language.

    `keep`: where in `said` the question stands that is asked again (`question` None) or edited.
    """

    said: Any
    settings: tuple  # side, then the values of add_controls
    words: dict[str, str]
    question: Any = None
    keep: int | None = None

    @property
    def side(self) -> str:
        return self.settings[0] if self.settings[0] in ("base", "both") else "tuned"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The conversation with the question at its end, and what of it is read."""

    turns: Messages
    read: Messages
    dropped: int
    generation_args: GenerationArguments


@dataclasses.dataclass(frozen=True)
class Speaker:
    """The model as the page offers it: `start` are the flags given, `about` the line that names the model."""

    chat: ChatModel
    start: GenerationArguments
    page_args: PageArguments
    about: str

    @property
    def has_adapter(self) -> bool:
        return self.chat.has_adapter

    @property
    def thinks(self) -> bool | None:
        """Whether replies begin with a thought; None where the template has no switch for it."""
        tokenizer = self.chat.tokenizer
        return tokenizer.thinks if tokenizer.style.has_switch else None

    def choose_chat(self, sent: Sent) -> ChatModel:
        """The model with thinking on or off, as the page's setting says."""
        if self.thinks is None:
            return self.chat
        return dataclasses.replace(self.chat, tokenizer=self.chat.tokenizer.switch(bool(sent.settings[-2])))

    def stream_answer(self, sent: Sent, wish: Wish) -> Iterator[tuple]:
        """(box, asked, chatbot, said, status) as the reply comes. What is refused is left in `asked`."""
        words = sent.words
        refused, shown = gr.skip(), gr.skip()
        try:
            messages = read_messages(sent.said, words)
            shown = show_messages(messages, words)
            if sent.question is None and sent.keep is not None:
                text = messages[sent.keep]["content"]
            else:
                text = refused = read_text(sent.question, words)
            prompt = self.build_prompt([*messages[: sent.keep], {"role": "user", "content": text}], sent)
        except UserError as error:
            gr.Warning(str(error))
            yield gr.skip(), refused, shown, gr.skip(), str(error)
            return
        stream = self.stream_both if sent.side == "both" and self.has_adapter else self.stream_prompt
        yield from stream(prompt, sent, wish)

    def build_prompt(self, turns: Messages, sent: Sent) -> Prompt:
        """Raises UserError for a setting that is none, and where the question is too long."""
        words = sent.words
        _, system, *numbers, _, _ = sent.settings
        system = system.strip() if isinstance(system, str) else system
        opening = [{"role": "system", "content": read_text(system, words)}] if system else []
        generation_args = read_settings(self.start, self.page_args, *read_numbers(numbers, words))
        chat, length = self.choose_chat(sent), generation_args.max_new_tokens
        fitting = fit_turns(chat, opening, turns, length, self.page_args, words)
        read = [{"role": turn["role"], "content": turn["content"]} for turn in opening + fitting]
        return Prompt(turns, read, len(turns) - len(fitting), generation_args)

    def stream_prompt(self, prompt: Prompt, sent: Sent, wish: Wish) -> Iterator[tuple]:
        words, stream = sent.words, sent.settings[-1]
        reply = {"role": "assistant", "content": ""} | ({"side": sent.side} if self.has_adapter else {})
        now = [*prompt.turns, reply]
        yield busy_box(), "", show_messages(prompt.turns, words), now, self.about

        limit = self.page_args.limit_seconds
        chat, is_tuned = self.choose_chat(sent), sent.side == "tuned"
        under_way = open_reply(chat, prompt.read, prompt.generation_args, is_tuned, limit)

        def describe(ended: str) -> str:
            return f"{self.about} · {describe_reply(under_way, ended, prompt.dropped, self.page_args, words)}"

        with closing(stream_text(chat.tokenizer, under_way)) as pieces:
            text, stored, shown = "", time.monotonic(), 0.0
            for piece in pieces:
                text += piece
                now = [*prompt.turns, reply | {"content": text.strip()}]
                if wish():
                    break
                if stream and time.monotonic() > shown + SHOW_SECONDS:
                    shown = time.monotonic()
                    store = time.monotonic() > stored + STORE_SECONDS
                    stored = time.monotonic() if store else stored
                    storage = now if store else gr.skip()
                    yield gr.skip(), gr.skip(), show_messages(now, words), storage, describe("stop")
        if wish() == "clear":
            yield empty_page(self.about)
            return
        ended = "interrupted" if wish() else under_way.finish_reason
        yield gr.skip(), gr.skip(), show_messages(now, words), now, describe(ended)

    def stream_both(self, prompt: Prompt, sent: Sent, wish: Wish) -> Iterator[tuple]:
        """The replies of the tuned model and of the base, written at once, each going on from its own."""
        words, fitting = sent.words, prompt.turns[prompt.dropped :]
        own = [{"role": turn["role"], "content": turn.get("base", turn["content"])} for turn in fitting]
        read = {"tuned": prompt.read, "base": prompt.read[: len(prompt.read) - len(own)] + own}
        texts, stored = dict.fromkeys(read, ""), time.monotonic()
        now = [*prompt.turns, {"role": "assistant", "content": "", "side": "both", "base": ""}]
        yield busy_box(), "", show_messages(prompt.turns, words), now, self.about
        limit, chat = self.page_args.limit_seconds, self.choose_chat(sent)
        replies = {
            side: open_reply(chat, asked, prompt.generation_args, side == "tuned", limit)
            for side, asked in read.items()
        }
        with ExitStack() as stack:
            streams = {
                side: stack.enter_context(closing(stream_text(chat.tokenizer, reply)))
                for side, reply in replies.items()
            }
            while streams and not wish():
                for side, stream in list(streams.items()):
                    texts[side] += (piece := next(stream, ""))
                    if not piece:
                        del streams[side]
                shown = {"content": texts["tuned"].strip(), "base": texts["base"].strip()}
                now = [*prompt.turns, now[-1] | shown]
                store = time.monotonic() > stored + STORE_SECONDS
                stored = time.monotonic() if store else stored
                if sent.settings[-1] and streams:
                    yield (
                        gr.skip(),
                        gr.skip(),
                        show_messages(now, words),
                        now if store else gr.skip(),
                        gr.skip(),
                    )
        if wish() == "clear":
            yield empty_page(self.about)
            return
        ended = [self.about]
        for side, reply in replies.items():
            reason = "interrupted" if wish() else reply.finish_reason
            told = describe_reply(reply, reason, prompt.dropped, self.page_args, words)
            ended.append(f"{words[side]}: {told}")
        yield gr.skip(), gr.skip(), show_messages(now, words), now, " · ".join(ended)


def empty_page(about: str) -> tuple:
    return gr.skip(), gr.skip(), [], [], about


def read_settings(
    start: GenerationArguments,
    page_args: PageArguments,
    temperature: float,
    top_p: float,
    top_k: float,
    beams: float,
    length: float,
) -> GenerationArguments:
    """The flags that the page started with, and the controls within its limits whatever a browser sends."""
    sampling: dict[str, Any] = SAMPLING_DEFAULTS
    if temperature > 0:
        sampling = {
            "temperature": min(float(temperature), max(MAX_TEMPERATURE, start.temperature)),
            "top_p": min(max(float(top_p), min(MIN_TOP_P, start.top_p)), 1.0),
            "top_k": max(int(top_k), 0),
        }
    longest = max(1, min(int(length), page_args.limit_new_tokens))
    return dataclasses.replace(
        start,
        max_new_tokens=longest,
        min_new_tokens=start.min_new_tokens and min(start.min_new_tokens, longest),
        do_sample=temperature > 0,
        num_beams=max(1, min(int(beams), max(MAX_BEAMS, start.num_beams))),
        **sampling,
    )
