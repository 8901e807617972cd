"""The learning rate of a run that goes on: where its schedule is after the steps that were done.

A scheduler's saved state holds the rate as it was, which is that of the old length. A run of 60 steps by
cosine ended at a rate of 0; made 120 steps long, it goes on at half of its peak, as step 60 of 120 has it.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from utils.console import notice

Factor = Callable[[int], float]  # steps done -> share of the peak learning rate


def follow_schedule(scheduler: Any, optimizer: Any) -> None:
    """Set the learning rates to those of the steps done, by the scheduler's length as it is now."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):  # others go by what was measured
        return
    factors: list[Factor] = scheduler.lr_lambdas
    rates = [
        peak * factor(scheduler.last_epoch) for peak, factor in zip(scheduler.base_lrs, factors, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def build_factor(args: transformers.TrainingArguments, steps: int) -> Factor | None:
    """The schedule of a run of so many `steps`, where it follows from the step alone."""
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        args.get_warmup_steps(steps),
        steps,
        args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # text is what the command line gave
    )
    return scheduler.lr_lambdas[0] if isinstance(scheduler, LambdaLR) else None


def report_extension(args: transformers.TrainingArguments, done: int, planned: int, now: int) -> None:
    """Say what the learning rate does after `done` steps of `planned`, where there are others `now`."""
    if planned == now:
        return
    then, longer = build_factor(args, planned), build_factor(args, now)
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if then is None or longer is None:
        rate, is_same = "follows the evaluations", False
    else:
        rates = [args.learning_rate * factor(done) for factor in (then, longer)]
        rate = f"is {rates[1]:.2e}" + (f", where it was {rates[0]:.2e}" if rates[0] != rates[1] else "")
        is_same = all(then(step) == longer(step) for step in range(done))
    equals = "as one" if is_same else "and is not equal to one"
    notice(
        f"--lr_scheduler_type {name}: after step {done} the learning rate {rate}; the run goes on to step "
        f"{now} {equals} that had this length from the start"
    )
