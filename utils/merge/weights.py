"""The arithmetic of a merge, tensor by tensor: W + s BA, where W is what the adapter was trained on."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from safetensors import safe_open
from transformers.quantizers.auto import AutoHfQuantizer

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.merge.base_tensors import Stored, StoredCodes, find_names_on_disk, open_tensors
from utils.merge.shards import save_sharded
from utils.models.baichuan import is_baichuan
from utils.models.base import build_quantization, build_without_weights, choose_compute_dtype
from utils.models.folder import ADAPTER_FILE
from utils.models.weight_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
HALVES = {torch.float16, torch.bfloat16}
# Stands for the base's own tensor: a bias, a layer that was trained itself, a saved base layer.
REPLACED = "replaced"
# What LoRA adds to a layer, by its name behind `.lora_`, and the tensor of the layer that it changes.
PARTS = {
    "A": "weight",
    "B": "weight",
    "B.bias": "bias",
    "embedding_A": "weight",
    "embedding_B": "weight",
    "magnitude_vector": "weight",  # DoRA's
}

Updates = dict[str, dict[str, str]]  # {tensor of the model: {part: tensor of the adapter}}


@dataclass(frozen=True)
class MergedTensors:
    """The merged model, none of it in memory yet."""

    planned: dict[str, torch.Tensor]  # by their names on disk, on the meta device
    build: Callable[[str], torch.Tensor]  # the real tensor of such a name
    in_model: dict[str, str]  # {name on disk: name in the model}
    changes: dict[str, Any]  # fields of config.json


def merge_weights(
    model_args: ModelArguments, base: Path, adapter_config: dict[str, Any], merge_base: str, folder: Path
) -> dict[str, Any]:
    """Write the merged weights of the model in `base` into `folder`; returns fields of config.json."""
    with open_merged(model_args, base, adapter_config, merge_base) as merged:
        save_sharded(merged.planned, merged.build, folder)
    return merged.changes


@contextmanager
def open_merged(
    model_args: ModelArguments,
    base: Path,
    adapter_config: dict[str, Any] | None,
    merge_base: str,
    dtype_out: torch.dtype | None = None,
) -> Iterator[MergedTensors]:
    """The tensors of the model in `base` with the adapter in them; without `adapter_config` as they are.

    `dtype_out`: the type they come in, else the 16-bit one that was computed in. Raises UserError at the end
    where a tensor of the adapter went nowhere.
    """
    model, dtype = build_without_weights(model_args), choose_compute_dtype(model_args)
    with ExitStack() as stack:
        stored = open_tensors(base, is_baichuan(read_json(base / "config.json")), stack)
        adapter: Any = open_adapter(model_args, stack) if adapter_config else None
        keys = list(adapter.keys()) if adapter else []
        updates, names = find_updates(keys), find_names_on_disk(model, list(stored))
        is_untied = untie_embeddings(model, updates, stored, names)
        adds_to_quantized = adapter is not None and merge_base == "dequantized"
        quantized = find_quantized_weights(model, model_args, dtype) if adds_to_quantized else set()
        if strangers := sorted(quantized - names.keys()):
            raise UserError(f"{base} holds no tensor {strangers[0]}: this architecture cannot be merged here")
        for name, parts in updates.items():
            check_fits(name, stored[names[name]] if name in names else None, parts, adapter)
        kept = {tensor.dtype for tensor in stored.values()}
        out = dtype if dtype in HALVES else torch.float16 if kept == {torch.float16} else torch.bfloat16
        in_model = {on_disk: name for name, on_disk in names.items()}
        planned = plan_tensors(stored, dtype_out or out)
        used: set[str] = set()

        def build(on_disk: str) -> torch.Tensor:
            name, weight = in_model.get(on_disk, on_disk), stored[on_disk].read()
            if isinstance(stored[on_disk], StoredCodes):
                weight = weight.to(dtype_out or dtype)  # rounded as training did
            elif name in quantized:
                # What training quantized; float32 leaves what comes out unrounded.
                weight = dequantize(weight.to(dtype).to(dtype_out or dtype), model_args)
            if name in updates:
                parts = {part: adapter.get_tensor(key) for part, key in updates[name].items()}
                weight = update_tensor(weight, parts, find_scale(name, parts, adapter_config or {}))
                used.update(updates[name].values())
            return weight.to(planned[on_disk].dtype)

        changes: dict[str, Any] = {"dtype": str(out).removeprefix("torch.")}
        changes |= {"tie_word_embeddings": False} if is_untied else {}
        yield MergedTensors(planned, build, in_model, changes)
        check_all_used(keys, used)


def open_adapter(model_args: ModelArguments, stack: ExitStack) -> Any:
    return stack.enter_context(safe_open(model_args.adapter_dir / ADAPTER_FILE, "pt"))


def plan_tensors(stored: dict[str, Stored | StoredCodes], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is written, on the meta device: the base's tensors by their names on disk, floats as `dtype`."""
    return {
        name: torch.empty(
            tensor.shape, dtype=dtype if tensor.dtype in FLOATS else tensor.dtype, device="meta"
        )
        for name, tensor in stored.items()
    }


