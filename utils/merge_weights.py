"""The arithmetic of a merge, tensor by tensor: W + s BA, where W is what the adapter was trained on."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from utils.arguments import ModelArguments
from utils.checks import ADAPTER_FILE, read_json
from utils.console import UserError
from utils.model import build_quantization, choose_compute_dtype
from utils.shards import Entry, save_shards

FLOATS = {"F64", "F32", "F16", "BF16"}
HALVES = {torch.float16: "F16", torch.bfloat16: "BF16"}
WHOLE = "whole"  # a bias, or a module that was trained itself


def merge_weights(
    model_args: ModelArguments, base: Path, adapter_config: dict[str, Any], merge_base: str, folder: Path
) -> str:
    """Write the merged weights of the model in `base` into `folder`; returns the name of their dtype."""
    dtype = choose_compute_dtype(model_args)
    quantized = find_quantized_weights(model_args, dtype) if merge_base == "dequantized" else set()
    with ExitStack() as stack:
        stored = dict(open_tensors(base, stack))
        adapter = stack.enter_context(safe_open(Path(model_args.checkpoint_dir, ADAPTER_FILE), "pt"))
        updates = find_updates(list(adapter.keys()))
        strangers = sorted((quantized | updates.keys()) - stored.keys())
        if strangers:
            raise UserError(f"{base} holds no tensor {strangers[0]}: this architecture cannot be merged here")
        kept = {file.get_slice(name).get_dtype() for name, file in stored.items()}
        out = dtype if dtype in HALVES else torch.float16 if kept == {"F16"} else torch.bfloat16
        entries = []
        for name, file in stored.items():
            tensor = file.get_slice(name)
            kind = HALVES[out] if tensor.get_dtype() in FLOATS else tensor.get_dtype()
            entries.append(Entry(name, kind, tensor.get_shape()))

        def build(entry: Entry) -> torch.Tensor:
            weight = stored[entry.name].get_tensor(entry.name)
            if entry.name in quantized:
                weight = dequantize(weight.to(dtype), model_args)
            if entry.name in updates:
                parts = {part: adapter.get_tensor(key) for part, key in updates[entry.name].items()}
                scale = find_scale(entry.name.removesuffix(".weight"), parts, adapter_config)
                weight = update_weight(weight, parts, scale)
            return weight.to(out) if entry.dtype == HALVES[out] else weight

        save_shards(entries, build, folder)
    return str(out).removeprefix("torch.")


def open_tensors(base: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    """(name, open file) of each tensor of the model, memory-mapped: nothing is read yet."""
    index = base / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in files:
        if not (base / name).is_file():
            raise UserError(f"{base} holds no {name}: download the model again, as safetensors")
        file = stack.enter_context(safe_open(base / name, "pt"))
        yield from ((tensor, file) for tensor in file.keys())


def find_quantized_weights(model_args: ModelArguments, dtype: torch.dtype) -> set[str]:
    """Names of the weights that loading in 4 or 8 bits quantizes, from a model without memory."""
    quantization = build_quantization(model_args, dtype)
    if quantization is None:
        return set()
    name, trusted = model_args.model_name_or_path, {"trust_remote_code": model_args.trust_remote_code}
    where = {"revision": model_args.revision, "cache_dir": model_args.cache_dir}
    config = AutoConfig.from_pretrained(name, **trusted, **where)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trusted)
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


def find_updates(keys: list[str]) -> dict[str, dict[str, str]]:
    """Of the adapter's tensors: {base tensor: {part: adapter tensor}}; parts: A, B, magnitude, whole."""
    updates: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if part:
            kind = part.removesuffix(".weight").removesuffix("_vector")
            if kind not in ("A", "B", "magnitude"):
                raise UserError(f"the adapter's tensor {key} is of a kind that cannot be merged")
            updates.setdefault(f"{name}.weight", {})[kind] = key
        else:
            updates[name.replace(".base_layer.", ".")] = {WHOLE: key}
    return updates


def find_scale(layer: str, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA), with PEFT's own per-layer alphas."""
    if WHOLE in parts:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)),
        config["lora_alpha"],
    )
    rank = parts["A"].shape[0]
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def update_weight(weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """`weight` [out, in] with the adapter in it, float32; DoRA gives each row the trained length."""
    if WHOLE in parts:
        return parts[WHOLE]
    merged = torch.addmm(weight.float(), parts["B"].float(), parts["A"].float(), alpha=scale)
    if "magnitude" in parts:
        merged *= (parts["magnitude"].float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged
