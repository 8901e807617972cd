"""A row of any known format becomes a Chat, messages of a role and a content.

    {"instruction": "Add.", "input": "3 + 4", "output": "7"}
    ->  user: "Add.\\n\\n3 + 4", assistant: "7"

The columns of a row tell its format; --dataset_format forces one. All that follows (templates, labels,
splits, limits) knows messages alone, so a new format is one function here and its line in FORMATS. Each
reader raises UserError for a row that it cannot read; the row is then left out and counted with that
reason. data/README.md has a row of each layout.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from utils.console import UserError
from utils.data.cells import find_given, is_empty_number, need_text, note_written
from utils.data.layouts import CONVERSATIONS, INPUTS, THOUGHTS, find_columns, find_pair
from utils.data.media import check_media
from utils.data.preferences import CHOSEN, CONTEXTS, REJECTED, check_desirable, is_ranked, read_preferred
from utils.data.roles import add_system, join_calls, read_history, read_system, wrap_tools
from utils.data.turns import (
    HUMAN_OR_ASSISTANT,
    blank_null,
    find_said,
    join_input,
    keep_ordered,
    name_model,
    names_speaker,
    read_list,
    read_turn,
    split_pairs,
    split_turns,
    tidy_messages,
    tidy_turns,
)
from utils.data.unread import find_unread, is_prose
from utils.prompts.messages import LEARNED, TEXT_ROLE, Chat, Message, Row, find_half_character
from utils.prompts.rendering import THOUGHT_KEYS


def read_text(row: Row, column: str) -> str:
    return need_text(row.get(column), f"column {column!r}")


def read_exchange(row: Row, question: str, answer: str, marker: str, inputs: Sequence[str] = ()) -> Chat:
    """One question and its answer, behind the system message and `history` of the row.

    `inputs` name columns of which the first that is given follows the question behind `marker`.
    """
    extra = find_given(row, inputs)
    asked = join_input(read_text(row, question), row, extra, marker)
    said = read_text(row, answer)
    for column, text in ((question, asked), (answer, said)):
        if not text.strip():
            raise UserError(f"column {column!r} is empty")
    reply: Message = {"role": "assistant", "content": said}
    thoughts = (row.get(column) for column in find_columns(THOUGHTS, row))  # `on` is a mark and no thought
    if thought := next((text for text in thoughts if isinstance(text, str) and is_prose(text)), None):
        reply[THOUGHT_KEYS[0]] = thought
    messages = [*read_system(row), *read_history(row), {"role": "user", "content": asked}, reply]
    notes = note_written([row[name] for name in (question, answer, extra) if name])
    return tidy_messages(messages, notes) if len(messages) > 2 else Chat(messages, cleaned=tuple(notes))


def read_alpaca(row: Row, marker: str) -> Chat:
    """instruction, input, output; LLaMA-Factory's `history` [[question, answer], ...] and `system`."""
    return read_exchange(row, "instruction", "output", marker, ("input",))


def read_dolly(row: Row, marker: str) -> Chat:
    """instruction, context, response; GPTeacher's rows have `input` for the context."""
    return read_exchange(row, "instruction", "response", marker, ("context", "input"))


def read_self_instruct(row: Row, marker: str) -> Chat:
    """prompt and completion, texts or lists of messages (TRL)."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        messages = [read_turn(turn) for turn in [*row["prompt"], *row["completion"]]]
        return tidy_messages(join_calls(add_system(row, messages)), [], read_tools(row))
    return read_exchange(row, "prompt", "completion", marker)


def read_input_output(row: Row, marker: str) -> Chat:
    """input and output, texts or lists of the questions and the answers of a chat (Chinese-Vicuna)."""
    asked, answers = row.get("input"), row.get("output")
    if isinstance(asked, list) and isinstance(answers, list) and len(asked) == len(answers):
        pairs = [[("user", ask), ("assistant", say)] for ask, say in zip(asked, answers, strict=True)]
        return tidy_turns([turn for pair in pairs for turn in pair])
    return read_exchange(row, "input", "output", marker)


def read_belle(row: Row, marker: str) -> Chat:
    """BELLE's multi-turn rows keep the earlier turns in `instruction`, as Human: and Assistant: lines."""
    turns = split_turns(read_text(row, "instruction"), r"(?:^|\n)\s*(Human|Assistant)[:：]")
    if turns and turns[-1][0] == "assistant" and not turns[-1][1]:
        turns.pop()
    return tidy_turns(turns + [("assistant", read_text(row, "output"))])


