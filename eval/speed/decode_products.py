"""The 4-bit products of a reply, held against bitsandbytes' weights bit for bit."""

import itertools
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from eval.speed.gpu_time import DEVICE, DTYPE, say, say_failure, time_call
from utils.decode.cuda_c import Kernel
from utils.decode.packed_product import Kernels, PackedGroup, Shape
from utils.fast.kernels import unpack_4bit

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments

QUANTIZATIONS = [
    ("nf4", True, 64), ("nf4", False, 64), ("fp4", True, 64), ("nf4", True, 128), ("nf4", True, 256)
]  # fmt: skip


def make_kernels(dtype: torch.dtype = DTYPE) -> Kernels:
    return Kernels(torch.device(DEVICE), dtype)


def make_layer(
    rows: int,
    width: int,
    dtype: torch.dtype = DTYPE,
    kind: str = "nf4",
    double: bool = True,
    block: int = 64,
) -> Any:
    layer = Linear4bit(width, rows, bias=False, compute_dtype=dtype, quant_type=kind)
    values = torch.randn(rows, width, dtype=dtype, device=DEVICE) * 0.02
    weight: Any = Params4bit(
        values.cpu(), requires_grad=False, quant_type=kind, compress_statistics=double, blocksize=block
    )
    layer.weight = weight.to(DEVICE)
    return layer


def check_overlap() -> None:
    """Whether kernels can start before the end of the one in front, in a graph; without, where not."""
    kernels, group = make_kernels(), PackedGroup([make_layer(256, 256)], DTYPE)
    x = torch.ones(1, 256, dtype=DTYPE, device=DEVICE)
    y = torch.empty_like(x)

    def multiply() -> None:
        for _ in range(4):
            kernels.multiply(group, x, y)

    try:
        time_call(multiply)
        say("programmatic dependent launch: yes")
    except Exception as error:
        say_failure("programmatic dependent launch", error)
        Kernel.overlaps = False


def check_weights(arguments: "DecodeSpeedArguments") -> None:
    """Bit for bit: rows of the unit matrix give columns of W."""
    rows, width = 256, 1024
    for dtype, (kind, double, block) in itertools.product((torch.bfloat16, torch.float16), QUANTIZATIONS):
        kernels, layer = make_kernels(dtype), make_layer(rows, width, dtype, kind, double, block)
        state: Any = layer.weight.quant_state
        W = dequantize_4bit(layer.weight.data, state)  # [rows, width]
        trained = unpack_4bit(layer.weight.data, state, torch.empty_like(W))
        group, unit = PackedGroup([layer], dtype), torch.eye(width, dtype=dtype, device=DEVICE)
        for shape in (Shape(), Shape(register_rows=2), Shape(8, 1, 3, 2)):
            y = torch.full((width, rows), float("nan"), dtype=dtype, device=DEVICE)
            for first in range(0, width, 8):
                kernels.multiply(group, unit[first : first + 8], y[first : first + 8], shape=shape)
            say(
                f"{str(dtype)[6:]:<9} {kind} double {double!s:<5} block {block:<4} of {W.numel()} weights "
                f"{(y.T != W).sum().item()} unlike bitsandbytes', {(y.T != trained).sum().item()} unlike "
                f"training's; {shape}"
            )
