"""Times replies: PEFT's own forward, one CUDA graph a token, steps of our own, eight conversations at once.

    python -m eval.chat_speed --model llama-7b llama3-8b
    python -m eval.chat_speed --model tiny --max_new_tokens 8     (a CPU's size: the same buffers, no graph)

The base has random weights, and so has the adapter: the time does not depend on them.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from eval.train_speed import SHAPE_NAMES
from utils.arguments import flag, require_positive
from utils.console import UserError, run_main
from utils.flags.parser import parse_args


@dataclass
class ChatSpeedArguments:
    _argument_group_name = "chat speed"
    model: list[str] = flag(["llama-7b"], f"Shapes: {', '.join(SHAPE_NAMES)}.")
    bits: Literal[4, 8, 16] = flag(4, "Bits of the base.")
    lora_r: int = flag(64, "Rank of the adapter, on all linear layers.")
    prompt_tokens: int = flag(512, "Length of the prompt.")
    max_new_tokens: int = flag(256, "Tokens of the reply that is timed.")
    conversations: int = flag(8, "Conversations at once, in the last row.")
    output_dir: str = flag("output/chat_speed", "Where the figures are saved as json.")

    def __post_init__(self):
        require_positive(self, "lora_r", "prompt_tokens", "conversations")
        if self.max_new_tokens < 2:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: use 2 or more, the first is not timed")
        for name in self.model:
            if name not in SHAPE_NAMES:
                raise UserError(f"--model {name}: use some of {', '.join(SHAPE_NAMES)}")


def main() -> None:
    (arguments,) = parse_args(sys.argv[1:], [ChatSpeedArguments], __doc__)

    from eval.speed.replies import time_replies

    time_replies(arguments)


if __name__ == "__main__":
    run_main(main)
