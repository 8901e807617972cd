"""What a model replies by, put together: kernels for its 4-bit layers, whole steps, captured graphs."""

import functools
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from utils.console import notice
from utils.fast.cuda_c import find_kernel_obstacle
from utils.fast.decode_layers import find_kernel_fault, install_decode_layers
from utils.fast.decode_model import WholeStep, find_whole_obstacle
from utils.fast.graph_decode import GraphDecoder
from utils.fast.packed_product import Kernels


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
    whole = None
    if kernels and groups and find_whole_obstacle(base, groups) is None:
        whole = WholeStep(base, kernels, groups)
    decoder = GraphDecoder(base, whole)

    @functools.wraps(base.forward)  # generate reads its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return decoder.forward(*args, **kwargs)

    base.forward = forward
    return decoder


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
    return None if kinds <= {DynamicLayer} else "its cache keeps a window of the latest tokens, not all"
