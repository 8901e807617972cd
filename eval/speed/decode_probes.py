"""What bounds the 4-bit product: its time where part of its work is left out, and its results are wrong."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from eval.speed.decode_products import build_groups, in_order, make_sides, multiply_all
from eval.speed.gpu_time import DEVICE, DTYPE, say, say_failure, time_call
from eval.speed.shapes import SHAPES
from utils.decode.cuda_c import Kernel, compile_source, write_source
from utils.decode.packed_product import Kernels, Shape

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments

ROUNDING = "return round_pair(__fmul_rn(two.x, scale), __fmul_rn(two.y, scale));"
PRODUCTS = "multiply_tile(sums[part], pairs[0]"
# A text of the source, and what stands there instead.
PROBES: dict[str, list[tuple[str, str]]] = {
    "as it is": [],
    "no table, no rounding": [(ROUNDING, "return codes ^ b ^ __float_as_uint(scale);")],
    "table, no rounding": [(ROUNDING, "return __float_as_uint(two.x) ^ __float_as_uint(two.y * scale);")],
    "no scales": [
        ("stage.scale_codes[i] = ((const unsigned char*)m.scales)[block];", "stage.scale_codes[i] = 3;"),
        ("stage.outer_scales[i] = m.outer_scales[block >> p.outer_shift];", "stage.outer_scales[i] = 1.f;"),
    ],
    "no x": [("if (reads) xs = x[word];", "if (reads) xs = make_uint4(word, lane, 1, 2);")],
    "no weights from memory": [
        (
            "stage.codes[i] = load_once(m.packed + place);",
            "stage.codes[i] = make_uint4(place, block, unit, i);",
        )
    ],
    "no products": [(PRODUCTS, f"if (pairs[0][0] == 77) {PRODUCTS}")],
    "256 bytes ahead into L2": [("L2::128B", "L2::256B")],
    "nothing ahead into L2": [(".L2::128B", "")],
    "cached in L1": [("L1::no_allocate.", "")],
}
SHAPES_PROBED = (Shape(16, 2, 2, 1), Shape(8, 2, 2, 2), Shape(16, 1, 2, 1), Shape(12, 1, 2, 2))


def compile_changed(
    changes: list[tuple[str, str]], name: str, files: tuple[str, ...], macros: Any, constants: str = ""
) -> Kernel:
    source = write_source(("intrinsics.cu", *files), macros, constants)
    for old, new in changes:
        if old not in source:
            raise ValueError(f"not in the source: {old}")
        source = source.replace(old, new)
    major, minor = torch.cuda.get_device_capability()
    return Kernel(compile_source(source, f"sm_{major}{minor}"), name)


def time_probes(arguments: "DecodeSpeedArguments") -> None:
    if DEVICE == "cpu":
        return say("needs a GPU")
    config = SHAPES[arguments.model]()
    groups = in_order(build_groups(config, config.num_hidden_layers))
    xs, ys = make_sides(groups, 1)
    for shape in SHAPES_PROBED:
        say(shape)
        for name, changes in PROBES.items():
            kernels = Kernels(torch.device(DEVICE), DTYPE, partial(compile_changed, changes))
            try:
                milliseconds = time_call(multiply_all, kernels, groups, xs, ys, shape=shape, repeats=12)
                say(f"   {name:<26} {milliseconds:.3f} ms")
            except Exception as error:
                say_failure(f"   {name}", error)