def read_guanaco(row: Row, marker: str) -> Chat:
    return tidy_turns(split_turns(read_text(row, "text"), r"### (Human|Assistant):"))


def read_chip2(row: Row, marker: str) -> Chat:
    return tidy_turns(split_turns(read_text(row, "text"), r"(?:^|\n)<(human|bot)>:"))


def read_hh_rlhf(row: Row, marker: str) -> Chat:
    """The preferred conversation; the rejected one is not trained."""
    return tidy_turns(split_turns(read_text(row, "chosen"), HUMAN_OR_ASSISTANT))


def read_plain_text(row: Row, marker: str) -> Chat:
    text = read_text(row, "text")
    if not text.strip():
        raise UserError("column 'text' is empty")
    return Chat([{"role": TEXT_ROLE, "content": text}])


def read_sharegpt(row: Row, marker: str) -> Chat:
    """conversations [{from, value}, ...]; a reply that is a piece of ShareGPT's page becomes Markdown.

    Also [{human, assistant}, ...], a question and its answer in one, or XTuner's {system, input, output}.
    """
    from utils.data.html_text import convert_page  # here: its parser takes 0.2 s to import

    turns = read_list(row, next((name for name in CONVERSATIONS if name in row), CONVERSATIONS[0]))
    turns, notes = name_model(turns) if names_speaker(turns[0]) else (split_pairs(turns), [])
    messages, notes = [], [*notes, *note_written(list(map(find_said, turns)))]
    for turn in turns:
        message = read_turn(blank_null(turn))
        if message["role"] == "assistant":
            message["content"], done = convert_page(message["content"])
            notes += [note for note in done if note not in notes]
        messages.append(message)
    return tidy_messages(join_calls(add_system(row, messages)), notes, read_tools(row))


def read_chat_messages(row: Row, marker: str) -> Chat:
    """messages [{role, content, ...}, ...]; tool calls and tool turns are kept for the template to render."""
    turns = read_list(row, "messages")
    if "role" not in turns[0]:  # ShareGPT's turns under this name
        return read_sharegpt(row | {"conversations": turns}, marker)
    said = list(map(find_said, turns))
    ordered, notes = keep_ordered(join_calls(add_system(row, list(map(read_turn, turns)))))
    notes += note_written(said)
    parts = [part for content in said if isinstance(content, list) for part in content]
    if any(isinstance(part, dict) and part.get("type") == "reasoning" for part in parts):
        notes = [*notes, "reasoning written in <think> tags"]
    return Chat(ordered, read_tools(row), tuple(notes))


def read_question_answer(row: Row, marker: str) -> Chat:
    """A question and its answer under any known names (layouts.py), with history and system as alpaca's."""
    pair = find_pair(row)
    if pair is None:
        raise UserError(
            f"no column of {', '.join(map(str, row))} is known as a question and one as its answer"
        )
    return read_exchange(row, *pair, marker, find_columns(INPUTS, row))


def read_preference(row: Row, marker: str) -> Chat:
    return tidy_messages(join_calls(read_preferred(row, marker)), [], read_tools(row))


def read_seed_task(row: Row, marker: str) -> Chat:
    """Self-instruct's seeds: an instruction and `instances` [{input, output}, ...]; the first is read."""
    instances = read_list(row, "instances")
    chat = read_alpaca({"instruction": row.get("instruction")} | instances[0], marker)
    more = ("further instances of a task left out",) if len(instances) > 1 else ()
    return replace(chat, cleaned=(*chat.cleaned, *more))


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The functions that a chat may call: `tools`, a list or its JSON, or OpenAI's older `functions`."""
    tools = row.get("tools") or row.get("functions") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except json.JSONDecodeError as error:
            raise UserError(f"column 'tools' is no JSON ({error})") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"column 'tools' holds {str(tools)[:40]!r}: a list of objects is needed")
    return wrap_tools(tools)


FORMATS: dict[str, Callable[[Row, str], Chat]] = {
    "preference": read_preference,
    "seed-task": read_seed_task,
    "question-answer": read_question_answer,
    "messages": read_chat_messages,
    "sharegpt": read_sharegpt,
    "hh-rlhf": read_hh_rlhf,
    "dolly": read_dolly,
    "belle": read_belle,
    "alpaca": read_alpaca,
    "self-instruct": read_self_instruct,
    "input-output": read_input_output,
    "oasst1": read_guanaco,
    "chip2": read_chip2,
    "text": read_plain_text,
}
ALIASES = {
    "vicuna": "sharegpt",
    "evol_instruct": "sharegpt",
    "guanaco": "oasst1",
    "olcc": "alpaca",
    "longform": "input-output",
}


