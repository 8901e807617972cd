"""Runs scripts in processes that cost tenths of a second: modules are imported once, each run is a fork.

The server itself never calls a torch operator, so that its children start without anybody's threads.
"""

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TRAINING = """qlora_finetune qlora_int8_finetune utils.train.training matplotlib.figure bitsandbytes peft.tuners.lora.bnb
    transformers.models.llama.modeling_llama transformers.integrations.bitsandbytes""".split()
FLAGS = (
    "qlora_finetune cli_demo transformers.hf_argparser".split()
)  # what a mistake is found with: without torch


class ForkServer:
    """The test's side: start a run, signal it by its process id, wait for its exit code."""

    def __init__(self, modules=TRAINING):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        while self.process.stdout.readline() != "ready\n":  # libraries may print while they are imported
            assert self.process.poll() is None, "the server could not start"

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, log: Path, *argv, script="qlora_finetune", errors=None, forbidden=(), max_file_bytes=None
    ) -> int:
        """The run's process id. Its standard error goes to the file `errors`, or to `log` as well.

        A module of `forbidden` that the run imports is named there.
        """
        argv = [str(word) for word in argv]
        log.touch()
        request = {"script": script, "argv": argv, "log": str(log), "errors": str(errors or log)}
        return self.ask(**request, forbidden=forbidden, max_file_bytes=max_file_bytes)

    def wait(self, pid: int) -> int:
        """Exit code, or the negative signal number; as subprocess gives it."""
        return self.ask(wait=pid)

    def has_ended(self, pid: int) -> bool:
        """Not reaped yet, so that the number cannot be another process's."""
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def run(self, log: Path, *argv, **options) -> int:
        return self.wait(self.start(log, *argv, **options))

    def wait_for(self, pid: int, condition, seconds: float = 60) -> None:
        """Until `condition()` holds; fails where the run ends or the time is up before."""
        end = time.monotonic() + seconds
        while not condition():
            assert not self.has_ended(pid), "the run ended before"
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.002)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def run_child(request: dict) -> None:
    for number, path in (1, request["log"]), (2, request["errors"]):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if request["max_file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"],) * 2)
    from utils.console import run_main
    from utils.run.signals import catch_stop_signals

    sys.argv = [f"{request['script']}.py", *request["argv"]]
    code = 0
    try:
        catch_stop_signals()
        run_main(importlib.import_module(request["script"]).main)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    for name in sys.modules.keys() & set(request["forbidden"]):
        print(f"{name} was imported", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(modules: list[str]) -> None:
    sys.path[0] = str(ROOT)  # in place of this folder, whose names are not the runs'
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # each child would walk it, and copy the pages by that
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                run_child(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
