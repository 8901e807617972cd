"""modelscope:ORG/NAME -> a folder: models and data sets from modelscope.cn, by its own package.

The package is asked for only here. It keeps what it has downloaded (MODELSCOPE_CACHE, or --cache_dir for a
model) and asks the site at each start whether that is complete. A run records the folder.
"""

import re
from pathlib import Path
from typing import Any

from utils.arguments import ModelArguments
from utils.console import UserError, notice

PREFIX = "modelscope:"
# In a model's repository, what is no part of the model as transformers reads it.
NOT_READ = ["*.gguf", "*.onnx", "*.pth", "original/*"]


def is_on_modelscope(name: str) -> bool:
    return name.startswith(PREFIX)


def download_model(name: str, model_args: ModelArguments) -> str:
    """The folder of a model on ModelScope, downloaded if it is not there."""
    pickles = [] if model_args.allow_pickle else ["*.bin"]
    options = {
        "revision": model_args.revision,
        "cache_dir": model_args.cache_dir,
        "ignore_patterns": NOT_READ + pickles,
    }
    return str(download("snapshot_download", name, f"--model_name_or_path {name}", options))


def download_dataset(name: str, flag: str) -> Path:
    """The folder of a data set on ModelScope, downloaded if it is not there."""
    return download("dataset_snapshot_download", name, f"{flag} {name}", {})


def download(function: str, name: str, what: str, options: dict[str, Any]) -> Path:
    """What the package's `function` gives. Raises UserError where package or repository are missing."""
    repository = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{what}: ModelScope's ids are written {PREFIX}ORG/NAME")
    try:
        import modelscope
    except ImportError as error:
        raise UserError(f"{what}: the package modelscope is missing (pip install modelscope)") from error
    try:
        folder = getattr(modelscope, function)(repository, **options)
    except Exception as error:  # the package's errors have no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what}: ModelScope does not give it ({reason}); name what is on this disk by its folder"
        ) from error
    notice(f"{name} is in {folder}")
    return Path(folder)
