"""On a CPU one step for several conversations gives each, to the bit, what it would be given alone."""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROOT
from helpers.families import FAMILIES
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, MixtralConfig

from utils.decode.loop import GrowingSteps
from utils.decode.shared_decoder import SharedDecoder
from utils.decode.shared_forward import PART, ROWS, SharedForward, find_fault, read_part, read_tokens
from utils.decode.token_choice import TokenChoice

PROMPTS = [[5, 9, 4], [7, 8], [11, 12, 13, 14, 15, 16], list(range(20, 90)), [6]]
# Their attention is not a call of transformers' interface, or their layers keep a window of the tokens.
ONE_BY_ONE = {"bloom", "bloomz", "gemma3", "phi3"}


@pytest.fixture(scope="module")
def decoder(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    decoder = SharedDecoder(model, GrowingSteps(model))
    decoder.open_slots(4, 512, kept=0, for_many=True)
    assert isinstance(decoder.engine, SharedForward)
    return decoder


@pytest.fixture
def shapes(decoder):
    """[rows, tokens] of every forward pass."""
    seen = []
    hook = decoder.model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("family", [one.id for one in FAMILIES if one.id not in ("baichuan", "decapoda")])
@torch.no_grad()
def test_rows_of_a_shared_step_are_the_models_own_logits(family, tmp_path):
    next(one.build for one in FAMILIES if one.id == family)(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (find_fault(model) is not None) == (family in ONE_BY_ONE)
    if family in ONE_BY_ONE:
        return
    caches = [DynamicCache(config=model.config) for _ in PROMPTS]
    for ids, cache in zip(PROMPTS, caches, strict=True):
        if ids[:-1]:
            read_part(model, ids[:-1], cache)
    logits = read_tokens(model, [ids[-1] for ids in PROMPTS], caches)
    for ids, row, cache in zip(PROMPTS, logits, caches, strict=True):
        assert torch.allclose(row, model(input_ids=torch.tensor([ids])).logits[0, -1], atol=1e-4)
        assert cache.get_seq_length() == len(ids)
    assert model.config._attn_implementation == "sdpa"


def test_model_whose_rows_are_not_their_own_takes_turns_and_says_so(capsys):
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = SharedDecoder(model, GrowingSteps(model))
    decoder.open_slots(4, 64, kept=0, for_many=True)
    assert not decoder.shares_steps
    assert "replies: a token each in turn (" in capsys.readouterr().out


def test_replies_together_are_those_alone_and_a_cancelled_one_leaves_nothing_behind(decoder, shapes):
    configs = [
        GenerationConfig(max_new_tokens=20 + i, do_sample=i % 2 == 1, temperature=1.5, top_k=0)
        for i in range(len(PROMPTS))
    ]
    asked = list(enumerate(zip(PROMPTS, configs, strict=True)))
    alone = [list(decoder.reply(ids, config, seed=i).tokens()) for i, (ids, config) in asked]
    begun = [decoder.reply(ids, config, seed=i) for i, (ids, config) in asked]
    broken_off = decoder.reply(PROMPTS[0], GenerationConfig(max_new_tokens=200), seed=9)
    tokens = broken_off.tokens()
    next(tokens)
    tokens.close()
    assert [list(reply.tokens()) for reply in begun] == alone and broken_off.finish_reason == "cancelled"
    assert {rows for rows, count in shapes if count == 1} <= {1, ROWS}
    while decoder.is_busy:
        pass
    assert not decoder.engine.places


def test_greedy_reply_is_what_transformers_own_generate_says(decoder):
    for ids in PROMPTS:
        config = GenerationConfig(max_new_tokens=24, do_sample=False)
        said = list(decoder.reply(ids, config).tokens())
        output = decoder.model.generate(torch.tensor([ids]), generation_config=config)
        assert said == output[0, len(ids) :].tolist()


def test_fault_of_one_replys_choice_ends_that_reply_alone(decoder, monkeypatch):
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=None)
    alone = list(decoder.reply(PROMPTS[2], config).tokens())
    choose = TokenChoice.choose

    def fail_for_seed_13(choice, logits):
        if choice.generator.initial_seed() == 13:
            raise RuntimeError("no token to choose")
        return choose(choice, logits)

    monkeypatch.setattr(TokenChoice, "choose", fail_for_seed_13)
    other, broken = decoder.reply(PROMPTS[2], config), decoder.reply(PROMPTS[0], config, seed=13)
    with pytest.raises(RuntimeError, match="no token to choose"):
        list(broken.tokens())
    assert list(other.tokens()) == alone
    assert other.finish_reason == "length"


def test_prompts_are_read_a_part_at_a_time_between_the_words_of_others(decoder, shapes):
    first = decoder.reply([5, 6], GenerationConfig(max_new_tokens=200), seed=0)
    tokens = first.tokens()
    next(tokens)
    prompt = list(range(5, 5 + 6 * PART + 5))
    list(decoder.reply(prompt, GenerationConfig(max_new_tokens=2), seed=0).tokens())
    first.cancel()
    parts = [i for i, (_, count) in enumerate(shapes) if count > 1]
    assert [shapes[i] for i in parts] == [(1, PART)] * 6 + [(1, 4)]  # the last token is read by a step
    assert all(shapes[i + 1] == (ROWS, 1) for i in parts)


def test_next_turn_of_a_kept_conversation_reads_only_what_is_new(decoder, shapes):
    decoder.open_slots(4, 512, kept=1, for_many=True)
    ids, config = list(range(5, 65)), GenerationConfig(max_new_tokens=3)
    said = list(decoder.reply(ids, config).tokens())
    shapes.clear()
    again = decoder.reply([*ids, *said, 9, 9], config)
    list(again.tokens())
    assert again.reused_tokens == 62 and shapes == [(1, 2), *[(ROWS, 1)] * 3]
    decoder.open_slots(4, 512, kept=0, for_many=True)


def check_two_threads(folder):
    """A model in 4 bits on two threads: greedy replies with others that come and go, and alone."""
    from utils.arguments import ModelArguments
    from utils.models.base import choose_compute_dtype, load_base

    args = ModelArguments(folder, bits=4)
    model = load_base(args, choose_compute_dtype(args), trainable=False).eval()
    decoder = SharedDecoder(model, GrowingSteps(model))
    decoder.open_slots(8, 256, kept=0, for_many=True)
    assert isinstance(decoder.engine, SharedForward) and torch.get_num_threads() == 2
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 40000) for _ in range(rng.randrange(2, 60))] for _ in range(4)]
    config = GenerationConfig(max_new_tokens=16, do_sample=False)
    alone = [list(decoder.reply(ids, config).tokens()) for ids in prompts]

    def ask(seed):
        own = random.Random(seed)
        time.sleep(3 * own.random())
        i, most = own.randrange(3), own.randrange(1, 14) if seed % 3 == 0 else 16
        tokens = decoder.reply(prompts[i], config).tokens()
        said = [token for _, token in zip(range(most), tokens, strict=False)]
        tokens.close()  # hangs up, if there is more
        assert said == alone[i][:most], (seed, said, alone[i])

    with ThreadPoolExecutor(12) as clients:
        list(clients.map(ask, range(18)))


def test_replies_on_two_threads_are_those_alone(tiny_model):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_two_threads(str(tiny_model))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_replies_of_the_135m_model_on_two_threads_are_those_alone(smollm2):
    code = "import sys; sys.path.insert(0, 'tests'); from test_shared_forward import check_two_threads; "
    code += f"check_two_threads({str(smollm2)!r})"
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
