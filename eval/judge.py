"""Compare answers by a model behind any OpenAI-compatible endpoint, each pair in both orders.

    export OPENAI_API_KEY=...   OPENAI_BASE_URL=http://localhost:8000/v1
    python -m eval.judge before.jsonl after.jsonl --questions eval/prompts/questions_zh.jsonl --model gpt-4o

Writes one review file an order, in the QLoRA paper's format; then: python -m eval.elo FILES.
Started again it asks only what is not yet judged.
"""

import functools
import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from eval.answers.questions import Answer, Question, load_answers, load_questions
from eval.answers.reviews import shorten_name
from utils.arguments import flag, require_folder, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import parse_args, prepend_flag

PROMPTS_DIR = Path(__file__).parent / "prompts"
ASK_AGAIN = {
    "threeclass": "Your reply must end with a line that holds only 1, 2 or 3. Give that line now.",
    "relative": "Your reply must begin with a line that holds only two numbers from 1 to 10, such as `7 9`.",
}
MAX_FAILURES_IN_A_ROW = 5  # then the endpoint is at fault, not a question
REVIEW_TOKENS = 250  # of a typical review, for the estimate


@dataclass
class JudgeArguments:
    _argument_group_name = "judge"
    answers: list[str] = flag([], "Answer files to compare, two or more.")
    questions: list[str] = flag([], "Question files that were answered.")
    model: str | None = flag(None, "The judging model's name at the endpoint.")
    scoring: Literal["threeclass", "relative"] = flag(
        "threeclass", "The better answer or a tie; or two scores out of 10."
    )
    output_dir: str = flag("output/reviews", "Folder of the review files.")
    max_questions: int | None = flag(None, "Judge this many questions at most.")
    parallel: int = flag(4, "Requests under way at once.")
    timeout_s: float = flag(120.0, "A request is given up after this, seconds.")
    retries: int = flag(5, "Tries after HTTP 429, 500 or a timeout, ever further apart.")
    attempts: int = flag(3, "Replies asked for until one holds a verdict.")
    temperature: float = flag(0.0, "Of the judge; below 0: left to the endpoint.")
    max_review_tokens: int = flag(2048, "Longest review, tokens.")
    price_in: float = flag(0.0, "Price of a million prompt tokens, for the estimate.")
    price_out: float = flag(0.0, "Price of a million reply tokens.")
    estimate_only: bool = flag(False, "Print the cost estimate and stop.")

    def __post_init__(self):
        require_positive(self, "max_questions", "parallel", "timeout_s", "attempts", "max_review_tokens")
        require_folder(self, "output_dir")
        if len(self.answers) < 2:
            raise UserError("--answers: two or more answer files are compared")
        if not self.questions:
            raise UserError("--questions: name the question file that was answered")
        if self.model is None and not self.estimate_only:
            raise UserError("--model: name the judging model, as the endpoint calls it")


@dataclass(frozen=True)
class Comparison:
    """One request: two answers to a question, in this order; `path` is the review file it belongs to."""

    question: Question
    players: tuple[str, str]
    answers: tuple[Answer, Answer]
    path: Path

    @property
    def key(self) -> tuple[str, str, str]:
        return str(self.question.question_id), self.answers[0].answer_id, self.answers[1].answer_id


def main() -> None:
    (judge_args,) = parse_args(prepend_flag(sys.argv[1:], "--answers"), [JudgeArguments], __doc__)
    comparisons = list_comparisons(judge_args)
    reviewed = {path: load_reviewed(path) for path in {comparison.path for comparison in comparisons}}
    open_ones = [one for one in comparisons if one.key not in reviewed[one.path]]
    instructions = (PROMPTS_DIR / f"judge_{judge_args.scoring}.txt").read_text(encoding="utf-8")
    prompts = [render_prompt(one, instructions) for one in open_ones]
    print_estimate(prompts, len(comparisons), judge_args)
    if judge_args.estimate_only:
        return
    if open_ones:
        judge_all(build_client(judge_args), open_ones, prompts, judge_args)
    files = sorted({str(one.path) for one in comparisons})
    notice("to rate them: python -m eval.elo " + " ".join(files))


