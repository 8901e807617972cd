"""Whole replies and whole steps, by each way there is: parts of eval.decode_speed."""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PretrainedConfig

from eval.speed.decode_products import make_kernels
from eval.speed.gpu_time import DEVICE, DTYPE, relative, say, time_call
from eval.speed.replies import build_adapted_model, time_by_generate, time_by_steps
from utils.decode.cuda_c import Kernel
from utils.decode.graph import GraphDecoder
from utils.decode.layers import find_kernel_fault, install_decode_layers
from utils.decode.model import WholeStep, find_whole_obstacle

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments


class Replies:
    """Times replies to one prompt by one way after another: how long are they the words of the first?"""

    def __init__(self, prompt: torch.Tensor, count: int):
        self.prompt, self.count = prompt, count
        self.tokens: dict[str, list[int]] = {}

    def note(self, name: str, reply: Any, said: list[int]) -> None:
        self.tokens[name] = said
        first = next(iter(self.tokens.values()))
        same = next((i for i, (a, b) in enumerate(zip(said, first, strict=False)) if a != b), self.count)
        say(
            f"{name:<28} {reply.tokens_per_second:7.1f} tokens/s, first after "
            f"{1e3 * reply.first_token_seconds:.0f} ms, peak {reply.peak_gib:.2f} GiB; the first {same} "
            "tokens are those of before"
        )

    def time(self, name: str, decoder: GraphDecoder, **flags: Any) -> None:
        self.note(name, *time_by_steps(decoder, self.prompt, self.count, **flags))


def time_all_replies(arguments: "DecodeSpeedArguments") -> None:
    """By bitsandbytes in a graph, as before; by our products between the model's modules; by whole steps."""
    model = build_adapted_model(arguments.model, 4, arguments.lora_r, DTYPE, DEVICE)
    base = model.get_base_model()
    plain = base.forward
    prompt = torch.randint(5, base.config.vocab_size, (1, arguments.prompt_tokens), device=DEVICE)
    replies = Replies(prompt, arguments.max_new_tokens)
    expected = plain(input_ids=prompt).logits[:, -1].float()  # through PEFT and bitsandbytes
    layers = [module for module in base.modules() if "forward" in vars(module)]
    install_decode_layers(base, DTYPE, None)
    decoder = GraphDecoder(base)
    base.forward = decoder.forward
    replies.note("as before", *time_by_generate(model, prompt, replies.count))
    replies.time("as before, our loop", decoder)
    for module in base.modules():  # PEFT's own forward again
        if module not in layers:
            vars(module).pop("forward", None)
    base.forward = plain
    kernels = make_kernels()
    start = time.perf_counter()
    say("kernels against the model's layers:", find_kernel_fault(base, DTYPE, kernels) or "equal")
    groups = install_decode_layers(base, DTYPE, kernels)
    obstacle = find_whole_obstacle(base, groups)
    say(f"installed in {time.perf_counter() - start:.1f} s; whole: {obstacle or 'yes'}")
    got = base(input_ids=prompt).logits[:, -1].float()
    say(f"logits of the prompt, installed against PEFT's: {relative(got, expected):.5f}")
    replies.time("our products, its modules", GraphDecoder(base))
    time_whole_steps(GraphDecoder(base, WholeStep(base, kernels, groups)), replies)


def time_whole_steps(decoder: GraphDecoder, replies: Replies) -> None:
    start = time.perf_counter()
    replies.time("whole steps", decoder)
    seconds = time.perf_counter() - start
    say(f"   (both replies with compiling and capturing {seconds:.1f} s; obstacle {decoder.obstacle}, "
        f"whole {decoder.whole is not None})")  # fmt: skip
    for name, flags in (
        ("whole, sampled", {"do_sample": True, "top_k": 50}),
        ("whole, sampled, top_p", {"do_sample": True, "top_k": 50, "top_p": 0.9}),
        ("whole, repetition penalty", {"repetition_penalty": 1.1}),
    ):
        replies.time(name, decoder, **flags)
    Kernel.overlaps = False
    decoder.graphs.clear()
    replies.time("whole, no overlap", decoder)
    Kernel.overlaps = True
    decoder.graphs.clear()
    prompt, said = replies.prompt, torch.tensor([replies.tokens["whole steps"]], device=DEVICE)
    replies.prompt = torch.cat(
        [prompt, said, prompt[:, -16:]], 1
    )  # what comes next may have been said before
    replies.time("whole, longer prompt", decoder)
    replies.time("whole, proposals", decoder, proposed=7)
    compare_steps(decoder, prompt)
    check_same_again(decoder)
    time_steps(decoder.whole, decoder.base.config)


def compare_steps(decoder: GraphDecoder, prompt: torch.Tensor) -> None:
    """One step's logits by both ways, after the prompt."""
    logits = {}
    whole = decoder.whole
    for name, step in (("modules", None), ("whole", whole)):
        cache = DynamicCache(config=decoder.config)
        decoder.read(prompt, cache)
        decoder.whole, decoder.buffers, decoder.capacity = step, None, 0
        decoder.prepare(prompt[:, -1:], cache, 1)
        decoder.ids[1].copy_(prompt[:, -1:])
        logits[name] = decoder.run().float().clone()
        decoder.cut(cache, prompt.shape[1])
    decoder.whole = whole
    ids = logits["modules"][0, 0].topk(3).indices
    say(f"one step, whole against modules: {relative(logits['whole'], logits['modules']):.5f}")
    for name, values in logits.items():
        say(f"   the likeliest, by {name}: {ids.tolist()} {values[0, 0, ids].tolist()}")


def check_same_again(decoder: GraphDecoder) -> None:
    """The same step from the same state many times: a race between kernels would show."""
    length, results = decoder.length, []
    for count in (1, 8):
        step, first = partial(decoder.run, count), None
        decoder.replay("logits", step, count)
        for _ in range(50):
            decoder.set_length(length)
            logits = decoder.replay("logits", step, count)
            first = logits.clone() if first is None else first
            results.append(torch.equal(first, logits))
        decoder.graphs.pop(("logits", True), None)
        decoder.set_length(length)
    say(f"the same step again: {sum(results)} of {len(results)} equal bit for bit")


STEPS = ((1, 1, 512), (1, 1, 4096), (1, 8, 512), (2, 1, 512), (4, 1, 512), (8, 1, 512))


def time_steps(whole: WholeStep | None, config: PretrainedConfig) -> None:
    """Milliseconds of the bare step, by conversations, new tokens and tokens before."""
    if whole is None:
        return
    for conversations, fresh, length in STEPS:
        milliseconds = time_step(whole, config, conversations, fresh, length)
        say(
            f"step of {conversations} x {fresh} tokens after {length}: {milliseconds:.3f} ms, "
            f"{1e3 * conversations * fresh / milliseconds:.0f} tokens/s"
        )


def time_step(
    whole: WholeStep, config: PretrainedConfig, conversations: int, fresh: int, length: int
) -> float:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (2, conversations, config.num_key_value_heads, length + 64, size)
    pairs = [
        torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_() for _ in range(config.num_hidden_layers)
    ]
    caches = [(keys, values) for keys, values in pairs]
    turns = whole.prepare_rotations(length + 64)
    lengths = torch.full((conversations,), length, dtype=torch.int32, device=DEVICE)
    ids = torch.full((conversations, fresh), 7, device=DEVICE)

    def run() -> None:
        whole.run(ids, caches, turns, lengths)
        lengths.sub_(fresh)

    return time_call(run)
