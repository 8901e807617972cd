"""Replies under way at once: each is what it would be alone, whoever joins, leaves or gives up beside it."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.architectures import DEVICE, VOCABULARY, build_model
from helpers.cuda_on_cpu import COMPILER, compile_on_cpu
from helpers.families import FAMILIES
from transformers import DynamicCache, GenerationConfig

from utils.fast.cuda_c import compile_kernel
from utils.fast.decode_layers import install_decode_layers
from utils.fast.decode_loop import GrowingSteps, stream_tokens
from utils.fast.decode_model import WholeStep
from utils.fast.decode_setup import build_reader, install_graph_decode
from utils.fast.graph_decode import GraphDecoder
from utils.fast.packed_product import Kernels, Shape
from utils.fast.shared_decoder import SharedDecoder
from utils.fast.slots import plan_slots

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


def build_slots_decoder(name, count, tokens, kept=0):
    """A bfloat16 model in 4 bits whose replies share steps; the kernels run on a CPU too, by their source."""
    model = build_model(name, dtype=torch.bfloat16, bits=4).eval()
    base = model.get_base_model()
    kernels = Kernels(
        torch.device(DEVICE), torch.bfloat16, compile_kernel if DEVICE == "cuda" else compile_on_cpu
    )
    if DEVICE == "cpu":
        kernels.shape = kernels.gated_shape = Shape(warps=4, blocks=1)  # fewer coroutines
    whole = WholeStep(base, kernels, install_decode_layers(base, torch.bfloat16, kernels))
    steps = GraphDecoder(base, whole, build_reader(base, whole))
    assert steps.reader
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
    cache = DynamicCache(config=steps.base.config)
    with decoder.adapter.turned(tuned):
        choice = steps.find_choice(config)
        return list(
            stream_tokens(steps, prompt, cache, choice, config.max_new_tokens, config.eos_token_id)
        )


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
