"""Replies under way at once: each is what it would be alone, whoever joins, leaves or gives up beside it."""

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROOT
from helpers.architectures import DEVICE, VOCABULARY, build_model
from helpers.cuda_on_cpu import COMPILER, compile_on_cpu
from helpers.families import FAMILIES
from torch.nn import functional as F
from transformers import GenerationConfig

from utils.decode import prompt_reader
from utils.decode.cuda_c import compile_kernel
from utils.decode.graph import GraphDecoder
from utils.decode.layers import install_decode_layers
from utils.decode.loop import GrowingSteps, finish, stream_tokens
from utils.decode.model import WholeStep
from utils.decode.packed_product import Kernels, Shape
from utils.decode.prompt_reader import PromptReader
from utils.decode.setup import build_reader, install_graph_decode
from utils.decode.shared_decoder import SharedDecoder
from utils.decode.slots import plan_slots
from utils.fast.frozen_weights import read_weight

NEVER = VOCABULARY + 1
PROMPTS = [[5, 6, 7, 8, 9], [20, 21, 22], list(range(30, 50)), [11], [60, 61, 62, 63], [5, 6, 40], [70] * 9]


def config_of(count=16, stops=(NEVER,), **flags):
    flags = {"do_sample": False} | flags
    return GenerationConfig(max_new_tokens=count, eos_token_id=list(stops), pad_token_id=0, **flags)


SETTINGS = [
    config_of(12),
    config_of(7),
    config_of(16, do_sample=True, temperature=0.7, top_k=12),
    config_of(9, repetition_penalty=1.3),
    config_of(16, do_sample=True, top_p=0.8, top_k=0),
    config_of(1),
    config_of(20, do_sample=True, temperature=1.4, min_new_tokens=6, stops=(7, 30, 44)),
]


def by_generate(model, prompt, config, seed=0):
    torch.manual_seed(seed)
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    said = output[0, len(prompt) :].tolist()
    stop = next((i for i, token in enumerate(said) if token in config.eos_token_id), len(said))
    return said[: stop + 1]


def wait_until_idle(decoder, seconds=20):
    end = time.monotonic() + seconds
    while decoder.is_busy:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def llama():
    return build_model("llama with grouped queries").eval()


@pytest.fixture(params=["growing", "buffers"])
def turns(request, llama):
    """A decoder whose replies take turns: as on a CPU, and as on a GPU without slots."""
    model = llama if request.param == "growing" else build_model("llama with grouped queries").eval()
    steps = GrowingSteps(model) if request.param == "growing" else install_graph_decode(model)
    return llama, SharedDecoder(model, steps)


class TokenByToken(Kernels):
    """The two products by torch, one token at a time: on a CPU the source of the kernels takes seconds."""

    def multiply(self, group, x, y, xa=None, residual=None, gated=False, shape=None):
        if not hasattr(group, "unpacked"):
            group.unpacked = [read_weight(base, torch.float32) for base in group.bases]
        for i, row in enumerate(x.float()):
            parts = [weight @ row for weight in group.unpacked]
            if xa is not None:
                own = xa[i].float().split(group.ranks)
                parts = [part + B.float() @ a for part, B, a in zip(parts, group.B, own, strict=True)]
            biases = [0 if bias is None else bias.float() for bias in group.biases]
            parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
            out = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts)
            y[i] = out if residual is None else out.to(y.dtype) + residual[i]

    def multiply_rows(self, weight, x, y, norm=None, epsilon=0.0, normed=None, rows_at_once=1, blocks=None):
        for i, row in enumerate(x):
            row = row if norm is None else F.rms_norm(row, row.shape, norm, epsilon)
            if normed is not None:
                normed[i] = row
            if weight is not None:
                y[i] = weight.float() @ row.float()


def build_slots_decoder(name, count, tokens, kept=0, kind=TokenByToken if DEVICE == "cpu" else Kernels):
    """A bfloat16 model in 4 bits whose replies share steps; kernels run on a CPU too, by their source."""
    model = build_model(name, dtype=torch.bfloat16, bits=4).eval()
    base = model.get_base_model()
    compiler = compile_kernel if DEVICE == "cuda" else compile_on_cpu
    kernels = kind(torch.device(DEVICE), torch.bfloat16, compiler)
    if DEVICE == "cpu":
        kernels.shape = kernels.gated_shape = Shape(warps=4, blocks=1)  # fewer coroutines
    whole = WholeStep(base, kernels, install_decode_layers(base, torch.bfloat16, kernels))
    steps = GraphDecoder(base, whole, build_reader(base, whole))
    base.forward = steps.forward
    decoder = SharedDecoder(model, steps)
    decoder.open_slots(count, tokens, kept)
    assert decoder.shares_steps
    return decoder


