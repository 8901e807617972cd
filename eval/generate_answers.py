"""Answer a question file with a run, and with its untuned base in the same process.

    python -m eval.generate_answers RUN --questions eval/prompts/questions_zh.jsonl --base_too
    python -m eval.generate_answers --model_name_or_path MODEL --questions FILE.jsonl

Writes JSON lines in the QLoRA paper's format; then: python -m eval.judge FILE FILE.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers.questions import Question, load_questions
from utils.arguments import GenerationArguments, ModelArguments, flag, require_folder, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import find_given_flags, parse_args, prepend_flag
from utils.models.folder import resolve_model
from utils.run.record import next_free_path


@dataclass
class AnswerArguments:
    _argument_group_name = "answers"
    questions: list[str] = flag([], "Question files: ours, Vicuna's, OASST's.")
    output_dir: str = flag("output/answers", "Folder of the answer files.")
    base_too: bool = flag(False, "Answer with the adapter off too, into a second file.")
    max_questions: int | None = flag(None, "Answer this many questions at most.")
    batch_size: int = flag(8, "Questions answered at once.")
    template: str | None = flag(None, "A name in utils/prompts/templates, instead of the run's own.")
    seed: int = flag(42, "Seed of --do_sample.")

    def __post_init__(self):
        require_positive(self, "max_questions", "batch_size")
        require_folder(self, "output_dir")
        if not self.questions:
            raise UserError("--questions: name a question file, such as eval/prompts/questions_zh.jsonl")


def main() -> None:
    argv = prepend_flag(sys.argv[1:], "--checkpoint_dir")
    model_args, generation_args, answer_args = parse_args(
        argv, [ModelArguments, GenerationArguments, AnswerArguments], __doc__
    )
    resolved = resolve_model(model_args, find_given_flags(argv), answer_args.template)
    if answer_args.base_too and not resolved.has_adapter:
        raise UserError(
            "--base_too switches an adapter off, and there is none: answer with the base by itself"
        )
    questions = load_questions(answer_args.questions)[: answer_args.max_questions]

    from utils.chat.generation import load_run

    chat, args = load_run(resolved), resolved.args
    base = Path(args.base).name
    tuned = Path(args.checkpoint_dir).resolve().name if args.checkpoint_dir else base
    write_answers(chat, questions, tuned, generation_args, answer_args)
    if answer_args.base_too:
        write_answers(chat, questions, base, generation_args, answer_args, tuned=False)


def write_answers(
    chat: Any,
    questions: list[Question],
    name: str,
    generation_args: GenerationArguments,
    answer_args: AnswerArguments,
    tuned: bool = True,
) -> None:
    """Answer into answer-NAME.jsonl, each row when it is there, so that a stopped run leaves what it had."""
    from tqdm import tqdm

    from eval.answers.answering import answer_questions

    folder = Path(answer_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = next_free_path(folder / f"answer-{name}.jsonl")
    settings = {"seed": answer_args.seed, "model_id": name, "generation_args": vars(generation_args)}
    how = generation_args, answer_args.seed, answer_args.batch_size, tuned
    with open(path, "x", encoding="utf-8") as file, tqdm(total=len(questions), unit="answer") as bar:
        for row in answer_questions(chat, questions, *how):
            del row["ids"]
            file.write(json.dumps(row | settings, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
    notice(f"{len(questions)} answers of {name} are in {path}")


if __name__ == "__main__":
    run_main(main)