# What ended a text in its publisher's file; a template closes answers with the model's own.
END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "</s>")


def take_off_end(message: Message) -> bool:
    """Leave out a mark behind the text, and say whether there was one; `</s>` may close an `<s>` of HTML."""
    text = message["content"].rstrip()
    if not text.endswith(END_MARKS) or (text.endswith("</s>") and "<s>" in text):
        return False
    message["content"] = text[: text.rindex("<")]
    if not message["content"].strip():
        raise UserError(f"an answer is {text!r} alone")
    return True


def find_format(row: Any) -> str | None:
    """The format that a row has the columns of, by its text where several share them."""
    if not isinstance(row, dict):
        return None
    columns = row.keys()
    if any(name in columns for name in (*CHOSEN, *REJECTED)) or is_ranked(row):
        alone = isinstance(row.get("chosen"), str) and find_given(row, CONTEXTS) is None
        return "hh-rlhf" if alone else "preference"
    if "messages" in columns:
        return "messages"
    if CONVERSATIONS[0] in columns or any(isinstance(row.get(name), list) for name in CONVERSATIONS):
        return "sharegpt"
    if "instances" in columns:
        return "seed-task"
    if columns >= {"instruction", "response"}:
        return "dolly"
    if columns >= {"instruction", "output"}:
        return "belle" if str(row["instruction"]).lstrip().startswith(("Human:", "Human：")) else "alpaca"
    if columns >= {"prompt", "completion"}:
        return "self-instruct"
    if find_pair(columns):
        return "question-answer"
    if columns >= {"input", "output"}:
        return "input-output"
    if "text" in columns:
        start = str(row["text"]).lstrip()
        if start.startswith("### Human:"):
            return "oasst1"
        return "chip2" if start.startswith("<human>:") else "text"
    return None


def sniff_format(rows: list[Any]) -> str | None:
    """The format most of these rows have."""
    found = Counter(filter(None, map(find_format, rows)))
    return found.most_common(1)[0][0] if found else None


def read_row(row: Any, dataset_format: str, marker: str = "\n\n") -> Chat:
    """One row as a Chat, checked. `marker` goes between a question and its input. UserError for a bad row."""
    if not isinstance(row, dict):
        raise UserError(f"holds {str(row)[:40]!r}: an object with columns is needed")
    row = blank_numbers(row)
    check_desirable(row)
    chat = read_chat(row, dataset_format, marker)
    own = (message.get(key) for message in chat.messages for key in ("content", *THOUGHT_KEYS))
    contents = [text for text in own if isinstance(text, str)]
    check_media(row, contents)
    answers = list_answers(chat)
    if not any(message.get(LEARNED, True) for message in answers):
        raise UserError("has no answer to train on" + (": all are marked as context" if answers else ""))
    said = "\0".join(contents)
    if half := find_half_character(said):
        raise UserError(f"holds half a character ({half!r}, a lone surrogate)")
    unread = find_unread(row, said, lambda watched: read_chat(watched, dataset_format, marker))
    return replace(chat, unread=unread) if unread else chat


def read_chat(row: Row, dataset_format: str, marker: str) -> Chat:
    """read_row of a row that has passed its checks before."""
    row = blank_numbers(row)
    name = ALIASES.get(dataset_format, dataset_format)
    if is_ranked(row) or (name in ("messages", "sharegpt") and row.get("chosen")):
        name = "preference"  # whatever format is forced: its answer is not in the context
    chat = FORMATS[name](row, marker)
    if any([take_off_end(message) for message in list_answers(chat)]):
        return replace(chat, cleaned=(*chat.cleaned, "an end mark behind an answer taken off"))
    return chat


def blank_numbers(row: Row) -> Row:
    """The row with its empty numbers as nulls."""
    empty = [column for column, value in row.items() if is_empty_number(value)]
    return row | dict.fromkeys(empty) if empty else row


def list_answers(chat: Chat) -> list[Message]:
    return [message for message in chat.messages if message["role"] in ("assistant", TEXT_ROLE)]
