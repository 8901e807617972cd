"""Rotary frequencies that follow the longest row: dynamic NTK and LongRoPE (Phi-3, arXiv 2402.13753).

transformers chooses them once for a whole micro-batch, by the highest position in it. One row beyond the
original context would rotate all others by frequencies of its own length: it gets a micro-batch to itself.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


def find_ropes(config: Any) -> list[dict[str, Any]]:
    """The model's sets of rotary parameters; some have one for each kind of layer."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]


def is_dynamic(rope: dict[str, Any]) -> bool:
    return "dynamic" in rope.get("rope_type", "default")


def find_shared_length(config: Any) -> int | None:
    """Tokens of the longest row that may share a micro-batch; None where any may."""
    limits = [
        config.get_text_config().max_position_embeddings
        if is_dynamic(rope)
        else rope["original_max_position_embeddings"]
        for rope in find_ropes(config)
        if is_dynamic(rope) or rope.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def follow_each_batch(model: nn.Module) -> None:
    """Let dynamic frequencies be those of the batch at hand; transformers may keep those of a longer one."""
    for module in model.modules():
        if any("dynamic" in kind for kind, _ in find_kinds(module)):
            module.register_forward_pre_hook(forget_longer_rows)


def find_kinds(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(rope type, prefix of its attributes) of a rotary module; nothing of other modules."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield kinds, ""
    elif isinstance(kinds, dict):
        yield from ((kind, f"{layer_type}_") for layer_type, kind in kinds.items())


def forget_longer_rows(module: nn.Module, _: Any) -> None:
    for kind, prefix in find_kinds(module):
        if "dynamic" in kind:
            original = getattr(module, f"{prefix}original_inv_freq")
            current = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(current.device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
