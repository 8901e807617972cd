"""Work on data that is done once: a folder for each key, complete or not there at all."""

import functools
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from utils.run.record import fingerprint, hash_file
from utils.run.repository import REPOSITORY, find_cache_dir

# What else makes rows: another version may read, render or tokenize them otherwise.
ROW_LIBRARIES = ("tokenizers", "transformers", "jinja2", "markdownify", "beautifulsoup4", "pyarrow")


@functools.cache
def hash_code(module: str, root: Path = REPOSITORY) -> str:
    """A digest of the code behind a module: its source, those of all it imports from here, the libraries.

    A number to be raised by hand would be forgotten, and old rows trained on; so would a list of modules be.
    The price: a changed word in any of them makes the rows anew, once.
    """
    finder = ModuleFinder([str(root)])  # follows imports inside functions, too
    finder.import_hook(module)
    files = {name: vars(found)["__file__"] for name, found in finder.modules.items()}
    code = {name: hash_file(Path(file)) for name, file in files.items() if file}
    libraries = {name: version(name) for name in ROW_LIBRARIES}
    return fingerprint([code, libraries, sys.version])


@contextmanager
def collect_rarely() -> Iterator[None]:
    """Look for circles of garbage among new objects alone, and after each 100,000 of them.

    By itself Python looks after 700, at times through all that was imported: a seventh of the time of rows.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def find_or_build(work: str, build: Callable[[Path], None], **parts: Any) -> tuple[Path, bool]:
    """(the folder of this work, whether it was there already). `build` fills a folder beside it first.

    `parts`: plain values, all that the work depends on.
    """
    folder = find_cache_dir() / f"{work}-{fingerprint(parts)[:32]}"
    if folder.is_dir():
        os.utime(folder)
        return folder, True
    while int(os.environ.get("LOCAL_RANK", "0")) > 0:  # the first process of each machine does the work
        time.sleep(0.2)
        if folder.is_dir():
            return folder, True
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{work}-"))
    try:
        with collect_rarely():
            build(beside)
        if folder.is_dir():  # another process was faster
            return folder, True
        beside.chmod(0o755)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder, False
