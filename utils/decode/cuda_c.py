"""CUDA C that is compiled while the program runs, by NVRTC: torch brings it, and no toolkit is needed.

The sources lie in cuda/ beside this file; what they are compiled to stays in the cache's folder. A kernel
takes one argument, a struct, which ctypes lays out as C does. Kernels start by the driver's own call: torch's
wrapper of it cannot let one start before the one in front of it has ended (programmatic dependent launch: its
first weights are on the way by then).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.fast.capability import is_before_ampere
from utils.run.repository import find_cache_dir

SOURCES = Path(__file__).parent / "cuda"
MAX_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class KernelError(RuntimeError):
    """Why a kernel cannot be compiled or started, in one line."""


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel:
    """A kernel on the GPU at hand."""

    overlaps = True  # whether it may start while the kernel before it still runs

    def __init__(self, cubin: bytes, name: str):
        self.name, self.driver = name, load_driver()
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.current_stream()  # which makes the GPU's context this thread's
        torch.cuda.synchronize()
        self.check(self.driver.cuModuleLoadData(ctypes.byref(self.module), cubin))
        self.check(self.driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode()))
        self.shared_limit = 48 << 10  # bytes; more must be asked for

    def check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(result, ctypes.byref(text))
            raise KernelError(f"{self.name}: {(text.value or b'unknown error').decode()}")

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared_bytes: int, argument: ctypes.Structure
    ) -> None:
        """Start it on torch's current stream; a capture records it."""
        if shared_bytes > self.shared_limit:
            self.check(self.driver.cuFuncSetAttribute(self.function, MAX_SHARED_ATTRIBUTE, shared_bytes))
            self.shared_limit = shared_bytes
        overlap = LaunchAttribute(OVERLAP)
        overlap.value[0] = 1
        stream = torch.cuda.current_stream().cuda_stream
        config = LaunchConfig(grid, (threads, 1, 1), shared_bytes, stream, ctypes.pointer(overlap))
        config.count = int(self.overlaps and torch.cuda.get_device_capability() >= (9, 0))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        self.check(self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None))


def write_source(files: tuple[str, ...], macros: Mapping[str, int], constants: str = "") -> str:
    lines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return lines + constants + "".join((SOURCES / name).read_text() for name in files)


def compile_kernel(
    name: str, files: tuple[str, ...], macros: Mapping[str, int], constants: str = ""
) -> Kernel:
    """The kernel `name` for the current GPU, from files in utils/decode/cuda with `macros` defined."""
    source = write_source(("intrinsics.cu", *files), macros, constants)
    major, minor = torch.cuda.get_device_capability()
    return Kernel(compile_source(source, f"sm_{major}{minor}"), name)


@functools.cache
def compile_source(source: str, architecture: str) -> bytes:
    """Machine code, from the cache's folder where it has been made before."""
    words = f"{architecture} {read_nvrtc_version()} {source}"
    path = find_cache_dir() / "kernels" / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = run_nvrtc(source, architecture)
    with contextlib.suppress(OSError):  # a folder that cannot be written to: the next start compiles again
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as beside:
            beside.write(code)
        os.replace(beside.name, path)  # whole or not there
    return code


def read_nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    load_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def run_nvrtc(source: str, architecture: str) -> bytes:
    """KernelError with the compiler's first complaint."""
    nvrtc, program, size = load_nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"decode.cu", 0, None, None):
        raise KernelError("NVRTC makes no program")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise KernelError(f"NVRTC for {architecture}: {log.value.decode().strip().splitlines()[0]}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def load_driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise KernelError(f"no CUDA driver: {error}") from error


@functools.cache
def load_nvrtc() -> ctypes.CDLL:
    """NVRTC of torch's CUDA version: loaded already, of the system, or of the wheel beside torch's."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    found = list(Path(torch.__file__).parents[1].glob(f"nvidia/*/*/{name}"))
    for path in found:  # it does not look beside itself for its other half
        for other in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(other), mode=ctypes.RTLD_GLOBAL)
    for candidate in [*map(str, found), name]:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise KernelError(f"there is no {name}, which compiles kernels while the program runs")


def find_kernel_obstacle() -> str | None:
    """Why the GPU at hand runs none of these kernels; None if it should."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip:
        return "AMD's GPUs are not covered"
    if is_before_ampere():
        return "the GPU is older than compute capability 8.0"
    try:
        load_nvrtc(), load_driver()
    except KernelError as error:
        return str(error)
    return None
