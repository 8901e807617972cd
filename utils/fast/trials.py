"""Trials on the model itself: a few tokens tell what its packed rows are worth, before anything is trained.

No list of architectures says it: masks, positions, sinks and biases are each model's own affair.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

ROW = 12  # tokens of a row
# What the first row changes in the second, and how far the second is from what it is alone, as shares of what
# one long row makes of the same tokens. Where rows mix, 0.3 to 1.05; where not, rounding: SmolLM2-135M has 0
# and 0.000001 in float32, 0 and 0.02 in bfloat16 (experts round otherwise in other company).
MAX_CHANGE, MAX_DISTANCE = 0.1, 0.25


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it nothing is dropped, drawn or kept for gradients; `model` then trains again, if it did."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def shallow(model: nn.Module) -> Iterator[None]:
    """Within it only the first layers of `model` run: two, and one of each kind that it has.

    Two kernels of the same arithmetic round otherwise, and every layer adds to that: after LLaMA-13B's 40
    layers of random weights the hidden states differ by more than a mistake would be let pass with.
    """
    stack = find_layers(model)
    kinds = [describe_layer(model, number, layer) for number, layer in enumerate(stack)]
    needed = max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    deeper = list(stack[needed:])
    del stack[needed:]
    try:
        yield
    finally:
        stack.extend(deeper)


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The model's layers; an empty list where they are not transformers' own kind."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module))
    is_stack = (part for part in lists if all(isinstance(x, GradientCheckpointingLayer) for x in part))
    return next(is_stack, nn.ModuleList())


def describe_layer(model: Any, number: int, layer: nn.Module) -> tuple[Any, ...]:
    """What tells a layer's kind: its attention (some slide) and the classes that it is made of."""
    attention = getattr(model.config.get_text_config(), "layer_types", None)
    return (attention and attention[number], *map(type, layer.modules()))


def draw_tokens(model: Any, rows: int, tokens: int) -> torch.Tensor:
    """The same ids each time, by a generator of their own  # int64 [rows, tokens]"""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (rows, tokens), generator=generator).to(model.device)


def try_first_layers(causal_model: Any) -> torch.Tensor:
    """Hidden states of two short rows  # [2, ROW, hidden_size]"""
    with evaluating(causal_model), shallow(causal_model):
        ids = draw_tokens(causal_model, 2, ROW)
        return causal_model.base_model(input_ids=ids, use_cache=False)[0]


def is_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> bool:
    """Whether the two differ by rounding alone: kernels of another order of sums, in the dtype at hand.

    On the meta device there is nothing to compare: a rehearsal takes it that they do.
    """
    if expected.is_meta:
        return True
    tolerance = tolerance or (5e-3 if expected.dtype == torch.float32 else 0.05)
    return bool((found.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def describe_distance(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """The first of the pairs that differ by more than rounding, found and expected; None where none do."""
    for name, (found, expected) in pairs.items():
        if not is_near(found, expected):
            away = (found.float() - expected.float()).norm() / expected.float().norm()
            return f"{name} that are {away:.0%} away"
    return None


def find_packing_obstacle(model: Any) -> str | None:
    """Why a packed row has not the logits that it has alone; None if it has them.

    A row is packed behind two others in turn, and read as the end of one long row.
    """
    if not takes_positions(model):
        return "its forward takes no position_ids"
    first, other, second = draw_tokens(model, 3, ROW).split(1)
    both = torch.cat([torch.cat([row, second], 1) for row in (first, other)])  # [2, 2 * ROW]
    positions = torch.arange(2 * ROW, device=both.device).expand(2, -1)
    with evaluating(model), shallow(model):
        alone = model(input_ids=second, use_cache=False).logits.float()  # [1, ROW, vocabulary]
        packed, joined = (
            model(input_ids=both, position_ids=places, use_cache=False).logits[:, -ROW:].float()
            for places in (positions % ROW, positions)
        )
    if not (packed[0] - packed[1]).norm() <= MAX_CHANGE * (joined[0] - joined[1]).norm():
        return "a row changes the logits of the next"
    if not (packed[0] - alone[0]).norm() <= MAX_DISTANCE * (joined[0] - alone[0]).norm():
        return "a row behind another has not the logits that it has alone"
    return None


def takes_positions(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(base.forward).parameters
    return "position_ids" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
