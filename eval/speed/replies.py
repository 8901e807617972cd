"""Times the replies that eval.chat_speed asks for."""

import gc
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from eval.speed.shapes import SHAPES, build_random_model
from utils.console import notice
from utils.decode.graph import GraphDecoder
from utils.decode.layers import install_decode_layers
from utils.decode.loop import GrowingSteps, Steps, stream_tokens
from utils.decode.reply import Reply
from utils.decode.setup import install_graph_decode
from utils.decode.shared_decoder import SharedDecoder
from utils.fast.frozen_weights import unpack_8bit_layers
from utils.run.record import write_json

if TYPE_CHECKING:
    from eval.chat_speed import ChatSpeedArguments


@dataclass
class Timed:
    variant: str
    tokens_per_second: float  # after the first token; of all replies where there are several
    first_token_seconds: float  # the longest, where there are several
    peak_gib: float
    conversations: int = 1
    ready_seconds: float | None = None  # from the loaded model to the first token of the first reply

    def describe(self) -> str:
        ready = "" if self.ready_seconds is None else f", ready in {self.ready_seconds:.1f} s"
        return (
            f"{self.variant:<26} {self.tokens_per_second:8.1f} tokens/s, first after "
            f"{1e3 * self.first_token_seconds:5.0f} ms, peak {self.peak_gib:.2f} GiB{ready}"
        )


class TokenTimes(BaseStreamer):
    """Notes when each token has come to the host."""

    def __init__(self):
        self.start, self.times, self.tokens = time.perf_counter(), [], []

    def note(self, token: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(token)

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:  # what comes first is the prompt
            self.note(int(value))

    def end(self) -> None:
        pass

    def describe(self, is_gpu: bool) -> Timed:
        speed = (len(self.times) - 1) / (self.times[-1] - self.times[0])
        return Timed("", round(speed, 1), round(self.times[0] - self.start, 4), read_peak(is_gpu))


def read_peak(is_gpu: bool) -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if is_gpu else 0.0


def begin(prompt: torch.Tensor) -> TokenTimes:
    if prompt.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return TokenTimes()


def time_by_generate(model: Any, prompt: torch.Tensor, count: int) -> tuple[Timed, list[int]]:
    """The second of two replies by transformers' generate: the first one captures and warms up."""
    for _ in range(2):
        times = begin(prompt)
        flags = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=times, **flags)
    return times.describe(prompt.is_cuda), times.tokens


@torch.no_grad()
def time_by_steps(
    steps: Steps, prompt: torch.Tensor, count: int, proposed: int = 0, repeats: int = 2, **flags: Any
) -> tuple[Timed, list[int]]:
    """The last of some replies, token by token as a chat gets them."""
    config = GenerationConfig(max_new_tokens=count, pad_token_id=0, eos_token_id=None, **flags)
    for _ in range(repeats):
        times = begin(prompt)
        cache = steps.make_cache()
        choice = steps.find_choice(config)
        tokens: Iterable[int] = stream_tokens(steps, prompt[0].tolist(), cache, choice, count, [], proposed)
        for token in tokens:
            times.note(token)
    return times.describe(prompt.is_cuda), times.tokens


def build_adapted_model(name: str, bits: int, rank: int, dtype: torch.dtype, device: str) -> Any:
    """A model of this shape, random like its adapter on all linear layers."""
    torch.manual_seed(0)
    model = build_random_model(SHAPES[name](), bits, dtype, device)
    if bits == 8:
        unpack_8bit_layers(model)
    lora = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).eval()
    model.generation_config.eos_token_id = None  # a random model says anything
    return model


@torch.no_grad()
def time_together(decoder: SharedDecoder, prompts: list[list[int]], count: int) -> Timed:
    """The second of two times that all are replied to at once: tokens while all of them are speaking."""
    config = GenerationConfig(max_new_tokens=count, pad_token_id=0, eos_token_id=None)
    is_gpu = decoder.steps.base.device.type == "cuda"

    def note_times(reply: Reply) -> list[float]:
        return [time.perf_counter() for _ in reply.tokens()]

    for _ in range(2):
        start = time.perf_counter()
        replies = [decoder.reply(prompt, config) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            times = list(pool.map(note_times, replies))
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    spoken = sum(begin < moment <= end for own in times for moment in own)
    speed = spoken / (end - begin) if end > begin else 0.0
    return Timed("", round(speed, 1), round(begin - start, 4), read_peak(is_gpu), len(prompts))


def time_variants(model: Any, prompt: torch.Tensor, arguments: "ChatSpeedArguments") -> Iterator[Timed]:
    """PEFT's own forward; on a GPU the same as one graph a token, as it was; our steps; and those shared."""
    base, count, is_gpu = model.get_base_model(), arguments.max_new_tokens, prompt.is_cuda
    reply, _ = time_by_generate(model, prompt, count)
    yield replace(reply, variant="plain")
    forward = base.forward
    if is_gpu:
        install_decode_layers(base, base.dtype, None)
        decoder = GraphDecoder(base)
        base.forward = decoder.forward
        reply, _ = time_by_generate(model, prompt, count)
        yield replace(reply, variant="graph, bitsandbytes")
        base.forward = forward
        del decoder
        torch.cuda.empty_cache()
    start = time.perf_counter()
    steps = (install_graph_decode(model) if is_gpu else None) or GrowingSteps(model)
    shared = SharedDecoder(model, steps)
    shared.open_slots(arguments.conversations, arguments.prompt_tokens + count, kept=0)
    first, _ = time_by_steps(steps, prompt, 2, repeats=1)
    ready = time.perf_counter() - start
    reply, _ = time_by_steps(steps, prompt, count)
    kind = "steps of our own" if getattr(steps, "whole", None) else "steps of its modules"
    has_graph = isinstance(steps, GraphDecoder) and steps.graphs
    yield replace(
        reply, variant=kind if has_graph or not is_gpu else f"{kind}, no graph", ready_seconds=round(ready, 4)
    )
    vocabulary = base.config.vocab_size
    others = [torch.randint(5, vocabulary, prompt.shape)[0].tolist() for _ in range(arguments.conversations)]
    reply = time_together(shared, others, count)
    how = "one step" if shared.shares_steps else "in turn"
    yield replace(reply, variant=f"{len(others)} conversations, {how}")


def time_replies(arguments: "ChatSpeedArguments") -> None:
    """Print a row for each way of decoding of each model, and save them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for shape in arguments.model:
        notice(f"{shape}, {arguments.bits} bits, on {name}, torch {torch.__version__}")
        model = build_adapted_model(shape, arguments.bits, arguments.lora_r, dtype, device)
        prompt = torch.randint(5, model.config.vocab_size, (1, arguments.prompt_tokens), device=device)
        replies = []
        for reply in time_variants(model, prompt, arguments):
            notice(reply.describe())
            replies.append(asdict(reply))
        path = Path(arguments.output_dir, f"{shape}.json")
        write_json({"device": name, "replies": replies}, path)
        notice(f"saved to {path}")
        del model
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
