"""The chat page: what happens when a message is sent, stopped, asked again, edited, taken back or cleared."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from utils.arguments import GenerationArguments
from utils.chat.generation import SAMPLING_DEFAULTS, ChatModel
from utils.chat.page_arguments import PageArguments
from utils.chat.page_labels import CSS, LABELS, choose_words
from utils.chat.page_messages import (
    describe_reply,
    fit_turns,
    read_messages,
    read_numbers,
    read_text,
    show_messages,
)
from utils.chat.page_parts import (
    MAX_BEAMS,
    MAX_TEMPERATURE,
    MIN_TOP_P,
    add_controls,
    add_conversation,
    busy_box,
)
from utils.chat.page_scripts import END, EXPORT, OPEN, PUT_BACK, SEND
from utils.chat.streaming import Kept, RecentlyKept, stream_reply
from utils.console import UserError, notice

MAX_SESSIONS = 256  # each holds 0.1 to 0.2 MB; the oldest is forgotten
# A reply may name pictures: escape_markup shows them as text, and this keeps the browser from fetching any.
NOTHING_FROM_ELSEWHERE = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"img-src 'self' data: blob:; media-src 'self'; font-src 'self' data:; frame-src 'self'\">"
)
STORE_SECONDS = 1.0  # the browser encrypts what it stores: not with each token of a long conversation
SKIP = (gr.skip(),) * 5


def build_page(
    chat: ChatModel, generation_args: GenerationArguments, page_args: PageArguments, about: str
) -> gr.Blocks:
    """The page around `chat`. The browser alone keeps the conversation, and sends it with each message."""
    with gr.Blocks(title="Chinese-Guanaco", fill_height=True, analytics_enabled=False) as page:
        key = f"conversation with {about}"  # of its own for each model; no secret: it keeps nobody out
        said = gr.BrowserState([], storage_key=key, secret=key)
        asked = gr.Textbox(visible="hidden")  # a message on its way from the box to the model
        has_adapter = bool(chat.turns.layers)
        side, chatbot, box, status, export, clear = add_conversation(about, has_adapter)
        controls = [side, *add_controls(generation_args, page_args)]
        system = controls[1]

        recent = RecentlyKept(page_args.kept_conversations)
        wishes: dict[str, str] = {}  # of each session whose reply is under way: "", "stop" or "clear"
        everything = [box, asked, chatbot, said, status]
        speaker = Speaker(chat, generation_args, page_args, about, has_adapter)

        def reply(
            request: gr.Request, said: Any, settings: tuple, question: Any = None, keep: int | None = None
        ) -> Iterator[tuple]:
            session, words = request.session_hash, choose_words(request.headers)
            if session in wishes:
                yield SKIP
                return
            wishes[session] = ""
            side = "base" if settings[0] == "base" else "tuned"
            place = session, side  # base and tuned read with other keys and values
            kept = recent.take(place)
            try:
                wish = functools.partial(wishes.get, session)
                yield from speaker.stream_answer(question, said, keep, side, settings[1:], wish, kept, words)
            finally:
                recent.put_back(place, kept)
                del wishes[session]

        def answer(request: gr.Request, question: Any, said: Any, *settings: Any) -> Iterator[tuple]:
            yield from reply(request, said, settings, question)

        def answer_again(request: gr.Request, said: Any, *settings: Any) -> Iterator[tuple]:
            if said:
                yield from reply(request, said, settings, keep=-2)

        def answer_edited(
            request: gr.Request, edited: gr.EditData, said: Any, *settings: Any
        ) -> Iterator[tuple]:
            yield from reply(request, said, settings, edited.value, edited.index)

        def stop(request: gr.Request) -> None:
            if request.session_hash in wishes:
                wishes[request.session_hash] = "stop"

        def take_back(request: gr.Request, typed: str, said: Any) -> tuple:
            if request.session_hash in wishes or not said:
                return SKIP
            rest, words = said[:-2], choose_words(request.headers)
            text = "" if typed else said[-2]["content"]
            return gr.skip(), text, show_messages(rest, words), rest, about

        def start_anew(request: gr.Request) -> tuple:
            if request.session_hash not in wishes:
                return empty_page(about)
            wishes[request.session_hash] = "clear"  # the reply under way empties the page as it ends
            return SKIP

        def restore(request: gr.Request, said: Any) -> tuple:
            words = choose_words(request.headers)
            try:
                messages = read_messages(said, words)
            except UserError:  # written by another version of the page
                messages = []
            return show_messages(messages, words), messages

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow = {
            "concurrency_limit": page_args.concurrent_replies,
            "concurrency_id": "replies",
            "show_progress": "minimal",
            "show_progress_on": chatbot,
            "trigger_mode": "once",
            "preprocess": False,  # whatever was sent is checked here, where it can be refused in one line
            "api_visibility": "private",
        }
        sent = box.submit(None, None, [box, asked], js=SEND, **quick)
        for event in (
            sent.then(answer, [asked, said, *controls], everything, **slow),
            chatbot.retry(answer_again, [said, *controls], everything, **slow),
            chatbot.edit(answer_edited, [said, *controls], everything, **slow),
        ):
            for ended in (event.success, event.failure):
                ended(None, asked, [box, asked], js=END, **quick)
        box.stop(stop, None, None, **quick)
        undone = chatbot.undo(take_back, [box, said], everything, **quick)
        undone.success(None, asked, asked, js=PUT_BACK, **quick)
        clear.click(start_anew, None, everything, **quick)
        export.click(None, [said, system], None, js=EXPORT, **quick)
        page.load(restore, said, [chatbot, said], **quick)
    page.queue(max_size=page_args.limit_queue, api_open=False)
    return page


def empty_page(about: str) -> tuple:
    return gr.skip(), gr.skip(), [], [], about


@dataclasses.dataclass(frozen=True)
class Speaker:
    """The model as the page offers it: `start` are the flags given, `about` the line that names the model."""

    chat: ChatModel
    start: GenerationArguments
    page_args: PageArguments
    about: str
    has_adapter: bool

    def stream_answer(
        self,
        question: Any,
        said: Any,
        keep: int | None,
        side: str,
        settings: tuple,
        wish: Callable[[], str],
        kept: Kept,
        words: dict[str, str],
    ) -> Iterator[tuple]:
        """(box, asked, chatbot, said, status) as the reply comes. What is refused is left in `asked`.

        `keep`: where in `said` the question stands that is asked again (`question` None) or edited.
        """
        system, *numbers, stream = settings
        refused, shown = gr.skip(), gr.skip()
        try:
            messages = read_messages(said, words)
            shown = show_messages(messages, words)
            if question is None and keep is not None:
                text = messages[keep]["content"]
            else:
                text = refused = read_text(question, words)
            turns = [*messages[:keep], {"role": "user", "content": text}]
            system = system.strip() if isinstance(system, str) else system
            opening = [{"role": "system", "content": read_text(system, words)}] if system else []
            generation_args = read_settings(self.start, self.page_args, *read_numbers(numbers, words))
            read = fit_turns(self.chat, opening, turns, generation_args.max_new_tokens, self.page_args, words)
        except UserError as error:
            gr.Warning(str(error))
            yield gr.skip(), refused, shown, gr.skip(), str(error)
            return
        reply = {"role": "assistant", "content": ""} | ({"side": side} if self.has_adapter else {})
        now = [*turns, reply]
        yield busy_box(), "", show_messages(turns, words), now, self.about
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in opening + read]
        dropped = len(turns) - len(read)
        describe = functools.partial(describe_reply, kept, page_args=self.page_args, words=words)
        limit = self.page_args.limit_seconds
        pieces = stream_reply(self.chat, asked, generation_args, kept, side == "tuned", limit)
        with closing(pieces):
            text, stored = "", time.monotonic()
            for piece in pieces:
                text += piece
                now = [*turns, reply | {"content": text.strip()}]
                if wish():
                    break
                if stream:
                    figures = f"{self.about} · {describe('stop', dropped)}"
                    store = time.monotonic() > stored + STORE_SECONDS
                    stored = time.monotonic() if store else stored
                    storage = now if store else gr.skip()
                    yield gr.skip(), gr.skip(), show_messages(now, words), storage, figures
        if wish() == "clear":
            yield empty_page(self.about)
            return
        figures = f"{self.about} · {describe('interrupted' if wish() else kept.ended, dropped)}"
        yield gr.skip(), gr.skip(), show_messages(now, words), now, figures


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
    sampling: dict[str, float] = SAMPLING_DEFAULTS
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


def launch_page(
    page: gr.Blocks, page_args: PageArguments, auth: list[tuple[str, str]] | None = None, wait: bool = True
) -> None:
    """Serve, until interrupted where `wait`. The system's fonts: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "sans-serif"]
    page.launch(
        server_name=page_args.server_name,
        server_port=page_args.server_port,
        share=page_args.share,
        auth=auth,
        theme=gr.themes.Default(
            primary_hue="teal", font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"]
        ),
        css=CSS,
        head=NOTHING_FROM_ELSEWHERE,
        js=OPEN,
        i18n=gr.I18n(**LABELS),
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        state_session_capacity=MAX_SESSIONS,
        prevent_thread_lock=True,
        quiet=True,
    )
    notice(f"page: {page.local_url}" + ("" if page_args.share else " (Ctrl-C ends it)"))
    if wait:
        page.block_thread()
