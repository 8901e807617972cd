"""scripts/distributed/ as a user starts them, with CPU processes in place of GPUs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import IDENTITY, ROOT
from helpers.shell import find_free_port

FOLDER = ROOT / "scripts" / "distributed"
FLAGS = """--use_cpu --max_steps 2 --max_train_samples 16 --model_max_length 400 --lora_r 4 --ignore_data_report
    --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --save_strategy no""".split()
SRUN = """#!/usr/bin/env bash
# Two machines: what follows --kill-on-bad-exit=1 runs once for each of them.
shift
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" & first=$!
trap 'kill -TERM $first $other' TERM
while kill -0 $first 2>/dev/null; do wait $first; done
wait $first && wait $other
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "requeued $2"; else echo 127.0.0.1; echo 127.0.0.1; fi
"""


def start(script, *flags, **environment):
    return subprocess.Popen(
        ["bash", str(FOLDER / script), *map(str, flags)],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_flags(model, run):
    return ["--model_name_or_path", model, "--dataset_name", IDENTITY, "--output_dir", run, *FLAGS]


def check_finished(run, printed, processes):
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["processes"]) == ("finished", processes), printed[-3000:]
    assert f"2 steps of {4 * processes} rows" in printed  # batch x accumulation x processes
    assert printed.count("finished: ") == 1


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_script_is_valid_bash_and_names_only_flags_that_exist(script):
    from utils.flags.finetune import FLAGS as GROUPS

    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#") and "set -euo pipefail" in text
    known = {name for group in GROUPS for name in group.__dataclass_fields__}
    header = "\n".join(line for line in text.splitlines() if re.match(r"#  ", line))
    ours = set(re.findall(r"--(\w*_\w+)", header))
    assert ours and ours <= known


@pytest.mark.slow
def test_one_node(small_model, tmp_path):
    run = tmp_path / "run"
    process = start("one_node.sh", *train_flags(small_model, run), "--shard_layers", GPUS="2")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed[-3000:]
    check_finished(run, printed, 2)


@pytest.mark.slow
def test_several_nodes(small_model, tmp_path):
    run, port = tmp_path / "run", str(find_free_port())
    first, other = (
        start(
            "several_nodes.sh",
            *train_flags(small_model, run),
            NODES="2", NODE=str(node), FIRST="127.0.0.1", GPUS="1", PORT=port,
        )
        for node in (0, 1)
    )  # fmt: skip
    printed, _ = first.communicate(timeout=200)
    other.communicate(timeout=60)
    assert first.returncode == other.returncode == 0, printed[-3000:]
    check_finished(run, printed, 2)


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins for srun and scontrol, and what SLURM tells a job of two machines."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    job = str(find_free_port() % 20000)
    return {"PATH": path, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a,b", "GPUS": "1", "SLURM_JOB_ID": job}


@pytest.mark.slow
def test_slurm(small_model, tmp_path, cluster):
    run = tmp_path / "run"
    process = start("slurm.sh", *train_flags(small_model, run), **cluster)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed[-3000:]
    check_finished(run, printed, 2)


@pytest.mark.slow
def test_slurm_job_saves_before_its_limit_and_is_queued_again(small_model, tmp_path, cluster):
    run = tmp_path / "run"
    flags = [
        *train_flags(small_model, run),
        "--max_steps",
        5000,
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
    ]
    process = start("slurm.sh", *flags, **cluster)
    while process.poll() is None and not (run / "checkpoint-2").is_dir():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"requeued {cluster['SLURM_JOB_ID']}" in printed, printed[-3000:]
    assert "the same command goes on from there" in printed
