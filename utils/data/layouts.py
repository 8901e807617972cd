"""Columns of any name: which column is the question, which the answer, who speaks in a turn.

Known by name where the field has one (question, query, ...), told by LLaMA-Factory's dataset_info.json beside
the file, or said with --columns instruction=QUESTION,output=ANSWER. Rows are renamed as they are read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.console import UserError

QUESTIONS = "instruction question query problem 问题 指令 提问 题目 prompt Question".split()
ANSWERS = "output answer response completion 回答 答案 输出 回复 solution target Answer".split()
INPUTS = ("input", "输入", "context")
CANONICAL = ("instruction", "input", "output", "system", "history", "messages", "tools", "text")
TURN_KEYS = ("role", "content")
INFO_FILE = "dataset_info.json"
# Column names of LLaMA-Factory's dataset_info.json -> ours.
INFO_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "label"}
INFO_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Layout:
    """Own names of columns, of a turn's keys and of its speakers; pairs, so that it can be compared."""

    columns: tuple[tuple[str, str], ...] = ()  # (ours, the file's)
    turn: tuple[tuple[str, str], ...] = ()  # (role or content, the file's)
    roles: tuple[tuple[str, str], ...] = ()  # (the file's, a known one)

    def apply(self, row: Any) -> Any:
        """The row under our names; other columns stay."""
        if not isinstance(row, dict):
            return row
        taken = {theirs for _, theirs in self.columns}
        renamed = {name: value for name, value in row.items() if name not in taken}
        renamed |= {ours: row[theirs] for ours, theirs in self.columns if theirs in row}
        if self.turn or self.roles:
            for name in ("messages", "chosen", "rejected"):
                if name in renamed:
                    renamed[name] = self.rename_turns(renamed[name])
        return renamed

    def rename_turns(self, turns: Any) -> Any:
        if isinstance(turns, dict):
            return self.rename_turns([turns])[0]
        if not isinstance(turns, list):
            return turns
        keys, roles = {theirs: ours for ours, theirs in self.turn}, dict(self.roles)
        found = [
            {keys.get(key, key): value for key, value in turn.items()} if isinstance(turn, dict) else turn
            for turn in turns
        ]
        return [
            turn | {"role": roles.get(turn["role"], turn["role"])}
            if isinstance(turn, dict) and isinstance(turn.get("role"), str)
            else turn
            for turn in found
        ]

    def describe(self) -> list[Any]:
        return [list(map(list, pairs)) for pairs in (self.columns, self.turn, self.roles)]


def parse_columns(text: str | None) -> Layout | None:
    """--columns ours=theirs,...; raises UserError for a name of ours that there is not."""
    if text is None:
        return None
    columns, turn = [], []
    for pair in filter(None, text.replace("，", ",").split(",")):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not theirs or ours not in CANONICAL + TURN_KEYS:
            raise UserError(
                f"--columns {text}: {pair!r} is not NAME=COLUMN with a NAME of "
                f"{', '.join(CANONICAL + TURN_KEYS)}"
            )
        (turn if ours in TURN_KEYS else columns).append((ours, theirs))
    return Layout(tuple(columns), tuple(turn))


def find_layout(path: Path) -> tuple[Layout, str] | None:
    """(layout, what it is called there) of a file that a dataset_info.json beside it names."""
    info = path.parent / INFO_FILE
    if not info.is_file() or path.name == INFO_FILE:
        return None
    try:
        listed = json.loads(info.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{info} cannot be read ({error}): mend it or move it away") from error
    for name, spec in listed.items() if isinstance(listed, dict) else ():
        if isinstance(spec, dict) and spec.get("file_name") == path.name:
            return read_info(spec), name
    return None


def read_info(spec: dict[str, Any]) -> Layout:
    """An entry of dataset_info.json, with LLaMA-Factory's defaults for what it leaves out."""
    named, tags = dict(spec.get("columns") or {}), dict(spec.get("tags") or {})
    if spec.get("formatting", "alpaca") == "alpaca":
        named = {"prompt": "instruction", "query": "input", "response": "output"} | named
        return Layout(tuple((INFO_COLUMNS.get(key, key), own) for key, own in named.items() if own))
    named = {"messages": "conversations"} | named
    turn = (("role", tags.get("role_tag", "from")), ("content", tags.get("content_tag", "value")))
    roles = tuple((tags[tag], role) for tag, role in INFO_ROLES.items() if tag in tags)
    return Layout(tuple((INFO_COLUMNS.get(key, key), own) for key, own in named.items() if own), turn, roles)


def find_pair(columns: Any) -> tuple[str, str] | None:
    """(question's, answer's) column, known by their names."""
    question = next((name for name in QUESTIONS if name in columns), None)
    answer = next((name for name in ANSWERS if name in columns), None)
    return (question, answer) if question and answer else None


def suggest_flag(row: dict[str, Any]) -> str:
    """--columns filled in for this row: a list is its messages, or two texts are question and answer."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and len(value[0]) > 1:
            role, content = list(value[0])[:2]
            return f"--columns messages={name},role={role},content={content}"
    texts = [name for name, value in row.items() if isinstance(value, str)]
    question = next((name for name in QUESTIONS if name in row), texts[0] if texts else "COLUMN")
    rest = [name for name in texts if name != question]
    answer = next((name for name in ANSWERS if name in row), rest[0] if rest else "COLUMN")
    return f"--columns instruction={question},output={answer}"
