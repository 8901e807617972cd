"""Runs the parts that eval.decode_speed names, one after another."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from eval.speed.decode_products import check_overlap, check_weights
from eval.speed.decode_replies import time_all_replies
from eval.speed.gpu_time import describe_machine, say

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments

RUN: dict[str, Callable[["DecodeSpeedArguments"], None]] = {
    "machine": describe_machine,
    "weights": check_weights,
    "replies": time_all_replies,
}


def run_parts(arguments: "DecodeSpeedArguments") -> None:
    torch.set_grad_enabled(False)
    check_overlap()
    for part in arguments.parts:
        say(f"\n== {part}")
        start = time.perf_counter()
        RUN[part](arguments)
        say(f"-- {part}: {time.perf_counter() - start:.1f} s")