def list_comparisons(judge_args: JudgeArguments) -> list[Comparison]:
    """Every question with every ordered pair of players. Raises UserError where a file answers too little."""
    questions = load_questions(judge_args.questions)[: judge_args.max_questions]
    files = {shorten_name(Path(path).stem): load_answers(path) for path in judge_args.answers}
    if len(files) < len(judge_args.answers):
        raise UserError(f"--answers: two files are called {', '.join(files)}: give each its own name")
    for name, answers in files.items():
        missing = [question.question_id for question in questions if question.question_id not in answers]
        if missing:
            raise UserError(
                f"--answers {name}: {len(missing)} of {len(questions)} questions have no answer, the first "
                f"is {missing[0]!r}"
            )
    judge = re.sub(r"[^\w.]+", "_", str(judge_args.model))
    suffix = "-threeclass" if judge_args.scoring == "threeclass" else ""
    folder = Path(judge_args.output_dir)
    return [
        Comparison(
            question,
            (one, two),
            (files[one][question.question_id], files[two][question.question_id]),
            folder / f"answer-{one}-vs-answer-{two}-{judge}-reviewer{suffix}.jsonl",
        )
        for question in questions
        for one, two in permutations(files, 2)
    ]


def load_reviewed(path: Path) -> set[tuple[str, str, str]]:
    """Keys of the reviews in a file; half a last line, left by a crash, is cut off."""
    if not path.is_file():
        return set()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        notice(f"{path}: its last line is half a review and is removed")
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
    return {(str(row["question_id"]), row["answer1_id"], row["answer2_id"]) for row in rows}


def render_prompt(comparison: Comparison, instructions: str) -> str:
    asked = "\n\n".join(
        message["content"]
        if len(comparison.question.messages) == 1
        else f"{message['role']}: {message['content']}"
        for message in comparison.question.messages
    )
    return (
        f"[Question]\n{asked}\n\n[Answer of Assistant 1]\n{comparison.answers[0].text}\n[End of Answer 1]\n\n"
        f"[Answer of Assistant 2]\n{comparison.answers[1].text}\n[End of Answer 2]\n\n{instructions}"
    )


def print_estimate(prompts: list[str], total: int, judge_args: JudgeArguments) -> None:
    """What the open requests will cost, before the first is sent."""
    tokens_in = sum(map(estimate_tokens, prompts))
    tokens_out = REVIEW_TOKENS * len(prompts)
    price = (tokens_in * judge_args.price_in + tokens_out * judge_args.price_out) / 1e6
    cost = f", about {price:.2f}" if price else ""
    notice(
        f"{len(prompts)} of {total} reviews to ask for: about {tokens_in:,} tokens in, {tokens_out:,} out"
        f"{cost} (--price_in, --price_out: per million tokens)"
    )


def estimate_tokens(text: str) -> int:
    """A Chinese character is about one token, other text about four characters a token."""
    chinese = sum(
        "\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef" for character in text
    )
    return chinese + (len(text) - chinese) // 4


def build_client(judge_args: JudgeArguments) -> Any:
    if not os.environ.get("OPENAI_API_KEY"):
        raise UserError("OPENAI_API_KEY is not set: export the endpoint's key (any word for a local server)")
    from openai import OpenAI

    return OpenAI(timeout=judge_args.timeout_s, max_retries=judge_args.retries)


def judge_all(
    client: Any, comparisons: list[Comparison], prompts: list[str], judge_args: JudgeArguments
) -> None:
    """Ask, and write each review as it comes. Ctrl-C and SIGTERM stop after the requests under way."""
    from tqdm import tqdm

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Path(judge_args.output_dir).mkdir(parents=True, exist_ok=True)
    usages: list[Any] = []  # of every reply that came, those without a verdict too: the endpoint counts them
    failures, in_a_row = [], 0
    judge = functools.partial(judge_one, client, judge_args, usages)
    try:
        # Whatever ends the loop, closing() cancels what waits; the pool then waits for what is under way.
        with (
            ThreadPoolExecutor(judge_args.parallel) as pool,
            closing(pool.map(judge, comparisons, prompts)) as outcomes,  # type: ignore[type-var]  # a generator
        ):
            for failure in tqdm(outcomes, total=len(prompts), unit="review"):
                in_a_row = in_a_row + 1 if failure else 0
                failures += [failure] if failure else []
                if in_a_row == MAX_FAILURES_IN_A_ROW:
                    raise UserError(f"{in_a_row} reviews in a row failed, the last: {failure}")
    finally:
        tokens_in = sum(usage.prompt_tokens for usage in usages)
        tokens_out = sum(usage.completion_tokens for usage in usages)
        notice(f"used {tokens_in:,} tokens in, {tokens_out:,} out")
    if failures:
        raise UserError(
            f"{len(failures)} reviews failed, the first: {failures[0]}; start again to ask for them"
        )


