"""Random numbers that follow from what they are for: nothing is drawn from a generator, nothing is shared.

    bits = hash(seed, optimizer step, row of the training set, position in the row; layer, column)

The first four make the key of a token, once a micro-batch. So a token has the same numbers whether its row
is packed or padded, in whichever micro-batch or process it is, on a CPU or a GPU, again when a checkpointed
layer is recomputed, and after any resume. The row goes by its number in the training set, not by its place in
the step: a step lies within one epoch, which has a row once, and no process need know what the others have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from utils.console import notice

CHUNK_ELEMENTS = 2**16  # hashed at once: 256 KiB stay in a CPU's cache
WORD = 2**32 - 1


class TokenKeys:
    """The keys of the current micro-batch; the layers that draw hold on to this object."""

    keys: torch.Tensor  # int64 [tokens], from the first read() on

    def __init__(self, device: torch.device):
        self.step_key = torch.zeros(1, dtype=torch.int64, device=device)  # a captured graph reads it there
        self.micro_batch: dict[str, Any] = {}
        self.is_used = self.is_announced = False

    def choose_step(self, seed: int, step: int) -> None:
        self.step_key.fill_(scramble(scramble(torch.tensor(seed)) + step).item())

    def read(self, micro_batch: dict[str, Any]) -> None:
        """Make the keys of `micro_batch`, whose token_keys the collators number by row and position."""
        if self.is_used:
            self.micro_batch = micro_batch
            self.keys = scramble(micro_batch["token_keys"].flatten() + self.step_key)

    @contextmanager
    def narrowed(self, tokens: slice) -> Iterator[None]:
        """Within it, the micro-batch consists of these of its tokens."""
        whole = self.keys if self.is_used else None
        try:
            if whole is not None:
                self.keys = whole[tokens]
            yield
        finally:
            if whole is not None:
                self.keys = whole

    def find(self, x: torch.Tensor) -> torch.Tensor:
        """The key of each row of `x`  # int64 [tokens]

        A layer may see others than the tokens (an expert its share of them): they are keyed by their place.
        """
        keys = self.keys.to(x.device)
        if len(x) == len(keys):
            return keys
        if not self.is_announced:
            notice(f"a layer sees {len(x)} rows of {len(keys)} tokens: its dropout depends on the packing")
            self.is_announced = True
        return scramble(keys[:1] + torch.arange(len(x), device=x.device))


def number_tokens(rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """What tells one token of a step from another, before it is hashed  # int64, of the arguments' shape"""
    return torch.from_numpy((rows.astype(np.int64) << 32) + positions)


def scramble(numbers: torch.Tensor) -> torch.Tensor:
    """splitmix64: numbers that follow one another become 64 random bits each  # int64"""
    numbers = numbers + (0x9E3779B97F4A7C15 - 2**64)
    numbers = (numbers ^ shift(numbers, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    numbers = (numbers ^ shift(numbers, 27)) * (0x94D049BB133111EB - 2**64)
    return numbers ^ shift(numbers, 31)


def shift(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as unsigned numbers."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)


def hash_columns(keys: np.ndarray, layer: int, width: int) -> np.ndarray:
    """32 random bits for each column, those of triton_kernels.hash_columns  # uint32 [tokens, width]

    `keys`  # uint64 [tokens]. Murmur3's finalizer, into which the upper half of the key comes midway.
    """
    low = keys.astype(np.uint32) ^ np.uint32(layer * 2654435761 & WORD)
    high = (keys >> np.uint64(32)).astype(np.uint32) + np.uint32(layer * 2246822519 & WORD)
    bits = np.arange(width, dtype=np.uint32) * np.uint32(3266489917) + low[:, None]
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(2246822507)
    bits += high[:, None]
    bits ^= bits >> np.uint32(13)
    bits *= np.uint32(3266489909)
    bits ^= bits >> np.uint32(16)
    return bits


def draw_mask(keys: torch.Tensor, layer: int, width: int, probability: float) -> torch.Tensor:
    """0 where an element is dropped, else 1 / (1 - probability), on a CPU  # float32 [tokens, width]"""
    mask, scale = np.empty((len(keys), width), np.float32), np.float32(1 / (1 - probability))
    rows, threshold = max(1, CHUNK_ELEMENTS // width), np.uint32(probability * 2**32)
    for first in range(0, len(keys), rows):
        bits = hash_columns(keys.numpy().view(np.uint64)[first : first + rows], layer, width)
        np.multiply(bits >= threshold, scale, out=mask[first : first + rows])
    return torch.from_numpy(mask)


def draw_uniform(keys: torch.Tensor, layer: int, width: int) -> torch.Tensor:
    """From [-1, 1), on a CPU  # float32 [tokens, width]"""
    bits = hash_columns(keys.numpy().view(np.uint64), layer, width)
    return torch.from_numpy((bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1))