def check_all_used(keys: Iterable[str], used: set[str]) -> None:
    """Raises UserError, naming it, for a tensor of the adapter that no merged tensor was made with."""
    left = sorted(set(keys) - used)
    if left:
        raise UserError(
            f"the adapter's tensor {left[0]} ({len(left)} of this kind) has no place in the merged model: it "
            "would be lost, so nothing is written"
        )


def untie_embeddings(
    model: "PreTrainedModel", updates: Updates, stored: dict[str, Stored | StoredCodes], names: dict[str, str]
) -> bool:
    """Give embedding and output layer a tensor each where they share one and the adapter changes either.

    PEFT leaves the other as it was. True where a tie was cut: config.json must say so.
    """
    cut = {pair for pair in model.all_tied_weights_keys.items() if updates.keys() & set(pair)}
    for target, source in cut:
        shared = stored[names[source if source in names else target]]
        for name in (target, source):
            stored.setdefault(names.setdefault(name, name), shared)
    return bool(cut)


def find_quantized_weights(
    model: "PreTrainedModel", model_args: ModelArguments, dtype: torch.dtype
) -> set[str]:
    """Names of the weights that loading in 4 or 8 bits quantizes; changes `model`, which has no memory."""
    quantization = build_quantization(model_args, dtype)
    if quantization is None:
        return set()
    AutoHfQuantizer.from_config(quantization).preprocess_model(model, device_map={"": "cpu"})
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {f"{layer}.weight" for layer, module in model.named_modules() if isinstance(module, kinds)}


def dequantize(weight: torch.Tensor, model_args: ModelArguments) -> torch.Tensor:
    """`weight` [out, in] as the quantized base computes with it."""
    if model_args.bits == 8:
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        return bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, compress_statistics=model_args.double_quant, quant_type=model_args.quant_type
    )
    return bitsandbytes.functional.dequantize_4bit(codes, state)


def find_updates(keys: Iterable[str]) -> Updates:
    """What the adapter's tensors change. Raises UserError for one of a kind that cannot be merged."""
    updates: Updates = {}
    for key in keys:
        layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if part:
            part = part.removesuffix(".weight")
            if part not in PARTS:
                raise UserError(f"the adapter's tensor {key} is of a kind that cannot be merged")
            updates.setdefault(f"{layer}.{PARTS[part]}", {})[part] = key
        else:
            updates.setdefault(layer.replace(".base_layer.", "."), {})[REPLACED] = key
    for name, parts in updates.items():
        if "B.bias" in parts:  # scaled by the rank as B is
            parts["A"] = updates[f"{name.removesuffix('.bias')}.weight"]["A"]
    return updates


def check_fits(name: str, tensor: Stored | StoredCodes | None, parts: dict[str, str], adapter: Any) -> None:
    """Raises UserError where the base has no tensor `name`, or one of another shape than the adapter's."""
    key = parts[min(parts)]
    if tensor is None:
        raise UserError(f"the adapter's tensor {key} cannot be merged: the base has no {name} to add it to")
    shapes = {part: adapter.get_slice(key).get_shape() for part, key in parts.items()}
    try:
        with torch.device("meta"):  # the merge itself, without memory
            tensors = {part: torch.empty(shape) for part, shape in shapes.items()}
            fits = list(update_tensor(torch.empty(tensor.shape), tensors, 1.0).shape) == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise UserError(
            f"the adapter's tensor {key} {shapes[min(parts)]} does not fit the base's {name} {tensor.shape}"
        )


def find_scale(name: str, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA), with PEFT's own per-layer alphas."""
    A = parts.get("A", parts.get("embedding_A"))  # [rank, in]
    if A is None:
        return 1.0
    patterns, layer = config.get("alpha_pattern") or {}, name.rpartition(".")[0]
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)),
        config["lora_alpha"],
    )
    return alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A))


def update_tensor(base: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """`base` with the adapter in it, float32; DoRA gives each row of W [out, in] the trained length."""
    parts = dict(parts)
    base = parts.pop(REPLACED, base).float()
    if "embedding_A" in parts:  # W is [vocabulary, hidden], A and B are those of its transpose
        linear = {part.removeprefix("embedding_"): tensor for part, tensor in parts.items()}
        return update_tensor(base.t(), linear, scale).t()
    if "B.bias" in parts:
        return base + scale * parts["B.bias"].float()
    if not parts:
        return base
    merged = torch.addmm(base, parts["B"].float(), parts["A"].float(), alpha=scale)
    if "magnitude_vector" in parts:
        merged *= (parts["magnitude_vector"].float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged
