"""Times a QLoRA step: the original's recipe, the plain path and the fast path, in one run on one GPU.

    python -m eval.train_speed --model llama-7b
    python -m eval.train_speed --model tiny --workloads 4x32 real-8     (a CPU's size)

A workload is BATCHxLENGTH (dense rows), real-ROWS (an optimizer step of that many rows with the lengths of
Alpaca's), either followed by -checkpointed. The base has random weights: the time does not depend on them.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from utils.arguments import flag, require_choice
from utils.console import run_main
from utils.flags.parser import parse_args

# Of eval/speed/shapes.py, known here without importing torch.
SHAPE_NAMES = (
    *("llama-7b", "llama3-8b", "llama-13b", "llama-33b", "llama-65b", "mistral-7b", "qwen2.5-7b", "gemma-7b"),
    *("opt-6.7b", "pythia-6.9b", "baichuan-7b", "bloomz-7b", "smollm2-135m", "tiny"),
)


@dataclass
class SpeedArguments:
    _argument_group_name = "speed"
    model: str = flag("llama-7b", f"Shape: {', '.join(SHAPE_NAMES)}.")
    workloads: list[str] = flag(
        ["4x512", "4x2048", "4x2048-checkpointed", "real-32", "real-128"],
        "BATCHxLENGTH or real-ROWS, each also with -checkpointed.",
    )
    variants: list[str] = flag(["original", "plain", "fast"], "original, plain and fast, in this order.")
    bits: Literal[4, 8, 16] = flag(4, "Bits of the base.")
    dtypes: list[str] = flag(["bf16"], "bf16, fp16, fp32: of the fast path.")
    lora_r: int = flag(64, "Rank of the adapter.")
    dropouts: list[float] = flag([0.1], "LoRA dropout of the fast path.")
    capacity: list[int] = flag([8192], "Largest packed micro-batches of real lengths, tokens.")
    steps: int = flag(
        4, "Optimizer steps timed; on a CPU and of padded variants three at most (24 of real-4)."
    )
    profile: bool = flag(False, "Print the kernels that took longest.")
    output_dir: str = flag("output/train_speed", "Where the table is saved as json.")

    def __post_init__(self):
        require_choice(self, "model", list(SHAPE_NAMES))


def main() -> None:
    (arguments,) = parse_args(sys.argv[1:], [SpeedArguments], __doc__)

    from eval.speed.steps import time_workloads

    time_workloads(arguments)


if __name__ == "__main__":
    run_main(main)
