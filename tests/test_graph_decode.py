"""Replies over buffers of a fixed size: the tokens of the growing cache, whatever a conversation does."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from utils.decode import graph as graph_decode
from utils.decode.graph import GraphDecoder
from utils.decode.setup import install_graph_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def models(tiny_model, monkeypatch):
    """The same model twice, once with the decoder; its buffers hold 32 tokens and grow from there."""
    monkeypatch.setattr(graph_decode, "SMALLEST_CAPACITY", 32)
    plain, decoded = (AutoModelForCausalLM.from_pretrained(tiny_model).to(DEVICE).eval() for _ in range(2))
    return plain, decoded, install_graph_decode(decoded)


def reply(model, prompt, cache=None, count=12, **flags):
    input_ids = torch.tensor([prompt], device=model.device)
    given = {} if cache is None else {"past_key_values": cache}
    flags |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(input_ids)
    return model.generate(input_ids=input_ids, attention_mask=mask, **given, **flags)[0].tolist()


def test_reply_is_that_of_the_growing_cache_beyond_the_first_buffers(models):
    plain, decoded, decoder = models
    prompt = list(range(5, 27))
    assert reply(decoded, prompt, count=60) == reply(plain, prompt, count=60)
    assert decoder.capacity == 128 and not decoder.obstacle
    assert list(decoder.graphs) == ([True] if DEVICE == "cuda" else [])
    reply(decoded, prompt[:4])
    assert decoder.capacity == 32  # nobody needs the larger ones any more


def test_logits_are_those_of_the_growing_cache(models):
    plain, decoded, _ = models
    caches = [DynamicCache(config=model.config) for model in (plain, decoded)]
    with torch.no_grad():
        for ids in ([3, 4, 5, 6, 7], [8], [9], [10, 11, 12], [13], [14]):
            ids = torch.tensor([ids], device=DEVICE)
            expected, got = (
                model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
                for model, cache in zip((plain, decoded), caches, strict=True)
            )
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            assert caches[0].get_seq_length() == caches[1].get_seq_length()
    for left, right in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(left.keys, right.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left.values, right.values, rtol=1e-4, atol=1e-5)


def test_kept_conversation_goes_on_and_is_cut_back(models):
    plain, decoded, _ = models
    cache = DynamicCache(config=decoded.config)
    first = reply(decoded, [5, 6, 7, 8], cache)
    longer = [*first, 9, 10]
    assert reply(decoded, longer, cache) == reply(plain, longer)
    for cut in (7, 3):  # another last token: the cache is cropped, and one token is read again
        cache.crop(cut - cache.get_seq_length())
        other = [*first[:cut], 11]
        assert reply(decoded, other, cache) == reply(plain, other)


def test_conversations_that_take_turns_token_by_token_stay_apart(models):
    plain, decoded, decoder = models
    prompts = [[5, 6, 7], [20, 21, 22, 23, 24], list(range(30, 60))]
    caches = [DynamicCache(config=decoded.config) for _ in prompts]
    rows = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for step in range(10):
            for row, cache in zip(rows, caches, strict=True):
                ids = torch.tensor([row if step == 0 else row[-1:]], device=DEVICE)
                logits = decoded(input_ids=ids, past_key_values=cache, use_cache=True).logits
                row.append(int(logits[0, -1].argmax()))
    assert rows == [reply(plain, prompt, count=10) for prompt in prompts]
    assert decoder.owner() is caches[-1]


def test_conversation_that_is_dropped_is_not_kept_alive(models):
    _, decoded, decoder = models
    reply(decoded, [5, 6, 7])
    assert decoder.owner() is None and decoder.buffers is not None


def test_batches_beams_and_gradients_take_the_plain_forward(models):
    plain, decoded, decoder = models
    assert reply(decoded, [5, 6, 7], num_beams=2) == reply(plain, [5, 6, 7], num_beams=2)
    ids = torch.tensor([[5, 6], [7, 8]], device=DEVICE)
    flags = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(decoded.generate(ids, **flags), plain.generate(ids, **flags))
    decoded(input_ids=ids[:1], labels=ids[:1]).loss.backward()
    assert decoder.buffers is None


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [0] * 30 + [1] * 9])
def test_lone_prompt_that_is_padded_on_the_left_gets_the_plain_models_reply(models, mask):
    """And so the reply to the same prompt without padding."""
    plain, decoded, decoder = models
    prompt = torch.arange(5, 5 + len(mask), device=DEVICE)[None]
    flags = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    flags["attention_mask"] = torch.tensor([mask], device=DEVICE)
    replies = [model.generate(prompt, **flags)[0, len(mask) :].tolist() for model in (plain, decoded)]
    shown = prompt[0, mask.count(0) :].tolist()
    assert replies[0] == replies[1] == reply(decoded, shown)[len(shown) :]
    assert decoder.buffers is not None and not decoder.obstacle  # of the prompt without padding


def test_step_that_asks_for_more_than_logits_gets_it(models):
    """Hidden states, a position of the caller's own, a loss."""
    plain, decoded, _ = models
    cache = [DynamicCache(config=model.config) for model in (plain, decoded)]
    ids = torch.tensor([[5, 6, 7]], device=DEVICE)
    last = ids[:, -1:]
    asked = [{"output_hidden_states": True}, {"position_ids": last}, {"labels": last}]
    with torch.no_grad():
        outputs = [
            [
                model(input_ids=ids if i == 0 else last, past_key_values=own, **more)
                for i, more in enumerate([{}, *asked])
            ]
            for model, own in zip((plain, decoded), cache, strict=True)
        ]
    for expected, got in zip(*outputs, strict=True):
        assert expected.keys() == got.keys()
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(outputs[1][1].hidden_states) == 3


