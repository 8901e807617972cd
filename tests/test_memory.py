"""Memory that is left to a process: the machine's, or the least that a cgroup above it allows."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from helpers import ROOT

from utils.fast import memory
from utils.fast.memory import read_cgroup_limits, read_host_memory

GIB = 2**30


@pytest.fixture
def cgroups(tmp_path):
    """Files of cgroups as the kernel lays them out: version, path, bytes of the limit, of use, of file pages."""

    def write(version, path, limit, used, inactive):
        folder = tmp_path / "cgroup" / ("memory" if version == 1 else "") / path
        folder.mkdir(parents=True, exist_ok=True)
        if version == 1:
            (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
            (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {inactive}\n")
        else:
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
        return tmp_path / "cgroup", tmp_path / "own"

    return write


def test_least_of_the_limits_above_the_process_counts(cgroups):
    """Version 2 outside a container: a job of 4 GiB within a user's 8, the machine's own group without one."""
    cgroups(2, "user", 8 * GIB, 7 * GIB, 0)
    root, own = cgroups(2, "user/job", 4 * GIB, 2 * GIB, GIB)
    own.write_text("0::/user/job\n")
    assert sorted(read_cgroup_limits(root, own)) == [(4 * GIB, 3 * GIB), (8 * GIB, 1 * GIB)]


def test_container_sees_its_group_at_the_root(cgroups):
    root, own = cgroups(2, "", 4 * GIB, GIB, 0)
    for path in ("/", "/docker/0123abcd"):  # the second: a path of the host's, which is not there
        own.write_text(f"0::{path}\n")
        assert read_cgroup_limits(root, own) == [(4 * GIB, 3 * GIB)]


def test_group_without_a_limit_sets_none(cgroups, tmp_path):
    root, own = cgroups(2, "job", "max", GIB, 0)
    own.write_text("0::/job\n")
    assert read_cgroup_limits(root, own) == []
    assert read_cgroup_limits(tmp_path / "nowhere", tmp_path / "none") == []  # macOS, Windows


def test_version_1_is_read_too(cgroups):
    root, own = cgroups(1, "job", 4 * GIB, 2 * GIB, GIB)
    own.write_text("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    assert read_cgroup_limits(root, own) == [(4 * GIB, 3 * GIB)]


def test_host_memory_is_the_machines_where_that_is_less(monkeypatch):
    """A cgroup of version 1 without a limit says 2^63; one of a container may say more than there is."""
    machine = psutil.virtual_memory()
    monkeypatch.setattr(memory, "read_cgroup_limits", lambda: [(2**63, 2**62)])
    total, free = read_host_memory()
    assert total == machine.total and free == pytest.approx(machine.available, rel=0.2)
    monkeypatch.setattr(memory, "read_cgroup_limits", lambda: [(2 * GIB, GIB), (3 * GIB, 100)])
    assert read_host_memory() == (2 * GIB, 100)


MANY_SHAPES = """
from utils.console import run_main

def main():
    import psutil, torch
    weight, sizes = torch.ones(64, 64, dtype=torch.bfloat16), []
    for width in range(1, 1001):
        torch.nn.functional.linear(torch.ones(width, 64, dtype=torch.bfloat16), weight)
        sizes.append(psutil.Process().memory_info().rss / 2**20)
    print([sizes[299], sizes[-1]])

run_main(main)
"""


def test_micro_batches_of_ever_new_shapes_do_not_fill_the_hosts_memory():
    """torch keeps a compiled kernel for each shape: without a bound, 500 MiB for these thousand."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    command = [sys.executable, "-c", MANY_SHAPES]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    early, late = json.loads(output.stdout)
    assert late < early + 20, f"{early:.0f} MiB after 300 shapes, {late:.0f} after 1,000"