needs_compiler = pytest.mark.skipif(DEVICE == "cpu" and not COMPILER, reason="needs g++ or a GPU")


@pytest.fixture(scope="module")
def slots():
    return build_slots_decoder("llama with grouped queries", 4, 64)


@torch.no_grad()
def alone(decoder, prompt, config, tuned=True):
    """A greedy reply by the steps of one conversation, which the terminal chat has."""
    steps = decoder.steps
    cache = steps.make_cache()
    with decoder.adapter.turned(tuned):
        choice = steps.find_choice(config)
        return list(stream_tokens(steps, prompt, cache, choice, config.max_new_tokens, config.eos_token_id))


@needs_compiler
def test_greedy_replies_that_share_steps_are_those_of_one_conversation(slots):
    """Tuned and base among each other, more than there are slots, of unlike lengths: token for token."""
    cases = [(prompt, config_of(6 + 3 * i), i % 3 != 1) for i, prompt in enumerate(PROMPTS)]
    replies = [slots.reply(prompt, config, tuned) for prompt, config, tuned in cases]
    said = [list(reply.tokens()) for reply in replies]
    wait_until_idle(slots)
    assert said == [alone(slots, *case) for case in cases]
    assert [reply.finish_reason for reply in replies] == ["length"] * len(cases)
    assert alone(slots, PROMPTS[0], config_of(), True) != alone(slots, PROMPTS[0], config_of(), False)


@needs_compiler
def test_so_they_are_by_the_kernels_themselves():
    decoder = build_slots_decoder("llama with grouped queries", 2, 48, kind=Kernels)
    replies = [decoder.reply(prompt, config_of(3)) for prompt in PROMPTS[:3]]
    said = [list(reply.tokens()) for reply in replies]
    wait_until_idle(decoder)
    assert said == [alone(decoder, prompt, config_of(3)) for prompt in PROMPTS[:3]]


@needs_compiler
@pytest.mark.parametrize("name", ["qwen2 with biases", "qwen3", "mistral with a window"])
def test_family_with_biases_normed_heads_or_a_window_shares_steps_too(name):
    decoder = build_slots_decoder(name, 2, 48)
    replies = [decoder.reply(prompt, config_of(8)) for prompt in PROMPTS[:3]]
    said = [list(reply.tokens()) for reply in replies]
    wait_until_idle(decoder)
    assert said == [alone(decoder, prompt, config_of(8)) for prompt in PROMPTS[:3]]


@needs_compiler
def test_logits_are_the_same_to_the_bit_whoever_is_beside(slots):
    steps, seen = slots.engine.steps, []
    for beside in ([], [1], [1, 3, 2], [3]):
        for place, prompt in zip([0, *beside], PROMPTS, strict=False):
            logits = finish(steps.read(place, prompt, 0))
            steps.place(place, len(prompt), logits.argmax(-1))
        rows = sorted([0, *beside], reverse=len(seen) % 2 == 1)
        for _ in range(3):
            logits = steps.step(rows, True)[rows.index(0)].clone()
        seen.append(logits)
    assert all(torch.equal(seen[0], other) for other in seen)


@needs_compiler
def test_sampled_replies_follow_from_their_seeds_and_settings_alone(slots):
    cases = [(PROMPTS[i], SETTINGS[i], i % 4 != 2, i) for i in range(len(PROMPTS))]
    by_themselves = [list(slots.reply(*case).tokens()) for case in cases]
    wait_until_idle(slots)
    together = [slots.reply(*case) for case in reversed(cases)][::-1]
    assert [list(reply.tokens()) for reply in together] == by_themselves
    assert all(
        1 <= len(said) <= config.max_new_tokens for said, config in zip(by_themselves, SETTINGS, strict=True)
    )
    other = list(slots.reply(PROMPTS[2], SETTINGS[2], seed=99).tokens())
    assert other != by_themselves[2]


