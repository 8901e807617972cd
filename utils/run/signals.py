"""SIGTERM and SIGINT: stop at a safe point, save, exit 75 within 30 s. A second SIGINT exits at once."""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
DEADLINE_SECONDS = 27  # schedulers send SIGKILL 30 s after SIGTERM


class StopRequested(SystemExit):
    """Raised at a safe point after the first signal; where nobody saves, it ends the process."""

    def __init__(self) -> None:
        super().__init__(EXIT_REQUEUE)


@dataclass
class _Stop:
    """Signals belong to the process, so their state does too."""

    asked_by: str | None = None
    held: bool = False
    owner: int = 0  # process id


_stop = _Stop()


def catch_stop_signals() -> None:
    _stop.owner = os.getpid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_stop_without_launcher, args=(os.getppid(),), daemon=True).start()


def _stop_without_launcher(launcher: int) -> None:
    """SIGTERM for a process whose `launcher` was killed: nobody would end it, and it holds a GPU."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _stop.owner:  # a forked worker: its parent decides, Ctrl-C reaches both
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if _stop.asked_by and number == signal.SIGINT:
        _leave("interrupted again: leaving at once", 128 + number)
    if _stop.asked_by:
        return
    # os.write and a bare thread: print() and threading take locks that the interrupted code may hold.
    os.write(2, f"\n{signal.Signals(number).name}: stopping (Ctrl-C again leaves at once)\n".encode())
    _thread.start_new_thread(_leave_at_deadline, ())
    ask_to_stop(signal.Signals(number).name)
    if not _stop.held:
        raise StopRequested


def _leave_at_deadline() -> None:
    time.sleep(DEADLINE_SECONDS)
    _leave(f"not saved within {DEADLINE_SECONDS} s: leaving with the last checkpoint", EXIT_REQUEUE)


def _leave(message: str, code: int) -> None:
    os.write(2, f"\n{message}\n".encode())
    os._exit(code)


def ask_to_stop(by: str) -> None:
    """What a signal does; also for a process that learns of it from another one."""
    _stop.asked_by = _stop.asked_by or by


def find_stop_signal() -> str | None:
    """Name of the signal that asked this process to stop."""
    return _stop.asked_by


def start_data_worker(worker: int, then: Callable[[int], None] | None) -> None:
    """A DataLoader's worker_init_fn: SIGTERM ends the worker only where the parent sends it.

    Schedulers signal every process of a job. A worker that died of it would raise in the middle of whatever
    its parent does, an optimizer step or a save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_for_parent, daemon=True).start()
    if then is not None:
        then(worker)


def _exit_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def hold_stop() -> None:
    """From here on a signal is only noted: weights, optimizer and step number are changing together."""
    _stop.held = True


def release_stop() -> None:
    """From here on a signal raises StopRequested where it arrives; one noted before raises it now."""
    _stop.held = False
    if _stop.asked_by:
        raise StopRequested


@contextmanager
def stop_held() -> Iterator[None]:
    before = _stop.held
    _stop.held = True
    try:
        yield
    finally:
        _stop.held = before
    if not before:
        release_stop()
