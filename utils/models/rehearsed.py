"""A model of few layers on the meta device, as the real one is: quantized, with its adapter."""

import copy
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, PretrainedConfig

from utils.arguments import LoraArguments, ModelArguments
from utils.models.adapter import add_lora
from utils.models.base import quantize_linears

# Of a 4-bit weight's scale, without and with double quantization (base.py).
SCALE_BYTES = (4 / 64, 1 / 64 + 4 / (64 * 256))


def cut_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of `config` with so many layers."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # of a model that is loaded
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def build_rehearsed(
    config: PretrainedConfig,
    layers: int,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    dtype: torch.dtype,
) -> Any:
    """The PeftModel of base.py and adapter.py with `layers` layers, without data."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(cut_layers(config, layers), dtype=dtype)
        quantize_linears(model, model_args, dtype)
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = model_args.bits == 4, model_args.bits == 8
    with torch.device("meta"):
        return add_lora(model, lora_args).train()


def count_weight_bytes(model: Any, model_args: ModelArguments) -> tuple[int, int, int]:
    """Bytes of the frozen weights: (codes, their scales, all others). A shared one counts once."""
    layers = [layer for layer in model.modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]
    packed = {layer.weight for layer in layers}
    weights = sum(weight.numel() for weight in packed)
    if model_args.bits == 8:
        codes, scales = weights, 4 * sum(len(weight) for weight in packed)
    else:
        codes, scales = weights // 2, round(weights * SCALE_BYTES[model_args.double_quant])
    others = [x for x in model.parameters() if not x.requires_grad and x not in packed]
    return codes, scales, sum(x.numel() * x.element_size() for x in others)
