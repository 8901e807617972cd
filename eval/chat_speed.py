"""Times replies, one conversation at a time: PEFT's own forward, and steps of one token as a CUDA graph.

    python -m eval.chat_speed --model llama-7b
    python -m eval.chat_speed --model tiny --max_new_tokens 8     (a CPU's size: the same buffers, no graph)

The base has random weights, and so has the adapter: the time does not depend on them.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import StoppingCriteria
from transformers.hf_argparser import HfArg

from utils.arguments import parse_args, require_positive
from utils.console import UserError, notice, run_main
from utils.frozen_weights import unpack_8bit_layers
from utils.graph_decode import install_graph_decode
from utils.shapes import SHAPES, build_random_model


@dataclass
class ChatSpeedArguments:
    _argument_group_name = "chat speed"
    model: str = HfArg(default="llama-7b", help=f"Shape: {', '.join(SHAPES)}.")
    bits: Literal[4, 8, 16] = HfArg(default=4, help="Bits of the base.")
    lora_r: int = HfArg(default=64, help="Rank of the adapter, on all linear layers.")
    prompt_tokens: int = HfArg(default=512, help="Length of the prompt.")
    max_new_tokens: int = HfArg(default=256, help="Tokens of the reply that is timed.")
    output_dir: str = HfArg(default="output/chat_speed", help="Where the figures are saved as json.")

    def __post_init__(self):
        require_positive(self, "lora_r", "prompt_tokens")
        if self.max_new_tokens < 2:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: use 2 or more, the first is not timed")
        if self.model not in SHAPES:
            raise UserError(f"--model {self.model}: use one of {', '.join(SHAPES)}")


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


def time_reply(model: torch.nn.Module, variant: str, prompt: torch.Tensor, count: int) -> Reply:
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


def main() -> None:
    (arguments,) = parse_args(sys.argv[1:], [ChatSpeedArguments], __doc__)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": name, "replies": [asdict(reply) for reply in replies]}, indent=2))
    notice(f"saved to {path}")


if __name__ == "__main__":
    run_main(main)
