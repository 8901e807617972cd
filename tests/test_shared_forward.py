"""On a CPU one step for several conversations gives each, to the bit, what it would be given alone."""

import pytest
import torch
from helpers.families import FAMILIES
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from utils.decode.loop import GrowingSteps
from utils.decode.shared_decoder import SharedDecoder
from utils.decode.shared_forward import open_shared_forward

PROMPTS = [[5, 9, 4], [7, 8], [11, 12, 13, 14, 15, 16], list(range(20, 90)), [6]]
# Their attention is not a call of transformers' interface, or their layers keep a window of the tokens.
ONE_BY_ONE = {"bloom", "bloomz", "gemma3", "phi3"}


def load(family, folder):
    folder.mkdir()
    next(one.build for one in FAMILIES if one.id == family)(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", [one.id for one in FAMILIES if one.id not in ("baichuan", "decapoda")])
@torch.no_grad()
def test_rows_of_a_shared_step_are_the_models_own_logits(family, tmp_path):
    model = load(family, tmp_path / "model")
    shared = open_shared_forward(model, 8)
    if family in ONE_BY_ONE:
        assert shared is None
        return
    assert shared is not None and shared.sizes[-1] == 8
    caches = [DynamicCache(config=model.config) for _ in PROMPTS]
    for ids, cache in zip(PROMPTS, caches, strict=True):
        if ids[:-1]:
            model(input_ids=torch.tensor([ids[:-1]]), past_key_values=cache)
    logits = shared.read([ids[-1] for ids in PROMPTS], caches)
    for ids, row, cache in zip(PROMPTS, logits, caches, strict=True):
        assert torch.allclose(row, model(input_ids=torch.tensor([ids])).logits[0, -1], atol=1e-4)
        assert cache.get_seq_length() == len(ids)
    assert model.config._attn_implementation == "sdpa"


def test_replies_together_are_those_alone_and_a_cancelled_one_leaves_nothing_behind(small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    decoder = SharedDecoder(model, GrowingSteps(model))
    decoder.open_slots(4, 256, kept=0, for_many=True)
    assert decoder.turns.shared is not None
    configs = [
        GenerationConfig(
            max_new_tokens=20 + i, do_sample=i % 2 == 1, temperature=1.5, top_k=0, eos_token_id=1
        )
        for i in range(len(PROMPTS))
    ]
    rows: set[int] = set()
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: rows.add(len(kwargs["input_ids"])), with_kwargs=True
    )
    asked = list(enumerate(zip(PROMPTS, configs, strict=True)))
    alone = [list(decoder.reply(ids, config, seed=i).tokens()) for i, (ids, config) in asked]
    assert rows == {1, decoder.turns.shared.sizes[0]}  # prompts; a reply alone in the smallest step
    begun = [decoder.reply(ids, config, seed=i) for i, (ids, config) in asked]
    broken_off = decoder.reply(PROMPTS[0], GenerationConfig(max_new_tokens=200), seed=9)
    tokens = broken_off.tokens()
    next(tokens)
    tokens.close()
    assert [list(reply.tokens()) for reply in begun] == alone and broken_off.finish_reason == "cancelled"
    while decoder.is_busy:
        pass
    assert not decoder.turns.caches and not decoder.turns.turns


def test_prompts_are_read_a_part_at_a_time_between_the_words_of_others(small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    decoder = SharedDecoder(model, GrowingSteps(model))
    decoder.open_slots(4, 512, kept=0, for_many=True)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first = decoder.reply([5, 6], GenerationConfig(max_new_tokens=200), seed=0)
    tokens = first.tokens()
    next(tokens)
    second = decoder.reply(list(range(5, 105)), GenerationConfig(max_new_tokens=2), seed=0)
    list(second.tokens())
    first.cancel()
    parts = [i for i, length in enumerate(lengths) if length > 2]
    assert [lengths[i] for i in parts] == [16] * 6 + [4]
    assert all(later - earlier > 1 for earlier, later in zip(parts, parts[1:], strict=False))
