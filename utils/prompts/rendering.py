"""Messages -> text by the tokenizer's chat template, each thought where the template wants it.

A thinking model writes a thought before its answer. Rows and chats have it as text, or under a key:

    {"role": "assistant", "content": "<think>\\nTwo and two.\\n</think>\\n\\nFour."}
    {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}

Both are one message here, and every template gets it in its own way: Qwen3 and GLM-4.5 read the key, gpt-oss
calls it `thinking`, SmolLM3 wants the text, DeepSeek-R1 leaves thoughts out. Which way, whether a prompt has
a switch (enable_thinking) and which marks stand around a thought is not looked up in a list of models: the
template renders a probe, and the text tells (find_style).
"""

import functools
import json
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from utils.console import UserError, notice_once
from utils.prompts.messages import LEARNED, Message, Messages, Thinking

OPEN, CLOSE = "<think>", "</think>"
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # names of one thing in files and templates
RENDERED_KEYS = {"role", "content", *THOUGHT_KEYS}  # messages of these alone need no copies and checks
SWITCHES = ("enable_thinking", "thinking")  # Qwen3's, GLM's, SmolLM3's; that of Granite and DeepSeek-V3.1
# What goes before a template whose default is the other mode.
DEFAULTS = {
    mode: "".join(f"{{%- set {name} = {name} | default({str(mode).lower()}) %}}" for name in SWITCHES)
    for mode in (True, False)
}
MODES = {"on": True, "off": False, "auto": None}  # --thinking -> enable_thinking; None: the template's own


@dataclass(frozen=True)
class ThoughtStyle:
    """What a chat template does with thoughts.

    `taken`: it shows a message's key, or its text as it stands, or no thought at all ("dropped").
    `opened`: with thinking on its prompt ends in <think>. `default`: whether thinking is on without a word.
    `opening`, `closing`, `lead`: what stands before a thought, behind it, and before an answer without one.
    """

    taken: Literal["key", "text", "dropped"] = "text"
    has_switch: bool = False
    default: bool = True
    opened: bool = False
    opening: str = f"{OPEN}\n"
    closing: str = f"\n{CLOSE}\n\n"
    lead: str = ""

    @property
    def is_thinking(self) -> bool:
        """Whether the template knows thoughts at all; to others they are text like any other."""
        return self.taken != "text" or self.has_switch or self.opened

    def is_opened(self, mode: Thinking) -> bool:
        """Whether a reply in this mode begins within its thought."""
        is_on = self.default if mode == "auto" else mode == "on"
        return self.opened and (is_on or not self.has_switch)


def find_style(tokenizer: Any) -> ThoughtStyle:
    """What the tokenizer's template does with thoughts."""
    return probe_style(tokenizer.chat_template)


@functools.cache
def probe_style(source: str) -> ThoughtStyle:
    thought, answer, asked = "Probed thought", "Probed answer", {"role": "user", "content": "Question"}

    def render(*said: Message, **flags: bool) -> str:
        marks = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": not said}
        unused = {"tools": None, "documents": None}
        return compile_template(source).render(marks, messages=[asked, *said], **flags, **unused)

    def find_lead(prompt: str, thinking: bool, said: Message) -> str:
        """What stands between the prompt and the answer; nothing where the prompt is no part of the text."""
        text = render({"role": "assistant", "content": answer} | said, **name_mode(thinking))
        return text.removeprefix(prompt).rpartition(answer)[0] if text.startswith(prompt) else ""

    try:
        on, off, default = render(**name_mode(True)), render(**name_mode(False)), render()
        by_key = find_lead(on, True, dict.fromkeys(THOUGHT_KEYS, thought))
        by_text = find_lead(on, True, {"content": join_thought(thought, answer)})
        lead = find_lead(off, False, {})
    except (TemplateError, TypeError):  # a template that wants more than a question
        return ThoughtStyle()
    has_switch, opened = on != off, on.rstrip().endswith(OPEN)
    if thought in by_key + by_text:
        opening, _, closing = (by_key if thought in by_key else by_text).partition(thought)
        taken: Literal["key", "text"] = "key" if thought in by_key else "text"
        return ThoughtStyle(taken, has_switch, default == on, opened, opening, closing, lead)
    blank = on.rpartition(OPEN)[2] if opened else "\n"  # as the prompt writes it, so the model closes it
    opening, closing = "" if opened else OPEN + blank, blank + CLOSE + blank * 2
    return ThoughtStyle("dropped", has_switch, default == on, opened, opening, closing, lead)


def write_reply(style: ThoughtStyle, prompt: str, thought: str, answer: str) -> str:
    """What the model writes behind `prompt`, where the template shows it otherwise once it is said."""
    if thought:
        return style.opening + thought + style.closing + answer
    return (style.closing if prompt.rstrip().endswith(OPEN) else style.lead) + answer


def name_mode(thinking: bool | None) -> dict[str, bool]:
    """The switch by both of its names; none leaves the template its default."""
    return {} if thinking is None else dict.fromkeys(SWITCHES, thinking)


