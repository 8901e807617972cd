"""What our steps need of transformers' cache that grows: that it keeps all, can be cut, and is alone."""

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

PLAIN_FLAGS = {"use_cache", "return_dict", "logits_to_keep"}  # of a step that is asked for logits only
GrowingCache = Any  # a DynamicCache of DynamicLayers: transformers annotates layers that may have no keys


def keep_all(config: Any) -> Any:
    """The config of a cache that keeps every token, also of a model that sees a window of the latest.

    Masks hide the others then. A cache that forgets them cannot be cut, and moves at each token.
    """
    text_config = copy.copy(config.get_text_config())
    if getattr(text_config, "layer_types", None) or getattr(text_config, "sliding_window", None):
        text_config.layer_types = ["full_attention"] * text_config.num_hidden_layers
    return text_config


def crop_cache(cache: GrowingCache, length: int) -> None:
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
