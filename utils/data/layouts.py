"""Columns of any name: which column is the question, which the answer, who speaks in a turn.

Known by name where the field has one (question, query, ...), told by LLaMA-Factory's dataset_info.json beside
the file, or said with --columns instruction=QUESTION,output=ANSWER. Rows are renamed as they are read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from utils.console import UserError
from utils.data.cells import is_given, is_metadata, write_cell
from utils.data.roles import ROLES

QUESTIONS = "instruction question query problem 问题 指令 提问 题目 prompt".split()
ANSWERS = "output answer response completion 回答 答案 输出 回复 solution target".split()
THOUGHTS = "reasoning reasoning_content thinking cot complex_cot chain_of_thought 思考 思维链".split()
INPUTS = "input 输入 context article".split()
CANONICAL = ("instruction", "input", "output", "reasoning", "system", "history", "messages", "tools", "text")
TURN_KEYS = ("role", "content")
CONVERSATIONS = ("conversations", "conversation", "paragraph")  # ShareGPT's and those like it
TURNS = ("messages", *CONVERSATIONS, "chosen")  # columns of turns that formats know
UNSPOKEN = ("tools",)  # objects that are no turns
# Columns of files that are no texts of chats -> what they are.
NO_TEXTS = {
    "segments": "axolotl's texts without a template, with their own marks of turns: "
    'write the rows as messages, answers that are not learned with "train": false',
    "input_ids": "tokens of some tokenizer: give the file of texts that they were made from",
}
INFO_FILE = "dataset_info.json"
# Column names of LLaMA-Factory's dataset_info.json -> ours.
INFO_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
INFO_DEFAULTS: dict[str, dict[str, str | None]] = {  # by its `formatting`
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}
INFO_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """Own names of columns, of a turn's keys and of its speakers; pairs, so that it can be compared."""

    columns: Pairs = ()  # (ours, the file's)
    turn: Pairs = ()  # (role or content, the file's)
    roles: Pairs = ()  # (the file's, a known one)
    asked: tuple[str, ...] = ()  # the file's columns that were named, not those of a default

    def apply(self, row: Any) -> Any:
        """The row under our names; other columns stay."""
        if not isinstance(row, dict):
            return row
        taken = {theirs for _, theirs in self.columns}
        renamed = {name: value for name, value in row.items() if name not in taken}
        renamed |= {ours: row[theirs] for ours, theirs in self.columns if theirs in row}
        if self.turn or self.roles:
            if name := self.find_turns(renamed):
                renamed["messages"] = renamed.pop(name)
            renamed = {name: self.rename_turns(value, name) for name, value in renamed.items()}
        return renamed

    def find_turns(self, row: dict[str, Any]) -> str | None:
        """The one column with a list of turns of these keys, where none has a name that formats know."""
        keys = {theirs for _, theirs in self.turn}
        if not keys or any(name in row for name in TURNS):
            return None
        found = [name for name, value in row.items() if list_keys(value) >= keys and name not in UNSPOKEN]
        return found[0] if len(found) == 1 else None

    def rename_turns(self, turns: Any, column: str) -> Any:
        """The value of a column with its turns under our names, where it holds a turn or a list of them."""
        if column in UNSPOKEN:
            return turns
        if isinstance(turns, list):
            return [self.rename_turn(turn) for turn in turns]
        return self.rename_turn(turns)

    def rename_turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        keys, roles = {theirs: ours for ours, theirs in self.turn}, dict(self.roles)
        renamed = {keys.get(key, key): value for key, value in turn.items()}
        role = renamed.get("role")
        return renamed | {"role": roles.get(role, role)} if isinstance(role, str) else renamed

    def describe(self) -> list[Any]:
        return [list(map(list, pairs)) for pairs in (self.columns, self.turn, self.roles)]


def parse_columns(text: str | None) -> Layout | None:
    """--columns ours=theirs,...; raises UserError for a name of ours that there is not."""
    if text is None:
        return None
    columns: dict[str, str] = {}
    for pair in filter(None, text.replace("，", ",").split(",")):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not theirs or ours not in CANONICAL + TURN_KEYS:
            raise UserError(
                f"--columns {text}: {pair!r} is not NAME=COLUMN with a NAME of "
                f"{', '.join(CANONICAL + TURN_KEYS)}"
            )
        if ours in columns:
            raise UserError(f"--columns {text}: {ours} is given twice: keep {columns[ours]} or {theirs}")
        columns[ours] = theirs
    turn = tuple(pair for pair in columns.items() if pair[0] in TURN_KEYS)
    named = tuple(pair for pair in columns.items() if pair[0] not in TURN_KEYS)
    return Layout(named, turn, asked=tuple(theirs for _, theirs in named))


