"""Our own loop over the tokens of a reply says what transformers' generate says, for every family."""

import pytest
import torch
from helpers import slow_but
from helpers.architectures import CONFIGS, DEVICE, GQA, VOCABULARY, build_model
from helpers.families import FAMILIES
from scipy.stats import chisquare
from transformers import DynamicCache, Gemma3TextConfig, GenerationConfig, MistralConfig, Phi3Config

from utils.decode import graph as graph_decode
from utils.decode.loop import Continuations, GrowingSteps, stream_tokens
from utils.decode.setup import install_graph_decode
from utils.decode.token_choice import NotCovered, TokenChoice

SETTINGS = {
    "greedy": {},
    "greedy, at least 20 tokens": {"min_new_tokens": 20},
    "greedy, repetitions punished": {"repetition_penalty": 1.3},
    "sampled": {"do_sample": True},
    "sampled, sharper": {"do_sample": True, "temperature": 0.6, "top_k": 10, "top_p": 0.8},
    "sampled, all of it": {
        "do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "typical_p": 0.9,
        "repetition_penalty": 1.2, "min_new_tokens": 8,
    },
}  # fmt: skip
PROMPT = [5, 6, 7, 8, 9, 7, 8]


def config_of(setting, stops=(2,), count=24):
    return GenerationConfig(
        **SETTINGS[setting], max_new_tokens=count, eos_token_id=list(stops), pad_token_id=0
    )


def reply_by_generate(model, prompt, config, seed=0):
    torch.manual_seed(seed)
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def reply_by_loop(steps, prompt, config, seed=0, cache=None, proposed=0):
    torch.manual_seed(seed)
    cache = steps.make_cache() if cache is None else cache
    choice = steps.find_choice(config)
    with torch.no_grad():
        return list(
            stream_tokens(steps, prompt, cache, choice, config.max_new_tokens, config.eos_token_id, proposed)
        )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_family_says_token_for_token_what_generate_says(families, family):
    from utils.arguments import ModelArguments
    from utils.models.base import load_base

    model = load_base(ModelArguments(str(families(family)), bits=16), torch.float32, trainable=False).eval()
    for setting in ("greedy", "sampled, all of it"):
        config = config_of(setting, stops=(model.config.vocab_size - 1,))
        expected = reply_by_generate(model, PROMPT, config)
        assert reply_by_loop(GrowingSteps(model), PROMPT, config) == expected


@pytest.fixture(scope="module")
def llama():
    return build_model("llama with grouped queries").eval().merge_and_unload()


@pytest.mark.parametrize("setting", SETTINGS)
def test_choice_of_a_token_is_that_of_transformers(llama, setting):
    config = config_of(setting)
    for seed in range(5):
        expected = reply_by_generate(llama, PROMPT, config, seed)
        assert reply_by_loop(GrowingSteps(llama), PROMPT, config, seed) == expected


def test_reply_ends_with_its_stop_token_and_the_cache_before_it(llama):
    free = reply_by_loop(GrowingSteps(llama), PROMPT, config_of("greedy", stops=(VOCABULARY + 1,)))
    stop = free[5]
    cache = DynamicCache(config=llama.config)
    said = reply_by_loop(GrowingSteps(llama), PROMPT, config_of("greedy", stops=(stop,)), cache=cache)
    assert said == free[: free.index(stop) + 1]
    assert cache.get_seq_length() == len(PROMPT) + len(said) - 1


