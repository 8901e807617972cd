"""What a model replies by, put together: kernels for its 4-bit layers, whole steps, captured graphs."""

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from utils.console import notice
from utils.decode.cuda_c import KernelError, find_kernel_obstacle
from utils.decode.graph import GraphDecoder
from utils.decode.growing_cache import GrowingCache, keep_all
from utils.decode.layers import find_kernel_fault, install_decode_layers
from utils.decode.model import WholeStep, find_whole_obstacle
from utils.decode.packed_product import Kernels, PackedGroup
from utils.decode.prompt_reader import PromptReader
from utils.fast.trials import describe_distance, draw_tokens

TRIED = 16  # tokens of a prompt, before the first reply


def install_graph_decode(model: nn.Module) -> GraphDecoder | None:
    """Let `model.generate` replay its steps of one token; None where that cannot be, and a line says why."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    obstacle = find_decode_obstacle(base)
    kernels, groups = None, {}
    if len({weight.device for weight in base.parameters()}) == 1:
        kernels = build_kernels(base)
        groups = install_decode_layers(base, base.dtype, kernels)
    if obstacle:
        notice(f"replies: without CUDA graphs ({obstacle})")
        return None
    whole = build_whole(base, kernels, groups) if kernels else None
    decoder = GraphDecoder(base, whole, build_reader(base, whole) if whole else None)

    @functools.wraps(base.forward)  # generate reads its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return decoder.forward(*args, **kwargs)

    base.forward = forward
    return decoder


def build_whole(
    base: PreTrainedModel, kernels: Kernels, groups: dict[nn.Module, PackedGroup]
) -> WholeStep | None:
    obstacle = find_whole_obstacle(base, groups)
    if obstacle is None:
        try:
            whole = WholeStep(base, kernels, groups)
            whole.compile_ahead()
            return whole
        except KernelError as error:
            obstacle = str(error)
    notice(f"replies: steps of the model's own modules ({obstacle})")
    return None


def build_reader(base: PreTrainedModel, whole: WholeStep) -> PromptReader | None:
    """None where it reads otherwise than the model's own forward, and a line says so."""
    reader = PromptReader(whole)
    fault = find_reader_fault(base, reader)
    if fault:
        notice(f"replies: prompts by the model's own forward (the other way gives {fault})")
    return None if fault else reader


@torch.no_grad()
def find_reader_fault(base: Any, reader: PromptReader) -> str | None:
    """Logits, keys and values of the first layers, by both ways: they may differ by rounding alone."""
    whole, shape = reader.whole, reader.whole.layers[0].shape
    ids, cache = draw_tokens(base, 1, TRIED), DynamicCache(config=keep_all(base.config))
    with whole.shallow(base):
        expected = base(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        like = whole.embedding.new_empty(1, shape.kv_heads, TRIED, shape.size)
        pairs = [(torch.empty_like(like), torch.empty_like(like)) for _ in whole.layers]
        found = reader.read(ids[0], pairs, 0)
    own: GrowingCache = cache.layers[len(pairs) - 1]
    keys, values = pairs[-1]
    return describe_distance(
        {"logits": (found, expected), "keys": (keys, own.keys), "values": (values, own.values)}
    )


def build_kernels(base: PreTrainedModel) -> Kernels | None:
    """The kernels for this model's 4-bit layers; None where there are none, or where a line says why not."""
    if base.device.type != "cuda" or not getattr(base, "is_loaded_in_4bit", False):
        return None
    obstacle = find_kernel_obstacle()
    kernels = Kernels(base.device, base.dtype)
    fault = obstacle or find_kernel_fault(base, base.dtype, kernels)
    if fault:
        notice(f"replies: by bitsandbytes' products ({fault})")
    return None if fault else kernels


def find_decode_obstacle(base: PreTrainedModel) -> str | None:
    """Why replies of this model are not captured; None if that can be tried."""
    if len({weight.device for weight in base.parameters()}) > 1:
        return "the model is spread over several devices"
    if not getattr(base, "_can_compile_fullgraph", False):
        return f"{type(base).__name__} takes no cache of fixed size"
    kinds = {type(layer) for layer in DynamicCache(config=base.config.get_text_config()).layers}
    return None if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else "its cache is of another kind"
