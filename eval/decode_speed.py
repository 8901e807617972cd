"""Checks the 4-bit product of a reply, and times whole replies by each way there is.

    python -m eval.decode_speed --model llama-7b
    python -m eval.decode_speed --model llama-7b --parts weights replies

It wants a GPU. The base has random weights.
"""

import sys
from dataclasses import dataclass

from eval.train_speed import SHAPE_NAMES
from utils.arguments import flag, require_choice, require_positive
from utils.console import UserError, run_main
from utils.flags.parser import parse_args

PARTS = ("machine", "weights", "replies")


@dataclass
class DecodeSpeedArguments:
    _argument_group_name = "decode speed"
    model: str = flag("llama-7b", f"Shape: {', '.join(SHAPE_NAMES)}.")
    lora_r: int = flag(64, "Rank of the adapter, on all linear layers.")
    prompt_tokens: int = flag(512, "Length of the prompt.")
    max_new_tokens: int = flag(128, "Tokens of each reply that is timed.")
    parts: list[str] = flag(list(PARTS), f"Of {', '.join(PARTS)}.")

    def __post_init__(self):
        require_positive(self, "lora_r", "prompt_tokens", "max_new_tokens")
        require_choice(self, "model", list(SHAPE_NAMES))
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"--parts {part}: use some of {', '.join(PARTS)}")


def main() -> None:
    (arguments,) = parse_args(sys.argv[1:], [DecodeSpeedArguments], __doc__)
    import torch

    if not torch.cuda.is_available():
        raise UserError("eval.decode_speed measures a GPU's kernels, and there is none")
    from eval.speed.decode import run_parts

    run_parts(arguments)


if __name__ == "__main__":
    run_main(main)
