"""The Trainer's other flags: looked up in transformers only when one is seen (importing it takes seconds)."""

import ast
from dataclasses import field, make_dataclass
from typing import Any

from utils.flags.strict_parser import StrictParser
from utils.flags.trainer_names import find_class

# Set from our own arguments, or without a meaning here.
OURS = {"bf16", "fp16", "use_cpu", "activation_checkpointing", "use_cache"}


def find_trainer_fields() -> set[str]:
    """Field names of transformers.TrainingArguments, read from its source without importing it."""
    body = find_class("training_args.py", "TrainingArguments")
    return {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)} - OURS


def parse_trainer_flags(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """({name: value} of the flags in `words` that the Trainer has, the words that are none of them)."""
    known = find_trainer_fields()
    names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    wanted = names & known
    if not wanted:
        return {}, words
    from transformers import TrainingArguments

    fields = [
        (name, spec.type, field(default=None, metadata=dict(spec.metadata)))
        for name, spec in TrainingArguments.__dataclass_fields__.items()
        if name in wanted
    ]
    parser = StrictParser([make_dataclass("OtherTrainerFlags", fields)], "")
    other, rest = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    return {name: value for name, value in vars(other).items() if value is not None}, rest
