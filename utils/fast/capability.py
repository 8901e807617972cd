"""What the GPU at hand can do, by its compute capability.

GPUs before Ampere (T4, V100, 2080 Ti: below 8.0) have no bfloat16, and no flash or variable-length attention.
QLORA_GPU_CAPABILITY=7.5 makes a newer GPU do without these, so that this path is tested and timed on it.
"""

import functools
import os

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
