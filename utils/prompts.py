"""A dataset row -> messages -> token ids and labels. The one place where text becomes a prompt.

Labels come from rendering, never from searching for token ids: the prompt of assistant turn i is the chat
before it, rendered with the generation prompt, and what rendering the turn appends is what is learned.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from utils.console import UserError, notice

IGNORE_INDEX = -100
TEMPLATES_DIR = Path(__file__).parent / "templates"
Messages = list[dict[str, str]]


# Columns that tell a format, most telling first. Every other column is left alone.
FORMAT_COLUMNS = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "self-instruct": ("prompt", "completion"),
    "input-output": ("input", "output"),
    "oasst1": ("text",),
}


def find_format(columns: set[str]) -> str | None:
    """Name of the first format whose columns are all there."""
    return next((name for name, needed in FORMAT_COLUMNS.items() if columns.issuperset(needed)), None)


def row_to_messages(row: dict[str, Any], dataset_format: str, alpaca_input: bool) -> Messages:
    """One row as messages. `alpaca_input`: mark an input as Stanford's prompt does, else by a blank line.

    Raises UserError where a needed column is missing or is no text.
    """
    if dataset_format == "messages":
        return read_messages(row["messages"])
    if dataset_format == "oasst1":
        return split_guanaco_text(row["text"])
    question, answer = FORMAT_COLUMNS[dataset_format]
    for column in (question, answer):
        if not isinstance(row.get(column), str):
            raise UserError(f"column {column!r} holds {row.get(column)!r}: text is needed")
    content = row[question]
    if dataset_format == "alpaca" and row.get("input"):
        content += ("\n\n### Input:\n" if alpaca_input else "\n\n") + row["input"]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": row[answer]}]


def read_messages(messages: Any) -> Messages:
    valid = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )
    if not valid:
        raise UserError(
            f"column 'messages' holds {str(messages)[:60]!r}: a list of {{role, content}} is needed"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def split_guanaco_text(text: Any) -> Messages:
    """`### Human: a### Assistant: b...` as messages (openassistant-guanaco)."""
    if not isinstance(text, str) or not text.startswith("### Human:"):
        raise UserError(
            f"column 'text' holds {str(text)[:40]!r}: text that starts with '### Human:' is needed"
        )
    parts = re.split(r"### (Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def template_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES_DIR.glob("*.jinja"))


def read_template(name: str) -> str:
    """Source of utils/templates/NAME.jinja. Raises UserError for an unknown name."""
    if name not in template_names():
        raise UserError(f"--template {name}: no such template; use one of {', '.join(template_names())}")
    return (TEMPLATES_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def render_chat(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The chat as text. Every prompt of training, samples, chat and evaluation comes from here."""
    try:
        return apply_template(tokenizer, messages, add_generation_prompt)
    except TemplateError as error:
        if not (messages[0]["role"] == "system" and len(messages) > 1 and messages[1]["role"] == "user"):
            raise UserError(f"the chat template refuses these messages: {error}") from error
    notice_once("the chat template takes no system message: it goes before the first user text")
    merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return apply_template(
        tokenizer, [{"role": "user", "content": merged}, *messages[2:]], add_generation_prompt
    )


