"""Biases that are trained (--bias all, lora_only): float32, whatever the layers compute in.

A step of 2e-4 is lost on a bias of 0.1 in bfloat16, where the next number is 0.0005 away, and a float16
gradient cannot be unscaled. So the parameter is a float32 master, which the optimizer steps and PEFT saves;
its layer computes with a 16-bit copy, made at each call, through which the gradient comes back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)


def keep_biases_in_float32(model: nn.Module) -> bool:
    """Turn every trained 16-bit weight of a frozen base into a float32 master; True if there is any."""
    dtypes = {
        weight: weight.dtype
        for weight in model.parameters()
        if weight.requires_grad and weight.dtype in HALVES
    }
    for weight in dtypes:
        weight.data = weight.data.float()
    for layer in model.modules():
        own = {
            name: dtypes[weight] for name, weight in layer.named_parameters(recurse=False) if weight in dtypes
        }
        if own:
            name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"  # behind accelerate's hook
            setattr(layer, name, partial(compute_in_16_bits, layer, own, getattr(layer, name)))
    return bool(dtypes)


def compute_in_16_bits(
    layer: nn.Module, dtypes: dict[str, torch.dtype], forward: Callable, *args: Any, **kwargs: Any
) -> Any:
    """`forward` of `layer` with copies of its masters, in the dtype that it was loaded in."""
    held: dict[str, Any] = layer._parameters
    masters = {name: held[name] for name in dtypes}
    # bitsandbytes casts a bias of another dtype than it computes in, in place.
    dtype = getattr(layer, "compute_dtype", None)
    copies = {name: master.to(dtype or dtypes[name]) for name, master in masters.items()}
    held.update(copies)
    try:
        return forward(*args, **kwargs)
    finally:
        held.update(masters)
