"""Quantized models of known shapes from random weights, to measure on: never whole in 16 bits."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from utils.fast.streamed_layers import StreamedLayers
from utils.models.rehearsed import cut_layers


def describe_llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    vocabulary: int = 32000,
    tied: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "llama-7b": lambda: describe_llama(4096, 11008, 32, 32),
    "llama3-8b": lambda: describe_llama(4096, 14336, 32, 32, 8, 128256),
    "llama-13b": lambda: describe_llama(5120, 13824, 40, 40),
    "llama-33b": lambda: describe_llama(6656, 17920, 60, 52),
    "llama-65b": lambda: describe_llama(8192, 22016, 80, 64),
    "mistral-7b": lambda: MistralConfig(),
    "qwen2.5-7b": lambda: Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "gemma-7b": lambda: GemmaConfig(),
    "opt-6.7b": lambda: OPTConfig(
        hidden_size=4096,
        ffn_dim=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        word_embed_proj_dim=4096,
        max_position_embeddings=8192,
    ),
    "pythia-6.9b": lambda: GPTNeoXConfig(
        vocab_size=50432,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "baichuan-7b": lambda: describe_llama(4096, 11008, 32, 32, vocabulary=64000),
    "bloomz-7b": lambda: BloomConfig(hidden_size=4096, n_head=32, n_layer=30, vocab_size=250880),
    "smollm2-135m": lambda: describe_llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "tiny": lambda: describe_llama(64, 128, 2, 4, 2, 512, tied=True),
}


def build_random_model(
    config: PretrainedConfig, bits: int, dtype: torch.dtype, device: str, streams: bool = False
) -> nn.Module:
    """A frozen causal model of `config`: one layer is built and quantized at a time.

    `streams`: layers go to host memory one by one (utils/fast/streamed_layers.py).
    """
    store = StreamedLayers(torch.device(device)) if streams else None
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(cut_layers(config, 1))
            stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
            model.config.num_hidden_layers = config.num_hidden_layers
            if getattr(config, "layer_types", None):
                model.config.layer_types = config.layer_types
            for number in range(config.num_hidden_layers):
                layer = stack[0] if number == 0 else type(stack[0])(model.config, number)
                layer.apply(init_linear)
                quantize_linears(layer, bits, dtype)
                if store:
                    store.hold(layer)
                if number:
                    stack.append(layer)
    finally:
        torch.set_default_dtype(default)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    if store:
        store.bind()
        model.streamed_layers = store
    return model.requires_grad_(False)


def init_linear(module: nn.Module) -> None:
    if type(module) is nn.Linear:
        nn.init.normal_(module.weight, std=0.02)


def quantize_linears(module: nn.Module, bits: int, dtype: torch.dtype) -> None:
    """Replace every linear layer within `module`: NF4 with double quantization, or LLM.int8()."""
    for name, child in list(module.named_modules()):
        if type(child) is not nn.Linear or bits == 16:
            continue
        sizes = (child.in_features, child.out_features, child.bias is not None)
        new: Any  # Linear4bit or Linear8bitLt
        packed: Any  # Params4bit or Int8Params, whose annotations contradict torch's
        with torch.device("meta"):
            if bits == 4:
                new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        device = child.weight.device
        if bits == 4:
            packed = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
            new.weight, new.support_avx512bf16_for_cpu = packed.to(device), False
        else:
            packed = bnb.nn.Int8Params(child.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            new.weight = packed.to(device)  # bitsandbytes quantizes on the way from the CPU only
        new.bias = child.bias
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, new)


def count_linear_weights(config: PretrainedConfig) -> int:
    """Weights that every token is multiplied with, the output layer included: N of the 2N and 4N rules."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * config.num_key_value_heads)
    mlp = 3 * hidden * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + hidden * config.vocab_size
