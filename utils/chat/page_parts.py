"""The page's components: the conversation, the box, the settings."""

from dataclasses import dataclass

import gradio as gr

from utils.arguments import GenerationArguments
from utils.chat.page_arguments import PageArguments
from utils.chat.page_labels import LABELS
from utils.chat.page_messages import LATEX

MAX_BEAMS = 4
MAX_TEMPERATURE = 2
MIN_TOP_P = 0.05


def word(key: str) -> gr.i18n.I18nData:
    """A label that the browser shows in its own language."""
    return gr.I18n(**LABELS)(key)


@dataclass(frozen=True)
class PageParts:
    """`said` is the conversation, which the browser keeps; `asked` a message on its way from box to model."""

    said: gr.BrowserState
    asked: gr.Textbox
    chatbot: gr.Chatbot
    box: gr.Textbox
    status: gr.Markdown
    export: gr.Button
    clear: gr.Button
    controls: list[gr.components.Component]  # side, then those of add_controls

    @property
    def everything(self) -> list[gr.components.Component]:
        """What a reply changes."""
        return [self.box, self.asked, self.chatbot, self.said, self.status]


def add_parts(
    generation_args: GenerationArguments,
    page_args: PageArguments,
    about: str,
    has_adapter: bool,
    thinks: bool | None,
) -> PageParts:
    """`thinks`: whether replies begin with a thought, None where that cannot be switched."""
    key = f"conversation with {about}"  # of its own for each model; no secret: it keeps nobody out
    said = gr.BrowserState([], storage_key=key, secret=key)
    asked = gr.Textbox(visible="hidden")
    side, chatbot, box, status, export, clear = add_conversation(about, has_adapter)
    controls = [side, *add_controls(generation_args, page_args, thinks)]
    return PageParts(said, asked, chatbot, box, status, export, clear, controls)


def add_conversation(
    about: str, has_adapter: bool
) -> tuple[gr.Radio, gr.Chatbot, gr.Textbox, gr.Markdown, gr.Button, gr.Button]:
    """Title and model choice, the messages, the box to write in, the status line with its buttons."""
    with gr.Row(equal_height=True, elem_id="head"):
        gr.Markdown("## Chinese-Guanaco", elem_id="title")
        sides = [(word(side), side) for side in ("tuned", "base", "both")]
        side = gr.Radio(
            sides, value="tuned", show_label=False, container=False, visible=has_adapter, elem_id="side"
        )
    chatbot = gr.Chatbot(
        show_label=False,
        elem_id="chat",
        height="calc(100dvh - 240px)",
        min_height=240,
        autoscroll=False,  # page.js lets the reader scroll up
        buttons=["copy"],
        editable="user",
        allow_tags=False,
        latex_delimiters=LATEX,
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
        export = gr.Button(word("export"), size="sm", scale=0, min_width=70, elem_id="export")
        clear = gr.Button(word("clear"), size="sm", scale=0, min_width=140, elem_id="clear")
    return side, chatbot, box, status, export, clear


def add_controls(
    generation_args: GenerationArguments, page_args: PageArguments, thinks: bool | None
) -> list[gr.components.Component]:
    """Settings, in the order in which stream_answer takes their values."""
    starts = generation_args.temperature if generation_args.do_sample else 0.0
    longest = min(generation_args.max_new_tokens, page_args.limit_new_tokens)
    with gr.Accordion(word("settings"), open=False, elem_id="settings"):
        system = gr.Textbox(page_args.system, label=word("system"), lines=1, max_lines=6, elem_id="system")
        with gr.Row():
            temperature = gr.Slider(
                0,
                max(MAX_TEMPERATURE, starts),
                starts,
                step=0.05,
                label=word("temperature"),
                elem_id="temperature",
            )
            length = gr.Slider(
                1, page_args.limit_new_tokens, longest, step=1, label=word("max_new_tokens"), elem_id="length"
            )
        with gr.Row():
            least, most = min(MIN_TOP_P, generation_args.top_p), max(200, generation_args.top_k)
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
        thinking = gr.Checkbox(
            bool(thinks),
            label=word("thinking"),
            container=False,
            visible=thinks is not None,
            elem_id="thinking",
        )
        stream = gr.Checkbox(True, label=word("stream"), container=False, elem_id="stream")
    return [system, temperature, top_p, top_k, beams, length, thinking, stream]


def busy_box() -> dict:
    """The box while a reply is under way: what is typed stays, and the button stops the reply."""
    return gr.update(submit_btn=False, stop_btn=True)
