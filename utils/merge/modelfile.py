"""Ollama's Modelfile beside a GGUF file: the prompt format as a Go template, the stop tokens, greedy replies.

Ollama does not run the chat template in the GGUF file, it has templates of its own in Go's language. Ours are
all of one form, so that their texts are read off three rendered chats. Of vicuna with the question Q:

    default_head  A chat between ... questions. USER:       before Q; with a system message system_head
    middle        ASSISTANT:                                between a question and its answer
    gap           (a blank)                                 what middle lacks before an answer that is known
    between       </s>USER:                                 between an answer and the next question

compose() puts a chat together from them; where the template renders another text, no Modelfile is written.
"""

import functools
from dataclasses import dataclass
from typing import Any

from utils.console import UserError
from utils.models.encoding import find_own_bos
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.answer_spans import Render, read_template, render_chat, template_names
from utils.prompts.messages import Messages

SYSTEM, QUESTION, ANSWER = "Obey me", "What now", "Nothing yet"
CHATML = ("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n")  # middle, between
VANILLA = (
    "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ .Content }}{{ end }}{{ end }}"
)
REFUSED = "no Modelfile: Ollama's templates are written in Go, and this run's is none that is known here"


@dataclass(frozen=True)
class TurnTexts:
    """What a template puts around the texts of a chat."""

    default_head: str
    system_head: str
    system_tail: str
    middle: str
    gap: str
    between: str


def render_modelfile(tokenizer: ChatTokenizer, gguf_name: str) -> str:
    """The Modelfile's text. Raises UserError for a template that is neither one of ours nor ChatML."""
    raw = tokenizer.raw
    bos = raw.bos_token if find_own_bos(raw) else ""  # Ollama puts it there by the GGUF's add_bos_token
    name = find_template_name(raw.chat_template)
    if name == "vanilla":
        template = VANILLA
    else:
        texts = read_turn_texts(functools.partial(render_without, raw, bos))
        if texts is None or (name is None and (texts.middle, texts.between) != CHATML):
            raise UserError(REFUSED)
        template = write_go(texts)
    note = "\n# A question with an input gets the heading of one without: Go cannot look into a text."
    stops = "".join(f'PARAMETER stop "{stop}"\n' for stop in tokenizer.stops)
    return (
        f"# Not tried with Ollama itself: ollama create NAME -f Modelfile; ollama run NAME"
        f"{note if name == 'alpaca' else ''}\n"
        f'FROM ./{gguf_name}\nTEMPLATE """{template}"""\n{stops}PARAMETER temperature 0\n'
    )


def find_template_name(source: str) -> str | None:
    """The name of ours that `source` is, with or without a BOS put before it."""
    plain = source.removeprefix("{{ bos_token }}")
    return next((name for name in template_names() if read_template(name) == plain), None)


def render_without(raw: Any, bos: str, messages: Messages, add_generation_prompt: bool) -> str:
    return render_chat(raw, messages, add_generation_prompt).removeprefix(bos)


def build_probe(*texts: str) -> Messages:
    """A chat of `texts`: SYSTEM is the system message, what is left are questions and answers in turn."""
    system = [{"role": "system", "content": SYSTEM}] if texts[0] == SYSTEM else []
    turns = texts[len(system) :]
    roles = ("user", "assistant")
    return system + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def read_turn_texts(render: Render) -> TurnTexts | None:
    """The texts around SYSTEM, QUESTION and ANSWER; None where longer chats are not made of them."""
    again = QUESTION + " again"
    default_head, _, middle = render(build_probe(QUESTION), True).partition(QUESTION)
    system_head, _, rest = render(build_probe(SYSTEM, QUESTION), True).partition(SYSTEM)
    answered = render(build_probe(QUESTION, ANSWER, again), True).removeprefix(default_head + QUESTION)
    opening, _, behind = answered.partition(ANSWER)
    texts = TurnTexts(
        default_head,
        system_head,
        rest.partition(QUESTION)[0],
        middle,
        opening.removeprefix(middle),
        behind.partition(again)[0],
    )
    for words in ((QUESTION, ANSWER, again, "No", "Why"), (SYSTEM, QUESTION, ANSWER, again, "No", "Why")):
        if render(build_probe(*words), True) != compose(texts, build_probe(*words)):
            return None
    return texts


def compose(texts: TurnTexts, messages: Messages) -> str:
    """The prompt that the Go template makes of `messages`, which end with a question."""
    has_system = messages[0]["role"] == "system"
    text = (
        texts.system_head + messages[0]["content"] + texts.system_tail if has_system else texts.default_head
    )
    for message in messages[has_system:]:
        content = message["content"]
        text += content + texts.middle if message["role"] == "user" else texts.gap + content + texts.between
    return text


def write_go(texts: TurnTexts) -> str:
    """compose() in Go's words; an answer that comes last is left open, to be gone on with."""
    if any("{{" in text or '"""' in text for text in vars(texts).values()):
        raise UserError(REFUSED)
    return (
        f"{{{{ if .System }}}}{texts.system_head}{{{{ .System }}}}{texts.system_tail}{{{{ else }}}}"
        f"{texts.default_head}{{{{ end }}}}{{{{ range $i, $_ := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{texts.middle}'
        f'{{{{ else if eq .Role "assistant" }}}}{texts.gap}{{{{ .Content }}}}'
        f"{{{{ if gt (len (slice $.Messages $i)) 1 }}}}{texts.between}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )
