"""Replies on a GPU: the forward pass of one token as a CUDA graph, which costs the CPU a single launch.

A 7B model with an adapter launches some 2,000 kernels a token, and the GPU waits for most of them. Of PEFT's
seven a layer for the adapter two are left.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from utils.console import notice
from utils.fast.graph_capture import CaptureError, capture_graph, round_to_power
from utils.fast.lora import ADAPTER
from utils.fast.lora_layers import find_obstacle

SMALLEST_CAPACITY = 1024  # tokens
PLAIN_FLAGS = {"use_cache", "return_dict", "logits_to_keep"}  # of a step that is asked for logits only
MAX_DIFFERENCE = 0.05  # of the logits, relative: attention over a longer buffer rounds otherwise


def install_graph_decode(model: torch.nn.Module) -> "GraphDecoder | None":
    """Let `model.generate` replay its steps of one token; None where that cannot be, and a line says why."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    obstacle = find_decode_obstacle(base)
    if obstacle:
        notice(f"replies: without CUDA graphs ({obstacle})")
        return None
    shorten_adapters(base, base.dtype)
    decoder = GraphDecoder(base)

    @functools.wraps(base.forward)  # generate reads its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return decoder.forward(*args, **kwargs)

    base.forward = forward
    return decoder


def find_decode_obstacle(base: torch.nn.Module) -> str | None:
    """Why replies of this model are not captured; None if that can be tried."""
    if len({weight.device for weight in base.parameters()}) > 1:
        return "the model is spread over several devices"
    if not getattr(base, "_can_compile_fullgraph", False):
        return f"{type(base).__name__} takes no cache of fixed size"
    kinds = {type(layer) for layer in DynamicCache(config=base.config.get_text_config()).layers}
    return None if kinds <= {DynamicLayer} else "its cache keeps a window of the latest tokens, not all"


def shorten_adapters(base: torch.nn.Module, dtype: torch.dtype) -> None:
    """y + (x A') (s B)' for PEFT's y + s ((x A') B'), in the base's dtype, as the fast path trains it."""
    for layer in base.modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), torch.nn.Linear):
            continue
        if find_obstacle(layer, layer.get_base_layer().weight.dtype) is None:
            A, B = (part[ADAPTER].weight.detach() for part in (layer.lora_A, layer.lora_B))
            A, B = A.to(dtype), (B * layer.scaling[ADAPTER]).to(dtype)
            layer.forward = functools.partial(forward_adapted, layer, A, B, layer.forward)


