"""Question and answer files: eval/prompts, the Vicuna and OASST questions, the paper's generations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.console import UserError, notice
from utils.data.readers import read_file
from utils.data.turns import split_turns
from utils.prompts.messages import Messages
from utils.run.record import hash_text


@dataclass(frozen=True)
class Question:
    """`text` as the file has it; `messages` what is asked, earlier turns of an OASST chat included."""

    question_id: str | int
    text: str
    category: str
    messages: Messages


def load_questions(paths: list[str]) -> list[Question]:
    """Rows {question_id or message_id, text or MT-bench's turns, category} of all files.

    Raises UserError for a bad row and an id twice.
    """
    questions: dict[str | int, Question] = {}
    more_turns = 0
    for path in paths:
        for number, row in enumerate(read_question_rows(Path(path)), 1):
            question_id, text = find_id(row), row.get("text", find_first(row.get("turns")))
            if not isinstance(text, str) or question_id is None:
                raise UserError(
                    f"{path}: row {number} is no question: question_id (or message_id) and text (or turns) "
                    "are needed"
                )
            more_turns += "text" not in row and len(row["turns"]) > 1
            messages = read_question(text)
            if not messages or messages[-1]["role"] != "user":
                raise UserError(f"{path}: row {number} is no question: nothing of the human's stands last")
            if question_id in questions:
                raise UserError(f"{path}: question_id {question_id!r} is there twice")
            questions[question_id] = Question(question_id, text, row.get("category", "generic"), messages)
    if more_turns:
        notice(f"--questions: {more_turns} of {len(questions)} have more than one turn: the first is asked")
    return list(questions.values())


def read_question_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; our own questions are in eval/prompts")
    rows = list(read_file(path))
    bad = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if bad:
        raise UserError(f"{path}: row {bad} is {str(rows[bad - 1])[:40]!r}: an object is needed")
    return rows


def find_id(row: dict[str, Any]) -> str | int | None:
    """OASST's rows have message_id in place of question_id."""
    return row.get("question_id", row.get("message_id"))


def find_first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def read_question(text: str) -> Messages:
    """A plain question, or `### Human: ... ### Assistant:` with earlier turns."""
    if not text.startswith("### Human:"):
        return [{"role": "user", "content": text}]
    turns = split_turns(text, r"### (Human|Assistant):")
    messages = [{"role": role, "content": said} for role, said in turns]
    return messages if messages[-1]["content"] else messages[:-1]


@dataclass(frozen=True)
class Answer:
    answer_id: str
    text: str


def load_answers(path: str) -> dict[str | int, Answer]:
    """{question_id: answer} of a file with `generation` (the runs) or `text` (the paper's baselines).

    `generation_truncated`, where the paper has it, is what it judged: without the next question that a model
    went on to ask itself. MT-bench's `choices` give the answer to the first turn.
    """
    answers = {}
    for number, row in enumerate(read_question_rows(Path(path)), 1):
        question_id, text = find_id(row), find_answer(row)
        if not isinstance(text, str) or question_id is None:
            raise UserError(
                f"{path}: row {number} is no answer: question_id (or message_id), and generation or text, "
                "are needed"
            )
        answers[question_id] = Answer(row.get("answer_id") or name_answer(question_id, text), text)
    return answers


def find_answer(row: dict[str, Any]) -> Any:
    for name in ("generation_truncated", "generation", "text"):
        if name in row:
            return row[name]
    choice = find_first(row.get("choices"))
    return find_first(choice.get("turns")) if isinstance(choice, dict) else None


def name_answer(question_id: str | int, text: str) -> str:
    """An id that changes with the answer, so that no review of another answer counts for it."""
    return hash_text(f"{question_id}\n{text}")[:22]
