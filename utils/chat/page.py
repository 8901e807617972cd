"""The chat page: what happens when a message is sent, stopped, asked again, edited, taken back or cleared."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from utils.arguments import GenerationArguments
from utils.chat.generation import ChatModel
from utils.chat.page_arguments import PageArguments
from utils.chat.page_labels import LABELS, choose_words
from utils.chat.page_messages import read_messages, show_messages
from utils.chat.page_parts import PageParts, add_parts
from utils.chat.page_replies import Sent, Speaker, empty_page
from utils.console import UserError, notice

SCRIPT, LOOKS = (Path(__file__).with_name(f"page.{kind}") for kind in ("js", "css"))
MAX_SESSIONS = 256  # each holds 0.1 to 0.2 MB; the oldest is forgotten
# A reply may name pictures: escape_markup shows them as text, and this keeps the browser from fetching any.
NOTHING_FROM_ELSEWHERE = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"img-src 'self' data: blob:; media-src 'self'; font-src 'self' data:; frame-src 'self'\">"
)
SKIP = (gr.skip(),) * 5
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build_page(
    chat: ChatModel,
    generation_args: GenerationArguments,
    page_args: PageArguments,
    about: str,
    examples: Sequence[str] = (),
) -> gr.Blocks:
    """The page around `chat`. The browser alone keeps the conversation, and sends it with each message.

    `examples`: questions that the empty page offers.
    """
    speaker = Speaker(chat, generation_args, page_args, about)
    tokens = page_args.limit_prompt_tokens + page_args.limit_new_tokens
    if chat.context is not None:
        tokens = min(tokens, chat.context)
    chat.decoder.open_slots(page_args.concurrent_replies, tokens, page_args.kept_conversations)
    if page_args.concurrent_replies > 1 and not chat.decoder.shares_steps:
        notice("replies at once take turns, a token each (a GPU does one step for all, of LLaMA-like models)")
    if generation_args.prompt_lookup and chat.decoder.shares_steps:
        notice("--prompt_lookup has no effect where replies at once share a step")
    sessions = Sessions(speaker)
    with gr.Blocks(title="Chinese-Guanaco", fill_height=True, analytics_enabled=False) as page:
        parts = add_parts(generation_args, page_args, about, speaker.has_adapter, speaker.thinks)
        parts.chatbot.examples = [{"text": text} for text in examples]
        connect_replies(parts, sessions, page_args)
        connect_buttons(parts, sessions)
        page.load(sessions.restore, parts.said, [parts.chatbot, parts.said], **QUICK)
    page.queue(max_size=page_args.limit_queue, api_open=False)
    return page


@dataclass(eq=False)
class Sessions:
    """What each event does; those of a reply give (box, asked, chatbot, said, status)."""

    speaker: Speaker
    # By session, of each reply under way: "", "stop" or "clear".
    wishes: dict[str | None, str] = field(default_factory=dict)

    def reply(self, request: gr.Request, said: Any, settings: tuple, *asked: Any) -> Iterator[tuple]:
        session = request.session_hash
        if session in self.wishes:
            yield SKIP
            return
        self.wishes[session] = ""
        sent = Sent(said, settings, choose_words(request.headers), *asked)
        try:
            yield from self.speaker.stream_answer(sent, functools.partial(self.wishes.get, session))
        finally:
            del self.wishes[session]

    def answer(self, request: gr.Request, question: Any, said: Any, *settings: Any) -> Iterator[tuple]:
        yield from self.reply(request, said, settings, question)

    def answer_again(self, request: gr.Request, said: Any, *settings: Any) -> Iterator[tuple]:
        if said:
            yield from self.reply(request, said, settings, None, -2)

    def answer_example(
        self, request: gr.Request, chosen: gr.SelectData, said: Any, *settings: Any
    ) -> Iterator[tuple]:
        yield from self.reply(request, said, settings, chosen.value["text"])

    def answer_edited(
        self, request: gr.Request, edited: gr.EditData, said: Any, *settings: Any
    ) -> Iterator[tuple]:
        yield from self.reply(request, said, settings, edited.value, edited.index)

    def stop(self, request: gr.Request) -> None:
        if request.session_hash in self.wishes:
            self.wishes[request.session_hash] = "stop"

    def take_back(self, request: gr.Request, typed: str, said: Any) -> tuple:
        if request.session_hash in self.wishes or not said:
            return SKIP
        rest, text = said[:-2], "" if typed else said[-2]["content"]
        return gr.skip(), text, show_messages(rest, choose_words(request.headers)), rest, self.speaker.about

    def start_anew(self, request: gr.Request) -> tuple:
        if request.session_hash not in self.wishes:
            return empty_page(self.speaker.about)
        self.wishes[request.session_hash] = "clear"  # the reply under way empties the page as it ends
        return SKIP

    def restore(self, request: gr.Request, said: Any) -> tuple:
        words = choose_words(request.headers)
        try:
            messages = read_messages(said, words)
        except UserError:  # written by another version of the page
            messages = []
        return show_messages(messages, words), messages


def connect_replies(parts: PageParts, sessions: Sessions, page_args: PageArguments) -> None:
    """A message sent, asked again or edited; as its reply ends, the box takes the next one."""
    slow: dict[str, Any] = {
        "outputs": parts.everything,
        "concurrency_limit": page_args.concurrent_replies,
        "concurrency_id": "replies",
        "show_progress": "minimal",
        "show_progress_on": parts.chatbot,
        "trigger_mode": "once",
        "preprocess": False,  # whatever was sent is checked here, where it can be refused in one line
        "api_visibility": "private",
    }
    box, asked, state = parts.box, parts.asked, [parts.said, *parts.controls]
    sent = box.submit(None, None, [box, asked], js="() => chatPage.send()", **QUICK)
    for event in (
        sent.then(sessions.answer, [asked, *state], **slow),
        parts.chatbot.example_select(sessions.answer_example, state, **slow),
        parts.chatbot.retry(sessions.answer_again, state, **slow),
        parts.chatbot.edit(sessions.answer_edited, state, **slow),
    ):
        for ended in (event.success, event.failure):
            ended(None, asked, [box, asked], js="asked => chatPage.end(asked)", **QUICK)


def connect_buttons(parts: PageParts, sessions: Sessions) -> None:
    """Stop, undo, clear and export."""
    parts.box.stop(sessions.stop, None, None, **QUICK)
    undone = parts.chatbot.undo(sessions.take_back, [parts.box, parts.said], parts.everything, **QUICK)
    undone.success(None, parts.asked, parts.asked, js="asked => chatPage.putBack(asked)", **QUICK)
    parts.clear.click(sessions.start_anew, None, parts.everything, **QUICK)
    parts.export.click(
        None,
        [parts.said, parts.controls[1]],
        None,
        js="(said, system) => chatPage.save(said, system)",
        **QUICK,
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
        css_paths=LOOKS,
        head=NOTHING_FROM_ELSEWHERE,
        js=SCRIPT.read_text(encoding="utf-8"),
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
