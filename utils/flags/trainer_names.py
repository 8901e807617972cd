"""Names that the Trainer knows, read from transformers' source: importing it takes seconds."""

import ast
import functools
import importlib.util
from pathlib import Path


def list_schedulers() -> list[str]:
    return list_values(find_class("trainer_utils.py", "SchedulerType"))


def list_optimizers() -> list[str]:
    return list_values(find_class("training_args.py", "OptimizerNames"))


def list_loggers() -> list[str]:
    tables = [node for node in parse_source("integrations/integration_utils.py") if hasattr(node, "targets")]
    (loggers,) = [table for table in tables if ast.unparse(table.targets) == "INTEGRATION_TO_CALLBACK"]
    return sorted(key.value for key in loggers.value.keys)


def list_values(enumeration: list[ast.stmt]) -> list[str]:
    return [member.value.value for member in enumeration if isinstance(member, ast.Assign)]


def find_class(file: str, name: str) -> list[ast.stmt]:
    """The statements of a class in a module of transformers."""
    return next(node.body for node in parse_source(file) if getattr(node, "name", "") == name)


@functools.cache
def parse_source(file: str) -> list[ast.stmt]:
    package = importlib.util.find_spec("transformers").submodule_search_locations[0]
    return ast.parse(Path(package, file).read_text(encoding="utf-8")).body
