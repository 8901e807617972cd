"""MMLU by comparing the logits of the four letters behind `Answer:`, as the QLoRA paper's callback does.

The letters are the tokens that follow `Answer:` in running text, " A" to " D": what lm-evaluation-harness
compares, and for LLaMA's tokenizer also what the paper's callback did, since it reads "A" as "▁A".
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.arguments import DataArguments, TrainingArguments
from utils.console import UserError, notice, read_rank_and_size
from utils.data.readers import read_file

if TYPE_CHECKING:
    import torch

LETTERS = "ABCD"
# The original's files, looked for in --data_dir, its mmlu/ folder, and data/mmlu/; else Hendrycks' set.
FILES = {"mmlu-zs": "zero_shot_mmlu_{split}.json", "mmlu-fs": "five_shot_mmlu_{split}.json"}
FILE_SPLITS = {"eval": "val", "test": "test"}
HUB_ID, HUB_SPLITS = "cais/mmlu", {"eval": "validation", "test": "test"}
SHOTS = {"mmlu-zs": 0, "mmlu-fs": 5}
Question = dict[str, str]  # subject, input, output


def load_mmlu(training_args: TrainingArguments, data_args: DataArguments) -> list[Question]:
    """Questions {subject, input, output}, of a file or the hub. Raises UserError where neither has them."""
    path = find_mmlu_file(training_args, data_args)
    rows = read_mmlu_file(path) if path else download_mmlu(training_args)
    return rows[: training_args.max_mmlu_samples]


def find_mmlu_file(training_args: TrainingArguments, data_args: DataArguments) -> Path | None:
    name = training_args.mmlu_dataset
    if name not in FILES:
        if not Path(name).is_file():
            raise UserError(
                f"--mmlu_dataset {name}: no such file; use a json/jsonl file, or {' or '.join(FILES)}"
            )
        return Path(name)
    file = FILES[name].format(split=FILE_SPLITS[training_args.mmlu_split])
    folders = [Path("data/mmlu")]
    if data_args.data_dir:
        folders = [Path(data_args.data_dir), Path(data_args.data_dir, "mmlu"), *folders]
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def read_mmlu_file(path: Path) -> list[Question]:
    rows = list(read_file(path))
    if not rows:
        raise UserError(f"{path} is empty: questions {{subject, input, output}} are needed")
    for number, row in enumerate(rows, 1):
        if not {"subject", "input", "output"} <= row.keys() or row["output"] not in [*LETTERS]:
            raise UserError(
                f"{path}: question {number} needs subject, input, and an output of one letter A to D"
            )
    return rows


def download_mmlu(training_args: TrainingArguments) -> list[Question]:
    from utils.models.hub import reach_hub

    name, split = training_args.mmlu_dataset, training_args.mmlu_split
    file = FILES[name].format(split=FILE_SPLITS[split])
    reach_hub(
        f"--mmlu_dataset {name}: {file} (data/mmlu of the QLoRA paper's repository) is neither in data/mmlu "
        f"nor in --data_dir, and for {HUB_ID}"
    )
    from datasets import load_dataset

    examples = load_dataset(HUB_ID, "all", split="dev").to_list()
    questions = load_dataset(HUB_ID, "all", split=HUB_SPLITS[split]).to_list()
    notice(f"--mmlu_dataset {name}: {len(questions)} questions of {HUB_ID}")
    return format_hub_questions(questions, examples, SHOTS[name])


def format_hub_questions(
    rows: list[dict[str, Any]], examples: list[dict[str, Any]], shots: int
) -> list[Question]:
    """Rows {subject, question, choices, answer} in the layout of the original's files (Hendrycks' prompt)."""
    questions = []
    for row in rows:
        subject = row["subject"]
        text = (  # the two blanks are Hendrycks'
            "The following are multiple choice questions (with answers) about  "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        for example in [example for example in examples if example["subject"] == subject][:shots]:
            text += f"{format_question(example)} {LETTERS[example['answer']]}\n\n"
        questions.append(
            {"subject": subject, "input": text + format_question(row), "output": LETTERS[row["answer"]]}
        )
    return questions


def format_question(row: dict[str, Any]) -> str:
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([row["question"], *choices, "Answer:"])


def find_letter_tokens(tokenizer: Any) -> dict[str, int]:
    """Token of each letter behind `Answer:`, such as {" A": 330}. Raises UserError where one is none."""
    before = tokenizer("Answer:", add_special_tokens=False).input_ids
    tokens = {}
    for letter in LETTERS:
        ids = tokenizer(f"Answer: {letter}", add_special_tokens=False).input_ids
        if ids[:-1] != before:
            raise UserError(
                f"--do_mmlu_eval: this tokenizer writes ' {letter}' behind 'Answer:' as {ids}, not as one "
                "token more, so letters cannot be compared: leave it out"
            )
        tokens[f" {letter}"] = ids[-1]
    return tokens


def compute_letter_logits(
    model: Any, tokenizer: Any, questions: list[str], max_len: int, batch_size: int
) -> "torch.Tensor":
    """Logits of " A" to " D" behind each question, in float32  # [questions, 4]

    A question longer than `max_len` tokens loses its beginning. Batches are of near lengths, longest first,
    and the vocabulary's logits are made at each row's last position only.
    """
    import torch
    from accelerate.utils import gather_object

    from utils.data.packing import split_at_long
    from utils.fast.rope import find_shared_length

    letters = list(find_letter_tokens(tokenizer).values())
    ids = [tokenizer(question).input_ids[-max_len:] for question in questions]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    groups = split_at_long([len(ids[i]) for i in order], find_shared_length(model.config))
    batches = [
        [order[place] for place in group[start : start + batch_size]]
        for group in groups
        for start in range(0, len(group), batch_size)
    ]
    rank, size = read_rank_and_size()
    found: list[tuple[int, list[float]]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches[rank::size]:
            logits = read_last_logits(model, [ids[i] for i in batch], tokenizer.pad_token_id)
            found += zip(batch, logits[:, letters].float().tolist(), strict=True)
    model.train(was_training)
    return torch.tensor([row for _, row in sorted(gather_object(found))])


def read_last_logits(model: Any, rows: list[list[int]], pad_token_id: int) -> "torch.Tensor":
    """The logits behind the last token of each row  # [rows, vocabulary]"""
    import torch

    from utils.chat.generation import pad_rows
    from utils.train.token_loss import has_logits_to_keep

    inputs = pad_rows(rows, pad_token_id, "right", model.device)  # where positions stay as they are
    lengths = torch.tensor([len(row) for row in rows])
    ends, column = torch.unique(lengths - 1, return_inverse=True)
    ends = ends.numpy()  # the hidden state may lie on another device than the rows: no hook moves an array
    if has_logits_to_keep(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=ends).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, ends]
    return logits[torch.arange(len(rows)), column]


def evaluate_mmlu(
    model: Any, tokenizer: Any, questions: list[Question], max_len: int, batch_size: int
) -> dict[str, float]:
    """Accuracy, as the mean over the subjects (`mmlu_accuracy`) and of each subject."""
    logits = compute_letter_logits(
        model, tokenizer, [question["input"] for question in questions], max_len, batch_size
    )
    marks: dict[str, list[bool]] = {}
    for question, choice in zip(questions, logits.argmax(1).tolist(), strict=True):
        marks.setdefault(question["subject"], []).append(LETTERS[choice] == question["output"])
    subjects = {f"mmlu_{subject}": sum(right) / len(right) for subject, right in sorted(marks.items())}
    return {"mmlu_accuracy": sum(subjects.values()) / len(subjects)} | subjects
