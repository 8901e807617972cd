"""What the GPU at hand can do, by its compute capability.

GPUs before Ampere (T4, V100, 2080 Ti: below 8.0) have no bfloat16, and no flash or variable-length attention.
QLORA_GPU_CAPABILITY=7.5 makes a newer GPU do without these, so that this path is tested and timed on it.
"""

import functools
import os
import time

import torch

from utils.console import UserError, notice

VARIABLE = "QLORA_GPU_CAPABILITY"
AMPERE = (8, 0)


@functools.cache
def read_capability() -> tuple[int, int]:
    """Of the current GPU, or the lower one that the variable asks for. Raises UserError."""
    found, asked = torch.cuda.get_device_capability(), os.environ.get(VARIABLE)
    if not asked:
        return found
    try:
        major, minor = map(int, asked.split("."))
    except ValueError:
        raise UserError(f"{VARIABLE}={asked}: write a compute capability, as 7.5") from None
    if (major, minor) < AMPERE <= found:
        notice(f"{VARIABLE}={asked}: this GPU works as an older one, without bfloat16 and flash attention")
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return min(found, (major, minor))


def is_before_ampere() -> bool:
    return read_capability() < AMPERE


def has_bfloat16() -> bool:
    """Whether the current GPU computes in it, not by emulation."""
    return torch.cuda.is_bf16_supported(including_emulation=False) and not is_before_ampere()


def measure_matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """What large products of random numbers reach here, kept up for a second as training does, TFLOP/s."""
    size, at_once, least = (8192, 20, 1.0) if device == "cuda" else (1024, 3, 0.0)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    synchronize(device)
    count, seconds, start = 0, 0.0, time.perf_counter()
    while not count or seconds < least:
        for _ in range(at_once):
            left @ right
        synchronize(device)
        count, seconds = count + at_once, time.perf_counter() - start
    return 2 * size**3 * count / seconds / 1e12


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
