"""Names that the Trainer knows, read from transformers' source: importing it takes seconds."""

import ast
import functools
from pathlib import Path

import transformers


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
