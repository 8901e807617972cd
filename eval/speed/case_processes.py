"""A process for each case: what one leaves on the GPU is no part of the next one's figures."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.console import notice


def run_cases(module: str, cases: Sequence[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """(lines that it printed, what it found) of each case that does not fail.

    `module` reads a case from its standard input and prints JSON last.
    """
    waiting = start(module)  # a process imports while the one before measures
    for case in cases:
        process, waiting = waiting, start(module)
        answer, _ = process.communicate(case)
        *lines, found = answer.splitlines() or [""]
        if process.returncode:
            notice("\n".join([*lines, found, f"{case} failed"]))
        else:
            yield lines, json.loads(found)
    waiting.kill()


def start(module: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", module]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"torch": torch.__version__} | results, indent=2))
    notice(f"saved to {path}")
