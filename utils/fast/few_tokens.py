"""Products of a few tokens without gradient, as a reply makes one after another: W is read once, as it lies.

The fused product of lora.py copies W beside B, which costs more than the product itself does here. What
it gains in 16 bits stays: the adapter's part is in the sum before that is rounded.
"""

from typing import TYPE_CHECKING

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from utils.fast.lora import AdapterGroup

FEW_TOKENS = 8  # bitsandbytes multiplies fewer by packed weights, in float32 too, and unpacks them for more


def is_few(group: "AdapterGroup", x: torch.Tensor) -> bool:
    """Whether `x`  # [..., in] is multiplied faster by a W that is neither unpacked nor copied."""
    if torch.is_grad_enabled() or x.numel() // x.shape[-1] >= FEW_TOKENS:
        return False
    base = group.bases[0]  # 8 bits are unpacked for every product, 4 bits on a CPU too
    return type(base) is nn.Linear or (isinstance(base, Linear4bit) and x.is_cuda)


def multiply_few(group: "AdapterGroup", i: int, x: torch.Tensor) -> torch.Tensor:
    """y of layer `i`  # [tokens, out] from x in the compute dtype  # [tokens, in]"""
    base, B = group.bases[i], group.B[i]
    xa = F.linear(x, group.A.split(group.ranks)[i])
    if type(base) is nn.Linear and not x.is_cuda:  # a CPU's product adds before it rounds
        y = torch.addmm((xa @ B.t()).mul_(group.scale), x, base.weight.t())
    else:
        if isinstance(base, Linear4bit):
            y = matmul_4bit(x.float(), base.weight, base.weight.quant_state)
        else:
            y = torch.mm(x, base.weight.t(), out_dtype=torch.float32)
        y.addmm_(xa.float(), B.float().t(), alpha=group.scale)
    if base.bias is not None:
        y += base.bias
    return y.to(group.dtype)