def test_what_depends_on_more_than_scores_is_left_to_generate(llama):
    for flags in ({"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [5]}):
        with pytest.raises(NotCovered):
            TokenChoice(llama, GenerationConfig(**flags, eos_token_id=2, pad_token_id=0))


def test_ten_thousand_draws_have_the_distribution_that_transformers_gives_them(llama):
    """Of one step, by the chi-square of their counts; transformers' own processors give the shares."""
    config = config_of("sampled, sharper")
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 3
    from transformers.generation import logits_process as own

    scores = own.TemperatureLogitsWarper(0.6)(None, logits)
    scores = own.TopPLogitsWarper(0.8)(None, own.TopKLogitsWarper(10)(None, scores))
    shares = scores.softmax(-1)[0].double().cpu()
    choice = TokenChoice(llama, config)
    choice.begin(PROMPT)
    torch.manual_seed(1)
    draws = torch.stack([choice.choose(logits)[0] for _ in range(10_000)]).cpu()
    counts = torch.bincount(draws, minlength=VOCABULARY)
    kept = shares > 0
    assert counts[~kept].sum() == 0 and 3 <= kept.sum() <= 10
    assert (
        chisquare(counts[kept].numpy(), (shares[kept] / shares[kept].sum() * 10_000).numpy()).pvalue > 0.001
    )


class Spoken(GrowingSteps):
    """Counts what is read at once."""

    def __init__(self, model):
        super().__init__(model)
        self.sizes = []

    def verify(self, ids, cache):
        self.sizes.append(len(ids))
        return super().verify(ids, cache)


@pytest.mark.parametrize("proposed", [1, 3, 7])
def test_proposals_from_the_prompt_leave_the_greedy_reply_as_it_is(llama, proposed):
    config = config_of("greedy", stops=(VOCABULARY + 1,), count=60)
    expected = reply_by_loop(GrowingSteps(llama), PROMPT, config)
    repeated = PROMPT + expected[:40] + PROMPT  # what comes next has been said before, more or less
    expected = reply_by_loop(GrowingSteps(llama), repeated, config)
    steps = Spoken(llama)
    cache = DynamicCache(config=llama.config)
    assert reply_by_loop(steps, repeated, config, cache=cache, proposed=proposed) == expected
    assert len(steps.sizes) < len(expected) - 1  # several tokens in one step, now and then
    assert max(steps.sizes) == proposed + 1
    assert cache.get_seq_length() == len(repeated) + len(expected) - 1


def test_stop_token_among_accepted_proposals_ends_the_reply(llama):
    config = config_of("greedy", stops=(VOCABULARY + 1,), count=60)
    expected = reply_by_loop(GrowingSteps(llama), PROMPT, config)
    repeated = PROMPT + expected + PROMPT
    free = reply_by_loop(GrowingSteps(llama), repeated, config)
    stop = free[9]
    config = config_of("greedy", stops=(stop,), count=60)
    cache = DynamicCache(config=llama.config)
    said = reply_by_loop(GrowingSteps(llama), repeated, config, cache=cache, proposed=7)
    assert said == free[: free.index(stop) + 1]
    assert cache.get_seq_length() == len(repeated) + len(said) - 1


def test_what_came_after_the_latest_place_of_the_last_tokens_is_proposed():
    said = Continuations([7, 8, 9, 5, 7, 8])
    assert said.find(2) == [9, 5] and said.find(9) == [9, 5, 7, 8]
    said.add(6)
    assert said.find(3) == []
    for token in (8, 9):
        said.add(token)
    assert said.find(1) == [5]
    assert Continuations([1, 2, 3, 9, 2, 3, 4, 1, 2, 3]).find(1) == [9]  # three tokens weigh more than two
    assert Continuations([1]).find(3) == []


@pytest.fixture
def decoders(monkeypatch):
    """The steps of a GPU, over buffers of a fixed size, and the plain model beside them."""
    monkeypatch.setattr(graph_decode, "SMALLEST_CAPACITY", 16)
    models = [build_model("llama with grouped queries").eval() for _ in range(2)]
    return models[0], install_graph_decode(models[1])


@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_over_buffers_say_what_generate_says(decoders, setting):
    plain, decoder = decoders
    if DEVICE == "cuda" and "sampled" in setting:
        pytest.skip("a graph draws other numbers than an eager step")
    for seed in range(2):
        config = config_of(setting)
        expected = reply_by_generate(plain, PROMPT, config, seed)
        assert reply_by_loop(decoder, PROMPT, config, seed) == expected
    assert not decoder.obstacle


WINDOWS = {
    "mistral": lambda: MistralConfig(**GQA, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(**GQA | {"num_hidden_layers": 6}, head_dim=16, sliding_window=8),
    "phi3": lambda: Phi3Config(**GQA, sliding_window=8),
}


@pytest.mark.parametrize("name", slow_but(["gemma3"], WINDOWS))
def test_family_that_sees_a_window_of_the_latest_tokens_goes_over_buffers_too(name, monkeypatch):
    """They keep all tokens, and masks hide the others: also of a conversation that goes on."""
    monkeypatch.setattr(graph_decode, "SMALLEST_CAPACITY", 16)
    monkeypatch.setitem(CONFIGS, name, WINDOWS[name])
    plain, model = (build_model(name).eval() for _ in range(2))
    decoder = install_graph_decode(model)
    config = config_of("greedy", stops=(VOCABULARY + 1,), count=40)
    expected = reply_by_generate(plain, PROMPT, config)
    assert len(set(expected)) > 2
    cache = decoder.make_cache()
    assert reply_by_loop(decoder, PROMPT, config, cache=cache) == expected and not decoder.obstacle
    longer = [*PROMPT, *expected, 11, 12]
    assert reply_by_loop(decoder, longer, config, cache=cache) == reply_by_generate(plain, longer, config)
    again = PROMPT + expected[:20] + PROMPT
    proposed = reply_by_loop(decoder, again, config, proposed=5)
    assert proposed == reply_by_generate(plain, again, config) and decoder.buffers and not decoder.obstacle


def test_proposals_over_buffers_leave_the_greedy_reply_as_it_is(decoders):
    plain, decoder = decoders
    config = config_of("greedy", stops=(VOCABULARY + 1,), count=40)
    prompt = PROMPT + reply_by_generate(plain, PROMPT, config) + PROMPT
    expected = reply_by_generate(plain, prompt, config)
    cache = DynamicCache(config=plain.config)
    assert reply_by_loop(decoder, prompt, config, cache=cache, proposed=5) == expected
    assert cache.get_seq_length() == len(prompt) + len(expected) - 1 and not decoder.obstacle
    longer = [*prompt, *expected, 11, 12]
    assert reply_by_loop(decoder, longer, config, cache=cache) == reply_by_generate(plain, longer, config)


def test_replies_that_take_turns_token_by_token_stay_apart(decoders):
    plain, decoder = decoders
    config = config_of("greedy, repetitions punished", stops=(VOCABULARY + 1,))
    prompts = [PROMPT, [20, 21, 22], list(range(30, 50))]
    caches = [DynamicCache(config=plain.config) for _ in prompts]
    with torch.no_grad():
        streams = [
            stream_tokens(decoder, prompt, cache, decoder.find_choice(config), 24, [VOCABULARY + 1])
            for prompt, cache in zip(prompts, caches, strict=True)
        ]
        said = [list(tokens) for tokens in zip(*(zip(*streams, strict=True)), strict=True)]
        [stream.close() for stream in streams]
    assert said == [reply_by_generate(plain, prompt, config) for prompt in prompts]
    for prompt, tokens, cache in zip(prompts, said, caches, strict=True):
        assert cache.get_seq_length() == len(prompt) + len(tokens) - 1


def test_generate_between_two_tokens_of_a_reply_changes_neither(decoders):
    plain, decoder = decoders
    config = config_of("greedy", stops=(VOCABULARY + 1,))
    expected = reply_by_generate(plain, PROMPT, config)
    cache, said = DynamicCache(config=plain.config), []
    with torch.no_grad():
        for token in stream_tokens(decoder, PROMPT, cache, decoder.find_choice(config), 24, [VOCABULARY + 1]):
            said.append(token)
            other = reply_by_generate(decoder.base, [30, 31, 32], config)
            assert other == reply_by_generate(plain, [30, 31, 32], config)
    assert said == expected


def test_reply_that_is_broken_off_leaves_a_cache_that_goes_on(decoders):
    plain, decoder = decoders
    config = config_of("greedy", stops=(VOCABULARY + 1,))
    expected = reply_by_generate(plain, PROMPT, config)
    cache = DynamicCache(config=plain.config)
    with torch.no_grad():
        stream = stream_tokens(decoder, PROMPT, cache, decoder.find_choice(config), 24, [VOCABULARY + 1])
        said = [next(stream) for _ in range(5)]
        stream.close()
    assert cache.get_seq_length() == len(PROMPT) + 4
    assert said + reply_by_loop(decoder, PROMPT + said, config, cache=cache)[:19] == expected


def test_steps_that_cannot_go_over_buffers_go_on_without_them(decoders, monkeypatch, capsys):
    plain, decoder = decoders
    config = config_of("greedy", stops=(VOCABULARY + 1,))
    run = decoder.run
    monkeypatch.setattr(decoder, "run", lambda *args: run(*args) * 1.2)
    assert reply_by_loop(decoder, PROMPT, config) == reply_by_generate(plain, PROMPT, config)
    assert decoder.obstacle in capsys.readouterr().out and decoder.buffers is None
    assert reply_by_loop(decoder, PROMPT, config) == reply_by_generate(plain, PROMPT, config)


@pytest.mark.parametrize("at", [2, 9])
def test_step_that_runs_out_of_memory_is_repeated(decoders, monkeypatch, at):
    plain, decoder = decoders
    config = config_of("greedy, repetitions punished", stops=(VOCABULARY + 1,))
    run, steps = decoder.run, []

    def fail_once(*args):
        steps.append(1)
        if len(steps) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*args)

    monkeypatch.setattr(decoder, "run", fail_once)
    assert reply_by_loop(decoder, PROMPT, config) == reply_by_generate(plain, PROMPT, config)
    assert (decoder.obstacle == "CUDA out of memory") == (DEVICE == "cpu")