def test_adapter_is_switched_off_and_on_between_tokens(tiny_model, models):
    from peft import LoraConfig, get_peft_model

    base, _, _ = models
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model).to(DEVICE), config).eval()
    tuned = reply(model, [5, 6, 7])
    install_graph_decode(model)
    short = [layer for layer in model.modules() if "forward_adapted" in repr(vars(layer).get("forward"))]
    assert len(short) == 14  # all linear layers
    for _ in range(2):
        assert reply(model, [5, 6, 7]) == tuned
        with model.disable_adapter():
            assert reply(model, [5, 6, 7]) == reply(base, [5, 6, 7]) != tuned


def test_model_that_the_buffers_do_not_fit_says_so_and_replies_as_ever(models, monkeypatch, capsys):
    plain, decoded, decoder = models
    run = GraphDecoder.run
    monkeypatch.setattr(GraphDecoder, "run", lambda self: run(self) * 1.2)
    assert reply(decoded, [5, 6, 7]) == reply(plain, [5, 6, 7])
    assert "without CUDA graphs (a cache of fixed size gives other logits)" in capsys.readouterr().out
    assert decoder.buffers is None


@pytest.mark.parametrize("error", [ValueError("no such mask"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("place", ["plain", "buffers"])
def test_step_that_breaks_off_between_layers_is_repeated_on_what_was_there(models, monkeypatch, error, place):
    plain, decoded, decoder = models
    last, raised = decoded.model.layers[-1], []
    forward = last.forward

    def break_once(*args, **kwargs):
        cache = kwargs["past_key_values"]
        if (
            not raised
            and cache.get_seq_length() > 3
            and isinstance(cache, StaticCache) == (place == "buffers")
        ):
            raised.append(error)
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(last, "forward", break_once)
    if place == "plain" and isinstance(error, ValueError):  # the model itself fails: its own error
        with pytest.raises(ValueError, match="no such mask"):
            reply(decoded, [5, 6, 7])
        return
    cache = DynamicCache(config=decoded.config)
    assert reply(decoded, [5, 6, 7], cache) == reply(plain, [5, 6, 7])
    assert raised and decoder.obstacle and len({layer.get_seq_length() for layer in cache.layers}) == 1


def test_each_reply_may_come_from_a_thread_of_its_own(models):
    plain, decoded, _ = models
    expected = reply(plain, [5, 6, 7])
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:  # as in a chat
            assert pool.submit(reply, decoded, [5, 6, 7]).result() == expected


def test_timing_command_prints_both_speeds(tmp_path, monkeypatch, capsys):
    from eval import chat_speed

    argv = [
        "--model",
        "tiny",
        "--prompt_tokens",
        "8",
        "--max_new_tokens",
        "40",
        "--output_dir",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", ["chat_speed", *argv])
    chat_speed.main()
    rows = json.loads((tmp_path / "tiny.json").read_text())["replies"]
    assert len(rows) == (4 if DEVICE == "cuda" else 3) and all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[-2]["ready_seconds"] > 0 and rows[-1]["conversations"] == 8
    assert "plain" in capsys.readouterr().out
