"""Where this repository lies: data, templates and models of its own are found from any folder."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def find_cache_dir() -> Path:
    """Where work is kept that is done once: $QLORA_CACHE, else qlora/ in the user's cache folder."""
    if chosen := os.environ.get("QLORA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qlora"
