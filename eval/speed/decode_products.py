"""The 4-bit products of a reply: their weights bit for bit, their time by each shape of the kernel."""

import copy
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import PretrainedConfig

from eval.speed import gpu_time
from eval.speed.gpu_time import DEVICE, DTYPE, relative, say, say_failure, time_call
from eval.speed.shapes import SHAPES
from utils.decode.cuda_c import LOCAL_ATTRIBUTE, REGISTERS_ATTRIBUTE, Kernel, KernelError
from utils.decode.packed_product import Kernels, PackedGroup, Shape, find_levels
from utils.fast.kernels import unpack_4bit

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments

PROCESSOR_SHARED, PROCESSOR_REGISTERS = 227 << 10, 65536
# About what the compiler takes for a thread, by tiles and stages.
REGISTERS = {(1, 2): 62, (1, 3): 78, (1, 4): 96, (2, 2): 120, (2, 3): 150}
QUANTIZATIONS = [
    ("nf4", True, 64), ("nf4", False, 64), ("fp4", True, 64), ("nf4", True, 128), ("nf4", True, 256)
]  # fmt: skip

Tensors = dict[int, torch.Tensor]


def make_kernels(dtype: torch.dtype = DTYPE) -> Kernels:
    return Kernels(torch.device(DEVICE), dtype, gpu_time.compiler)


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


def copy_layer(layer: Linear4bit) -> Linear4bit:
    """The same weights elsewhere in memory, so that no cache holds them."""
    old: Any = layer.weight  # not only a tensor: it has its quant_state
    new, weight = copy.copy(layer), copy.copy(old)
    new._parameters = dict(layer._parameters)
    weight.data = old.data.clone()
    weight.quant_state = copy.copy(old.quant_state)
    weight.quant_state.absmax = old.quant_state.absmax.clone()
    new.weight = weight
    return new


