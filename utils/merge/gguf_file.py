"""The merged model as one GGUF file, the format of llama.cpp and Ollama.

A GGUF file holds fields (sizes, rotary base, tokenizer, chat template), a table of its tensors, and their
data: for SmolLM2-135M 272 tensors, 271 MB in F16. Matrices are F16 or Q8_0 (32 weights as 8-bit numbers with
one scale), vectors F32. Each tensor is merged when its turn comes: memory is that of the largest.

Layouts written here are those of LLaMA and Qwen. Others go through llama.cpp's own converter, which reads the
merged folder; check_layout names that command.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
    quants,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from utils.console import UserError
from utils.merge.gguf_tokenizer import add_tokenizer
from utils.merge.weights import MergedTensors
from utils.models.tokenizer import ChatTokenizer

# model_type -> llama.cpp's name of its layout
ARCHITECTURES = {
    "llama": "llama",
    "baichuan": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
UNKNOWN_TO_LLAMA_CPP = {"opt"}
ROPE_TYPES = {"default", "linear", "llama3"}
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def check_layout(config: dict[str, Any]) -> None:
    """Raises UserError for a config.json whose model is not written here: what does write it, or why not."""
    kind = str(config.get("model_type"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    reasons = {
        f"of the kind {kind}": kind not in ARCHITECTURES,
        f"with rotary positions of the type {rope_type}": rope_type not in ROPE_TYPES,
        f"with the activation {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        "with a sliding window": has_window(config),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if kind in UNKNOWN_TO_LLAMA_CPP:
        raise UserError(
            f"a model of the kind {kind} cannot become a GGUF file: llama.cpp does not compute it"
        )
    if found:
        raise UserError(
            f"a model {found} is not written here, llama.cpp's converter does it: python -m "
            "utils.merge_adapter --checkpoint_dir RUN --output_dir MERGED; python "
            "llama.cpp/convert_hf_to_gguf.py MERGED --outfile MERGED.gguf --outtype f16"
        )


def has_window(config: dict[str, Any]) -> bool:
    return bool(config.get("sliding_window")) and config.get("use_sliding_window", True)


def save_gguf(
    merged: MergedTensors, config: Any, tokenizer: ChatTokenizer, name: str, outtype: str, path: Path
) -> None:
    """`config`: transformers' of the merged model. `outtype`: f16 or q8_0."""
    writer = GGUFWriter(path, ARCHITECTURES[config.model_type])
    kind, file_type = TYPES[outtype]
    writer.add_name(name)
    writer.add_file_type(file_type)
    if outtype == "q8_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    add_sizes(writer, config)
    rows = config.vocab_size
    add_tokenizer(writer, tokenizer, rows)
    names = name_tensors(merged, config)
    for on_disk, written in names.items():
        shape = list(merged.planned[on_disk].shape)
        stored = choose_type(shape, kind)
        writer.add_tensor_info(written, *describe_data(shape, stored))
    factors = find_rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", *describe_data(list(factors.shape), GGMLQuantizationType.F32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in build_data(merged, names, config, kind):
        writer.write_tensor_data(data)
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def add_sizes(writer: GGUFWriter, config: Any) -> None:
    head_dim = find_head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def find_head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def find_rope_factors(config: Any) -> np.ndarray | None:
    """What LLaMA 3.1 divides each rotary frequency by  # float32 [head_dim / 2]"""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_dim = find_head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled).numpy()


def name_tensors(merged: MergedTensors, config: Any) -> dict[str, str]:
    """{name on disk: name in the GGUF} of all that is written. Raises UserError for one without a place."""
    layout = {short: arch for arch, short in MODEL_ARCH_NAMES.items()}[ARCHITECTURES[config.model_type]]
    known = get_tensor_name_map(layout, config.num_hidden_layers)
    is_tied = config.tie_word_embeddings
    names = {}
    for on_disk in merged.planned:
        name = merged.in_model.get(on_disk, on_disk)
        if name.endswith("rotary_emb.inv_freq") or (is_tied and name == "lm_head.weight"):
            continue  # computed from the rotary base; the embedding itself
        written = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise UserError(f"the tensor {on_disk} has no place in a GGUF file of {config.model_type}")
        names[on_disk] = written
    return names


def choose_type(shape: list[int], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay whole; so does, in F16, a matrix whose rows are no whole blocks of 32."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % 32 else kind


def describe_data(shape: list[int], kind: GGMLQuantizationType) -> tuple[Any, ...]:
    """(shape, dtype, bytes, type) as GGUFWriter.add_tensor_info takes them."""
    if kind == GGMLQuantizationType.Q8_0:
        in_bytes = quants.quant_shape_to_byte_shape(shape, kind)
        return in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), kind
    dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    return shape, dtype, int(np.prod(shape)) * dtype.itemsize, kind


def build_data(
    merged: MergedTensors, names: dict[str, str], config: Any, kind: GGMLQuantizationType
) -> Iterator[np.ndarray]:
    """The tensors of `names`, one after another, as they are stored."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for on_disk, written in names.items():
        tensor = merged.build(on_disk)  # float32
        part = written.split(".")[-2]
        if ARCHITECTURES[config.model_type] == "llama" and part in heads:
            tensor = interleave(tensor, heads[part])
        stored = choose_type(list(tensor.shape), kind)
        data = quants.quantize(tensor.numpy(), stored)
        if stored == GGMLQuantizationType.F16 and not np.isfinite(data).all():
            raise UserError(f"{on_disk} has weights past 65,504, which F16 cannot hold: use --outtype q8_0")
        yield data


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers rows of its halves: rows 0, half, 1, ..."""
    half = len(tensor) // heads // 2
    return tensor.view(heads, 2, half, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
