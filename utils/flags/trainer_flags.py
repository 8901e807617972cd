"""What the Trainer knows: its other flags, optimizers, schedulers and loggers.

Names are read from transformers' source, as importing it takes seconds; it is imported where one of its flags
is seen.
"""

import ast
import functools
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import transformers

from utils.flags.strict_parser import StrictParser

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
    fields = [
        (name, spec.type, field(default=None, metadata=dict(spec.metadata)))
        for name, spec in transformers.TrainingArguments.__dataclass_fields__.items()
        if name in wanted
    ]
    parser = StrictParser([make_dataclass("OtherTrainerFlags", fields)], "")
    other, rest = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    return {name: value for name, value in vars(other).items() if value is not None}, rest


def list_schedulers() -> list[str]:
    return list_values(find_class("trainer_utils.py", "SchedulerType"))


def list_optimizers() -> list[str]:
    return list_values(find_class("training_args.py", "OptimizerNames"))


def list_loggers() -> list[str]:
    source = parse_source("integrations/integration_utils.py")
    assigned = {ast.unparse(node.targets[0]): node.value for node in source if isinstance(node, ast.Assign)}
    loggers = assigned["INTEGRATION_TO_CALLBACK"]
    assert isinstance(loggers, ast.Dict)
    return sorted(ast.literal_eval(name) for name in loggers.keys if name)


def list_values(enumeration: list[ast.stmt]) -> list[str]:
    return [ast.literal_eval(member.value) for member in enumeration if isinstance(member, ast.Assign)]


def find_class(file: str, name: str) -> list[ast.stmt]:
    """The statements of a class in a module of transformers."""
    classes = (node for node in parse_source(file) if isinstance(node, ast.ClassDef))
    return next(node.body for node in classes if node.name == name)


@functools.cache
def parse_source(file: str) -> list[ast.stmt]:
    return ast.parse(read_source(file)).body


def read_source(file: str) -> str:
    return (Path(transformers.__file__).parent / file).read_text(encoding="utf-8")
