"""Holds the memory plan against what training really takes on this GPU, case by case.

    python -m eval.memory
    python -m eval.memory --cases llama-7b:64:8192:none gemma-7b:16:2048:all bloomz-7b:16:4x512:none

    python -m eval.memory --promises llama-65b:64:1x512:44 llama-65b:64:1x512:18:streamed

A case is SHAPE:RANK:TOKENS:MODE. TOKENS of a packed micro-batch, or ROWSxWIDTH of a padded one. MODE: none or
all layers recomputed, or auto, as few as 16 GiB demand. The base has random weights; each case is a process
of its own that trains two optimizer steps with micro-batches of several sizes, captured as CUDA graphs.

A promise is SHAPE:RANK:ROWSxTOKENS:GIB. What a run plans under that cap is built and trained for ten steps on
one batch (eval/speed/promises.py). Words behind it: streamed or resident, where the plan is not to choose
whether layers come from host memory; recomputed, all of them; 8bit, the base in 8 bits and not 4; padded, one
micro-batch of all rows side by side and not packed, as BLOOM and OPT are trained.
"""

import re
import sys
from dataclasses import dataclass

from eval.train_speed import SHAPE_NAMES
from utils.arguments import flag, require_choice
from utils.console import UserError, run_main
from utils.flags.parser import parse_args

# The first 24 are of the shapes that the plan's figures were found with; the last 8 are of others.
CASES = [
    *(f"smollm2-135m:{rank}:{tokens}:{mode}" for rank, tokens, mode in
      [(16, 512, "none"), (16, 2048, "none"), (64, 2048, "all"), (64, 8192, "none"), (16, 8192, "all")]),
    *(f"llama-7b:{rank}:{tokens}:{mode}" for rank, tokens, mode in
      [(16, 512, "none"), (64, 512, "all"), (64, 2048, "none"), (64, 2048, "all"), (64, 8192, "none"),
       (16, 8192, "all"), (64, 8192, "auto")]),
    *(f"llama3-8b:{rank}:{tokens}:{mode}" for rank, tokens, mode in
      [(64, 512, "none"), (16, 2048, "none"), (64, 8192, "all"), (64, 8192, "auto")]),
    *(f"llama-13b:{rank}:{tokens}:{mode}" for rank, tokens, mode in
      [(64, 512, "all"), (16, 2048, "none"), (64, 8192, "auto"), (64, 2048, "auto")]),
    *(f"qwen2.5-7b:{rank}:{tokens}:{mode}" for rank, tokens, mode in
      [(64, 512, "none"), (64, 2048, "auto"), (16, 8192, "none"), (64, 8192, "all")]),
    "mistral-7b:64:8192:none", "mistral-7b:16:2048:all", "gemma-7b:64:2048:none", "gemma-7b:16:8192:all",
    "opt-6.7b:64:2048:none", "opt-6.7b:16:8192:all", "bloomz-7b:64:4x512:none", "bloomz-7b:16:8x512:all",
]  # fmt: skip


WORDS = "streamed|resident|recomputed|8bit|padded"
PROMISE = re.compile(rf"[^:]+:\d+:\d+x\d+:[\d.]+(:({WORDS}))*")


@dataclass
class MemoryArguments:
    _argument_group_name = "memory"
    cases: list[str] = flag(list(CASES), "SHAPE:RANK:TOKENS:MODE each.")
    promises: list[str] = flag(
        [], "SHAPE:RANK:ROWSxTOKENS:GIB each: trained under that cap, instead of cases."
    )
    steps: int = flag(10, "Optimizer steps of a promise.")
    output_dir: str = flag("output/memory", "Where the table is saved as json.")

    def __post_init__(self):
        for promise in self.promises:
            if not PROMISE.fullmatch(promise):
                raise UserError(
                    f"--promises {promise}: write llama-7b:64:1x512:6.2, with :streamed behind it or not"
                )
            self.shape = promise.split(":")[0]
            require_choice(self, "shape", list(SHAPE_NAMES))
        for case in self.cases:
            parts = case.split(":")
            if len(parts) != 4 or not parts[1].isdecimal() or parts[3] not in ("none", "all", "auto"):
                raise UserError(f"--cases {case}: write llama-7b:64:8192:none (or all, or auto)")
            self.shape = parts[0]
            require_choice(self, "shape", list(SHAPE_NAMES))


def main() -> None:
    (arguments,) = parse_args(sys.argv[1:], [MemoryArguments], __doc__)
    import torch

    if not torch.cuda.is_available():
        raise UserError("eval.memory measures a GPU, and there is none")
    if arguments.promises:
        from eval.speed.promises import keep_promises

        return keep_promises(arguments)
    from eval.speed.memory import compare_plans

    compare_plans(arguments)


if __name__ == "__main__":
    run_main(main)
