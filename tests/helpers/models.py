"""A random model that every script runs on in seconds, and what two models have in common."""

from pathlib import Path

import torch

from helpers import SMOLLM2


def save_random_model(folder: Path, seed: int) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def read_logits(model):
    model.eval()
    ids = torch.arange(5, 45)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def assert_close_in_bfloat16(logits, expected):
    """transformers' own tolerance between two implementations in bfloat16, flash attention and eager."""
    assert torch.allclose(logits, expected, atol=4e-2 * expected.abs().max().item())


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    difference = sum((first[name] - second[name]).double().square().sum() for name in first)
    return (difference / sum(second[name].double().square().sum() for name in second)).sqrt().item()
