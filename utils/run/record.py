"""run.json: what made an adapter. Written when training starts, completed when it ends.

    base_model   name, revision, kind and a fingerprint of its files       -> chat loads this one
    prompt       a hash of the template, and the stop tokens               -> chat stops where training did
    arguments    every flag, given or not                                  -> bits and quantization, for chat
    data         each source with its sha256, rows trained and held out    -> evaluation holds out the same
    and the command, versions, git commit, metrics, and `status`: running, then finished

Whoever opens the run later asks this file, and needs no flag that could be set otherwise by mistake.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from utils.console import UserError

RUN_FILE = "run.json"
ADAPTER_FILE = "adapter_model.safetensors"
INITIAL = "initial_adapter"  # of a run that began with a part of the base (--init_lora_weights pissa, olora)
CHANGING_STARTS = ("pissa", "olora")  # PEFT's init_lora_weights that take what they begin with from the base
TOKENIZATION = "rendered chats as a whole"  # how token ids come about; before it, prompts and answers apart
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
# What a run may leave in its folder; --overwrite_output_dir removes these and nothing else.
RUN_ARTIFACTS = (
    RUN_FILE,
    "README.md",
    "adapter_config.json",
    ADAPTER_FILE,
    "chat_template.jinja",
    "config.json",
    "eval_metrics*.json",
    "generation_config.json",
    "metrics.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "lm_tasks*.json",
    "predictions*.jsonl",
    "report.json",
    "report.md",
    "report.png",
    "samples.jsonl",
    "special_tokens_map.json",
    "tokenizer*",
    "training_curve.png",
    "non_finite_steps.jsonl",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "checkpoint-*",
    ".checkpoint-*",
    INITIAL,
    ".final.tmp",
    "runs",
    "wandb",
)


def collect_arguments(*arguments: Any) -> dict[str, Any]:
    """Every field of the argument dataclasses, without secrets."""
    merged: dict[str, Any] = {}
    for group in arguments:
        merged |= dataclasses.asdict(group)
    extra = merged.pop("extra", {})
    merged |= {name: value for name, value in extra.items() if not name.endswith("token")}
    return merged


def start_record(arguments: dict[str, Any]) -> dict[str, Any]:
    """run.json as far as it is known at the start: base_model, prompt and data are yet to be described."""
    return {
        "status": "running",
        "base_model": {},
        "prompt": {},
        "data": {},
        "tokenization": TOKENIZATION,
        "arguments": arguments,
        "directory": os.getcwd(),
        "command": shlex.join(["python", *hide_secrets(sys.argv)]),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES},
        "git_commit": read_git_commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "metrics": {},
    }


def hide_secrets(argv: list[str]) -> list[str]:
    """`argv` with the value of every --...token and --...key as ***."""
    words, hidden = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("--") and name.replace("-", "_").endswith(("token", "key"))
        words.append("***" if hidden else f"{name}=***" if is_secret and equals else word)
        hidden = is_secret and not equals
    return words


def read_git_commit() -> str | None:
    """Commit of this checkout, with `+` when files differ from it; None outside git."""
    describe = "describe --always --exclude=* --abbrev=40 --dirty=+".split()
    try:
        return subprocess.check_output(
            ["git", *describe], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(content: Any, path: Path) -> None:
    """Write beside, fsync and rename: no reader, and no crash, ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def find_run_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a run, or of the run that a checkpoint-N belongs to; None for a bare adapter folder."""
    return read_run_record(folder) or read_run_record(folder.resolve().parent)


def read_run_record(run_dir: Path) -> dict[str, Any] | None:
    """run.json in this very folder, if it is there."""
    path = run_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it or name the adapter folder alone"
        ) from error


def find_run_dir(folder: Path) -> Path:
    """The run that a checkpoint-N belongs to, or `folder` itself."""
    return folder if (folder / RUN_FILE).is_file() else folder.resolve().parent


def list_run_files(output_dir: Path) -> list[Path]:
    return sorted({path for pattern in RUN_ARTIFACTS for path in output_dir.glob(pattern)})


def clear_run(output_dir: Path) -> None:
    """Remove what an earlier run left (RUN_ARTIFACTS), and no other file."""
    for path in list_run_files(output_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def next_free_path(path: Path) -> Path:
    """`path`, or with -2, -3, ... where it is taken: results are never overwritten."""
    names = (path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in itertools.count(1))
    return next(name for name in names if not name.exists())


def describe_parent(folder: Path) -> dict[str, Any]:
    """For run.json of a run that starts from the adapter in `folder`: which it was, and what made it."""
    weights, record = folder / ADAPTER_FILE, find_run_record(folder) or {}
    return {
        "folder": str(folder),
        "adapter_sha256": hash_file(weights) if weights.is_file() else None,
        "data": record.get("data", {}).get("sources"),
        "prompt": record.get("prompt"),
        "command": record.get("command"),
    }


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(content: Any) -> str:
    """sha256 of plain values."""
    return hash_text(json.dumps(content, sort_keys=True))
