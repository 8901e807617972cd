"""LoRA's dropout and NEFTune's noise, drawn from the keys of the tokens instead of torch's generators."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.fast.kernels import Mask, draw_noise
from utils.fast.token_keys import TokenKeys

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
NOISE = 0  # in place of a layer's number


class DropElements(torch.autograd.Function):
    """x  # [tokens, width], dropped; the backward pass draws the mask again."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, mask: Mask):
        ctx.mask = mask
        return mask.drop(x.contiguous())

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        return ctx.mask.drop(dy.contiguous()), None


class KeyedDropout(nn.Module):
    """nn.Dropout in a LoRA layer, whose mask follows from the tokens' keys and the layer's number."""

    def __init__(self, keys: TokenKeys, number: int, p: float):
        super().__init__()
        self.mask, self.p = Mask(keys, number, p), p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return DropElements.apply(x.reshape(-1, x.shape[-1]), self.mask).view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def key_dropout(model: nn.Module) -> TokenKeys:
    """Let every LoRA layer drop by the keys that are returned; who runs a micro-batch reads them first."""
    keys = TokenKeys(next(model.parameters()).device)
    for layer, number in number_layers(model).items():
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = KeyedDropout(keys, number, dropout.p).train(dropout.training)
                keys.is_used = True
    return keys


def number_layers(model: nn.Module) -> dict[LoraLayer, int]:
    """From 1 on, fused or not. Layers that read one input have one number: they share a mask."""
    first_names = {name: names[0] for names in SHARED_INPUT for name in names}
    numbers: dict[tuple[str, str], int] = {}
    layers = {}
    for parent_name, parent in model.named_modules():
        for name, layer in parent.named_children():
            if isinstance(layer, LoraLayer):
                place = (parent_name, first_names.get(name, name))
                layers[layer] = numbers.setdefault(place, len(numbers) + 1)
    return layers


def add_embedding_noise(embeddings: nn.Module, keys: TokenKeys, alpha: float) -> None:
    """NEFTune (arXiv 2310.05914): uniform noise of alpha / sqrt(L d), L the length of the token's own row."""
    keys.is_used = True

    def add_noise(module: nn.Module, _, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        width = embedded.shape[-1]  # [rows, width of the batch, hidden_size]
        scales = alpha / (find_row_lengths(keys.micro_batch) * width).sqrt()
        noise = draw_noise(keys.find(embedded.flatten(0, -2)), NOISE, scales.to(embedded.device), width)
        return embedded + noise.to(embedded.dtype).view(embedded.shape)

    embeddings.register_forward_hook(add_noise)


def find_row_lengths(micro_batch: dict[str, Any]) -> torch.Tensor:
    """Length of the row that each token is in; nothing is read on the host  # float32 [tokens]"""
    if "cu_seqlens" not in micro_batch:
        mask = micro_batch["attention_mask"]  # [rows, width]
        return mask.sum(1, keepdim=True).expand_as(mask).flatten().float()
    ends, tokens = micro_batch["cu_seqlens"], micro_batch["input_ids"].shape[1]
    places = torch.arange(tokens, device=ends.device, dtype=ends.dtype)
    return ends.diff()[torch.searchsorted(ends, places, right=True) - 1].float()
