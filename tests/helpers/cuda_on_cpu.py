"""The CUDA kernels of utils/decode/cuda run on a CPU: their own source, with cuda_on_cpu.cpp as the GPU."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from helpers import ROOT
from utils.decode.cuda_c import SOURCES

COMPILER = shutil.which("g++")
FOLDER = Path(tempfile.gettempdir()) / "cuda_on_cpu"


class CpuKernel:
    """As utils.decode.cuda_c.Kernel; tensors lie in the host's memory."""

    def __init__(self, library: ctypes.CDLL, name: str):
        self.name, self.entry = name, getattr(library, f"launch_{name}")

    def launch(self, grid, threads, shared_bytes, argument) -> None:
        self.entry((ctypes.c_uint * 3)(*grid), threads, shared_bytes, ctypes.byref(argument))


def compile_on_cpu(name: str, files: tuple[str, ...], macros, constants: str = "") -> CpuKernel:
    lines = "".join(f"#define {macro} {value}\n" for macro, value in macros.items())
    parts = [(ROOT / "tests" / "helpers" / "cuda_on_cpu.cpp").read_text(), constants]
    parts += [(SOURCES / file).read_text() for file in files]
    source = lines + "".join(parts)
    (kind,) = re.findall(rf"{name}\(const (\w+) p\)", source)
    source += (
        f'extern "C" void launch_{name}(const unsigned* grid, unsigned threads, unsigned shared, const {kind}* p) '
        f"{{ launch(grid, threads, shared, [=] {{ {name}(*p); }}); }}\n"
    )
    return CpuKernel(build_library(source), name)


@functools.cache
def build_library(source: str) -> ctypes.CDLL:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{hashlib.sha256(source.encode()).hexdigest()[:20]}.so"
    if not path.exists():
        code, made = path.with_suffix(".cpp"), path.with_suffix(".tmp")
        code.write_text(source)
        command = [
            COMPILER,
            "-O2",
            "-std=c++20",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
            "-w",
            code,
            "-o",
            made,
        ]
        subprocess.run(command, check=True)
        made.rename(path)
    return ctypes.CDLL(str(path))
