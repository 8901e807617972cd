"""A prompt is read by a LLaMA-like model: 40 launches a layer, where transformers and PEFT make 150.

A prompt of 512 tokens is 7 TFLOP for a 7B model and 13 GB of unpacked weights: 25 ms of an H100. Through the
model's own modules the GPU waits for Python four times as long. Here the layers of one input are unpacked
into one matrix, by the kernel of training, and multiplied at once; keys and values go where they are kept.
"""

from typing import Any

import torch
from torch.nn import functional as F

from utils.decode.model import WholeLayer, WholeStep
from utils.decode.packed_product import PackedGroup
from utils.fast.frozen_weights import read_weight
from utils.fast.graph_capture import round_to_power

Pair = tuple[torch.Tensor, torch.Tensor]


class PromptReader:
    def __init__(self, whole: WholeStep):
        self.whole = whole
        self.rotations: Pair | None = None

    def read(self, ids: torch.Tensor, caches: list[Pair], past: int) -> torch.Tensor:
        """Logits  # [1, vocabulary] of the last of `ids`  # [tokens]

        Their keys and values are written behind the first `past` in `caches`, of each layer keys and values
        # [1, kv_heads, room, head size]
        """
        whole, end = self.whole, past + len(ids)
        cos, sin = (part[past:end] for part in self.find_rotations(end))
        masks = {layer.window: find_seen(past, end, layer.window, ids.device) for layer in whole.layers}
        hidden = F.embedding(ids, whole.embedding)
        for layer, (keys, values) in zip(whole.layers, caches, strict=True):
            x = normalize(hidden, layer.norms[0])
            q = self.write_heads(layer, self.multiply(layer.qkv, x), (cos, sin), keys, values, past)
            attended = attend(layer, q, keys[:, :, :end], values[:, :, :end], masks[layer.window])
            hidden += self.multiply(layer.out, attended)
            gate, up = self.multiply(layer.gate_up, normalize(hidden, layer.norms[1])).chunk(2, -1)
            hidden += self.multiply(layer.down, F.silu(gate) * up)
        return F.linear(normalize(hidden[-1:], whole.norm), whole.head)

    def read_into(self, cache: Any, ids: torch.Tensor) -> torch.Tensor:
        """As `read`; keys and values go behind those of a DynamicCache, whose layers get new tensors."""
        past, shape = cache.get_seq_length(), self.whole.layers[0].shape
        pairs = []
        for layer in cache.layers:
            keys, values = (
                self.whole.embedding.new_empty(1, shape.kv_heads, past + len(ids), shape.size) for _ in "kv"
            )
            if past:
                keys[:, :, :past], values[:, :, :past] = layer.keys, layer.values
            pairs.append((keys, values))
        logits = self.read(ids, pairs, past)
        for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return logits

    def find_rotations(self, length: int) -> Pair:
        if self.rotations is None or len(self.rotations[0]) < length:
            self.rotations = self.whole.prepare_rotations(round_to_power(length, 1024))
        return self.rotations

    def multiply(self, group: PackedGroup, x: torch.Tensor) -> torch.Tensor:
        """y of all layers of the group  # [tokens, out of all]"""
        weight = x.new_empty(sum(group.sizes), group.width)
        for base, rows in zip(group.bases, weight.split(group.sizes), strict=True):
            read_weight(base, x.dtype, rows)
        y = x @ weight.t()
        for part, bias in zip(y.split(group.sizes, 1), group.biases, strict=True):
            if bias is not None:
                part += bias
        if group.is_on:
            xa = (x @ group.A.t()).split(group.ranks, 1)
            for part, own, B in zip(y.split(group.sizes, 1), xa, group.B, strict=True):
                part.addmm_(own, B.t())
        return y

    def write_heads(
        self, layer: WholeLayer, qkv: torch.Tensor, rotations: Pair, keys: Any, values: Any, past: int
    ) -> torch.Tensor:
        """Queries, rotated  # [1, heads, tokens, head size]; keys and values are in their places then."""
        shape, tokens = layer.shape, len(qkv)
        heads = qkv.view(tokens, -1, shape.size).transpose(0, 1)[None]
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        if layer.head_norms[0] is not None:
            norms: Any = layer.head_norms
            q, k = normalize(q, (norms[0], shape.epsilon)), normalize(k, (norms[1], shape.epsilon))
        both = torch.cat([q, k], 1)
        low, high = both.chunk(2, -1)
        both = both * rotations[0] + torch.cat([-high, low], -1) * rotations[1]
        keys[:, :, past : past + tokens], values[:, :, past : past + tokens] = both[:, shape.heads :], v
        return both[:, : shape.heads]


def find_seen(past: int, end: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Which of all tokens each new one sees  # [tokens, end]; None: those before it and itself."""
    if past == 0 and not 0 < window < end:
        return None
    places = torch.arange(end, device=device)
    seen = places <= places[past:, None]
    return seen & (places > places[past:, None] - window) if window else seen


def normalize(x: torch.Tensor, norm: tuple[torch.Tensor, float]) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], *norm)


def attend(
    layer: WholeLayer, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None
) -> torch.Tensor:
    """[tokens, heads * head size]; `seen` None: each token sees those before it."""
    group = layer.shape.group
    if group > 1:
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=seen, is_causal=seen is None, scale=layer.shape.scale
    )
    return out[0].transpose(0, 1).reshape(q.shape[2], -1)
