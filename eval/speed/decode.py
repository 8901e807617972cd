"""Runs the parts that eval.decode_speed names, one after another."""

import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from eval.speed.decode_probes import time_probes
from eval.speed.decode_products import check_overlap, check_weights, run_once, time_shapes
from eval.speed.decode_replies import profile_step, time_all_replies
from eval.speed.decode_small import time_small
from eval.speed.gpu_time import describe_machine, say

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments

RUN: dict[str, Callable[["DecodeSpeedArguments"], None]] = {
    "machine": describe_machine,
    "weights": check_weights,
    "shapes": time_shapes,
    "probes": time_probes,
    "small": time_small,
    "once": run_once,
    "replies": time_all_replies,
    "profile": profile_step,
}


def run_parts(arguments: "DecodeSpeedArguments") -> None:
    """A part that fails is printed, and the next one begins."""
    torch.set_grad_enabled(False)
    check_overlap()
    for part in arguments.parts:
        say(f"\n== {part}")
        start = time.perf_counter()
        try:
            RUN[part](arguments)
        except Exception:
            say(traceback.format_exc())
        say(f"-- {part}: {time.perf_counter() - start:.1f} s")