@needs_compiler
def test_conversation_that_goes_on_is_not_read_again_and_a_full_house_forgets_it():
    decoder = build_slots_decoder("llama with grouped queries", 2, 96, kept=1)
    first = decoder.reply(PROMPTS[2], config_of(12))
    said = list(first.tokens())
    wait_until_idle(decoder)
    longer = [*PROMPTS[2], *said, 33, 34]
    again = decoder.reply(longer, config_of(12))
    tokens = list(again.tokens())
    assert first.reused_tokens == 0 and again.reused_tokens == len(PROMPTS[2]) + len(said) - 1
    with torch.no_grad():  # each token is the likeliest, but for 16 bits of rounding
        ids = torch.tensor([longer + tokens], device=DEVICE)
        logits = decoder.steps.plain(input_ids=ids).logits[0, len(longer) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(longer) :, None])[:, 0]
    assert (logits.max(1).values - chosen <= 0.02 * logits.std(1)).all()
    base = decoder.reply([*longer, *tokens, 5], config_of(2), tuned=False)
    others = [decoder.reply(PROMPTS[i], config_of(2)) for i in (0, 1)]
    for reply in (base, *others):
        list(reply.tokens())
    assert base.reused_tokens == 0  # other keys and values than the adapter's
    forgotten = decoder.reply([*longer, *tokens, 5], config_of(2))
    assert len(list(forgotten.tokens())) == 2 and forgotten.reused_tokens == 0


def read_some(reply, count):
    tokens = reply.tokens()
    said = [next(tokens) for _ in range(count)]
    tokens.close()
    return said


@needs_compiler
def test_who_hangs_up_leaves_room_for_who_waits(slots):
    long = config_of(40)
    expected = {i: alone(slots, PROMPTS[i], long) for i in range(5)}
    talkers = [slots.reply(PROMPTS[i], long) for i in range(4)]
    waiting = slots.reply(PROMPTS[4], config_of(5))
    gone = slots.reply(PROMPTS[5], config_of(5))
    gone.cancel()
    assert read_some(talkers[1], 3) == expected[1][:3]
    assert list(waiting.tokens()) == expected[4][:5]
    assert talkers[1].finish_reason == gone.finish_reason == "cancelled" and list(gone.tokens()) == []
    for i in (0, 2, 3):
        assert list(talkers[i].tokens()) == expected[i]


@needs_compiler
def test_prompt_read_in_parts_lets_others_speak_between_them(monkeypatch):
    from utils.decode import loop as decode_loop
    from utils.decode import slots

    for module in (slots, decode_loop):
        monkeypatch.setattr(module, "READ_TOGETHER", 4)
    decoder = build_slots_decoder("llama with grouped queries", 2, 64)
    expected = [alone(decoder, prompt, config_of(12)) for prompt in (PROMPTS[0], PROMPTS[2])]
    order, read, step = [], decoder.engine.steps.read, decoder.engine.steps.step
    monkeypatch.setattr(decoder.engine.steps, "read", lambda *args: (order.append("read"), read(*args))[1])
    monkeypatch.setattr(decoder.engine.steps, "step", lambda *args: (order.append("step"), step(*args))[1])
    first = decoder.reply(PROMPTS[0], config_of(12))
    tokens = first.tokens()
    said = [next(tokens)]
    second = decoder.reply(PROMPTS[2], config_of(12))
    assert [said + list(tokens), list(second.tokens())] == expected
    begun = order.index("read", 2)
    assert order[begun : begun + 13] == ["read", "step", "step"] * 4 + ["read"]  # the layers are two parts


