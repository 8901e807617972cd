"""What several test modules use: no test module imports another, and no file here imports one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent  # the repository
IDENTITY = ROOT / "data" / "guanaco_identity.jsonl"  # 128 rows in two languages
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


def slow_but(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All `cases` of a test: the `kept` ones in both tiers, the others in the second."""
    kept = list(kept)
    assert all(case in cases for case in kept)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
