"""Work on data that is done once: a folder for each key, complete or not there at all."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def find_cache_dir() -> Path:
    """$QLORA_CACHE, else qlora/ in the user's cache folder."""
    chosen = os.environ.get("QLORA_CACHE")
    return (
        Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qlora"
    )


def build_key(**parts: Any) -> str:
    """A digest of everything that the cached work depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def find_or_build(kind: str, key: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """(the folder of this work, whether it was there already). `build` fills a folder beside it first."""
    folder = find_cache_dir() / f"{kind}-{key}"
    if folder.is_dir():
        os.utime(folder)
        return folder, True
    while int(os.environ.get("LOCAL_RANK", "0")) > 0:  # the first process of each machine does the work
        time.sleep(0.2)
        if folder.is_dir():
            return folder, True
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{kind}-"))
    try:
        build(beside)
        if folder.is_dir():  # another process was faster
            return folder, True
        beside.chmod(0o755)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder, False