@needs_compiler
def test_failure_ends_the_replies_it_concerns_and_the_next_ones_are_as_ever(slots, monkeypatch):
    expected = alone(slots, PROMPTS[0], config_of())
    steps = slots.engine.steps
    too_long = slots.reply([5] * 60, config_of())
    with pytest.raises(ValueError, match="prompt and reply are 76 tokens, a slot has 64"):
        list(too_long.tokens())
    with monkeypatch.context() as patched:
        patched.setattr(steps, "read", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(slots.reply(PROMPTS[0], config_of()).tokens())
    wait_until_idle(slots)
    with monkeypatch.context() as patched:
        patched.setattr(steps, "step", lambda *args: 1 / 0)
        for reply in [slots.reply(PROMPTS[i], config_of()) for i in (0, 1)]:
            with pytest.raises(ZeroDivisionError):
                list(reply.tokens())
    wait_until_idle(slots)
    assert list(slots.reply(PROMPTS[0], config_of()).tokens()) == expected


def test_fewer_slots_where_memory_is_short_in_one_line(capsys):
    assert plan_slots(8, 10**9, 20 * 10**9) == 8 and capsys.readouterr().out == ""
    assert plan_slots(8, 2 * 10**9, 7 * 10**9) == 3
    assert "3 at once by one step, not 8" in capsys.readouterr().out
    assert plan_slots(8, 2 * 10**9, -1) == 0 and "none at once" in capsys.readouterr().out


def test_replies_that_take_turns_are_those_of_generate(turns):
    """Of unlike settings, joining while others are under way: the same seed gives the same draws."""
    plain, decoder = turns
    replies = []
    for i, (prompt, config) in enumerate(zip(PROMPTS, SETTINGS, strict=True)):
        replies.append(decoder.reply(prompt, config, seed=i))
        time.sleep(0.01 * (i % 2))
    said = [list(reply.tokens()) for reply in replies]
    wait_until_idle(decoder)
    assert said == [
        by_generate(plain, prompt, config, i)
        for i, (prompt, config) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
    ]


def test_beams_are_left_to_generate_and_the_others_go_on(turns):
    plain, decoder = turns
    beams = config_of(12, num_beams=3)
    grams = config_of(12, no_repeat_ngram_size=2)
    replies = [decoder.reply(PROMPTS[0], beams), decoder.reply(PROMPTS[1], grams, seed=3)]
    replies += [
        decoder.reply(prompt, config_of(12), tuned=i % 2 == 0) for i, prompt in enumerate(PROMPTS[2:5])
    ]
    said = [list(reply.tokens()) for reply in replies]
    wait_until_idle(decoder)
    expected = [by_generate(plain, PROMPTS[0], beams), by_generate(plain, PROMPTS[1], grams)]
    for i, prompt in enumerate(PROMPTS[2:5]):
        with decoder.adapter.turned(True) if i % 2 == 0 else plain.disable_adapter():
            expected.append(by_generate(plain, prompt, config_of(12)))
    assert said == expected and all(reply.finish_reason == "length" for reply in replies)
    assert replies[4].seconds < replies[0].seconds or replies[2].seconds < replies[0].seconds


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_replies_of_every_family_under_way_at_once_are_those_of_generate(families, family):
    from utils.arguments import ModelArguments
    from utils.models.base import load_base

    model = load_base(ModelArguments(str(families(family)), bits=16), torch.float32, trainable=False).eval()
    decoder = SharedDecoder(model, GrowingSteps(model))
    config = config_of(10, stops=(model.config.vocab_size + 7,))
    replies = [decoder.reply(prompt, config) for prompt in PROMPTS[:4]]
    said = [list(reply.tokens()) for reply in replies]
    assert said == [by_generate(model, prompt, config) for prompt in PROMPTS[:4]]


def soak(decoder, expect, seconds, users=6):
    """Users who ask, listen, hang up or wait; every reply is compared to `expect`."""
    wrong, counts, end = [], {"whole": 0, "cancelled": 0}, time.monotonic() + seconds

    def use(user):
        chance = random.Random(user)
        while time.monotonic() < end:
            i, tuned = chance.randrange(len(PROMPTS)), chance.random() < 0.6
            config = config_of(chance.choice([1, 2, 9, 20]))
            reply, wanted = (
                decoder.reply(PROMPTS[i], config, tuned),
                expect[i, tuned][: config.max_new_tokens],
            )
            if chance.random() < 0.3:
                said = read_some(reply, chance.randrange(config.max_new_tokens))
                counts["cancelled"] += 1
            else:
                said = list(reply.tokens())
                counts["whole"] += 1
                if len(said) != len(wanted):
                    wrong.append((i, tuned, said))
            if said != wanted[: len(said)]:
                wrong.append((i, tuned, said))
            time.sleep(chance.random() * 0.01)

    with ThreadPoolExecutor(users) as pool:
        list(pool.map(use, range(users)))
    wait_until_idle(decoder)
    assert wrong == [] and counts["whole"] > users
    return counts


def expect_all(decoder):
    return {
        (i, tuned): alone(decoder, prompt, config_of(20), tuned)
        for i, prompt in enumerate(PROMPTS)
        for tuned in (True, False)
    }


@needs_compiler
def test_users_who_come_and_go_get_their_own_replies_from_slots(slots):
    soak(slots, expect_all(slots), 4)


def test_users_who_come_and_go_get_their_own_replies_in_turns(llama):
    decoder = SharedDecoder(llama, GrowingSteps(llama), kept=0)
    decoder.open_slots(3, 64, 0)
    soak(decoder, expect_all(decoder), 3)
    assert threading.active_count() < 20


@pytest.mark.slow
@needs_compiler
def test_users_who_come_and_go_for_two_minutes_get_their_own_replies(slots):
    counts = soak(slots, expect_all(slots), 120, users=12)
    assert counts["whole"] > 100 and counts["cancelled"] > 20


@needs_compiler
def test_answers_to_a_question_file_are_those_of_one_conversation_each(slots):
    """As many as there are, in order, tuned and base; slots that are too short are made anew."""
    from types import SimpleNamespace

    from eval.answers.answering import stream_replies
    from utils.arguments import GenerationArguments
    from utils.models.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(SimpleNamespace(pad_token_id=0), [NEVER])
    chat = SimpleNamespace(decoder=slots, tokenizer=tokenizer)
    for tuned, count in ((True, 9), (False, 9), (True, 60)):
        flags = GenerationArguments(max_new_tokens=count)
        said = list(stream_replies(chat, PROMPTS, flags, seed=0, batch_size=3, tuned=tuned))
        wait_until_idle(slots)
        assert said == [alone(slots, prompt, config_of(count), tuned) for prompt in PROMPTS]
    assert slots.engine.steps.capacity == 80


MISTAKES = {
    "turned the other way": ("find_rotations", lambda plain, self, *args: (plain(self, *args)[0], -plain(self, *args)[1])),
    "without the adapter": ("multiply", lambda plain, self, group, x: x @ torch.cat([read_weight(base, x.dtype) for base in group.bases]).t()),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mistake", [*MISTAKES, "every token sees all", "no weights of norms"])
def test_reader_that_makes_a_mistake_is_refused_and_slots_read_by_the_model(mistake, monkeypatch, capsys):
    """By the first layers' logits, keys and values: what is right is a percent away, in 16 bits."""
    if mistake in MISTAKES:
        name, change = MISTAKES[mistake]
        plain = getattr(PromptReader, name)
        monkeypatch.setattr(PromptReader, name, lambda self, *args: change(plain, self, *args))
    elif mistake == "every token sees all":
        attend = prompt_reader.attend

        def see_all(layer, q, keys, values, seen):
            everything = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=DEVICE)
            return attend(layer, q, keys, values, everything)

        monkeypatch.setattr(prompt_reader, "attend", see_all)
    else:
        normalize = prompt_reader.normalize
        ones = lambda x, norm: normalize(x, (torch.ones_like(norm[0]), norm[1]))  # noqa: E731
        monkeypatch.setattr(prompt_reader, "normalize", ones)
    decoder = build_slots_decoder("llama with grouped queries", 2, 48)
    assert "prompts by the model's own forward (the other way gives" in capsys.readouterr().out
    assert decoder.steps.reader is None
    replies = [decoder.reply(prompt, config_of(6), tuned=i != 1) for i, prompt in enumerate(PROMPTS[:3])]
    said = [list(reply.tokens()) for reply in replies]
    wait_until_idle(decoder)
    expected = [alone(decoder, prompt, config_of(6), i != 1) for i, prompt in enumerate(PROMPTS[:3])]
    assert said == expected


@needs_compiler
def test_steps_that_make_a_mistake_are_refused_with_a_line(monkeypatch, capsys):
    decoder = build_slots_decoder("llama with grouped queries", 2, 48)
    plain = WholeStep.prepare_rotations
    turned = lambda self, capacity: (plain(self, capacity)[0], -plain(self, capacity)[1])  # noqa: E731
    monkeypatch.setattr(WholeStep, "prepare_rotations", turned)
    decoder.open_slots(2, 64)
    assert not decoder.shares_steps
    assert "one conversation after another (a step gives keys that are" in capsys.readouterr().out
    assert len(list(decoder.reply(PROMPTS[0], config_of(3)).tokens())) == 3


def test_program_that_ends_while_somebody_is_still_replied_to_ends_well(tiny_model):
    """The thread that computes is waited for: torch aborts a process that leaves it behind."""
    program = f"""
import os, sys
from utils.arguments import GenerationArguments, ModelArguments
from utils.chat.generation import load_run
from utils.chat.streaming import open_reply
from utils.models.folder import resolve_model
for _ in range(3):  # forks of what has computed nothing: the seconds of imports are paid once
    child = os.fork()
    if child == 0:
        break
    print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
chat = load_run(resolve_model(ModelArguments({str(tiny_model)!r}), set()))
flags = GenerationArguments(max_new_tokens=400, min_new_tokens=400)
replies = [open_reply(chat, [{{"role": "user", "content": str(i)}}], flags) for i in range(3)]
next(replies[0].tokens())
print("leaving")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and result.stdout.count("leaving") == 3, result.stderr
    assert result.stdout.count("ended with 0") == 3, result.stdout + result.stderr
