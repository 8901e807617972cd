"""One training run at a time in an output folder, by a lock that ends with the process that holds it."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.console import UserError, is_main_process, notice

LOCK_FILE = "run.lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # what a file system without locks says


@contextmanager
def run_locked(output_dir: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UserError where a living process holds it.

    kill -9 frees it, and a forked data worker does not keep it alive: filelock closes the worker's copy.
    """
    if not is_main_process():
        yield
        return
    path = output_dir / LOCK_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir} cannot be written ({error.strerror}): name another folder"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still locked
        lock.release()


def take_lock(path: Path) -> FileLock:
    """The lock, held. Raises UserError where another process holds it; a folder without locks is said."""
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = ""
        with suppress(FileNotFoundError):  # it ends at this moment
            holder = path.read_text(encoding="utf-8")
        raise UserError(
            f"--output_dir {path.parent} is in use by {holder or 'another process'}: wait for it, or name "
            "another folder"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        notice(f"{path.parent} has no file locks ({error.strerror}): start only one run there at a time")
    return lock


def check_usable(output_dir: Path) -> None:
    """Raises UserError where a run holds the folder or nothing can be written there. Changes nothing."""
    path = output_dir / LOCK_FILE
    nearest = next(parent for parent in (output_dir, *output_dir.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {nearest} cannot be written, name another folder")
    if is_main_process() and path.is_file() and os.access(path, os.W_OK):
        take_lock(path).release()