def forward_adapted(
    layer: LoraLayer, A: torch.Tensor, B: torch.Tensor, plain: Callable, x: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    if layer.disable_adapters or x.dtype != A.dtype or torch.is_grad_enabled() or kwargs:
        return plain(x, **kwargs)
    y = layer.get_base_layer()(x)  # [..., out]
    return y.flatten(0, -2).addmm_(F.linear(x, A).flatten(0, -2), B.t()).view(y.shape)


class GraphDecoder:
    """The forward of a causal language model: one token after a DynamicCache is replayed, all else is plain.

    Keys and values of the conversation under way lie in buffers of fixed size, and the layers of its
    DynamicCache are views of them: it can be cropped, kept and read as ever. A conversation that another one
    displaces gets copies of its own. On a CPU the same steps run without a graph.
    """

    def __init__(self, base: torch.nn.Module):
        self.plain, self.config = base.forward, base.config.get_text_config()
        self.adapted = next((module for module in base.modules() if isinstance(module, BaseTunerLayer)), None)
        self.ids = torch.zeros(1, 1, dtype=torch.long, device=base.device)
        self.stream = torch.cuda.Stream() if base.device.type == "cuda" else None
        self.buffers, self.capacity = None, 0  # a StaticCache and the tokens that it has room for
        self.length = 0  # tokens that it holds
        self.owner = lambda: None  # weak reference to the DynamicCache that the buffers belong to
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}  # by: adapter on -> logits
        self.obstacle, self.tried = None, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args or self.obstacle or torch.is_grad_enabled() or not is_next_token(**kwargs):
            return self.plain(*args, **kwargs)
        input_ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
        length = cache.get_seq_length()
        try:
            if not self.tried:
                self.try_out(input_ids, cache)
            logits = self.step(input_ids, cache)
        except (CaptureError, torch.OutOfMemoryError) as error:
            self.give_up(str(error).splitlines()[0])
            crop_cache(cache, length)
            return self.plain(*args, **kwargs)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def give_up(self, obstacle: str) -> None:
        notice(f"replies: without CUDA graphs ({obstacle})")
        self.obstacle = obstacle
        # A cache that lies in the buffers may stay there: nothing else is written to them any more.
        self.owner, self.buffers, self.graphs = lambda: None, None, {}

    def try_out(self, input_ids: torch.Tensor, cache: DynamicCache) -> None:
        """Raises CaptureError where the buffers give other logits for this token than the growing cache."""
        length = cache.get_seq_length()
        expected = self.plain(input_ids=input_ids, past_key_values=cache, use_cache=True).logits.float()
        crop_cache(cache, length)
        self.load(cache, length)
        self.ids.copy_(input_ids)
        try:
            logits = self.run().float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the model's own code, which may take the cache for one that grows
            raise CaptureError(f"a cache of fixed size: {error}") from error
        self.set_length(length)
        if (logits - expected).norm() > MAX_DIFFERENCE * expected.norm():
            raise CaptureError("a cache of fixed size gives other logits")
        self.tried = True

    def step(self, input_ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits of the next token  # [1, 1, vocabulary]; `cache` grows by this one."""
        length = cache.get_seq_length()
        if self.owner() is not cache or not self.is_view(cache) or length >= self.capacity:
            self.load(cache, length)
        elif length != self.length:  # cropped since
            self.set_length(length)
        self.ids.copy_(input_ids)
        tuned = self.adapted is None or not self.adapted.disable_adapters
        if self.stream is None:
            logits = self.run()
        elif tuned in self.graphs:
            graph, logits = self.graphs[tuned]
            graph.replay()
        else:
            logits = self.capture(tuned)
        self.length = length + 1
        for layer, buffer in zip(cache.layers, self.buffers.layers, strict=True):
            layer.keys, layer.values = buffer.keys[:, :, : self.length], buffer.values[:, :, : self.length]
        return logits

    def run(self) -> torch.Tensor:
        return self.plain(input_ids=self.ids, past_key_values=self.buffers, use_cache=True).logits

    def capture(self, tuned: bool) -> torch.Tensor:
        """This step, run eagerly, which warms up every kernel; the following ones are captured after it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            logits = self.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        try:
            self.graphs[tuned] = capture_graph(self.run, self.stream, self.ids.device)
        except CaptureError:
            self.set_length(self.length)  # the step is repeated by the plain forward
            raise
        return logits

    def load(self, cache: DynamicCache, length: int) -> None:
        """Copy the first `length` keys and values of `cache` into the buffers.

        New buffers are made where the old ones are too small. They are also made where the old ones are four
        times too large and nobody's conversation lies there any more: attention reads a buffer to its end.
        """
        wanted = round_to_power(length + 1, SMALLEST_CAPACITY)
        is_too_large = self.owner() is None and 4 * wanted <= self.capacity
        self.release()
        if length >= self.capacity or is_too_large:
            self.buffers, self.graphs = None, {}  # the old ones go first
            self.buffers = StaticCache(config=self.config, max_cache_len=wanted)
            self.capacity = wanted
            for layer, buffer in zip(cache.layers, self.buffers.layers, strict=True):
                buffer.lazy_initialization(layer.keys, layer.values)
        for layer, buffer in zip(cache.layers, self.buffers.layers, strict=True):
            buffer.keys[:, :, :length].copy_(layer.keys)
            buffer.values[:, :, :length].copy_(layer.values)
        self.owner = weakref.ref(cache)
        self.set_length(length)

    def release(self) -> None:
        """Copies of its own for the conversation that the buffers belong to."""
        cache = self.owner()
        if cache is not None and self.is_view(cache):
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        self.owner = lambda: None

    def is_view(self, cache: DynamicCache) -> bool:
        """Whether the layers of `cache` still lie in the buffers: reading a prompt moves them out."""
        return cache.layers[0].keys.data_ptr() == self.buffers.layers[0].keys.data_ptr()

    def set_length(self, length: int) -> None:
        self.length = length
        for buffer in self.buffers.layers:
            buffer.cumulative_length.fill_(length)


def crop_cache(cache: DynamicCache, length: int) -> None:
    """Leave `length` tokens in every layer, also where a step broke off between two of them."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


def is_next_token(
    input_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> bool:
    """Whether this is one token of one conversation behind a cache that holds all tokens before it.

    All of them seen: a prompt padded on the left has some that are not. And logits are all that is asked for.
    """
    cache, more = past_key_values, [value for name, value in others.items() if name not in PLAIN_FLAGS]
    return (
        input_ids is not None
        and input_ids.shape == (1, 1)
        and isinstance(cache, DynamicCache)
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and cache.get_seq_length() > 0
        and (attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all())))
        and (position_ids is None or position_ids.flatten().tolist() == [cache.get_seq_length()])
        and all(value is None or value is False for value in more)
    )
