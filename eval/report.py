"""One page on a run, before and after: loss, benchmarks, how it answers, what it cost, where it got worse.

    python -m eval.report RUN

The adapter is switched off for "before". Writes report.md, report.json and report.png into the run's folder.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.answers.questions import Question, load_questions
from eval.measures.differences import Measure, compute_row_losses, measure_answers
from eval.measures.rendering import draw_measures, render_report
from utils.arguments import GenerationArguments, ModelArguments, flag, require_folder, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import find_given_flags, parse_args, prepend_flag, split_commas
from utils.models.folder import resolve_model
from utils.run.record import write_json

if TYPE_CHECKING:
    from utils.data.token_rows import Example

OWN_QUESTIONS = ["eval/prompts/questions_zh.jsonl", "eval/prompts/questions_en.jsonl"]


@dataclass
class ReportArguments:
    _argument_group_name = "report"
    questions: list[str] = flag(OWN_QUESTIONS, "Question files.")
    max_questions: int = flag(24, "Questions asked, spread evenly over the files.")
    max_held_out: int = flag(256, "Held-out rows whose loss is measured, at most.")
    max_held_out_answers: int = flag(12, "Held-out rows that are answered, at most.")
    tasks: str = flag("quiz_en,quiz_zh", "Benchmarks of lm_eval, or none.")
    include_path: str | None = flag(None, "Folder of task files of your own.")
    limit: int | None = flag(None, "This many questions of each benchmark at most.")
    batch_size: int = flag(8, "Sequences in a batch.")
    output_dir: str | None = flag(None, "Folder of the report; default: the run's.")
    seed: int = flag(42, "Seed of --do_sample and of few-shot examples.")

    def __post_init__(self):
        require_positive(self, "max_questions", "max_held_out", "max_held_out_answers", "limit", "batch_size")
        require_folder(self, "output_dir")


def main() -> None:
    argv = prepend_flag(sys.argv[1:], "--checkpoint_dir")
    model_args, generation_args, report_args = parse_args(
        argv, [ModelArguments, GenerationArguments, ReportArguments], __doc__, max_new_tokens=128
    )
    if model_args.checkpoint_dir is None:
        raise UserError("no run is named: python -m eval.report RUN")
    resolved = resolve_model(model_args, find_given_flags(argv))
    if not resolved.has_adapter:
        raise UserError(
            "a full fine-tune has no adapter to switch off: use eval.lm_tasks on it and on its base"
        )
    questions = spread(load_questions(report_args.questions), report_args.max_questions)

    from eval.measures.harness import load_task_manager
    from utils.chat.generation import load_run

    tasks = [] if report_args.tasks == "none" else split_commas([report_args.tasks])
    manager = load_task_manager(tasks, report_args.include_path) if tasks else None
    chat, run_dir = load_run(resolved), resolved.args.adapter_dir
    measures = measure_tasks(chat, tasks, manager, report_args) if tasks else []
    content = measure_run(chat, resolved.record, questions, measures, generation_args, report_args)
    save_report(content | {"run": str(run_dir)}, Path(report_args.output_dir or run_dir))


def measure_run(
    chat: Any,
    record: dict[str, Any] | None,
    questions: list[Question],
    measures: list[Measure],
    generation_args: GenerationArguments,
    report_args: ReportArguments,
) -> dict[str, Any]:
    """What report.json holds: every measure compared, the benchmarks' `measures` too, and answers."""
    from eval.answers.answering import answer_questions
    from eval.measures.held_out import load_held_out

    held_out = load_held_out(record, chat, report_args.max_held_out)
    asked = held_out.questions[: report_args.max_held_out_answers]
    how = (generation_args, report_args.seed, report_args.batch_size)
    answers, held_out_answers = (
        tuple(list(answer_questions(chat, some, *how, tuned)) for tuned in (False, True))
        for some in (questions, asked)
    )
    measures = [
        *measure_loss(chat, held_out.encoded),
        *measures,
        *measure_answers([question.text for question in questions], *answers),
        *measure_rouge(held_out.references[: len(asked)], *held_out_answers),
    ]
    record = record or {}
    return {
        "results": [measure.compare() for measure in measures],
        "left_out": held_out.reason,
        "cost": record.get("metrics", {}),
        "record": {name: record.get(name) for name in ("base_model", "command", "data", "versions")},
        "settings": dataclasses.asdict(report_args) | {"max_new_tokens": generation_args.max_new_tokens},
        "answers": pair_answers(questions, *answers),
        "held_out_answers": pair_answers(asked, *held_out_answers),
    }


def save_report(content: dict[str, Any], folder: Path) -> None:
    write_json(content, folder / "report.json")
    draw_measures(content["results"], folder / "report.png")
    (folder / "report.md").write_text(render_report(content, folder), encoding="utf-8")
    notice(f"report.md, report.json and report.png are in {folder}")


def spread(questions: list[Question], count: int) -> list[Question]:
    """`count` questions at even distances: every file and every kind is there."""
    if count >= len(questions):
        return questions
    return [questions[i * len(questions) // count] for i in range(count)]


def ask_both(chat: Any, ask: Callable[[], Any]) -> tuple[Any, Any]:
    """What `ask` gives without the adapter, and with it."""
    with chat.model.disable_adapter():
        before = ask()
    return before, ask()


def measure_loss(chat: Any, rows: list["Example"]) -> list[Measure]:
    """Held-out loss, weighted by label tokens as in training."""
    if not rows:
        return []
    (before, counts), (after, _) = ask_both(chat, lambda: compute_row_losses(chat.model, rows))
    return [Measure("held-out loss, nats a token", before, after, "lower", counts)]


def measure_tasks(chat: Any, tasks: list[str], manager: Any, report_args: ReportArguments) -> list[Measure]:
    """Accuracy of each task, question by question."""
    from eval.measures.harness import run_tasks

    options: dict[str, Any] = {
        "batch_size": report_args.batch_size,
        "limit": report_args.limit,
        "seed": report_args.seed,
    }
    sides = ask_both(chat, lambda: run_tasks(chat, tasks, manager, **options)["samples"])
    measures = []
    for task in sorted(name for name, rows in sides[0].items() if "acc" in rows[0]):
        first, second = ([row["acc"] for row in side[task]] for side in sides)
        measures.append(Measure(f"{task}, accuracy", first, second, "higher", percent=True))
    return measures


def measure_rouge(
    references: list[str], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[Measure]:
    """ROUGE-L of the answers to held-out rows."""
    from utils.train.metrics import score_answer

    if not references:
        return []
    sides = []
    for rows in (before, after):
        pairs = zip([row["generation"] for row in rows], references, strict=True)
        sides.append([score_answer(*pair)["rouge-l"] / 100 for pair in pairs])
    first, second = sides
    return [Measure("ROUGE-L of held-out answers", first, second, "higher", percent=True)]


def pair_answers(
    questions: list[Question], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    return [
        {
            "question": question.messages[-1]["content"],
            "category": question.category,
            "before": first["generation"],
            "after": second["generation"],
        }
        for question, first, second in zip(questions, before, after, strict=True)
    ]


if __name__ == "__main__":
    run_main(main)
