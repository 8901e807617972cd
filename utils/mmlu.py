"""MMLU by comparing the logits of the letters A to D after `Answer:`, as the QLoRA paper's callback does."""

import json
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments, TrainingArguments
from utils.console import UserError

LETTERS = "ABCD"
# The original's files, looked for in --data_dir, its mmlu/ folder, and data/mmlu/.
FILES = {"mmlu-zs": "zero_shot_mmlu_{split}.json", "mmlu-fs": "five_shot_mmlu_{split}.json"}


def load_mmlu(training_args: TrainingArguments, data_args: DataArguments) -> list[dict[str, str]]:
    """Questions {subject, input, output}. Raises UserError where the file is not found or holds others."""
    path = find_mmlu_file(training_args, data_args)
    text = path.read_text(encoding="utf-8").strip()
    try:
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    for number, row in enumerate(rows, 1):
        if not {"subject", "input", "output"} <= row.keys() or row["output"] not in LETTERS:
            raise UserError(
                f"{path}: question {number} needs subject, input, and an output of one letter A to D"
            )
    return rows[: training_args.max_mmlu_samples]


def find_mmlu_file(training_args: TrainingArguments, data_args: DataArguments) -> Path:
    name = training_args.mmlu_dataset
    if name not in FILES:
        if not Path(name).is_file():
            raise UserError(
                f"--mmlu_dataset {name}: no such file; use a json/jsonl file, or {' or '.join(FILES)}"
            )
        return Path(name)
    split = {"eval": "val", "test": "test"}[training_args.mmlu_split]
    file = FILES[name].format(split=split)
    folders = [Path("data/mmlu")]
    if data_args.data_dir:
        folders = [Path(data_args.data_dir), Path(data_args.data_dir, "mmlu"), *folders]
    found = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if found is None:
        raise UserError(
            f"--mmlu_dataset {name}: {file} is in none of {', '.join(map(str, folders))}; "
            "it is in the data/mmlu folder of the QLoRA paper's repository"
        )
    return found


def evaluate_mmlu(
    model: Any, tokenizer: Any, questions: list[dict[str, str]], max_len: int, batch_size: int
) -> dict[str, float]:
    """Accuracy, as the mean over the subjects (`mmlu_accuracy`) and of each subject."""
    import torch

    letters = torch.tensor([tokenizer(letter, add_special_tokens=False).input_ids[-1] for letter in LETTERS])
    ids = [tokenizer(question["input"]).input_ids[-max_len:] for question in questions]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    right: dict[str, list[bool]] = {}
    was_training = model.training
    model.eval()
    for start in range(0, len(ids), batch_size):
        batch = by_length[start : start + batch_size]
        lengths = torch.tensor([len(ids[i]) for i in batch])
        padded = torch.full((len(batch), int(lengths.max())), tokenizer.pad_token_id)
        for row, i in enumerate(batch):
            padded[row, : len(ids[i])] = torch.tensor(ids[i])
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
        with torch.no_grad():
            logits = model(
                input_ids=padded.to(model.device), attention_mask=mask.long().to(model.device)
            ).logits
        choices = logits[torch.arange(len(batch)), lengths - 1][:, letters].argmax(1)
        for i, choice in zip(batch, choices.tolist(), strict=True):
            right.setdefault(questions[i]["subject"], []).append(LETTERS[choice] == questions[i]["output"])
    model.train(was_training)
    subjects = {f"mmlu_{subject}": sum(marks) / len(marks) for subject, marks in sorted(right.items())}
    return {"mmlu_accuracy": sum(subjects.values()) / len(subjects)} | subjects