def judge_one(
    client: Any, judge_args: JudgeArguments, usages: list[Any], comparison: Comparison, prompt: str
) -> str | None:
    """Ask for a review and write it; returns what went wrong instead, if anything did.

    Raises UserError where the endpoint refuses every request: a wrong key, model or parameter.
    """
    import openai

    try:
        text, score = ask_judge(client, prompt, judge_args, usages)
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
        raise UserError(f"the endpoint refuses (--model {judge_args.model}): {error}") from error
    except (openai.OpenAIError, ValueError) as error:
        return f"question {comparison.question.question_id}: {type(error).__name__}: {error}"
    save_review(comparison, str(judge_args.model), text, score)
    return None


def ask_judge(
    client: Any, prompt: str, judge_args: JudgeArguments, usages: list[Any]
) -> tuple[str, int | list[float]]:
    """(text, verdict) of the first reply that holds one. Raises openai's errors, or ValueError for none."""
    messages = [{"role": "user", "content": prompt}]
    options = {"temperature": judge_args.temperature} if judge_args.temperature >= 0 else {}
    for _ in range(judge_args.attempts):
        reply = client.chat.completions.create(
            model=judge_args.model,
            messages=messages,
            max_completion_tokens=judge_args.max_review_tokens,
            **options,
        )
        # A server that answers with anything but JSON gives a str here.
        usage, choices = getattr(reply, "usage", None), getattr(reply, "choices", None)
        usages += [usage] if usage else []
        text = (choices[0].message.content if choices else None) or ""
        score = parse_score(text, judge_args.scoring)
        if score is not None:
            return text, score
        messages = [
            messages[0],
            {"role": "assistant", "content": text},
            {"role": "user", "content": ASK_AGAIN[judge_args.scoring]},
        ]
    raise ValueError(f"no verdict in {judge_args.attempts} replies, the last ends with {text[-60:]!r}")


def parse_score(text: str, scoring: str) -> int | list[float] | None:
    """1, 2 or 3 of the last line; or the two numbers, 1 to 10, of the first."""
    lines = text.strip().splitlines()
    if not lines:
        return None
    if scoring == "threeclass":
        found = re.fullmatch(r"[\W_]*([123])[\W_]*", lines[-1])
        return int(found[1]) if found else None
    numbers = re.fullmatch(r"\W*(\d+(?:\.\d+)?)[\s,/;]+(\d+(?:\.\d+)?)\W*", lines[0])
    scores = [float(number) for number in numbers.groups()] if numbers else []
    return scores if scores and all(1 <= score <= 10 for score in scores) else None


def save_review(comparison: Comparison, judge: str, text: str, score: int | list[float]) -> None:
    """Append the review to its file in a single write, so that two threads' lines do not mix."""
    question_id, answer1_id, answer2_id = comparison.key
    players = dict(zip(("player1", "player2"), comparison.players, strict=True))
    row = {
        "review_id": f"{question_id}-{answer1_id[:8]}-{answer2_id[:8]}",
        "question_id": comparison.question.question_id,
        "answer1_id": answer1_id,
        "answer2_id": answer2_id,
        "reviewer_id": judge,
        "metadata": players | {"judge": judge, "category": comparison.question.category},
        "text": text,
        "score": score,
    }
    with open(comparison.path, "ab", buffering=0) as file:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        os.fsync(file.fileno())


if __name__ == "__main__":
    run_main(main)
