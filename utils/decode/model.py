"""A whole step of a LLaMA-like model in nine kernels a layer, where transformers and PEFT launch sixty.

    norm, A of q k v          multiply_rows
    q k v                     multiply_packed
    rotate, cache, attend     attend
    A of o                    multiply_rows
    o, and the residual       multiply_packed
    norm, A of gate and up    multiply_rows
    silu(gate) * up           multiply_packed
    A of down                 multiply_rows
    down, and the residual    multiply_packed

LLaMA, Mistral, Qwen2, Qwen3, Yi, DeepSeek and Baichuan-7B are built so. Whether a model is, its modules'
names say first, and then its own logits, which these must equal (graph.py); others keep their modules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from utils.decode.attention import LARGEST_HEAD, DecodeAttention, HeadShape
from utils.decode.packed_product import MOST_TOKENS, Kernels, PackedGroup
from utils.fast.trials import shallow

MODEL_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length
HEAD_ROWS = 4  # of the output layer that a block does at once
HEAD_BLOCKS = 4  # a multiprocessor


def name_children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def find_whole_obstacle(base: Any, groups: dict[nn.Module, PackedGroup]) -> str | None:
    """Why the steps of this model are made of its own modules; None if the kernels above may do them."""
    model, head = getattr(base, "model", None), base.get_output_embeddings()
    if model is None or name_children(model) != MODEL_PARTS:
        return "its modules are not LLaMA's"
    if type(head) is not nn.Linear or head.bias is not None or head.weight.dtype != base.dtype:
        return "its output layer is not a plain one"
    if getattr(model.rotary_emb, "rope_type", None) not in FIXED_ROTATIONS:
        return "its rotations depend on the length"
    config = base.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        return "its logits are capped"
    return next(filter(None, (find_layer_obstacle(layer, groups) for layer in model.layers)), None)


def find_layer_obstacle(layer: Any, groups: dict[nn.Module, PackedGroup]) -> str | None:
    if name_children(layer) != LAYER_PARTS or name_children(layer.mlp) != MLP_PARTS:
        return "its layers are not LLaMA's"
    attention, mlp = layer.self_attn, layer.mlp
    parts = name_children(attention)
    if parts not in (ATTENTION_PARTS, ATTENTION_PARTS | {"q_norm", "k_norm"}):
        return "its attention is not LLaMA's"
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if name in parts]
    if any(not hasattr(norm, "variance_epsilon") or len(list(norm.parameters())) != 1 for norm in norms):
        return "its norms are not LLaMA's"
    if 0 < find_window(attention) < MOST_TOKENS:
        return f"windows of {find_window(attention)} tokens"
    if attention.head_dim % 8 or attention.head_dim > LARGEST_HEAD:
        return f"heads of {attention.head_dim}"
    if type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return f"its activation is {type(mlp.act_fn).__name__}"
    together = ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj])
    for layers in (*together, [attention.o_proj], [mlp.down_proj]):
        if any(groups.get(each) is None or groups[each].layers != layers for each in layers):
            return "not all of its linear layers are in 4 bits and adapted alike"
    return None


def find_window(attention: Any) -> int:
    """Tokens that a token sees, itself included; 0: all. Mistral's layers leave it to the config."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    is_mistral = attention.config.model_type == "mistral"
    return (attention.config.sliding_window or 0) if is_mistral else 0


class Workspace:
    """What passes between the kernels of a step of `tokens` tokens; every layer uses the same."""

    def __init__(self, step: "WholeStep", tokens: int):
        def make(width: int) -> torch.Tensor:
            return step.embedding.new_empty(tokens, width)

        first = step.layers[0]
        self.normed, self.logits = make(first.qkv.width), make(len(step.head))
        self.qkv, self.attended = make(sum(first.qkv.sizes)), make(first.out.width)
        self.gated = make(first.down.width)
        groups = [group for layer in step.layers for group in layer.groups]
        self.xa = make(max(sum(group.ranks) for group in groups))