def set_default(template: str, thinking: bool) -> str:
    """The template with thinking on or off where a server says nothing of it."""
    template = template.removeprefix(DEFAULTS[True]).removeprefix(DEFAULTS[False])
    style = probe_style(template)
    return template if not style.has_switch or style.default == thinking else DEFAULTS[thinking] + template


def split_thought(message: Message) -> tuple[str, str]:
    """(thought, answer) of an assistant's message, the thought without the blanks around it."""
    inner, answer = split_tags(message["content"])
    for key in THOUGHT_KEYS if len(message) > 2 else ():  # most have a role and a content alone
        thought = message.get(key)
        if isinstance(thought, str) and thought.strip():
            return thought.strip(), answer
    return inner, answer


def split_tags(text: str) -> tuple[str, str]:
    """(thought, answer) of a text that may begin with a thought in <think> tags, or without the first."""
    if OPEN not in text and CLOSE not in text:
        return "", text
    head, close, tail = text.partition(CLOSE)
    before, opened, inner = head.partition(OPEN)
    if before.strip() if opened else not close:  # no thought, or words before it
        return "", text
    return (inner if opened else head).strip(), tail.lstrip()


def join_thought(thought: str, answer: str) -> str:
    """The text of both, as reasoning models write it."""
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}" if thought else answer


def has_thought(message: Message) -> bool:
    return message["role"] == "assistant" and bool(split_thought(message)[0])


def choose_thoughts(messages: Messages, mode: Thinking) -> Messages:
    """What --thinking on or off trains: off drops thoughts, on has answers without one as context."""
    if mode == "off":
        return [drop_thought(message) if has_thought(message) else message for message in messages]
    return [
        message if message["role"] != "assistant" or has_thought(message) else message | {LEARNED: False}
        for message in messages
    ]


def drop_thought(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
    return kept | {"content": split_thought(message)[1]}


def place_thought(style: ThoughtStyle, message: Message) -> Message:
    """The message with its thought where the template takes it."""
    is_given = len(message) > 2 and not message.keys().isdisjoint(THOUGHT_KEYS)
    if message["role"] != "assistant" or not (is_given or style.is_thinking):
        return message
    thought, answer = split_thought(message)
    if not (is_given or thought) and answer == message["content"]:
        return message
    bare = drop_thought(message)
    if not thought or style.taken == "dropped":
        return bare
    if style.taken == "key":
        return bare | dict.fromkeys(THOUGHT_KEYS, thought)
    return bare | {"content": join_thought(thought, answer)}


def render_chat(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
    thinking: bool | None = None,
) -> str:
    """The chat as text. Every prompt of training, samples, chat and evaluation comes from here."""
    try:
        return apply_template(tokenizer, messages, add_generation_prompt, tools, thinking)
    except (TemplateError, TypeError) as error:  # TypeError: a template that adds what is no text
        if [message["role"] for message in messages[:2]] != ["system", "user"]:
            raise UserError(f"the chat template refuses these messages: {error}") from error
    notice_once("the chat template takes no system message: it goes before the first user text")
    merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return render_chat(tokenizer, [merged, *messages[2:]], add_generation_prompt, tools, thinking)


def apply_template(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool,
    tools: list[Any] | None,
    thinking: bool | None,
) -> str:
    """tokenizer.apply_chat_template. Plain messages skip its copies and checks: 34 microseconds, not 47.

    Templates never see which answers are context (LEARNED).
    """
    style = find_style(tokenizer)
    flags = name_mode(thinking) if style.has_switch else {}
    messages = [place_thought(style, message) for message in messages]
    if has_more := any(len(message) > 2 for message in messages):
        messages = [{key: message[key] for key in message if key != LEARNED} for message in messages]
        has_more = not all(message.keys() <= RENDERED_KEYS for message in messages)
    if tools or has_more:
        render = functools.partial(
            tokenizer.apply_chat_template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **flags,
        )
        try:
            return render([convert_arguments(message, dict) for message in messages])
        except TypeError:  # DeepSeek-V3's adds the arguments to a text
            return render([convert_arguments(message, str) for message in messages])
    return compile_template(tokenizer.chat_template).render(
        tokenizer.special_tokens_map,
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        **flags,
    )


@functools.cache
def compile_template(source: str) -> Any:
    """transformers' jinja template. Renderings copy its globals, 5 us faster from a dict than a ChainMap."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(source)
    template.globals = dict(template.globals)
    return template


def convert_arguments(message: dict[str, Any], kind: type) -> dict[str, Any]:
    """The message with the arguments of its calls as an object (`dict`) or as its JSON (`str`).

    OpenAI's files have the JSON; transformers' templates take the object, and quote a JSON text once more.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise TypeError(f"the tool call {str(call)[:40]!r} is no object with a function")
        arguments = function.get("arguments")
        try:
            if kind is dict and isinstance(arguments, str):
                function = function | {"arguments": json.loads(arguments)}
            elif kind is str and not isinstance(arguments, str):
                function = function | {"arguments": json.dumps(arguments, ensure_ascii=False)}
        except json.JSONDecodeError:  # no JSON: the template shows it as it stands
            pass
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls}
