"""Dropout and NEFTune follow from seed, step, row, position, layer and column, and from nothing else."""

import math

import numpy as np
import pytest
import torch
from helpers.architectures import DEVICE, adapter_gradients, build_batch, build_model, run_plain
from helpers.models import relative_difference
from torch import nn

from utils.data.packing import PackingCollator, PaddingCollator
from utils.fast.kernels import (
    Mask,
    add_low_rank,
    copy_and_drop,
    draw_noise,
    gated_activation,
    gated_activation_backward,
)
from utils.fast.keyed_noise import add_embedding_noise, find_row_lengths, key_dropout
from utils.fast.model import FastModel, prepare_fast_model
from utils.fast.token_keys import TokenKeys, draw_mask, hash_columns, number_tokens, scramble

CPU = torch.device("cpu")


def build_keys(rows: int, length: int, seed: int = 0, step: int = 0, device: torch.device = CPU) -> TokenKeys:
    keys = TokenKeys(device)
    keys.is_used = True
    keys.choose_step(seed, step)
    numbers = number_tokens(np.arange(rows)[:, None], np.arange(length))
    keys.read({"token_keys": numbers.to(device)})
    return keys


def read_unsigned(keys: TokenKeys) -> np.ndarray:
    return keys.keys.cpu().numpy().view(np.uint64)


def test_keys_are_those_of_splitmix64():
    """The first numbers of its reference implementation from the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = torch.tensor(1234567) + torch.arange(4) * (0x9E3779B97F4A7C15 - 2**64)
    assert scramble(state).numpy().view(np.uint64).tolist() == expected


def test_hash_is_the_one_written_out_in_whole_numbers():
    word = 2**32

    def hash_element(key: int, layer: int, column: int) -> int:
        low = (key % word) ^ (layer * 2654435761 % word)
        high = (key >> 32) + layer * 2246822519
        bits = (column * 3266489917 + low) % word
        bits = ((bits ^ bits >> 16) * 2246822507 + high) % word
        bits = (bits ^ bits >> 13) * 3266489909 % word
        return bits ^ bits >> 16

    keys = read_unsigned(build_keys(3, 4))
    for layer in (0, 1, 224):
        expected = [[hash_element(int(key), layer, column) for column in range(50)] for key in keys]
        assert hash_columns(keys, layer, 50).tolist() == expected


def test_masks_look_random_along_every_part_of_the_key():
    """Shares and correlations within five standard deviations of those of coin tosses."""

    def draw(seed: int = 0, step: int = 0, layer: int = 1) -> np.ndarray:
        return hash_columns(read_unsigned(build_keys(32, 32, seed, step)), layer, 256).reshape(32, 32, 256)

    bits = draw()
    size = bits.size
    for bit in range(32):
        assert abs((bits >> bit & 1).mean() - 0.5) < 5 * 0.5 / math.sqrt(size)
    pairs = {
        "column": (bits[..., 1:], bits[..., :-1]),
        "position": (bits[:, 1:], bits[:, :-1]),
        "row": (bits[1:], bits[:-1]),
        "layer": (bits, draw(layer=2)),
        "step": (bits, draw(step=1)),
        "seed": (bits, draw(seed=1)),
    }
    for name, (first, second) in pairs.items():
        correlation = 12 * ((first / 2**32 - 0.5) * (second / 2**32 - 0.5)).mean()
        assert abs(correlation) < 5 / math.sqrt(first.size), name
        both = ((first < 0.1 * 2**32) & (second < 0.1 * 2**32)).mean()
        assert abs(both - 0.01) < 5 * 0.1 / math.sqrt(first.size), name


def test_dropout_drops_its_share_and_keeps_the_mean():
    dropped = Mask(build_keys(20, 20), 1, 0.1).drop(torch.ones(400, 300))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.9])


@pytest.fixture
def rows() -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 90, length) for length in (13, 9, 18, 5)]
    return [{"input_ids": row, "labels": row, "row": np.int64(7 + i)} for i, row in enumerate(ids)]


def read_masks(batches: list[dict]) -> dict[int, torch.Tensor]:
    """The mask of each row by its number, as a layer of three columns sees it."""
    keys, masks = TokenKeys(CPU), {}
    keys.is_used = True
    keys.choose_step(3, 4)
    for batch in batches:
        keys.read(batch)
        mask = draw_mask(keys.keys, 5, 3, 0.5)
        if "cu_seqlens" in batch:
            parts = mask.split(batch["cu_seqlens"].diff().tolist())
        else:
            width = batch["input_ids"].shape[1]
            lengths = batch["attention_mask"].sum(1).tolist()
            parts = [part[:n] for part, n in zip(mask.split(width), lengths, strict=True)]
        masks |= dict(zip(batch["rows"].tolist(), parts, strict=False))  # the filling has no number
    return masks


def test_a_row_has_one_mask_in_every_batch(rows):
    packed = [PackingCollator(0, 64, fixed=fixed)(rows)["micro_batches"] for fixed in (True, False)]
    packed.append(PackingCollator(0, 18)(rows[::-1])["micro_batches"])
    padded = [[PaddingCollator(0, 8)(rows)], [PaddingCollator(0)([row]) for row in rows]]
    first, *others = [read_masks(batches) for batches in packed + padded]
    assert (
        list(first) == [9, 7, 8, 10]
        and len({tuple(mask[:5].flatten().tolist()) for mask in first.values()}) == 4
    )
    for other in others:
        assert all(torch.equal(other[row], mask) for row, mask in first.items())


def build_mixed_model(dropout: float, checkpointed: bool = False) -> FastModel:
    """GPT-2 with an adapter on layers that the fused path covers (the head) and that it does not (Conv1D)."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, **none)
    targets = ["c_attn", "c_fc", "c_proj", "lm_head"]
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(config).to(DEVICE), lora).train()
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.1)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_are_not_covered_drop_the_same_again_when_recomputed(checkpointed, capsys):
    plain = build_mixed_model(0.3)
    fast = prepare_fast_model(build_mixed_model(0.3, checkpointed), torch.float32)
    assert "Conv1D layers keep PEFT's own forward" in capsys.readouterr().out
    keys, batch = key_dropout(plain), build_batch(packed=False)
    for each in (keys, fast.keys):
        each.choose_step(seed=1, step=2)
    keys.read(batch)
    expected = run_plain(plain, batch, 0.5)
    loss = fast.run(batch, torch.tensor(0.5, device=DEVICE))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_difference(adapter_gradients(fast.model), adapter_gradients(plain)) < 1e-5