def list_products(config: PretrainedConfig) -> dict[str, tuple[list[int], int]]:
    """Rows of each layer and their width, of the four products of a layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    kv_rows = config.num_key_value_heads * size
    return {
        "q k v": ([heads * size, kv_rows, kv_rows], hidden),
        "o": ([hidden], heads * size),
        "gate up": ([config.intermediate_size] * 2, hidden),
        "down": ([hidden], config.intermediate_size),
    }


def check_overlap() -> None:
    """Whether kernels can start before the end of the one in front, in a graph; without, where not."""
    if DEVICE == "cpu":
        return
    kernels, group = make_kernels(), PackedGroup([make_layer(256, 256)], DTYPE)
    x = torch.ones(1, 256, dtype=DTYPE, device=DEVICE)
    try:
        time_call(multiply_all, kernels, [group] * 4, {256: x}, {256: torch.empty_like(x)})
        say("programmatic dependent launch: yes")
    except Exception as error:
        say_failure("programmatic dependent launch", error)
        Kernel.overlaps = False


def check_weights(arguments: "DecodeSpeedArguments") -> None:
    """Bit for bit: rows of the unit matrix give columns of W."""
    rows, width = (256, 1024) if DEVICE == "cuda" else (32, 256)
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


def list_shapes(tokens: int) -> Iterator[Shape]:
    for (tiles, stages), needed in REGISTERS.items():
        for warps, blocks, rows in itertools.product((8, 12, 16, 24, 32), (1, 2, 3), (0, 1, 2)):
            shape = Shape(warps, tiles, stages, blocks, rows)
            if (
                blocks * (shape.count_shared_bytes(tokens) + 1024) <= PROCESSOR_SHARED
                and blocks * warps * 32 * needed <= PROCESSOR_REGISTERS
                and 12 <= blocks * warps
                and (rows == 0 or (stages == 2 and rows <= tiles))
            ):
                yield shape


def build_groups(config: PretrainedConfig, layers: int) -> dict[str, list[PackedGroup]]:
    """The packed groups of `layers` layers, each with weights of its own."""
    groups = {}
    for name, (sizes, width) in list_products(config).items():
        first = [make_layer(rows, width) for rows in sizes]
        groups[name] = [PackedGroup([copy_layer(layer) for layer in first], DTYPE) for _ in range(layers)]
    return groups


def in_order(groups: dict[str, list[PackedGroup]]) -> list[PackedGroup]:
    """Layer after layer."""
    return [group for layer in zip(*groups.values(), strict=True) for group in layer]


def count_bytes(groups: list[PackedGroup]) -> int:
    pairs = [pair for group in groups for pair in zip(group.bases, group.states, strict=True)]
    return sum(base.weight.numel() + state.absmax.numel() for base, state in pairs)


def compile_all(kernels: Kernels, state: Any, shapes: list[Shape], tokens: int) -> dict[Shape, str]:
    """Compiles side by side; what each is: registers, bytes that spilled, or why there is none."""

    def compile_one(shape: Shape) -> str:
        try:
            kernel = kernels.compile_product(find_levels(state), state.nested, tokens, shape)
        except KernelError as error:
            return f"failed: {error}"
        if not isinstance(kernel, Kernel):
            return "on a CPU"
        registers, local = map(kernel.read_attribute, (REGISTERS_ATTRIBUTE, LOCAL_ATTRIBUTE))
        return f"{registers} registers, {local} bytes spilled"

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(shapes, pool.map(compile_one, shapes), strict=True))
    say(f"{len(shapes)} shapes compiled in {time.perf_counter() - start:.1f} s")
    return found


def time_shapes(arguments: "DecodeSpeedArguments") -> None:
    """All 4-bit products of the model, one after another in a graph, by each shape of the kernel."""
    config = SHAPES[arguments.model]()
    groups = build_groups(config, config.num_hidden_layers)
    for tokens in (1, 8):
        time_shapes_of(groups, tokens)


def multiply_all(kernels: Kernels, groups: list[PackedGroup], xs: Tensors, ys: Tensors, **more: Any) -> None:
    for group in groups:
        kernels.multiply(group, xs[group.width], ys[sum(group.sizes)], **more)


def multiply_by_bitsandbytes(groups: list[PackedGroup], xs: Tensors) -> None:
    for group in groups:
        for base in group.bases:
            matmul_4bit(xs[group.width], base.weight.data.t(), base.weight.quant_state)


def make_sides(groups: list[PackedGroup], tokens: int) -> tuple[Tensors, Tensors]:
    """x of each width, y of each number of rows."""
    xs = {group.width: torch.randn(tokens, group.width, device=DEVICE).to(DTYPE) for group in groups}
    sizes = {sum(group.sizes) for group in groups}
    return xs, {size: torch.empty(tokens, size, dtype=DTYPE, device=DEVICE) for size in sizes}


def time_shapes_of(groups: dict[str, list[PackedGroup]], tokens: int) -> None:
    flat, kernels = in_order(groups), make_kernels()
    (xs, ys), total = make_sides(flat, tokens), count_bytes(flat)
    theirs = time_call(multiply_by_bitsandbytes, flat, xs)
    gigabytes = total / 1e9
    say(f"{tokens} tokens, {gigabytes:.2f} GB: bitsandbytes {theirs:.3f} ms, {gigabytes / theirs:.2f} TB/s")
    shapes = [shape for shape in list_shapes(tokens) if tokens == 1 or shape.register_rows == 0]
    if DEVICE == "cpu":
        shapes = [Shape(4, 2, 2), Shape(4, 1, 2, 2)]
    notes, results = compile_all(kernels, flat[0].states[0], shapes, tokens), []
    for shape in shapes:
        try:
            worst = max(find_error(kernels, own[0], xs, shape) for own in groups.values())
            milliseconds = time_call(multiply_all, kernels, flat, xs, ys, shape=shape, repeats=12)
            results.append((milliseconds, shape, worst))
        except Exception as error:
            say_failure(f"{shape}, {notes[shape]}", error)
    results.sort(key=lambda result: result[0])
    for milliseconds, shape, worst in results:
        speed = f"{milliseconds:.3f} ms {total / milliseconds / 1e9:.2f} TB/s"
        say(f"{speed} error {worst:.5f} {shape} {notes[shape]}")
    for shape in {result[1].tiles: result[1] for result in reversed(results)}.values():  # the best of each
        detail_shape(kernels, groups, xs, ys, shape)


def find_error(kernels: Kernels, group: PackedGroup, xs: Tensors, shape: Shape) -> float:
    """Relative, against the product with the unpacked weights in float32."""
    x = xs[group.width]
    y = torch.full((len(x), sum(group.sizes)), float("nan"), dtype=DTYPE, device=DEVICE)
    kernels.multiply(group, x, y, shape=shape)
    W = torch.cat([dequantize_4bit(base.weight.data, base.weight.quant_state) for base in group.bases])
    error = relative(y, x.float() @ W.float().T)
    if not error < 0.01:
        raise ValueError(f"relative error {error}")
    return error


def detail_shape(
    kernels: Kernels, groups: dict[str, list[PackedGroup]], xs: Tensors, ys: Tensors, shape: Shape
) -> None:
    """Each of the four products by itself; gate and up with their activation; without overlap."""
    say(shape)
    for name, own in groups.items():
        milliseconds = time_call(multiply_all, kernels, own, xs, ys, shape=shape) / len(own)
        size = count_bytes(own) / len(own)
        say(f"   {name:<8} {1e3 * milliseconds:6.2f} us {size / milliseconds / 1e9:.2f} TB/s")
    own = groups["gate up"]
    if shape.tiles == 2:
        out = {sum(own[0].sizes): torch.empty_like(xs[groups["down"][0].width])}
        gated = time_call(multiply_all, kernels, own, xs, out, gated=True, shape=shape)
        say(f"   gated    {1e3 * gated / len(own):6.2f} us")
    Kernel.overlaps = False
    milliseconds = time_call(multiply_all, kernels, in_order(groups), xs, ys, shape=shape)
    say(f"   all, each after the end of the one before: {milliseconds:.3f} ms")
    Kernel.overlaps = True


def run_once(arguments: "DecodeSpeedArguments") -> None:
    """Each product of a layer by two shapes, for a profiler to look at."""
    kernels, groups = make_kernels(), in_order(build_groups(SHAPES[arguments.model](), 1))
    xs, ys = make_sides(groups, 1)
    Kernel.overlaps = False
    for shape in (Shape(16, 2, 2, 1), Shape(12, 1, 2, 2)) if DEVICE == "cuda" else (Shape(4),):
        multiply_all(kernels, groups, xs, ys, shape=shape)
