"""How a run uses the memory at hand: tokens of a micro-batch, layers that are recomputed, the optimizer.

Recomputing a layer's activations in the backward pass makes a step a third slower and frees nearly all of
their memory. Larger micro-batches unpack the weights less often and pack rows tighter, and hold more. The
plan is the fastest choice that fits, and all choices train the same: the rows of a step, its loss and the
dropout masks do not depend on them (utils/data/packing.py, utils/fast/token_keys.py). Say 24 GiB are free
for LLaMA-7B and rows of 283 tokens, 32 a step:

    tokens   recomputed   needs      cost of a step, in tokens' worth of arithmetic
     2,048   all            6.9 GiB  13,900
     2,048   none          14.0 GiB  10,300
     4,096   none          21.4 GiB   9,800     <- taken
     8,192   14 of 32      23.6 GiB  11,000
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import notice, read_rank_and_size
from utils.data.packing import choose_capacity, choose_sizes, pack_rows
from utils.fast.memory import read_host_memory
from utils.models.base import CUDA_CONTEXT, has_gpu
from utils.train.engine import find_flag_obstacle
from utils.train.needs import Needs, StepNeeds, rehearse_model

Arguments = tuple[ModelArguments, DataArguments, LoraArguments, TrainingArguments]

CAPACITIES = (2048, 4096, 8192)  # tokens; beyond them products are as large as a GPU wants
MARGIN = 0.03  # of the memory: what the forecast may be wrong by
SAMPLED_STEPS = 64
# Measured on one H100, LLaMA-7B (docs/results.md). Unpacking the weights for a micro-batch takes as long as
# the arithmetic of 270 tokens, and recomputing every layer 0.36 of a step that recomputes none.
UNPACKING_TOKENS, RECOMPUTING = 270, 0.36
MAX_STATE_SHARE = 0.1  # of the memory: above, a paged optimizer leaves it to the activations


@dataclass(frozen=True)
class Plan:
    """What a run takes. Without `needs` nothing was foreseen, and `obstacle` says why."""

    optim: str
    capacity: int  # tokens of a packed micro-batch
    recomputed_layers: int | None = None  # the first ones; None: all
    layers: int | None = None
    needs: Needs | None = None
    budget: int | None = None  # bytes; None: not known
    obstacle: str | None = None

    @property
    def fits(self) -> bool:
        return self.needs is None or self.budget is None or fits(self.needs, self.budget)

    def describe(self) -> dict[str, Any]:
        """For run.json, in bytes."""
        needs = asdict(self.needs) | {"total": self.needs.total} if self.needs else None  # of all parts
        return {"needs": needs, "budget": self.budget, "obstacle": self.obstacle}


@dataclass(frozen=True)
class Rows:
    """What the plan must know of the training rows and of how they are batched."""

    lengths: np.ndarray  # int64 [rows]
    batch: int  # rows of a padded micro-batch
    step: int  # rows of a process's optimizer step
    max_len: int  # of a row, by the flags
    is_packed: bool

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=1))


@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    has_gpu: bool
    dtype: torch.dtype  # that it computes in
    budget: int | None  # bytes for this process; None: not known
    shares: int = 1  # processes that hold one base together


def fits(needs: Needs, budget: int) -> bool:
    return needs.total <= (1 - MARGIN) * budget


def find_machine(model_args: ModelArguments, dtype: torch.dtype) -> Machine:
    """The one at hand. Its budget leaves out CUDA's context, and on a CPU half of the free memory."""
    cap = model_args.max_memory_MB * 10**6 - CUDA_CONTEXT if model_args.max_memory_MB else None
    shares = read_rank_and_size()[1] if model_args.shard_layers else 1
    if not has_gpu(model_args):
        return Machine(False, dtype, read_host_memory()[1] // 2, shares)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return Machine(True, dtype, min(free, cap or free), shares)


def make_plan(
    config: Any,
    arguments: Arguments,
    machine: Machine,
    lengths: np.ndarray,
    is_packed: bool,
    earlier: dict[str, Any],
) -> Plan:
    """The fastest choice that fits the `machine`; what the run chose `earlier`, where that fits still.

    `lengths` of the training rows  # int64 [rows]
    """
    model_args, data_args, lora_args, training_args = arguments
    batch = training_args.per_device_train_batch_size
    rows = Rows(
        lengths, batch, batch * training_args.gradient_accumulation_steps, data_args.max_len, is_packed
    )
    step: StepNeeds | str = find_obstacle(model_args, training_args) or rehearse_model(
        config, model_args, lora_args, machine.dtype, is_packed, training_args.offload_checkpoints
    )
    if isinstance(step, str):
        return plan_blindly(training_args, rows, machine.has_gpu, step)
    step.shares = machine.shares
    optim = training_args.optim
    if optim == "auto":
        budget = (machine.budget or 2**63) if machine.has_gpu else None
        optim = earlier.get("optim") or choose_optim(step.trained, budget)

    def build(capacity: int, recomputed: int) -> Plan:
        tokens = (1, capacity) if is_packed else (batch, rows.longest)
        needs = step.measure(*tokens, recomputed, optim)
        return Plan(optim, capacity, recomputed, step.layers, needs, machine.budget)

    if earlier.get("capacity") and earlier.get("recomputed_layers") is not None:
        plan = build(earlier["capacity"], earlier["recomputed_layers"])
        if plan.fits:
            return plan
        notice("the memory plan that this run began with does not fit here: it is planned anew")
    capacities, layers = list_choices(step, rows, training_args, machine.has_gpu)
    plans = [
        next(filter(lambda plan: plan.fits, (build(size, n) for n in layers)), None) for size in capacities
    ]
    fitting = [plan for plan in plans if plan]
    # Where nothing fits, the least is tried: the loop cuts a step smaller still (step_memory.py).
    least = build(capacities[0], layers[-1])
    return min(fitting, key=lambda plan: measure_cost(rows, plan)) if fitting else least


def find_obstacle(model_args: ModelArguments, training_args: TrainingArguments) -> str | None:
    """Why no plan is made."""
    if not training_args.do_train:
        return "nothing is trained"
    if model_args.full_finetune:
        return "every weight is trained"
    if not training_args.fast_lora:
        return "--fast_lora False"
    is_spread = torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ
    if has_gpu(model_args) and is_spread and training_args.num_gpus == 1:
        return "the layers are spread over several GPUs"
    # What auto stands for is covered.
    return None if training_args.optim == "auto" else find_flag_obstacle(training_args)


def plan_blindly(training_args: TrainingArguments, rows: Rows, on_gpu: bool, obstacle: str) -> Plan:
    """All layers recomputed unless the flag says none; micro-batches as large as the batch flags say."""
    capacity = choose_capacity(rows.lengths, rows.batch, rows.step, rows.max_len, on_gpu)
    recomputed = 0 if training_args.gradient_checkpointing == "False" else None
    return Plan(training_args.optim, capacity, recomputed, obstacle=obstacle)


def choose_optim(trained: int, budget: int | None) -> str:
    """--optim auto for so many `trained` weights: paged where their state would crowd the GPU.

    `budget`: bytes; None on a CPU.
    """
    if budget is None:
        return "adamw_torch"
    return "paged_adamw_32bit" if 8 * trained > MAX_STATE_SHARE * budget else "adamw_torch_fused"


def list_choices(
    step: StepNeeds, rows: Rows, training_args: TrainingArguments, on_gpu: bool
) -> tuple[list[int], list[int]]:
    """(capacities, numbers of recomputed layers) that may be taken, both ascending."""
    flag = training_args.gradient_checkpointing
    asked = choose_capacity(rows.lengths, rows.batch, rows.step, rows.max_len, on_gpu)
    if flag != "auto":
        return [asked], [step.layers if flag == "True" else 0]
    return list_capacities(rows) if on_gpu and rows.is_packed else [asked], list(range(step.layers + 1))


def list_capacities(rows: Rows) -> list[int]:
    """Those that hold the longest row, none larger than the longest rows of a step."""
    longest_step = int(np.sort(rows.lengths)[-rows.step :].sum())
    largest = max(rows.longest, min(longest_step, CAPACITIES[-1]))
    return sorted({capacity for capacity in CAPACITIES if rows.longest <= capacity < largest} | {largest})


def measure_cost(rows: Rows, plan: Plan) -> float:
    """Mean cost of a step, in tokens' worth of arithmetic."""
    assert plan.layers and plan.recomputed_layers is not None
    again = 1 + RECOMPUTING * plan.recomputed_layers / plan.layers
    if not rows.is_packed:
        return again
    sample = np.random.default_rng(0).permutation(rows.lengths)[: SAMPLED_STEPS * rows.step].tolist()
    sizes = choose_sizes(plan.capacity, fixed=True)
    steps = [pack_rows(sample[at : at + rows.step], sizes) for at in range(0, len(sample), rows.step)]
    return again * sum(size + UNPACKING_TOKENS for packed in steps for _, size in packed) / len(steps)
