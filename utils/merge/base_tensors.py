"""The base's tensors on disk, under the names that the model's modules have.

They differ where a checkpoint leaves out the first word (BLOOM's `h.0` is the model's `transformer.h.0`) and
where it packs several weights in one (Baichuan's W_pack holds q, k and v, one under the other).
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import str_to_torch_dtype

from utils.console import UserError
from utils.models.baichuan import PACKED, cut_rows
from utils.models.stored_quantized import CODES_STATE, find_codes, is_part
from utils.models.weight_files import open_weights, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stored:
    """A tensor of an open, memory-mapped file, or some of its rows: nothing is read before read()."""

    file: Any
    key: str
    rows: slice | None = None

    @property
    def dtype(self) -> torch.dtype:
        return str_to_torch_dtype[self.file.get_slice(self.key).get_dtype()]

    @property
    def shape(self) -> list[int]:
        whole = self.file.get_slice(self.key).get_shape()
        return whole if self.rows is None else [self.rows.stop - self.rows.start, *whole[1:]]

    def read(self) -> torch.Tensor:
        return (
            self.file.get_tensor(self.key) if self.rows is None else self.file.get_slice(self.key)[self.rows]
        )


@dataclass(frozen=True)
class StoredCodes:
    """A weight in 4 bits: what its codes and scales stand for, as a Stored is read."""

    parts: dict[str, Stored]  # by the end of their names: "" of the codes, ".absmax", ...

    @property
    def about(self) -> dict[str, Any]:
        """What is no tensor of it: shape, dtype, block size, ..."""
        packed = next(part for end, part in self.parts.items() if end.startswith(CODES_STATE))
        return json.loads(bytes(packed.read().tolist()))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.about["dtype"])

    @property
    def shape(self) -> list[int]:
        return self.about["shape"]

    def read(self) -> torch.Tensor:
        """Unrounded, in float32."""
        tensors = {end.removeprefix("."): part.read() for end, part in self.parts.items()}
        codes = tensors.pop("")
        state = QuantState.from_dict(tensors, device=codes.device)
        state.dtype = torch.float32
        return dequantize_4bit(codes, state)


def join_codes(stored: dict[str, Stored]) -> dict[str, Stored | StoredCodes]:
    """`stored` with the tensors of each 4-bit weight as one."""
    joined: dict[str, Stored | StoredCodes] = {
        name: tensor for name, tensor in stored.items() if not is_part(name)
    }
    parts = {name: tensor for name, tensor in stored.items() if is_part(name)}
    for codes in find_codes(list(parts)):
        own = {name.removeprefix(codes): tensor for name, tensor in parts.items() if name.startswith(codes)}
        joined[codes] = StoredCodes({"": stored[codes]} | own)
    return joined


def open_tensors(base: Path, packed: bool, stack: ExitStack) -> dict[str, Stored | StoredCodes]:
    """{name on disk: tensor} of the model in `base`; `packed`: W_pack is cut into q, k and v."""
    index = base / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    stored: dict[str, Stored] = {}
    for name in files:
        if not (base / name).is_file():
            raise UserError(f"{base} holds no {name}: download the model again, as safetensors")
        file = stack.enter_context(open_weights(base / name, "pt"))
        for key in file.keys():
            is_packed = packed and key.endswith(PACKED)
            cuts = cut_rows(key, Stored(file, key).shape[0]) if is_packed else {key: None}
            stored |= {part: Stored(file, key, rows) for part, rows in cuts.items()}
    return join_codes(stored)


def find_names_on_disk(model: "PreTrainedModel", names: list[str]) -> dict[str, str]:
    """{name in the model: name on disk}, by the renaming of transformers' own loader.

    What the loader computes from several tensors, or from a part of one, is left out.
    """
    transforms, prefix = get_model_conversion_mapping(model), model.base_model_prefix
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters, on_disk = model.state_dict(), {}
    for name in sorted(names):
        renamed, converter = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, converter = name, None
        if renamed in parameters and converter is None:
            on_disk[renamed] = name
    return on_disk
