"""A model of few layers on the meta device, as the real one is: quantized, with its adapter."""

import copy
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from transformers import AutoModelForCausalLM, PretrainedConfig

from utils.arguments import LoraArguments, ModelArguments
from utils.models.adapter import add_lora
from utils.models.base import quantize_linears

BLOCK, OUTER_BLOCK = 64, 256  # weights of a scale, and scales of one of double quantization (bitsandbytes)


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
        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                layer.weight = pack_weight(layer.weight, dtype)
            elif isinstance(layer, Linear8bitLt):
                codes = torch.empty(layer.weight.shape, dtype=torch.int8)
                layer.weight = Int8Params(codes, requires_grad=False, SCB=torch.empty(len(codes)))
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = model_args.bits == 4, model_args.bits == 8
    with torch.device("meta"):
        return add_lora(model, lora_args).train()


def pack_weight(weight: Any, dtype: torch.dtype) -> Params4bit:
    """What quantizing makes of `weight`: two codes a byte, their scales in its state."""
    scales, outer = -(-weight.numel() // BLOCK), None
    absmax = torch.empty(scales)
    if weight.compress_statistics:  # double quantization
        absmax = torch.empty(scales, dtype=torch.uint8)
        outer_absmax = torch.empty(-(-scales // OUTER_BLOCK))
        outer = QuantState(outer_absmax, None, torch.empty(256), OUTER_BLOCK, dtype=torch.float32)
    shape, kind, offset = weight.shape, weight.quant_type, torch.empty(())
    state = QuantState(absmax, shape, torch.empty(16), BLOCK, kind, dtype, offset, outer)
    options = {name: getattr(weight, name) for name in ("compress_statistics", "quant_type")}
    codes = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    return Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True, **options)


def count_weight_bytes(model: Any) -> tuple[int, int, int]:
    """Bytes of the frozen weights: (codes, their scales, all others). A shared one counts once."""
    packed = {x.weight for x in model.modules() if isinstance(x, (Linear4bit, Linear8bitLt))}
    scales = sum(x.nbytes for weight in packed for x in list_scales(weight))
    others = (x for x in model.parameters() if not x.requires_grad and x not in packed)
    return sum(x.nbytes for x in packed), scales, sum(x.nbytes for x in others)


def list_scales(weight: Any) -> list[torch.Tensor]:
    if isinstance(weight, Int8Params):
        return [weight.SCB]
    state = weight.quant_state
    return [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]
