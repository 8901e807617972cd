"""safetensors shards, written one after another: memory is that of one shard."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from utils.models.weight_files import save_weights
from utils.run.record import write_json

SHARD_BYTES = 2 * 10**9


def save_sharded(
    planned: dict[str, torch.Tensor],
    build: Callable[[str], torch.Tensor],
    folder: Path,
    limit: int = SHARD_BYTES,
) -> None:
    """Write model*.safetensors and, for several, the index. No shard passes `limit` bytes but for one tensor.

    `planned` holds a tensor of the meta device for each name: its shape and type without its memory. `build`
    makes the real one of that name when the turn of its shard comes.
    """
    split = split_torch_state_dict_into_shards(planned, max_shard_size=limit)
    for file_name, names in split.filename_to_tensors.items():
        # Not kept in a variable, or one shard would still be there while the next one is made.
        save_weights({name: copy_whole(build(name)) for name in names}, folder / file_name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(index, folder / SAFE_WEIGHTS_INDEX_NAME)


def copy_whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in memory of its own and row by row, as safetensors wants it: two may be views of one."""
    return tensor.clone(memory_format=torch.contiguous_format)
