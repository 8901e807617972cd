"""The weights of a frozen base layer, unpacked when a product needs them.

8-bit layers keep LLM.int8()'s weights (arXiv 2208.07339) and leave out its rounding of activations, so that
evaluation and chat compute what training did: unpacking costs less than that rounding gains.
"""

from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.nn import functional as F

from utils.console import notice
from utils.fast.kernels import unpack_4bit, unpack_8bit
from utils.fast.memory import read_host_memory


def read_weight(base: nn.Linear, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The frozen weight in the compute dtype  # [out, in]; written to `out`, if given; it may be strided."""
    if place := vars(base).get("read_from"):  # it is not all here (sharded_layers.py)
        store, number = place
        store.hold(number)
    weight: Any = base.weight  # not only a tensor, where it is quantized: it has its scales
    if not isinstance(base, (Linear4bit, Linear8bitLt)):
        return weight.data if out is None else out.copy_(weight.data)
    if out is None:
        out = torch.empty(base.out_features, base.in_features, dtype=dtype, device=weight.device)
    with torch.cuda.device_of(out):  # where Triton launches; layers may be spread over several GPUs
        if isinstance(base, Linear4bit):
            return unpack_4bit(weight.data, weight.quant_state, out)
        row_max: Any = weight.SCB if weight.SCB is not None else base.state.SCB
        return unpack_8bit(weight.data, row_max, out)


class UnpackedProduct(torch.autograd.Function):
    """x W' + b  # [..., out]; W is unpacked again for the gradient, never kept. b may be trained."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, layer: nn.Linear):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.layer, ctx.dtype, ctx.bias_dtype = layer, x.dtype, None if bias is None else bias.dtype
        return F.linear(x.to(dtype), read_weight(layer, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ read_weight(ctx.layer, dy.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0, dtype=ctx.bias_dtype)
        return dx, db, None


def multiply_unpacked(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return UnpackedProduct.apply(x, layer.bias, layer)


def unpack_8bit_layers(model: nn.Module) -> None:
    """Let every 8-bit layer of `model` multiply by its unpacked weight."""
    for layer in model.modules():
        if isinstance(layer, Linear8bitLt):
            name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"  # behind accelerate's hook
            setattr(layer, name, partial(multiply_unpacked, layer))


def replace_by_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Linear layers of the same weights, unpacked once, in place of the quantized ones of `model`.

    For chat on a CPU, where unpacking them for every token takes longer than the products.
    """
    quantized = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))
    }
    size = sum(layer.in_features * layer.out_features for layer in quantized.values()) * dtype.itemsize
    _, free = read_host_memory()
    if size > free / 2:
        notice(
            f"quantized weights are unpacked for every token: all at once need {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free"
        )
        return
    for name, layer in quantized.items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(read_weight(layer, dtype), requires_grad=False)
        dense.bias = layer.bias
        model.set_submodule(name, dense)
