"""The kind of CPU, and all that follows from it.

Servers of today (AMD since Zen 4, Intel since Sapphire Rapids) multiply bfloat16 by instructions of their
own, AVX512-BF16 or AMX. Without them a backward pass takes 30 times as long in bfloat16 as in float32.

|                           | with them                                | without        |
|---------------------------|------------------------------------------|----------------|
| compute dtype             | bfloat16                                 | float32        |
| 4-bit weights in training | unpacked for each product                | the same       |
| 4-bit weights in chat     | repacked, where every layer's shape fits | unpacked, once |

Repacked is a layout of bitsandbytes' for these instructions, made at the first evaluation: 1.8 times the
tokens per second. $QLORA_CPU_DTYPE, bfloat16 or float32, takes a CPU for the other kind, as tests do.
"""

import ctypes
import os
from typing import Any

import torch

from utils.console import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
REPACKED_ROWS = 32  # that bitsandbytes interleaves
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def choose_cpu_dtype() -> torch.dtype:
    """What this CPU computes in."""
    forced = os.environ.get("QLORA_CPU_DTYPE")
    if forced is None:
        return torch.bfloat16 if has_bfloat16_instructions() else torch.float32
    if forced not in DTYPES:
        raise UserError(f"QLORA_CPU_DTYPE {forced}: a CPU computes in {' or '.join(DTYPES)}")
    return DTYPES[forced]


def has_bfloat16_instructions() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def repacks_weights(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes is to repack the 4-bit weights of `model`, which computes in `dtype`.

    All layers or none. In float32 none: the repacked product rounds its inputs to bfloat16.
    """
    layers = find_4bit_layers(model)
    return bool(layers) and dtype == torch.bfloat16 and all(map(fits_repacking, layers))


def fits_repacking(layer: Any) -> bool:
    """Whether bitsandbytes can repack this layer: rows are interleaved, scales are kept by rows."""
    has_whole_blocks = layer.in_features % layer.weight.quant_state.blocksize == 0
    return layer.support_avx512bf16_for_cpu and layer.out_features % REPACKED_ROWS == 0 and has_whole_blocks


def keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking the 4-bit weights of `model` at the first evaluation.

    The repacked layout cannot be trained through: later gradients are wrong by up to 100%.
    """
    for layer in find_4bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def find_4bit_layers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def return_freed_memory() -> None:
    """Let glibc give blocks of 4 MiB and more back when they are freed; else it keeps those below 32 MiB.

    A step of a billion weights that two processes share peaks at 0.91 GiB then, and at 1.04 without. The next
    block's pages are new, which costs a millisecond for 16 MiB. Other C libraries have no such setting.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
