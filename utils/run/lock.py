"""One training run at a time in an output folder, by a lock that ends with the process that holds it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from utils.console import UserError, is_main_process, notice

LOCK_FILE = "run.lock"


@contextmanager
def run_locked(output_dir: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UserError where a living process holds it.

    A POSIX lock belongs to the process: kill -9 frees it, and forked data workers do not keep it alive.
    filelock's lock (flock) is also a worker's until that worker has closed its copy: on a busy machine a run
    that was killed just after a fork, and started again, was refused.
    """
    if not is_main_process():
        yield
        return
    path = output_dir / LOCK_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = open_locked(path)
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir} cannot be written ({error.strerror}): name another folder"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still locked
        file.close()


def open_locked(path: Path) -> TextIO:
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            take_lock(file, path)
        except BaseException:
            file.close()
            raise
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # its last holder removed it between our opening and our locking
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def take_lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read() or "another process"
        raise UserError(
            f"--output_dir {path.parent} is in use by {holder}: wait for it, or name another folder"
        ) from error
    except OSError as error:
        notice(f"{path.parent} has no file locks ({error.strerror}): start only one run there at a time")


def check_usable(output_dir: Path) -> None:
    """Raises UserError where a run holds the folder or nothing can be written there. Changes nothing."""
    path = output_dir / LOCK_FILE
    nearest = next(parent for parent in (output_dir, *output_dir.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {nearest} cannot be written, name another folder")
    if is_main_process() and path.is_file() and os.access(path, os.W_OK):
        with open(path, "a+", encoding="utf-8") as file:
            take_lock(file, path)
