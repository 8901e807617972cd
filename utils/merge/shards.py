"""safetensors shards, written one tensor at a time: memory is that of the largest tensor."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from utils.run.record import write_json

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 * 10**9
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def plan_shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """`entries` in order, cut so that no shard passes `limit` bytes; a larger tensor has its own."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.size for other in shards[-1]) + entry.size > limit:
            shards.append([])
        shards[-1].append(entry)
    return shards


def save_shards(
    entries: list[Entry], build: Callable[[Entry], "torch.Tensor"], folder: Path, limit: int = SHARD_BYTES
) -> None:
    """Write model*.safetensors and, for several, the index; `build` makes each tensor when its turn comes."""
    shards, weight_map = plan_shards(entries, limit), {}
    for number, shard in enumerate(shards, 1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        weight_map |= {entry.name: name for entry in shard}
        save_shard(shard, build, folder / name)
    if len(shards) > 1:
        total = sum(entry.size for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(index, folder / "model.safetensors.index.json")


def save_shard(entries: list[Entry], build: Callable[[Entry], "torch.Tensor"], path: Path) -> None:
    """One file: length of the header, header, tensors (https://github.com/huggingface/safetensors#format)."""
    import torch

    header, end = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [end, end + entry.size],
        }
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            raw = build(entry).contiguous().flatten().view(torch.uint8).numpy()
            assert raw.nbytes == entry.size, f"{entry.name} has {raw.nbytes} bytes, not {entry.size}"
            file.write(raw.data)
