"""Times the replies that eval.chat_speed asks for."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from eval.speed.shapes import SHAPES, build_random_model
from utils.console import notice
from utils.fast.decode_loop import GrowingSteps, Steps, stream_tokens
from utils.fast.decode_setup import install_graph_decode
from utils.fast.frozen_weights import unpack_8bit_layers
from utils.fast.graph_decode import GraphDecoder
from utils.run.record import write_json

if TYPE_CHECKING:
    from eval.chat_speed import ChatSpeedArguments


@dataclass
class Reply:
    variant: str
    tokens_per_second: float  # after the first token
    first_token_seconds: float
    peak_gib: float


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

    def describe(self, is_gpu: bool) -> Reply:
        seconds = self.times[-1] - self.times[0]
        peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else 0.0
        speed = (len(self.times) - 1) / seconds
        return Reply("", round(speed, 1), round(self.times[0] - self.start, 4), round(peak, 2))


def begin(prompt: torch.Tensor) -> TokenTimes:
    if prompt.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return TokenTimes()


def time_by_generate(model: Any, prompt: torch.Tensor, count: int) -> tuple[Reply, list[int]]:
    """The second of two replies by transformers' generate: the first one captures and warms up."""
    for _ in range(2):
        times = begin(prompt)
        flags = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=times, **flags)
    return times.describe(prompt.is_cuda), times.tokens


@torch.no_grad()
def time_by_steps(
    steps: Steps, prompt: torch.Tensor, count: int, proposed: int = 0, **flags: Any
) -> tuple[Reply, list[int]]:
    """The second of two replies, token by token as a chat gets them."""
    base: Any = steps.base
    config = GenerationConfig(max_new_tokens=count, pad_token_id=0, eos_token_id=None, **flags)
    for _ in range(2):
        times = begin(prompt)
        cache = DynamicCache(config=base.config.get_text_config())
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


def time_replies(arguments: "ChatSpeedArguments") -> None:
    """Print a row for each way of decoding, and save them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    notice(f"{arguments.model}, {arguments.bits} bits, on {name}, torch {torch.__version__}")
    model = build_adapted_model(arguments.model, arguments.bits, arguments.lora_r, dtype, device)
    prompt = torch.randint(5, model.config.vocab_size, (1, arguments.prompt_tokens), device=device)
    replies = []
    for variant in ("plain", "graph") if device == "cuda" else ("plain", "our loop"):
        if variant == "plain":
            reply, _ = time_by_generate(model, prompt, arguments.max_new_tokens)
        else:
            steps = install_graph_decode(model) if device == "cuda" else None
            reply, _ = time_by_steps(steps or GrowingSteps(model), prompt, arguments.max_new_tokens)
            if isinstance(steps, GraphDecoder) and not steps.graphs:
                variant = "no graph"
        reply.variant = variant
        notice(
            f"{reply.variant:<13} {reply.tokens_per_second:8.1f} tokens/s, first after "
            f"{reply.first_token_seconds:.3f} s, peak {reply.peak_gib:.2f} GiB"
        )
        replies.append(reply)
    path = Path(arguments.output_dir, f"{arguments.model}.json")
    write_json({"device": name, "replies": [asdict(reply) for reply in replies]}, path)
    notice(f"saved to {path}")
