"""Benchmarks by lm-evaluation-harness, of a run and of its untuned base in the same process.

    python -m eval.lm_tasks RUN --tasks mmlu,cmmlu,ceval-valid --base_too
    python -m eval.lm_tasks RUN --tasks quiz_en,quiz_zh --base_too

The second is our own quiz and needs no hub. Writes lm_tasks.json into the run's folder.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments import ModelArguments, flag, require_folder, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import find_given_flags, parse_args, prepend_flag, split_commas
from utils.models.folder import resolve_model
from utils.run.record import next_free_path, write_json


@dataclass
class TaskArguments:
    _argument_group_name = "tasks"
    tasks: str = flag("quiz_en,quiz_zh", "Tasks or groups of lm_eval, with commas.")
    include_path: str | None = flag(None, "Folder of task files of your own.")
    base_too: bool = flag(False, "Measure the base, the adapter off, in the same process.")
    chat_template: bool = flag(False, "Ask through the run's chat template.")
    template: str | None = flag(None, "A name in utils/prompts/templates, instead of the run's own.")
    num_fewshot: int | None = flag(None, "Examples before a question; default: the task's.")
    limit: int | None = flag(None, "This many questions of each task at most.")
    batch_size: int = flag(8, "Sequences in a batch.")
    output_dir: str | None = flag(None, "Folder of lm_tasks.json; default: the run's.")
    seed: int = flag(42, "Seed of the few-shot examples.")

    def __post_init__(self):
        require_positive(self, "limit", "batch_size")
        require_folder(self, "output_dir")


def main() -> None:
    argv = prepend_flag(sys.argv[1:], "--checkpoint_dir")
    model_args, task_args = parse_args(argv, [ModelArguments, TaskArguments], __doc__)
    resolved = resolve_model(model_args, find_given_flags(argv), task_args.template)
    if task_args.base_too and not resolved.has_adapter:
        raise UserError("--base_too switches an adapter off, and there is none: measure the base by itself")

    from eval.measures.harness import load_task_manager, read_scores, run_tasks
    from utils.chat.generation import load_run

    tasks = split_commas([task_args.tasks])
    manager = load_task_manager(tasks, task_args.include_path)
    chat = load_run(resolved)
    asked = ("batch_size", "num_fewshot", "limit", "chat_template", "seed")
    options = {name: getattr(task_args, name) for name in asked}
    scores = {"run": read_scores(run_tasks(chat, tasks, manager, **options))}
    if task_args.base_too:
        with chat.model.disable_adapter():
            scores["base"] = read_scores(run_tasks(chat, tasks, manager, **options))
    print(render_scores(scores))
    folder = Path(task_args.output_dir or resolved.args.checkpoint_dir or "output/lm_tasks")
    path = next_free_path(folder / "lm_tasks.json")
    write_json({"model": vars(resolved.args), "tasks": tasks, "options": options} | scores, path)
    notice(f"saved in {path}")


def render_scores(scores: dict[str, list[dict[str, Any]]]) -> str:
    """A markdown table, value and standard error, run beside base."""
    names = list(scores)
    lines = [f"| task | metric | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    for rows in zip(*scores.values(), strict=True):
        cells = [format_score(row) for row in rows]
        lines.append(f"| {rows[0]['task']} | {rows[0]['metric']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_score(row: dict[str, Any]) -> str:
    return f"{row['value']:.4f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")


if __name__ == "__main__":
    run_main(main)