class WholeLayer:
    def __init__(self, layer: Any, groups: dict[nn.Module, PackedGroup]):
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv, self.out = groups[attention.q_proj], groups[attention.o_proj]
        self.gate_up, self.down = groups[mlp.gate_proj], groups[mlp.down_proj]
        self.groups = (self.qkv, self.out, self.gate_up, self.down)
        self.norms = [
            (norm.weight.detach(), norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        q_norm, k_norm = (None if norm is None else norm.weight.detach() for norm in norms)
        self.head_norms = q_norm, k_norm
        epsilon = 0.0 if norms[0] is None else norms[0].variance_epsilon
        size = attention.head_dim
        heads, kv_heads = (self.qkv.sizes[i] // size for i in (0, 1))
        self.shape = HeadShape(heads, kv_heads, size, attention.scaling, epsilon)
        self.window = find_window(attention)


class WholeStep:
    """The logits of one new token of each of several conversations, or of a few tokens of one."""

    def __init__(self, base: Any, kernels: Kernels, groups: dict[nn.Module, PackedGroup]):
        self.kernels, self.rotary = kernels, base.model.rotary_emb
        self.embedding = base.get_input_embeddings().weight.detach()
        self.head = base.get_output_embeddings().weight.detach()
        self.norm = (base.model.norm.weight.detach(), base.model.norm.variance_epsilon)
        self.layers = [WholeLayer(layer, groups) for layer in base.model.layers]
        self.spaces: dict[int, Workspace] = {}
        self.attentions: dict[tuple[int, int], DecodeAttention] = {}

    def compile_ahead(self) -> None:
        """For one new token of one conversation, of several, and for proposals to verify."""
        shape, like = self.layers[0].shape, self.embedding
        ids = torch.zeros(MOST_TOKENS, 1, dtype=torch.long, device=like.device)
        lengths, rotations = ids.flatten().int(), self.prepare_rotations(1)
        pair = (like.new_empty(MOST_TOKENS, shape.kv_heads, 1, shape.size),) * 2
        caches = [pair] * len(self.layers)

        def run() -> None:
            for some in (ids[:1], ids, ids.view(1, -1)):
                self.run(some, caches, rotations, lengths[: len(some)])

        self.kernels.compile_ahead(run)
        self.attentions.clear()  # they hold what was not compiled

    @contextmanager
    def shallow(self, base: Any) -> Iterator[None]:
        """Within it the first layers alone run, here and in the model, as rounding grows with depth."""
        layers = self.layers
        with shallow(base):
            self.layers = layers[: len(base.model.layers)]
            try:
                yield
            finally:
                self.layers = layers

    def prepare_rotations(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position that the buffers have  # [capacity, head size]"""
        positions = torch.arange(capacity, device=self.embedding.device)[None]
        cos, sin = self.rotary(self.embedding[:1], positions)
        return cos[0].contiguous(), sin[0].contiguous()

    def run(
        self,
        ids: torch.Tensor,
        caches: list[tuple[torch.Tensor, torch.Tensor]],
        rotations: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits  # [conversations, fresh, vocabulary] of `ids`  # [conversations, fresh]

        Keys and values of the new tokens are written behind `lengths`  # int32 [places], which grow; `places`
        # int64 [conversations], where they are not 0, 1, 2, ...
        """
        conversations, fresh = ids.shape
        if ids.numel() not in self.spaces:
            self.spaces[ids.numel()] = Workspace(self, ids.numel())
        space = self.spaces[ids.numel()]
        if (conversations, fresh) not in self.attentions:
            self.attentions[conversations, fresh] = DecodeAttention(
                self.kernels, self.layers[0].shape, conversations, fresh, ids.device
            )
        attention, kernels = self.attentions[conversations, fresh], self.kernels
        hidden = F.embedding(ids.view(-1), self.embedding)  # [tokens, hidden_size]
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            xa = self.multiply_A(layer.qkv, hidden, space, layer.norms[0])
            kernels.multiply(layer.qkv, space.normed, space.qkv, xa)
            attention.attend(
                space.qkv, keys, values, rotations, lengths, space.attended, layer.head_norms, places,
                layer.window,
            )  # fmt: skip
            xa = self.multiply_A(layer.out, space.attended, space)
            kernels.multiply(layer.out, space.attended, hidden, xa, residual=hidden)
            xa = self.multiply_A(layer.gate_up, hidden, space, layer.norms[1])
            kernels.multiply(layer.gate_up, space.normed, space.gated, xa, gated=True)
            xa = self.multiply_A(layer.down, space.gated, space)
            kernels.multiply(layer.down, space.gated, hidden, xa, residual=hidden)
        blocks = HEAD_BLOCKS * kernels.processors
        kernels.multiply_rows(
            self.head, hidden, space.logits, *self.norm, rows_at_once=HEAD_ROWS, blocks=blocks
        )
        if places is None:
            lengths.add_(fresh)
        else:
            lengths.index_add_(0, places, torch.full_like(places, fresh, dtype=lengths.dtype))
        return space.logits.view(conversations, fresh, -1)

    def multiply_A(
        self,
        group: PackedGroup,
        x: torch.Tensor,
        space: Workspace,
        norm: tuple[torch.Tensor | None, float] = (None, 0.0),
    ) -> torch.Tensor | None:
        """xa of norm(x)  # [tokens, ranks], None without adapter; norm(x) is then in `space.normed`."""
        A = group.A if group.is_on else None
        xa = None if A is None else space.xa.view(-1)[: len(x) * len(A)].view(len(x), len(A))
        if A is not None or norm[0] is not None:
            normed = None if norm[0] is None else space.normed
            self.kernels.multiply_rows(A, x, xa, *norm, normed=normed)
        return xa
