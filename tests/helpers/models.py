"""A random model that every script runs on in seconds, and what two models have in common."""

from pathlib import Path

import torch
from torch.nn import functional as F

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


def train_with_plain_peft(model, adapter, rows, b_rate=1e-2):
    """Three steps of four rows in their order: AdamW on the mean loss of the label tokens, norm clipped to 0.3.

    A learns at a rate of 1e-2.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    weights = [weight for weight in peft.parameters() if weight.requires_grad]
    trained = [(name, weight) for name, weight in peft.named_parameters() if weight.requires_grad]
    rates = [{"params": [weight], "lr": b_rate if "lora_B" in name else 1e-2} for name, weight in trained]
    optimizer = torch.optim.AdamW(rates, eps=1e-4, weight_decay=0.0)
    for step in range(3):
        losses, count = torch.zeros(()), 0
        for index in range(4 * step, 4 * step + 4):
            ids, labels = (torch.from_numpy(rows[index][name])[None] for name in ("input_ids", "labels"))
            logits = peft(input_ids=ids).logits[0, :-1]
            losses = losses + F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
            count += int((labels[0, 1:] != -100).sum())
        (losses / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(peft)
