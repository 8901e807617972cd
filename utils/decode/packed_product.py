"""Products of 1 to 8 tokens with 4-bit weights where they lie, adapter included: cuda/product.cu and rows.cu.

    xa = x A'                            A of all layers that read x, end to end     multiply_rows
    y  = [x | xa] [W | s B]' (+ bias)    all these layers in one launch              multiply_packed

These are the two products of training (lora.py), with the same weights bit for bit: level * scale in float32,
rounded to 16 bits, as bitsandbytes unpacks them; s B rounded to 16 bits; xa too; sums in float32.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from utils.decode.cuda_c import Kernel, compile_kernel
from utils.fast.lora import ADAPTER, AdaptedLayer

MOST_TOKENS = 8
MOST_LAYERS = 3
RANK_UNIT = 8  # columns of s B are filled up with zeros to a multiple
MOST_BLOCKS = 4  # of a multiprocessor
MOST_SUMS = 2 * 16 * MOST_TOKENS  # of a tile
TABLE_BYTES, CODE_BYTES = 65536, 260 * 4
ROW_THREADS = 256
Pointer = ctypes.c_void_p
Int = ctypes.c_int


class Matrix(ctypes.Structure):
    _fields_ = [
        (name, Pointer) for name in ("packed", "scales", "outer_scales", "offset", "right", "bias", "y")
    ] + [(name, Int) for name in ("rows", "rank", "xa_column", "first_tile")]


class Product(ctypes.Structure):
    _fields_ = (
        [("matrices", Matrix * MOST_LAYERS)]
        + [(name, Pointer) for name in ("outer_code", "x", "xa", "residual", "handed", "is_handed")]
        + [(name, Int) for name in ("count", "tiles", "width", "xa_width", "tokens", "y_stride", "paired")]
        + [("block_shift", Int), ("outer_shift", Int)]
    )


class RowsProduct(ctypes.Structure):
    _fields_ = (
        [(name, Pointer) for name in ("weight", "x", "norm", "normed", "y")]
        + [(name, Int) for name in ("rows", "width", "tokens", "y_stride")]
        + [("epsilon", ctypes.c_float)]
    )


@dataclass(frozen=True)
class Shape:
    """How a launch is laid out: chosen by eval.decode_speed, no part of the result."""

    warps: int = 8  # of a block
    tiles: int = 2  # of 16 rows that a block does at once
    stages: int = 2  # chunks that a warp has under way
    blocks: int = 2  # of a multiprocessor
    register_rows: int = 0  # of a lane's 2 * tiles rows, unpacked without the table

    def count_shared_bytes(self, tokens: int) -> int:
        return TABLE_BYTES + CODE_BYTES + 2 * self.warps * self.tiles * 16 * tokens * 4


DEFAULT_SHAPE = Shape()


def find_packed_obstacle(base: nn.Module, dtype: torch.dtype) -> str | None:
    """Why this layer is not multiplied by the kernel; None if it is."""
    if type(base) is not Linear4bit:
        return f"{type(base).__name__} layers"
    state: Any = getattr(base.weight, "quant_state", None)
    if state is None or dtype not in (torch.bfloat16, torch.float16):
        return "the base is not quantized" if state is None else f"replies in {dtype}"
    if base.in_features % 32 or state.blocksize % 32 or state.blocksize & (state.blocksize - 1):
        return f"{base.in_features} columns in blocks of {state.blocksize}"
    if tuple(state.shape) != (base.out_features, base.in_features):
        return "weights that are stored in another shape"
    if state.nested and state.state2.blocksize & (state.state2.blocksize - 1):
        return f"scales in blocks of {state.state2.blocksize}"
    return None


class PackedGroup:
    """Layers that read one input, adapted or not, whose 4-bit weights stay where they are.

    A  # [ranks, in] and s B  # [out, rank] of each layer are copies in 16 bits, B's columns filled up.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], dtype: torch.dtype):
        self.layers, self.dtype = list(layers), dtype
        self.bases: list[Any] = [read_base(layer) for layer in layers]
        self.width = self.bases[0].in_features
        self.sizes = [base.out_features for base in self.bases]
        self.states: list[Any] = [base.weight.quant_state for base in self.bases]
        self.biases = [None if base.bias is None else base.bias.detach().to(dtype) for base in self.bases]
        adapted = [layer for layer in layers if layer not in self.bases]
        self.ranks = [-(-layer.r[ADAPTER] // RANK_UNIT) * RANK_UNIT for layer in adapted]
        self.A: Any = None
        self.B: Any = None
        if adapted:
            self.A = self.bases[0].weight.new_zeros(sum(self.ranks), self.width, dtype=dtype)
            self.B = [self.A.new_zeros(size, rank) for size, rank in zip(self.sizes, self.ranks, strict=True)]
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the adapter as it is now."""
        for layer, A, B in zip(self.layers, self.A.split(self.ranks), self.B, strict=True):
            rank = layer.r[ADAPTER]
            A[:rank] = layer.lora_A[ADAPTER].weight
            B[:, :rank] = layer.lora_B[ADAPTER].weight.to(self.dtype) * layer.scaling[ADAPTER]

    @property
    def is_double(self) -> bool:
        return self.states[0].nested

    @property
    def is_on(self) -> bool:
        """Whether the adapter counts at present."""
        return self.A is not None and not self.layers[0].disable_adapters

    def describe(self, x: torch.Tensor, xa: torch.Tensor | None, y: torch.Tensor, shape: Shape) -> Product:
        """The launch of y  # [tokens, out of all layers] from x  # [tokens, in] and xa  # [tokens, ranks]"""
        p = Product(count=len(self.bases), width=self.width, tokens=len(x), y_stride=y.stride(0))
        p.x, p.xa, p.xa_width = x.data_ptr(), address(xa), 0 if xa is None else xa.stride(0)
        state = self.states[0]
        p.block_shift = (state.blocksize // 32).bit_length() - 1
        if state.nested:
            p.outer_code = state.state2.code.data_ptr()
            p.outer_shift = state.state2.blocksize.bit_length() - 1
        first = column = 0
        for i, (base, state) in enumerate(zip(self.bases, self.states, strict=True)):
            m = p.matrices[i]
            m.packed, m.scales = base.weight.data_ptr(), state.absmax.data_ptr()
            if state.nested:
                m.outer_scales, m.offset = state.state2.absmax.data_ptr(), state.offset.data_ptr()
            m.bias, m.y = address(self.biases[i]), y.data_ptr() + first * y.element_size()
            m.rows, m.first_tile = self.sizes[i], p.tiles
            if xa is not None:
                m.right, m.rank, m.xa_column = self.B[i].data_ptr(), self.ranks[i], column
                column += self.ranks[i]
            p.tiles += -(-self.sizes[i] // (16 * shape.tiles))
            first += self.sizes[i]
        return p


def read_base(layer: AdaptedLayer) -> Any:
    """The layer below the adapter; a layer without one is its own base."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def is_alike(layers: Sequence[AdaptedLayer]) -> bool:
    """Whether layers that read one input can be one launch: quantized alike, all adapted or none."""
    bases = [read_base(layer) for layer in layers]
    states = [base.weight.quant_state for base in bases]
    kinds = {
        (s.blocksize, s.quant_type, s.nested and s.state2.blocksize, base.in_features, layer is base)
        for s, base, layer in zip(states, bases, layers, strict=True)
    }
    codes = [state.state2.code for state in states if state.nested]
    return len(layers) <= MOST_LAYERS and len(kinds) == 1 and all(torch.equal(codes[0], c) for c in codes)


class Unlaunched:
    """In place of a kernel that is not compiled yet."""

    def launch(self, *args: Any) -> None:
        pass


class Kernels:
    """The kernels of one GPU and dtype, each compiled when it is first asked for."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, compiler: Callable[..., Kernel] = compile_kernel
    ):
        self.half, self.compiler = int(dtype == torch.float16), compiler
        self.made: dict[Any, Kernel] = {}
        self.device, is_gpu = device, device.type == "cuda"
        self.shape = self.gated_shape = DEFAULT_SHAPE
        self.spread(torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 3)

    def spread(self, processors: int) -> None:
        """Let launches have `MOST_BLOCKS` blocks on each of so many multiprocessors, each with its sums."""
        self.processors, most = processors, MOST_BLOCKS * processors
        self.handed = torch.empty(most, MOST_SUMS, dtype=torch.float32, device=self.device)
        self.is_handed = torch.zeros(most, dtype=torch.int32, device=self.device)

    def compile(self, name: str, file: str, macros: dict[str, int], constants: str = "") -> Kernel:
        macros = {"HALF": self.half} | macros
        key = (name, constants, *macros.items())
        if key not in self.made:
            self.made[key] = self.compiler(name, (file,), macros, constants)
        return self.made[key]

    def compile_ahead(self, run: Callable[[], Any]) -> None:
        """Compile what `run` would launch, at once: a second each, and NVRTC works in as many threads."""
        compiler, made, asked = self.compiler, self.made, {}

        def note(*words: Any) -> Any:
            asked[words[0], words[3], *words[2].items()] = words
            return Unlaunched()

        self.compiler, self.made = note, dict(made)
        try:
            run()
        finally:
            self.compiler, self.made = compiler, made
        with ThreadPoolExecutor(max(1, len(asked))) as pool:
            self.made |= zip(asked, pool.map(lambda words: compiler(*words), asked.values()), strict=True)

    def compile_product(self, levels: tuple[float, ...], double: bool, tokens: int, shape: Shape) -> Kernel:
        macros = {
            "DOUBLE": int(double), "TOKENS": tokens, "WARPS": shape.warps, "TILES": shape.tiles,
            "STAGES": shape.stages, "BLOCKS": shape.blocks, "REGISTER_ROWS": shape.register_rows,
        }  # fmt: skip
        return self.compile("multiply_packed", "product.cu", macros, write_levels(levels))

    def multiply(
        self,
        group: PackedGroup,
        x: torch.Tensor,
        y: torch.Tensor,
        xa: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gated: bool = False,
        shape: Shape | None = None,
    ) -> None:
        """Fill y; with `gated` silu of the first layer times the second  # [tokens, out of one]

        `residual`  # as y, which it may be, is added: to a single layer's
        """
        shape = shape or (self.gated_shape if gated else self.shape)
        assert shape.blocks <= MOST_BLOCKS and shape.tiles * 16 * MOST_TOKENS <= MOST_SUMS
        p = group.describe(x, xa, y, shape)
        assert residual is None or len(group.sizes) == 1
        p.residual = address(residual)
        if gated:
            assert shape.tiles == 2 and len(group.sizes) == 2 and group.sizes[0] == group.sizes[1]
            p.paired, p.tiles = 1, -(-group.sizes[0] // 16)
        tokens = 1 if len(x) == 1 else MOST_TOKENS
        kernel = self.compile_product(find_levels(group.states[0]), group.is_double, tokens, shape)
        p.handed, p.is_handed = self.handed.data_ptr(), self.is_handed.data_ptr()
        chunks = -(-p.width // 128) + max(-(-m.rank // 32) for m in p.matrices)
        grid = min(self.processors * shape.blocks, p.tiles * chunks)
        kernel.launch((grid, 1, 1), shape.warps * 32, shape.count_shared_bytes(tokens), p)

    def multiply_rows(
        self,
        weight: torch.Tensor | None,
        x: torch.Tensor,
        y: torch.Tensor | None,
        norm: torch.Tensor | None = None,
        epsilon: float = 0.0,
        normed: torch.Tensor | None = None,
        rows_at_once: int = 1,
        blocks: int | None = None,
    ) -> None:
        """y = norm(x) W'  # [tokens, rows] of a 16-bit W  # [rows, width]; norm(x) itself into `normed`."""
        rows, tokens = 0 if weight is None else len(weight), 1 if len(x) == 1 else MOST_TOKENS
        chunks = -(-x.shape[1] // (8 * ROW_THREADS))
        macros = {"GROUP": rows_at_once, "CHUNKS": chunks, "TOKENS": tokens}
        p = RowsProduct(address(weight), x.data_ptr(), address(norm), address(normed), address(y))
        p.rows, p.width, p.tokens, p.epsilon = rows, x.shape[1], len(x), epsilon
        p.y_stride = 0 if y is None else y.stride(0)
        grid = max(1, min(-(-rows // rows_at_once), blocks or rows))
        shared = ROW_THREADS // 32 * rows_at_once * tokens * 4
        self.compile("multiply_rows", "rows.cu", macros).launch((grid, 1, 1), ROW_THREADS, shared, p)


def find_levels(state: Any) -> tuple[float, ...]:
    """The 16 levels of NF4 or FP4, exactly."""
    if not hasattr(state, "levels"):
        state.levels = tuple(state.code.float().tolist())
    return state.levels


def write_levels(levels: tuple[float, ...]) -> str:
    return f"__constant__ float LEVELS[16] = {{{', '.join(level.hex() + 'f' for level in levels)}}};\n"
