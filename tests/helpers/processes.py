"""Several processes on one machine: runs that torchrun starts, and functions that talk to each other."""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import time

import psutil

from helpers import ROOT
from helpers.fork_server import TRAINING
from helpers.runs import run_in_process
from helpers.shell import find_free_port


def start(processes, model, output_dir, *flags):
    """qlora_finetune.py on `model` in so many processes, in float32."""
    port = find_free_port()
    launcher = f"-m torch.distributed.run --nproc_per_node {processes} --master_port {port}".split()
    command = [sys.executable, *(launcher if processes > 1 else []), "qlora_finetune.py"]
    command += ["--model_name_or_path", model, *flags, "--output_dir", output_dir]
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "QLORA_CPU_DTYPE": "float32"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*command, code=0):
    process = start(*command)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == code, printed[-3000:]
    return printed


def wait_for(process, path):
    """Until `path` is there; the run must not have ended before."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.005)


def find_ranks(process):
    """{rank: process} of a run that torchrun started."""
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = {child.environ().get("RANK"): child for child in children}
    return {int(rank): child for rank, child in ranks.items() if rank is not None}


def kill_all(process):
    """Launcher and processes at once, as a machine that fails."""
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):  # workers have sessions of their own
        each.kill()
    process.communicate()


def _join(function, rank, processes, port, arguments, environment, results):
    os.environ.update(environment)
    import torch
    from accelerate.state import PartialState
    from torch import distributed

    torch.set_num_threads(1)
    PartialState._reset_state()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        results.put((rank, function(rank, *arguments)))
    except Exception as error:
        results.put((rank, error))


def run_function(processes, function, *arguments):
    """What function(rank, *arguments) returns in each of so many processes that can talk to each other.

    They are forks of a process that has imported everything and computed nothing: a fork of this one would
    wait for ever for the threads that computed here.
    """
    context, port = multiprocessing.get_context("forkserver"), find_free_port()
    context.set_forkserver_preload(TRAINING)
    results = context.SimpleQueue()
    shared = (port, arguments, dict(os.environ), results)
    workers = [
        context.Process(target=_join, args=(function, rank, processes, *shared)) for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get() for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
        worker.kill()
    for value in found.values():
        if isinstance(value, Exception):
            raise value
    return [found[rank] for rank in range(processes)]


def _train(rank, argv):
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        run_in_process("qlora_finetune", *argv)
    return printed.getvalue()


def train_forked(processes, *argv):
    """A run in so many processes, which lose no seconds on imports; what the first printed."""
    return run_function(processes, _train, argv)[0]