def apply_template(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


@functools.cache
def notice_once(message: str) -> None:
    notice(message)


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered chat, tokenized on its own; `answer` pieces are what the model writes."""

    text: str
    answer: bool


def split_prompt(tokenizer: Any, messages: Messages, stops: list[str]) -> list[Segment]:
    """A chat that ends before an assistant turn, cut into pieces at its earlier answers.

    A template that rewrites earlier answers (Qwen3, gpt-oss, DeepSeek-V3) gives one piece.
    """
    prompt = render_chat(tokenizer, messages, add_generation_prompt=True)
    segments, end = [], 0
    for turn in answer_turns(messages):
        before, answer = render_turn(tokenizer, messages, turn, stops)
        if not prompt.startswith(before + answer):
            return [Segment(prompt, False)]
        segments += [Segment(before[end:], False), Segment(answer, True)]
        end = len(before) + len(answer)
    return [*segments, Segment(prompt[end:], False)]


def split_chat(tokenizer: Any, messages: Messages, stops: list[str]) -> list[list[Segment]]:
    """The training rows of one chat: one, or one for each answer where the template rewrites earlier ones."""
    turns = answer_turns(messages)
    if not turns:
        return []
    last = turns[-1]
    row = split_prompt(tokenizer, messages[:last], stops)
    earlier = [turn for turn in turns if turn < last]
    rewritten = bool(earlier) and len(row) == 1
    if rewritten:
        rows = split_chat(tokenizer, messages[: earlier[-1] + 1], stops)
    else:
        rows = []
    _, answer = render_turn(tokenizer, messages, last, stops)
    return [*rows, [*row, Segment(answer, True)]]


def answer_turns(messages: Messages) -> list[int]:
    """Indices of the assistant turns that answer something; a leading assistant turn is no answer."""
    asked = next(
        (i for i, message in enumerate(messages) if message["role"] not in ("system", "assistant")), None
    )
    if asked is None:
        return []
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > asked]


def render_turn(tokenizer: Any, messages: Messages, turn: int, stops: list[str]) -> tuple[str, str]:
    """(prompt, answer) of one assistant turn; the answer ends with its stop token, rendered or appended."""
    prompt = render_chat(tokenizer, messages[:turn], add_generation_prompt=True)
    whole = render_chat(tokenizer, messages[: turn + 1])
    # A generation prompt that opens what the template drops later (<think>) is no prefix: the bare answer.
    rest = whole[len(prompt) :] if whole.startswith(prompt) else messages[turn]["content"].strip()
    ends = [rest.find(stop) + len(stop) for stop in stops if stop in rest]
    return prompt, rest[: min(ends)] if ends else rest + stops[0]


def find_stop_tokens(tokenizer: Any, eos_token_ids: list[int]) -> list[int]:
    """Ids that end a reply; the first is what closes an answer in the template, or follows it (GLM)."""
    probe = "Probe"
    question = {"role": "user", "content": "Question"}
    chat = [question, {"role": "assistant", "content": probe}, question]
    tail = render_chat(tokenizer, chat).rpartition(probe)[2].lstrip()
    first = tokenizer(tail, add_special_tokens=False).input_ids[:1]
    closing = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    opens_chat = tokenizer.bos_token_id != tokenizer.eos_token_id and first == [tokenizer.bos_token_id]
    closes_turn = first if closing.issuperset(first) and not opens_chat else []
    return list(dict.fromkeys([*closes_turn, tokenizer.eos_token_id, *eos_token_ids]))


def encode_text(tokenizer: Any, text: str, opens: bool) -> list[int]:
    """Token ids of one segment. Only the first of a row gets a BOS and a SentencePiece dummy prefix."""
    if not text:
        return []
    if opens:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        bos = tokenizer("").input_ids[:1]  # what this tokenizer puts at the front by itself
        return ids if ids[:1] == bos or bos != [tokenizer.bos_token_id] else bos + ids
    if not has_dummy_prefix(tokenizer):
        return tokenizer(text, add_special_tokens=False).input_ids
    # LLaMA's tokenizer puts a blank before any text, but not behind a newline, which merges with nothing.
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer("\n" + text, add_special_tokens=False).input_ids
    assert ids[: len(newline)] == newline, f"a newline merged into {text[:20]!r}"
    return ids[len(newline) :]


def has_dummy_prefix(tokenizer: Any) -> bool:
    first = tokenizer("a", add_special_tokens=False).input_ids[:1]
    return tokenizer.convert_ids_to_tokens(first)[0].startswith("▁")


def encode_segments(
    tokenizer: Any, segments: list[Segment], train_on_source: bool = False
) -> dict[str, list[int]]:
    """{input_ids, labels}; prompts are labelled IGNORE_INDEX unless `train_on_source`."""
    input_ids, labels = [], []
    for i, segment in enumerate(segments):
        ids = encode_text(tokenizer, segment.text, opens=i == 0)
        input_ids += ids
        labels += ids if segment.answer or train_on_source else [IGNORE_INDEX] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


def encode_prompt(tokenizer: Any, messages: Messages, stop_ids: list[int]) -> list[int]:
    """Token ids from which a reply to `messages` is generated: those of a training row up to that answer."""
    stops = tokenizer.convert_ids_to_tokens(stop_ids)
    return encode_segments(tokenizer, split_prompt(tokenizer, messages, stops))["input_ids"]
