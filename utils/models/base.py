"""The frozen base, loaded in 4, 8, 16 or 32 bits. NF4 with double quantization is QLoRA's (sections 2 and 3).

A block of 64 weights becomes 64 codes of 4 bits and one scale. With absmax the largest of them by absolute
value:

    code  = the nearest of 16 values in [-1, 1] to w / absmax       (2 codes a byte)
    w'    = value[code] * absmax                                     what a product reads

NF4's 16 values are quantiles of a normal distribution, as trained weights are nearly normal: each code is
used about equally often. FP4's are a float of 4 bits. 64 weights in 4 bits and a float32 scale are 4.5 bits a
weight; double quantization stores the scales in 8 bits, with one float32 for 256 of them: 4.127 bits a
weight.

bitsandbytes quantizes while the weights are read, so a model is never whole in 16 bits on the GPU.
Embeddings, norms and the output layer stay in 16 bits.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging

from utils.arguments import ModelArguments
from utils.console import UserError, notice, notice_once
from utils.fast.capability import has_bfloat16
from utils.fast.frozen_weights import replace_by_dense, unpack_8bit_layers
from utils.fast.rope import follow_each_batch
from utils.fast.streamed_layers import stream_layers
from utils.models.baichuan import build_llama_config, is_baichuan, load_baichuan
from utils.models.cpu import choose_cpu_dtype, keep_weights_unpacked, repacks_weights
from utils.models.folder import CONVERT, read_model_config

CUDA_CONTEXT = 820 * 2**20  # bytes that CUDA and its kernels take beside all that is allocated (H100)

# What we say ourselves in a line.
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
warnings.filterwarnings("ignore", message=r"(PiSSA|OLoRA) changes the base weights")
if not sys.stderr.isatty():
    logging.disable_progress_bar()


def choose_compute_dtype(model_args: ModelArguments) -> torch.dtype:
    """The dtype of activations and matrix products; prints what replaces a dtype that the hardware lacks."""
    asked = torch.bfloat16 if model_args.bf16 else torch.float16 if model_args.fp16 else None
    if asked is None and model_args.bits == 32:
        return torch.float32
    if has_gpu(model_args):
        if model_args.bf16 and not has_bfloat16():
            notice_once("this GPU has no bfloat16: computing in float16 with a loss scale")
        return torch.bfloat16 if has_bfloat16() and asked != torch.float16 else torch.float16
    if choose_cpu_dtype() == torch.bfloat16 and asked != torch.float16:
        return torch.bfloat16
    if asked is not None or model_args.bits == 16:
        wanted = f"--{'bf16' if model_args.bf16 else 'fp16'}" if asked else "--bits 16"
        lacking = "float16" if model_args.fp16 else "bfloat16"
        notice(f"{wanted}: this CPU has no fast {lacking}, float32 is used instead")
    return torch.float32


def has_gpu(model_args: ModelArguments) -> bool:
    return torch.cuda.is_available() and not model_args.use_cpu


def load_base(
    model_args: ModelArguments, dtype: torch.dtype, trainable: bool = True, streams: bool = False
) -> PreTrainedModel:
    """The base model in 4, 8, 16 or 32 bits, frozen unless all of it is trained.

    `trainable`: gradients will flow through it; a process that only chats has faster ways on a CPU.
    `streams`: its quantized layers stay in host memory (fast/streamed_layers.py).
    """
    config = read_model_config(model_args)
    report_experts(model_args, config)
    is_stored = "quantization_config" in config  # in bits that model_args know (stored_quantized.py)
    options: dict[str, Any] = {
        "dtype": choose_weight_dtype(model_args, dtype),
        "use_safetensors": None if model_args.allow_pickle else True,
    }
    if not is_stored:
        options["quantization_config"] = build_quantization(model_args, dtype)
    placement = choose_placement(model_args)
    options |= model_args.where | placement
    if placement["device_map"] != "auto":  # else accelerate keeps to the cap, layer by layer
        cap_memory(model_args, placement["device_map"][""])
    if streams:
        options["device_map"] = {"": "cpu"}
    name = model_args.base
    with unknown_models_explained(model_args):
        if is_baichuan(config):
            model = load_baichuan(name, config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=model_args.trust_remote_code, **options
            )
    if is_stored:
        compute_in(model, dtype)
    if model_args.bits == 8:
        unpack_8bit_layers(model)  # bitsandbytes' own product rounds the input to 8 bits, too
    # On a CPU bitsandbytes may repack 4-bit weights, which no gradient survives; a chat without that layout
    # unpacks them once and not for each token (cpu.py).
    if trainable or not repacks_weights(model, dtype):
        keep_weights_unpacked(model)
        if not trainable and not has_gpu(model_args):
            replace_by_dense(model, dtype)
    if streams:
        device = torch.device(placement["device_map"][""])
        stream_layers(model, device)
        model.hf_device_map = placement["device_map"]  # where accelerate is to believe it is
    follow_each_batch(model)  # rotary frequencies by the rows at hand (fast/rope.py)
    model.requires_grad_(model_args.full_finetune)
    return model


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let the loaded layers unpack and multiply in `dtype`, whatever the checkpoint's maker computed in.

    What is not quantized is loaded as it is stored, and brought to `dtype` here.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            weight: Any = layer.weight
            weight.quant_state.dtype = layer.compute_dtype = dtype
            layer.compute_type_is_set = True
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def load_config(model_args: ModelArguments) -> PretrainedConfig:
    """transformers' config of the model that base.py loads."""
    config = read_model_config(model_args)
    if is_baichuan(config):
        return build_llama_config(config)
    with unknown_models_explained(model_args):
        return AutoConfig.from_pretrained(
            model_args.base, trust_remote_code=model_args.trust_remote_code, **model_args.where
        )


