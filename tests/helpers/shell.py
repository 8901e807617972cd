"""Shell commands as a user types them, and the pages and servers that they open."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from helpers import ROOT


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_shell(command, folder):
    environment = os.environ | {
        "HOME": str(folder.parent),
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=take_signals,
    )


def take_signals():
    """As in a terminal: what a shell starts in the background, tests too, would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_page(process):
    """The page answers at the address that it prints, and ends on Ctrl-C."""
    printed = ""
    for line in process.stdout:
        printed += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        raise AssertionError(printed)
    deadline = time.monotonic() + 60
    while True:
        try:
            assert "gradio" in urllib.request.urlopen(found.group()).read().decode().lower()
            break
        except OSError:
            assert time.monotonic() < deadline, printed
            time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)


def run_script(
    script: str, *argv: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script as a user starts it, in its own process."""
    return subprocess.run(
        [sys.executable, script, *map(str, argv)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
    )


def ignore_outputs(*patterns: str):
    """For shutil.copytree of this repository: without models/ (utils/models/ stays), runs and hidden files."""
    left_out = shutil.ignore_patterns(".*", "output", "wandb", "__pycache__", *patterns)

    def ignore(path: str, names: list[str]) -> set[str]:
        return left_out(path, names) | ({"models"} & set(names) if path == str(ROOT) else set())

    return ignore
