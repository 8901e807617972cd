"""Host memory: how much this machine, or the container around the process, has; and pinned memory."""

import mmap
from pathlib import Path

import psutil
import torch

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Linux's two versions: (limit, use, what of it are pages of files that go when memory is needed)
FILES_V2 = ("memory.max", "memory.current", "inactive_file")
FILES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
LOCKED: list[torch.Tensor] = []


def read_host_memory() -> tuple[int, int]:
    """(bytes of memory in all, bytes that are free), the least that the machine and each cgroup leave."""
    machine = psutil.virtual_memory()
    limits = [(machine.total, machine.available), *read_cgroup_limits()]
    total, free = (min(numbers) for numbers in zip(*limits, strict=True))
    return total, free


def read_cgroup_limits(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[tuple[int, int]]:
    """(limit, free) of this process's cgroup and of all above it that set one."""
    found = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, FILES_V2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", FILES_V1
        else:
            continue
        # Within a container the path may be the host's, and the container's own group lies at the root.
        folder = root / path.lstrip("/")
        found += [limit for at in (folder, *folder.parents) if (limit := read_limit(at, *files))]
    return found


def read_limit(folder: Path, limit_name: str, use_name: str, file_pages: str) -> tuple[int, int] | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in (limit_name, use_name))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no such group here, or one without a limit of its own
        return None
    if limit == "max":
        return None
    return int(limit), int(limit) - int(used) + int(stat[file_pages])


def allocate_pinned(size: int) -> torch.Tensor:
    """So many bytes of host memory that a GPU reads and writes by itself  # uint8 [size]; kept for good.

    torch's own pinned memory rounds up to a power of two: 33 GB of layers would take 64. Here pages are
    mapped, and locked in place where there is a GPU.
    """
    pages = mmap.mmap(-1, size)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    if torch.cuda.is_available():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
        LOCKED.append(buffer)  # pages may not be given back while they are locked
    return buffer


def pin_copy(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` in pinned host memory."""
    return allocate_pinned(x.nbytes).view(x.dtype).view(x.shape).copy_(x)