def build_without_weights(model_args: ModelArguments) -> PreTrainedModel:
    """The model's modules on the meta device."""
    config = load_config(model_args)
    with unknown_models_explained(model_args), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code)


def report_experts(model_args: ModelArguments, config: dict[str, Any]) -> None:
    """Say what the experts of a mixture cost: bitsandbytes quantizes linear layers, and they are none.

    transformers keeps the experts of a layer in one tensor  # [experts, out, in]
    """
    bits, values = model_args.bits, config.get("text_config", config)
    is_mixture = any("expert" in name and value for name, value in values.items())
    if bits not in (4, 8) or not is_mixture or ("auto_map" in config and model_args.trust_remote_code):
        return
    weights = list(build_without_weights(model_args).parameters())
    total, experts = (sum(weight.numel() for weight in weights if weight.ndim > least) for least in (0, 2))
    if experts:
        share, memory = experts / total, experts * 2 / 2**30
        notice(
            f"a mixture of experts: {share:.0%} of {total:,} weights are theirs, and stay in 16 bits, "
            f"{memory:,.2f} GiB, {16 // bits} times what layers take at --bits {bits}"
        )


@contextmanager
def unknown_models_explained(model_args: ModelArguments) -> Iterator[None]:
    """One line where the publisher's code is needed, the kind is unknown, or there are no safetensors."""
    what = f"--model_name_or_path {model_args.model_name_or_path}"
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            advice = "runs Python code of its publisher: read it there, then add --trust_remote_code"
        elif "does not recognize this architecture" in str(error):
            advice = "is of a kind that transformers does not know: a newer version may"
        elif isinstance(error, OSError) and "safetensors" in str(error):
            advice = f"has no safetensors on the hub: {CONVERT}"
        else:
            raise
        raise UserError(f"{what} {advice}") from error


def choose_weight_dtype(model_args: ModelArguments, dtype: torch.dtype) -> torch.dtype:
    """Of the weights that are not quantized. float16 itself cannot be trained: a loss scale needs float32."""
    if model_args.bits == 32 or (model_args.full_finetune and dtype == torch.float16):
        return torch.float32
    return dtype


def quantize_linears(model: Any, model_args: ModelArguments, dtype: torch.dtype) -> None:
    """Every linear layer but the output layer, as from_pretrained does it; the new ones have no weights."""
    if quantization := build_quantization(model_args, dtype):
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)


def build_quantization(model_args: ModelArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantization is QLoRA's (sections 2 and 3); int8 LLM.int8()'s (arXiv 2208.07339)."""
    if model_args.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model_args.quant_type,
            bnb_4bit_use_double_quant=model_args.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.bits == 8 else None


def choose_placement(model_args: ModelArguments) -> dict[str, Any]:
    """device_map and max_memory: this process's GPU; several GPUs under plain python share the layers."""
    if not has_gpu(model_args):
        return {"device_map": {"": "cpu"}}
    if "LOCAL_RANK" in os.environ:
        return {"device_map": {"": int(os.environ["LOCAL_RANK"])}}
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return {"device_map": {"": 0}}
    notice(
        f"one process, {gpus} GPUs: the layers are spread over them and the batch flags are global; "
        "`accelerate launch` trains one copy on each instead"
    )
    caps = {"max_memory": dict.fromkeys(range(gpus), f"{model_args.max_memory_MB}MB")}
    return {"device_map": "auto"} | (caps if model_args.max_memory_MB else {})


def cap_memory(model_args: ModelArguments, device: int | str) -> None:
    """Let this process take no more than --max_memory_MB on the GPU `device`, CUDA's own context counted.

    Raises UserError where that leaves nothing, or more than there is.
    """
    megabytes = model_args.max_memory_MB
    if megabytes is None or device == "cpu":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = megabytes * 10**6 - CUDA_CONTEXT
    if allowed <= 0 or allowed > total:
        raise UserError(
            f"--max_memory_MB {megabytes}: use more than {CUDA_CONTEXT // 10**6}, which CUDA takes itself, "
            f"and at most {total // 10**6}, which this GPU has"
        )
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