def read_info(spec: dict[str, Any], where: str) -> Layout:
    """An entry of dataset_info.json, with LLaMA-Factory's defaults for what it leaves out."""
    asked, tags = read_names(spec, "columns", where), read_names(spec, "tags", where)
    formatting = spec.get("formatting") or "alpaca"
    if formatting not in tuple(INFO_DEFAULTS):
        known = ", ".join(INFO_DEFAULTS)
        raise UserError(f"{where}: formatting {formatting!r} is none of {known}: mend it or move it away")
    named = {key: own for key, own in (INFO_DEFAULTS[formatting] | asked).items() if own}
    columns = tuple((INFO_COLUMNS.get(key, key), own) for key, own in named.items())
    if set(asked) == {"prompt"} and formatting == "alpaca":  # without an answer it is text to continue
        columns = (("text", named["prompt"]),)
    turn: Pairs = ()
    roles: Pairs = ()
    if formatting != "alpaca":
        turn = (("role", tags.get("role_tag") or "from"), ("content", tags.get("content_tag") or "value"))
        roles = tuple((own, role) for tag, role in INFO_ROLES.items() if (own := tags.get(tag)))
    return Layout(columns, turn, roles, tuple(own for own in asked.values() if own))


def read_names(spec: dict[str, Any], key: str, where: str) -> dict[str, str | None]:
    """`columns` or `tags` of an entry: {LLaMA-Factory's name: the file's, or null}."""
    names = spec.get(key) or {}
    if not isinstance(names, dict) or not all(isinstance(own, str | None) for own in names.values()):
        seen = str(names)[:40]
        raise UserError(f"{where}: {key} {seen!r} is no object of names: mend it or move it away")
    return names


def find_columns(known: list[str], columns: Iterable[Any]) -> list[str]:
    """The columns of these names, in the order of `known`, in capitals or not."""
    own = {str(name).lower(): name for name in columns}
    return [own[name] for name in known if name in own]


def find_pair(columns: Iterable[Any]) -> tuple[str, str] | None:
    """(question's, answer's) column, known by their names."""
    question, answer = find_columns(QUESTIONS, columns)[:1], find_columns(ANSWERS, columns)[:1]
    return (question[0], answer[0]) if question and answer else None


def list_keys(value: Any) -> set[str]:
    """The keys of a list's first object; none of another value."""
    return set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else set()


def explain_unknown(rows: list[dict[str, Any]], is_table: bool) -> str:
    """Why no format reads these rows, and what to do: the flag is filled in by their own columns."""
    seen = dict.fromkeys(str(name) for row in rows for name in row)
    if name := next((name for name in NO_TEXTS if name in seen), None):
        return f"column {name!r} holds {NO_TEXTS[name]}"
    unnamed = "if that line is a row, put the columns' names above it, separated as it is; else "
    return (
        f"no known format has the columns {', '.join(seen)}: {unnamed if is_table else ''}say which is "
        f"which, as in {suggest_flag(rows)} (data/README.md has the known layouts)"
    )


def suggest_flag(rows: list[dict[str, Any]]) -> str:
    """--columns filled in for these rows: a list is their messages, or two texts are question and answer."""
    row = {name: value for one in rows for name, value in one.items() if is_given(value)}
    for name, value in row.items():
        if name not in UNSPOKEN and len(list_keys(value)) > 1:
            role, content = guess_turn(value[0])
            return f"--columns messages={name},role={role},content={content}"
    names = [name for name in row if not is_metadata(name)]
    names.sort(key=lambda name: not isinstance(row[name], str))  # numbers behind texts
    names = [name for name in names if isinstance(write_cell(row[name]), str)]
    answer = next((name for name in ANSWERS if name in names), None)
    asking = [name for name in QUESTIONS if name in names] + [name for name in names if name != answer]
    question = asking[0] if asking else "COLUMN"
    rest = [name for name in names if name != question]
    return f"--columns instruction={question},output={answer or (rest[0] if rest else 'COLUMN')}"


def guess_turn(turn: dict[str, Any]) -> tuple[str, str]:
    """The keys of (who speaks, what is said) of a turn with keys of its own."""
    texts = [key for key, value in turn.items() if isinstance(value, str)] or list(turn)
    speaker = next((key for key in texts if str(turn[key]).lower() in ROLES), texts[0])
    rest = [key for key in texts if key != speaker] or [key for key in turn if key != speaker]
    return speaker, max(rest, key=lambda key: len(str(turn[key])))
