"""A prompt is read by a LLaMA-like model: 40 launches a layer, where transformers and PEFT make 150.

A prompt of 512 tokens is 7 TFLOP for a 7B model and 13 GB of unpacked weights: 25 ms of an H100. Through the
model's own modules the GPU waits for Python four times as long. Here the layers of one input are unpacked
into one matrix, by the kernel of training, and multiplied at once; keys and values go where they are kept.

Even so Python takes 60 ms. So what begins a conversation is filled up to 128, 256, ... tokens and read by
CUDA graphs of that size; no token sees those behind it. What comes later in a conversation is read eagerly.
Both have pauses between groups of layers, in which others are given their next tokens (slots.py).
"""

import math
from collections.abc import Generator
from typing import Any

import torch
from torch.nn import functional as F

from utils.console import notice
from utils.decode.loop import READ_TOGETHER, finish
from utils.decode.model import WholeLayer, WholeStep
from utils.decode.packed_product import PackedGroup
from utils.fast.frozen_weights import read_weight
from utils.fast.graph_capture import CaptureError, capture_graph, round_to_power

Pair = tuple[torch.Tensor, torch.Tensor]
SIZE_UNIT = 128  # tokens: the graphs' sizes are its multiples
PARTS = 8  # at most, groups of layers


class PromptReader:
    def __init__(self, whole: WholeStep):
        self.whole, self.depth = whole, len(whole.layers)
        self.first_rotations = whole.prepare_rotations(READ_TOGETHER)  # which the graphs read
        self.rotations = self.first_rotations
        self.pages = self.make_pages()
        self.reading: Any = None  # whose tokens lie on the pages, which share their memory
        self.graphs: dict[tuple[int, bool, int], torch.cuda.CUDAGraph] = {}
        self.stream = torch.cuda.Stream() if whole.embedding.is_cuda else None
        self.pool: Any = torch.cuda.graph_pool_handle() if self.stream else None

    @property
    def parts(self) -> int:
        return min(PARTS, len(self.whole.layers))

    def make_pages(self) -> "list[Page]":
        """One of each size, the smallest first, over the same memory; none where there is too little."""
        try:
            room = PageRoom(self.whole)
        except torch.OutOfMemoryError:
            notice("replies: prompts without CUDA graphs (too little memory)")
            return []
        return [Page(room, size) for size in range(SIZE_UNIT, READ_TOGETHER + 1, SIZE_UNIT)]

    def read(self, ids: torch.Tensor, caches: list[Pair], past: int) -> torch.Tensor:
        """Logits  # [1, vocabulary] of the last of `ids`  # [tokens]

        Their keys and values are written behind the first `past` in `caches`, of each layer keys and values
        # [1, kv_heads, room, head size]
        """
        return finish(self.read_in_parts(ids, caches, past))

    def read_in_parts(
        self, ids: torch.Tensor, caches: list[Pair], past: int
    ) -> Generator[None, None, torch.Tensor]:
        """As `read`, with a pause between parts; one prompt at a time."""
        page = next((page for page in self.pages if len(page.ids) >= len(ids)), None)
        if past or page is None:
            hidden = F.embedding(ids, self.whole.embedding)
            for part in range(self.parts):
                if part:
                    yield
                self.run_layers(part, hidden, caches, past)
            return self.find_logits(hidden[-1:])
        page.write(ids)
        self.reading = mine = object()
        for part in range(self.parts):
            if part:
                yield
            if self.reading is not mine:
                raise RuntimeError("two prompts were read at a time")
            self.replay(page, part)
        page.copy_out(caches, len(ids))
        return page.logits.clone()

    def replay(self, page: "Page", part: int) -> None:
        """The next part of what is on the page; what is shallow, at a trial, is not captured."""
        is_on = any(group.is_on for layer in self.whole.layers for group in layer.groups)
        key = (len(page.ids), is_on, part)
        if self.stream is None or len(self.whole.layers) < self.depth:
            self.turn(page, part)
        elif key in self.graphs:
            self.graphs[key].replay()
        else:
            self.capture(key, page, self.stream)

    def capture(self, key: tuple[int, bool, int], page: "Page", stream: torch.cuda.Stream) -> None:
        """This part, run eagerly, which warms up every kernel; the following ones are captured after it."""
        part = key[-1]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.turn(page, part)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            self.graphs[key], _ = capture_graph(
                lambda: self.turn(page, part), stream, page.ids.device, self.pool
            )
        except (CaptureError, torch.OutOfMemoryError) as error:
            notice(f"replies: prompts without CUDA graphs ({str(error).splitlines()[0]})")
            self.stream = None

    def turn(self, page: "Page", part: int) -> None:
        if part == 0:
            page.hidden.copy_(F.embedding(page.ids, self.whole.embedding))
        self.run_layers(part, page.hidden, page.caches[: len(self.whole.layers)], 0)
        if part == self.parts - 1:
            page.logits.copy_(self.find_logits(page.hidden.index_select(0, page.last)))

    def run_layers(self, part: int, hidden: torch.Tensor, caches: list[Pair], past: int) -> None:
        """`hidden`  # [tokens, hidden_size] becomes what it is behind the layers of this part."""
        layers, end = self.whole.layers, past + len(hidden)
        own = slice(part * len(layers) // self.parts, (part + 1) * len(layers) // self.parts)
        cos, sin = (rotation[past:end] for rotation in self.find_rotations(end))
        masks = {layer.window: find_seen(past, end, layer.window, hidden.device) for layer in layers[own]}
        for layer, (keys, values) in zip(layers[own], caches[own], strict=True):
            x = normalize(hidden, layer.norms[0])
            q = self.write_heads(layer, self.multiply(layer.qkv, x), (cos, sin), keys, values, past)
            attended = attend(layer, q, keys[:, :, :end], values[:, :, :end], masks[layer.window])
            hidden += self.multiply(layer.out, attended)
            gate, up = self.multiply(layer.gate_up, normalize(hidden, layer.norms[1])).chunk(2, -1)
            hidden += self.multiply(layer.down, F.silu(gate) * up)

    def find_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(normalize(hidden, self.whole.norm), self.whole.head)

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
        if length <= len(self.first_rotations[0]):
            return self.first_rotations
        if len(self.rotations[0]) < length:
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


class PageRoom:
    """The memory of all pages: only one is read at a time."""

    def __init__(self, whole: WholeStep):
        self.shape, like = whole.layers[0].shape, whole.embedding
        self.caches = like.new_empty(
            2 * len(whole.layers), self.shape.kv_heads * READ_TOGETHER * self.shape.size
        )
        self.hidden = like.new_empty(READ_TOGETHER, like.shape[1])
        self.logits = like.new_empty(1, len(whole.head))
        self.ids = torch.zeros(READ_TOGETHER, dtype=torch.long, device=like.device)
        self.last = torch.zeros(1, dtype=torch.long, device=like.device)


class Page:
    """Where graphs of `size` tokens find them, and leave their keys and values."""

    def __init__(self, room: PageRoom, size: int):
        self.ids, self.last, self.hidden, self.logits = (
            room.ids[:size],
            room.last,
            room.hidden[:size],
            room.logits,
        )
        sizes = (1, room.shape.kv_heads, size, room.shape.size)
        parts = [part[: math.prod(sizes)].view(sizes) for part in room.caches]
        self.caches = list(zip(parts[::2], parts[1::2], strict=True))

    def write(self, ids: torch.Tensor) -> None:
        self.ids[: len(ids)] = ids
        self.last.fill_(len(ids) - 1)

    def copy_out(self, caches: list[Pair], count: int) -> None:
        own = [part[:, :, :count] for pair in self.caches[: len(caches)] for part in pair]
        torch._foreach_copy_([part[:, :, :count] for pair in caches for part in pair], own)


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
