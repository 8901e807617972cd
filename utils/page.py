"""The chat page: gradio components, and what happens when a message is sent, stopped or cleared."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from utils.arguments import GenerationArguments
from utils.console import UserError
from utils.formats import Messages
from utils.generation import SAMPLING_DEFAULTS, ChatModel, Kept, RecentlyKept, stream_reply, trim_history
from utils.page_arguments import PageArguments
from utils.page_labels import CSS, ENDINGS, LABELS, TOO_LONG

CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
CHARACTERS_PER_TOKEN = 16  # a text longer than this allows is refused without being tokenized
MAX_BEAMS = 4
MAX_SESSIONS = 256  # each holds 0.1 to 0.2 MB, more with a long conversation; the oldest is forgotten
IDLE_SECONDS = 3600  # a conversation that nobody continues is forgotten


def build_page(
    chat: ChatModel, generation_args: GenerationArguments, page_args: PageArguments, about: str
) -> gr.Blocks:
    """The page around `chat`. Conversations stay on this side: a browser can show them, not change them."""
    with gr.Blocks(title="Chinese-Guanaco", fill_height=True, analytics_enabled=False) as page:
        messages = gr.State([], time_to_live=IDLE_SECONDS)
        side, chatbot, box, status, clear = add_conversation(about, has_adapter=bool(chat.turns.layers))
        controls = [side, *add_controls(generation_args, page_args)]

        start = generation_args
        recent = RecentlyKept(page_args.kept_conversations)
        wishes: dict[str, str] = {}  # of each session whose reply is under way: "", "stop" or "clear"
        everything = [box, chatbot, messages, status]

        def answer(request: gr.Request, question: str, said: Messages, *settings: Any) -> Iterator[tuple]:
            wishes[request.session_hash] = ""
            key = request.session_hash, settings[0]  # base and tuned read with other keys and values
            kept = recent.take(key)
            try:
                wish = functools.partial(wishes.get, request.session_hash)
                yield from stream_answer(chat, start, page_args, about, question, said, settings, wish, kept)
            finally:
                recent.put_back(key, kept)
                del wishes[request.session_hash]

        def stop(request: gr.Request) -> None:
            if request.session_hash in wishes:
                wishes[request.session_hash] = "stop"

        def start_anew(request: gr.Request) -> tuple:
            if request.session_hash not in wishes:
                return empty_page(about)
            wishes[request.session_hash] = "clear"  # the reply under way empties the page as it ends
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()

        box.submit(
            answer,
            [box, messages, *controls],
            everything,
            concurrency_limit=page_args.concurrent_replies,
            show_progress="minimal",
            show_progress_on=chatbot,
            trigger_mode="once",
            api_visibility="private",
        )
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        box.stop(stop, None, None, **quick)
        clear.click(start_anew, None, everything, **quick)
    page.queue(max_size=page_args.limit_queue, api_open=False)
    return page


def word(key: str) -> Any:
    """A label that the browser shows in its own language."""
    return gr.I18n(**LABELS)(key)


def add_conversation(about: str, has_adapter: bool) -> tuple[gr.components.Component, ...]:
    """Title and model choice, the messages, the box to write in, the status line with its button."""
    with gr.Row(equal_height=True, elem_id="head"):
        gr.Markdown("## Chinese-Guanaco", elem_id="title")
        sides = [(word("tuned"), "tuned"), (word("base"), "base")]
        side = gr.Radio(
            sides, value="tuned", show_label=False, container=False, visible=has_adapter, elem_id="side"
        )
    chatbot = gr.Chatbot(
        show_label=False,
        elem_id="chat",
        height="calc(100dvh - 240px)",
        min_height=240,
        buttons=["copy"],
        allow_tags=False,
        latex_delimiters=[],
    )
    box = gr.Textbox(
        placeholder=word("ask"),
        show_label=False,
        container=False,
        lines=1,
        max_lines=8,
        submit_btn=True,
        elem_id="box",
    )
    with gr.Row(equal_height=True, elem_id="foot"):
        status = gr.Markdown(about, elem_id="status")
        clear = gr.Button(word("clear"), size="sm", scale=0, min_width=140, elem_id="clear")
    return side, chatbot, box, status, clear


def add_controls(
    generation_args: GenerationArguments, page_args: PageArguments
) -> list[gr.components.Component]:
    """Settings, in the order in which stream_answer takes their values."""
    starts = generation_args.temperature if generation_args.do_sample else 0.0
    longest = min(generation_args.max_new_tokens, page_args.limit_new_tokens)
    with gr.Accordion(word("settings"), open=False, elem_id="settings"):
        system = gr.Textbox(page_args.system, label=word("system"), lines=1, max_lines=6, elem_id="system")
        with gr.Row():
            temperature = gr.Slider(
                0, max(2, starts), starts, step=0.05, label=word("temperature"), elem_id="temperature"
            )
            length = gr.Slider(
                1, page_args.limit_new_tokens, longest, step=1, label=word("max_new_tokens"), elem_id="length"
            )
        with gr.Row():
            least, most = min(0.05, generation_args.top_p), max(200, generation_args.top_k)
            top_p = gr.Slider(
                least, 1, generation_args.top_p, step=0.05, label=word("top_p"), elem_id="top_p"
            )
            top_k = gr.Slider(0, most, generation_args.top_k, step=1, label=word("top_k"), elem_id="top_k")
            beams = gr.Slider(
                1,
                max(MAX_BEAMS, generation_args.num_beams),
                generation_args.num_beams,
                step=1,
                label=word("beams"),
                elem_id="beams",
            )
        stream = gr.Checkbox(True, label=word("stream"), container=False, elem_id="stream")
    return [system, temperature, top_p, top_k, beams, length, stream]


def stream_answer(
    chat: ChatModel,
    start: GenerationArguments,
    page_args: PageArguments,
    about: str,
    question: str,
    said: Messages,
    settings: tuple,
    wish: Callable[[], str],
    kept: Kept,
) -> Iterator[tuple]:
    """(box, chatbot, messages, status) as the reply comes. A refusal leaves the message in the box."""
    side, system, *numbers, stream = settings
    if not question.strip():
        yield idle_box(), gr.skip(), gr.skip(), gr.skip()
        return
    generation_args = read_settings(start, page_args, *numbers)
    opening = [{"role": "system", "content": system.strip()}] if system.strip() else []
    turns = [message for message in said if message["role"] != "system"]
    asked = [*opening, *turns, {"role": "user", "content": question.strip()}]
    try:
        asked = fit_messages(chat, asked, generation_args.max_new_tokens, page_args)
    except UserError as error:
        gr.Warning(str(error))
        yield idle_box(), gr.skip(), gr.skip(), str(error)
        return
    yield busy_box(), show(asked), asked, about
    now = asked
    pieces = stream_reply(chat, asked, generation_args, kept, side == "tuned", page_args.limit_seconds)
    with closing(pieces):
        text = ""
        for piece in pieces:
            text += piece
            now = [*asked, {"role": "assistant", "content": text.strip()}]
            if wish():
                break
            if stream:
                yield gr.skip(), show(now), now, f"{about} · {kept.describe()}"
    if wish() == "clear":
        yield empty_page(about)
        return
    ending = ENDINGS["interrupted" if wish() else kept.ended].format(limit_seconds=page_args.limit_seconds)
    figures = " · ".join(part for part in (about, kept.describe(), ending) if part)
    yield idle_box(""), show(now), now, figures


def empty_page(about: str) -> tuple:
    return idle_box(""), [], [], about


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
        sampling = {"temperature": float(temperature), "top_p": float(top_p), "top_k": int(top_k)}
    longest = max(1, min(int(length), page_args.limit_new_tokens))
    return dataclasses.replace(
        start,
        max_new_tokens=longest,
        min_new_tokens=start.min_new_tokens and min(start.min_new_tokens, longest),
        do_sample=temperature > 0,
        num_beams=max(1, min(int(beams), max(MAX_BEAMS, start.num_beams))),
        **sampling,
    )


def fit_messages(
    chat: ChatModel, messages: Messages, max_new_tokens: int, page_args: PageArguments
) -> Messages:
    """`messages` without the oldest where they are too many. Raises UserError where the last is too long."""
    limit = page_args.limit_prompt_tokens
    if chat.context is not None:
        limit = min(limit, chat.context - max_new_tokens)
    always_sent = [message for message in messages if message["role"] == "system" or message is messages[-1]]
    characters = sum(len(message["content"]) for message in always_sent)
    if characters > limit * CHARACTERS_PER_TOKEN:
        raise UserError(TOO_LONG.format(size=f"{characters:,} characters", limit=limit))
    within = dataclasses.replace(chat, context=limit + max_new_tokens)
    try:
        return trim_history(within, messages, max_new_tokens)[0]
    except UserError as error:
        size = re.search(r"\d+ tokens", str(error)).group()
        raise UserError(TOO_LONG.format(size=size, limit=limit)) from error


def show(messages: Messages) -> Messages:
    """What the chatbot shows: no system message, markup as text, no pictures fetched from elsewhere."""
    return [
        {"role": message["role"], "content": escape_markup(message["content"])}
        for message in messages
        if message["role"] != "system"
    ]


def escape_markup(text: str) -> str:
    """`text` whose Markdown works and whose HTML and images are shown as they were written."""
    parts = CODE.split(text)  # code, at odd places, is shown as it is by Markdown itself
    parts[::2] = [
        part.replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\\[") for part in parts[::2]
    ]
    return "".join(parts)


def idle_box(text: str | None = None) -> Any:
    changes = {} if text is None else {"value": text}
    return gr.update(submit_btn=True, stop_btn=False, **changes)


def busy_box() -> Any:
    return gr.update(value="", submit_btn=False, stop_btn=True)


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
        i18n=gr.I18n(**LABELS),
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        state_session_capacity=MAX_SESSIONS,
        prevent_thread_lock=not wait,
    )
