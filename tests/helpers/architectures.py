"""Small random models of every architecture the fused path is tested on, and one step of PEFT's plain path."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from eval.speed.shapes import quantize_linears
from utils.fast.kernels import Mask

VOCABULARY = 96
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()  # LLaMA's
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = SIZES | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with grouped queries": lambda: LlamaConfig(**GQA),
    "mistral with a window": lambda: MistralConfig(**GQA, sliding_window=8),
    "qwen2 with biases": lambda: Qwen2Config(**GQA),
    "qwen3": lambda: Qwen3Config(**GQA, head_dim=16),
    "gemma": lambda: GemmaConfig(**GQA, head_dim=16),
    "gemma2 with caps": lambda: Gemma2Config(**GQA, head_dim=16, final_logit_softcapping=5.0),
    "cohere with scaled logits": lambda: CohereConfig(**GQA),
    "granite with divided logits": lambda: GraniteConfig(**GQA, logits_scaling=8.0),
    "phi3": lambda: Phi3Config(**GQA),
    "phi3 with half of a head rotated": lambda: Phi3Config(**GQA, partial_rotary_factor=0.5),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=64, dropout=0.0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}  # fmt: skip


def build_model(
    name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, bits: int = 16, **adapter
):
    """The model with an adapter whose B is not zero, from a fixed seed; biases and norms are random too."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    base.to(DEVICE, dtype).requires_grad_(False)
    quantize_linears(base.base_model, bits, dtype)
    torch.manual_seed(1)  # quantizing has drawn numbers of its own
    model = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            task_type="CAUSAL_LM",
            **({"target_modules": "all-linear"} | adapter),
        ),
    )
    for parameter_name, parameter in model.named_parameters():
        if ".lora_B." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def build_batch(packed: bool, seed: int = 0) -> dict:
    """Three rows of 13, 9 and 18 tokens, packed or padded; labels on part of each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (13, 9, 18)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    labels = [torch.cat([row[:3] * 0 - 100, row[3:]]) for row in rows]
    if packed:
        batch = {
            "input_ids": torch.cat(rows)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seqlens": torch.tensor([0, 13, 22, 40], dtype=torch.int32),
            "max_length": 18,
        }
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        }
    numbers = [(row << 32) + torch.arange(length) for row, length in enumerate(lengths)]
    batch["token_keys"] = torch.cat(numbers)[None] if packed else pad(numbers, batch_first=True)
    batch["label_positions"] = (batch["labels"][:, 1:] != -100).any(0).nonzero().flatten()
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


class RepeatedDropout(torch.nn.Module):
    """Dropout by multiplying with the mask that the fused path draws for the same layer."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.drop(torch.ones_like(x).flatten(0, -2)).view(x.shape)


def share_masks(plain, fast) -> None:
    """Make `plain` drop what `fast` (a FastModel of the same architecture) drops."""
    for layer, twin in zip(fast.model.modules(), list(plain.modules()), strict=True):
        if isinstance(layer, LoraLayer) and hasattr(layer.lora_dropout["default"], "mask"):
            twin.lora_dropout["default"] = RepeatedDropout(layer.lora_dropout["default"].mask)


def run_plain(model, batch: dict[str, torch.Tensor], loss_scale: float) -> torch.Tensor:
    """Sum of token losses, its gradients times `loss_scale` added to .grad, through PEFT and the model's own logits."""
    names = ("input_ids", "attention_mask", "position_ids")
    logits = model(**{name: batch[name] for name in names if name in batch}, use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    (loss * loss_scale).backward()
    return loss.detach()


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.requires_grad}
