"""Times the replies that eval.chat_speed asks for."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import StoppingCriteria

from eval.speed.shapes import SHAPES, build_random_model
from utils.console import notice
from utils.fast.frozen_weights import unpack_8bit_layers
from utils.fast.graph_decode import install_graph_decode
from utils.run.record import write_json

if TYPE_CHECKING:
    from eval.chat_speed import ChatSpeedArguments


@dataclass
class Reply:
    variant: str
    tokens_per_second: float  # after the first token
    first_token_seconds: float
    peak_gib: float


class TokenTimes(StoppingCriteria):
    """Notes when each token is there, and waits for it as a streamer does; never stops a reply."""

    def __init__(self):
        self.start, self.times = time.perf_counter(), []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        input_ids[0, -1].item()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_reply(model: Any, variant: str, prompt: torch.Tensor, count: int) -> Reply:
    """The second of two replies: the first one captures and warms up."""
    for _ in range(2):
        if prompt.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        tokens = TokenTimes()
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[tokens],
        )
    first, *_, last = tokens.times
    peak = torch.cuda.max_memory_allocated() / 2**30 if prompt.is_cuda else 0.0
    return Reply(
        variant, round((count - 1) / (last - first), 1), round(first - tokens.start, 3), round(peak, 2)
    )


def time_replies(arguments: "ChatSpeedArguments") -> None:
    """Print a row for each way of decoding, and save them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    notice(f"{arguments.model}, {arguments.bits} bits, on {name}, torch {torch.__version__}")
    torch.manual_seed(0)
    model = build_random_model(SHAPES[arguments.model](), arguments.bits, dtype, device)
    if arguments.bits == 8:
        unpack_8bit_layers(model)
    lora = LoraConfig(
        r=arguments.lora_r,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora).eval()
    prompt = torch.randint(5, model.config.vocab_size, (1, arguments.prompt_tokens), device=device)
    replies = []
    for variant in ("plain", "graph") if device == "cuda" else ("plain", "fixed buffers"):
        decoder = install_graph_decode(model) if variant != "plain" else None
        reply = time_reply(model, variant, prompt, arguments.max_new_tokens)
        if variant == "graph" and not (decoder and decoder.graphs):
            reply.variant = "no graph"
        notice(
            f"{reply.variant:<13} {reply.tokens_per_second:8.1f} tokens/s, first after "
            f"{reply.first_token_seconds:.3f} s, peak {reply.peak_gib:.2f} GiB"
        )
        replies.append(reply)
    path = Path(arguments.output_dir, f"{arguments.model}.json")
    write_json({"device": name, "replies": [asdict(reply) for reply in replies]}, path)
    notice(f"saved to {path}")