@pytest.mark.parametrize("name", ["llama with grouped queries", "gpt_neox"])
def test_plain_path_drops_what_the_fused_one_drops_and_consumes_nothing(name):
    plain, fast = build_model(name, 0.3), prepare_fast_model(build_model(name, 0.3), torch.float32)
    keys, batch = key_dropout(plain), build_batch(packed=True)
    state = torch.get_rng_state()
    for each in (keys, fast.keys):
        each.choose_step(seed=1, step=2)
    keys.read(batch)
    expected = run_plain(plain, batch, 0.5)
    loss = fast.run(batch, torch.tensor(0.5, device=DEVICE))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_difference(adapter_gradients(fast.model), adapter_gradients(plain)) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_sees_a_share_of_the_tokens_says_so_and_repeats_its_mask(capsys):
    mask, x = Mask(build_keys(4, 10), 1, 0.5), torch.ones(7, 50)
    dropped = mask.drop(x)
    assert "sees 7 rows of 40 tokens" in capsys.readouterr().out
    assert torch.equal(mask.drop(x), dropped) and 0.4 < (dropped == 0).float().mean() < 0.6


def read_noise(batches: list[dict], alpha: float, width: int) -> dict[int, torch.Tensor]:
    """NEFTune's noise of each row by its number  # [tokens, width]"""
    embeddings, keys, noises = nn.Embedding(100, width), TokenKeys(CPU), {}
    add_embedding_noise(embeddings, keys, alpha)
    keys.choose_step(0, 0)
    for batch in batches:
        keys.read(batch)
        noise = embeddings(batch["input_ids"]) - embeddings.eval()(batch["input_ids"])
        embeddings.train()
        if "cu_seqlens" in batch:
            parts = noise[0].split(batch["cu_seqlens"].diff().tolist())
        else:
            parts = [part[:n] for part, n in zip(noise, batch["attention_mask"].sum(1), strict=True)]
        noises |= dict(zip(batch["rows"].tolist(), parts, strict=False))
    return noises


def test_noise_of_a_row_goes_by_its_own_length_packed_or_not(rows):
    packed = read_noise(PackingCollator(0, 64, fixed=True)(rows)["micro_batches"], 5.0, 1000)
    padded = read_noise([PaddingCollator(0)(rows)], 5.0, 1000)
    for row in rows:
        noise, bound = packed[int(row["row"])], 5.0 / math.sqrt(len(row["input_ids"]) * 1000)
        assert torch.allclose(noise, padded[int(row["row"])], atol=1e-6)
        assert 0.99 * bound < noise.abs().max() <= bound + 1e-6
        assert noise.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
        assert abs(noise.mean().item()) < 5 * bound / math.sqrt(3 * noise.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 1500])
def test_gpu_masks_and_noise_equal_those_of_a_cpu_bit_for_bit(width):
    device = torch.device("cuda")
    keys, cpu_keys = (build_keys(5, 41, 3, 4, place) for place in (device, CPU))
    assert torch.equal(keys.keys.cpu(), cpu_keys.keys)
    tokens = len(keys.keys)
    ones = torch.ones(tokens, width, device=device)
    for layer, probability in ((1, 0.1), (2, 0.5), (224, 0.9)):
        mask, expected = Mask(keys, layer, probability), draw_mask(cpu_keys.keys, layer, width, probability)
        assert torch.equal(mask.drop(ones).cpu(), expected)
        assert torch.equal(copy_and_drop(ones, torch.empty_like(ones), mask).cpu(), expected)
        total, left = torch.zeros_like(ones), torch.ones(tokens, 4, device=device)
        add_low_rank(total, left, torch.ones(4, width, device=device), 0.25, mask)
        assert torch.equal(total.cpu() != 0, expected != 0)
        sides, hidden = torch.ones(tokens, 2 * width, device=device), torch.empty_like(ones)
        assert torch.equal(gated_activation(sides, hidden, "silu", mask).cpu() != 0, expected != 0)
        gated_activation_backward(sides, hidden, "silu", mask)
        assert torch.equal(hidden.cpu() != 0, expected != 0)
    scales = torch.rand(tokens)
    noise = draw_noise(keys.keys, 0, scales.to(device), width).cpu()
    assert torch.equal(noise, draw_noise(cpu_keys.keys, 0, scales, width))


def test_row_lengths_are_found_without_a_read_on_the_host(rows):
    (packed,) = PackingCollator(0, 64, fixed=True)(rows)["micro_batches"]
    ends = packed["cu_seqlens"]
    widened = packed | {"cu_seqlens": torch.cat([ends, ends[-1:], ends[-1:]])}  # as GraphedStep does
    expected = [length for length in ends.diff().tolist() for _ in range(length)]
    assert find_row_lengths(widened).tolist() == expected
