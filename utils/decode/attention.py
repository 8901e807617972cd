"""Attention of the newest tokens over the tokens that exist: cuda/attention.cu.

transformers attends over the whole buffer of a cache of fixed size, under a mask. Here the kernel reads the
length on the GPU, so that one CUDA graph serves all lengths; it rotates queries and keys and fills the cache.
"""

import ctypes
from dataclasses import dataclass

import torch

from utils.decode.packed_product import Int, Kernels, Pointer, address

WARPS, LARGEST_HEAD = 4, 256
MOST_QUERIES = 8  # of one block
BLOCKS_PER_PROCESSOR = 2
MOST_STRETCHES = 64  # of the keys of one head


class Attention(ctypes.Structure):
    _fields_ = (
        [(name, Pointer) for name in ("q", "k", "v", "keys", "values", "cos", "sin", "q_norm", "k_norm")]
        + [(name, Pointer) for name in ("lengths", "places", "partials", "arrived", "out")]
        + [
            (name, Int)
            for name in ("kv_heads", "group", "fresh", "capacity", "q_stride", "kv_stride", "window")
        ]
        + [("scale", ctypes.c_float), ("epsilon", ctypes.c_float)]
    )


@dataclass(frozen=True)
class HeadShape:
    heads: int
    kv_heads: int
    size: int
    scale: float
    epsilon: float = 0.0  # of the norms of q and k, where there are any

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


class DecodeAttention:
    """The kernel for `conversations` of `fresh` new tokens each, and the memory that its blocks meet in."""

    def __init__(
        self, kernels: Kernels, shape: HeadShape, conversations: int, fresh: int, device: torch.device
    ):
        self.shape, self.fresh, self.conversations = shape, fresh, conversations
        self.queries = min(MOST_QUERIES, shape.group * fresh)
        parts = -(-shape.group * fresh // self.queries)
        self.rows, self.device = shape.kv_heads * parts, device
        macros = {"HEAD_DIM": shape.size, "QUERIES": self.queries}
        self.kernel = kernels.compile("attend", "attention.cu", macros)
        self.arrived = torch.zeros(conversations * self.rows, dtype=torch.int32, device=device)
        # As many for any number of conversations: their sums are then added as they would be for each alone.
        wanted = BLOCKS_PER_PROCESSOR * kernels.processors // self.rows
        self.split(max(1, min(MOST_STRETCHES, wanted)))

    def split(self, stretches: int) -> None:
        """Let so many blocks share the keys of one head."""
        self.grid = (stretches, self.rows, self.conversations)
        cells = self.conversations * self.rows * self.queries * stretches * (self.shape.size + 2)
        self.partials = torch.empty(cells, dtype=torch.float32, device=self.device)

    @property
    def shared_bytes(self) -> int:
        size = self.shape.size
        lanes = max(1, min(32, 1 << (-(-size // 8) - 1).bit_length()))
        states = WARPS * (32 // lanes) * self.queries * (size + 2) * 4
        return self.queries * size * 4 + 2 * 8 * size * 2 + max(states, WARPS * size * 4)

    def attend(
        self,
        qkv: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
        out: torch.Tensor,
        norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        places: torch.Tensor | None = None,
        window: int = 0,
    ) -> None:
        """Fill `out`  # [tokens, heads * size]

        `qkv`  # [tokens, (heads + 2 kv_heads) * size]; `keys` and `values`  # [places, kv_heads, capacity,
        size] are written behind `lengths`  # int32 [places]; `rotations` are cos and sin  #
        [positions, size]; `places`  # int64 [conversations], where they are not 0, 1, 2, ...; with
        `window` a token sees so many, itself included
        """
        shape, bytes_each = self.shape, qkv.element_size()
        p = Attention(kv_heads=shape.kv_heads, group=shape.group, fresh=self.fresh, capacity=keys.shape[2])
        p.q = qkv.data_ptr()
        p.k = qkv.data_ptr() + shape.heads * shape.size * bytes_each
        p.v = qkv.data_ptr() + (shape.heads + shape.kv_heads) * shape.size * bytes_each
        p.keys, p.values, p.out, p.lengths = (t.data_ptr() for t in (keys, values, out, lengths))
        p.places, p.window = address(places), window
        p.cos, p.sin = (part.data_ptr() for part in rotations)
        p.q_norm, p.k_norm = map(address, norms)
        p.partials, p.arrived = self.partials.data_ptr(), self.arrived.data_ptr()
        p.q_stride = p.kv_stride = qkv.stride(0)
        p.scale, p.epsilon = shape.scale, shape.epsilon
        self.kernel.launch(self.grid, WARPS * 32, self.shared_bytes, p)
