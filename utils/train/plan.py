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
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import notice, read_rank_and_size
from utils.data.packing import choose_capacity, choose_sizes, pack_rows
from utils.fast.memory import read_host_memory
from utils.models.base import CUDA_CONTEXT, has_gpu
from utils.train.engine import find_flag_obstacle
from utils.train.host_adam import count_piece_bytes
from utils.train.needs import Needs, StepNeeds, rehearse_model
from utils.train.savings import LAYERS, Savings, count_tokens, describe_savings, list_savings

Arguments = tuple[ModelArguments, DataArguments, LoraArguments, TrainingArguments]

CAPACITIES = (2048, 4096, 8192)  # tokens; beyond them products are as large as a GPU wants
MARGIN = 0.03  # of the memory: what the forecast may be wrong by
NEAR = 0.01  # of a step's cost: as fast, for all that is known
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
    savings: Savings = ()  # what lies in host memory, ... (savings.py)
    saving_lines: tuple[str, ...] = ()
    step_tokens: float | None = None  # mean cost of a step, in tokens' worth of arithmetic

    @property
    def fits(self) -> bool:
        return self.needs is None or self.budget is None or fits(self.needs, self.budget)

    @property
    def choices(self) -> dict[str, Any]:
        """What a run that goes on takes again."""
        return {
            "capacity": self.capacity,
            "recomputed_layers": self.recomputed_layers,
            "savings": list(self.savings),
        }

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
    host_budget: int | None = None  # bytes of host memory that may be pinned; None: not known
    shares: int = 1  # processes that hold one base together


def fits(needs: Needs, budget: int) -> bool:
    return needs.total <= (1 - MARGIN) * budget


def find_machine(model_args: ModelArguments, dtype: torch.dtype) -> Machine:
    """The one at hand. Its budget leaves out CUDA's context, and on a CPU half of the free memory."""
    cap = model_args.max_memory_MB * 10**6 - CUDA_CONTEXT if model_args.max_memory_MB else None
    shares = read_rank_and_size()[1] if model_args.shard_layers else 1
    if not has_gpu(model_args):
        return Machine(False, dtype, read_host_memory()[1] // 2, shares=shares)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    total, host_free = read_host_memory()
    host_budget = max(0, host_free - total // 4) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(True, dtype, min(free, cap or free), host_budget, shares)


def make_plan(
    config: Any,
    arguments: Arguments,
    machine: Machine,
    lengths: np.ndarray,
    is_packed: bool,
    earlier: dict[str, Any],
    streams: bool | None = None,
) -> Plan:
    """The fastest choice that fits the `machine`; what the run chose `earlier`, where that fits still.

    `lengths` of the training rows  # int64 [rows]. `streams`: whether the model was loaded with its layers in
    host memory; None: it is not loaded yet.
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
        optim = earlier.get("optim") or ("adamw_torch_fused" if machine.has_gpu else "adamw_torch")
    if machine.shares > 1:  # the layers come from the other GPUs
        streams = False
    return choose_plan(step, rows, arguments, machine, optim, earlier, streams)


def choose_plan(
    step: StepNeeds,
    rows: Rows,
    arguments: Arguments,
    machine: Machine,
    optim: str,
    earlier: dict[str, Any],
    streams: bool | None,
) -> Plan:
    model_args, _, _, training_args = arguments

    def build(capacity: int, recomputed: int, savings: Savings) -> Plan:
        tokens = (1, capacity) if rows.is_packed else (rows.batch, rows.longest)
        needs = step.measure(*tokens, recomputed, optim, savings)
        lines = describe_savings(savings, needs, step.measure(*tokens, recomputed, optim)) if savings else []
        return Plan(
            optim, capacity, recomputed, step.layers, needs, machine.budget, None, savings, tuple(lines)
        )

    if earlier.get("capacity") and earlier.get("recomputed_layers") is not None:
        savings = tuple(earlier.get("savings", ()))
        plan = build(earlier["capacity"], earlier["recomputed_layers"], savings)
        if plan.fits and streams in (None, LAYERS in savings):
            return plan
        notice("the memory plan that this run began with does not fit here: it is planned anew")
    capacities, layers = list_choices(step, rows, training_args, machine.has_gpu)
    ladder = list_ladder(step, machine, optim, model_args.bits, streams)
    plans = [
        next(
            filter(lambda plan: plan.fits, (build(size, n, savings) for n in list_layers(layers, savings))),
            None,
        )
        for savings in ladder
        for size in (list_capacities(rows) if LAYERS in savings and rows.is_packed else capacities)
        if list_layers(layers, savings)
    ]
    fitting = [plan for plan in plans if plan and fits_host(plan, machine)]
    # Layers are streamed only where they must be.
    fitting = [plan for plan in fitting if LAYERS not in plan.savings] or fitting
    # Where nothing fits, the least is tried: the loop cuts a step smaller still (step_memory.py).
    leasts = (build(capacities[0], layers[-1], savings) for savings in reversed(ladder))
    least = next(
        (plan for plan in leasts if fits_host(plan, machine)), build(capacities[0], layers[-1], ladder[0])
    )
    costed = [
        replace(plan, step_tokens=measure_cost(rows, plan, step.trained)) for plan in fitting or [least]
    ]
    return choose_fastest(costed)


def choose_fastest(plans: list[Plan]) -> Plan:
    """The least cost, of which each saving must be worth a part; of the nearest, the largest micro-batches.

    Small ones want CUDA graphs, so two runs and a capture of each size, before they are fast.
    """
    ranked = [((1 + NEAR * len(plan.savings)) * (plan.step_tokens or 0.0), plan) for plan in plans]
    least = min(cost for cost, _ in ranked)
    near = [(-plan.capacity, cost, plan) for cost, plan in ranked if cost <= (1 + NEAR) * least]
    return min(near, key=lambda choice: choice[:2])[2]


def list_ladder(
    step: StepNeeds, machine: Machine, optim: str, bits: int, streams: bool | None
) -> list[Savings]:
    """What may be saved. `streams`: whether the model's layers lie on the host; None: it is not loaded."""
    if not machine.has_gpu:
        return [()]
    can_stream = bits == 4 and len(step.short.layers) == 2
    is_large = optim == "adamw_torch_fused" and count_piece_bytes(step.trained) < 8 * step.trained
    has_embedding = step.embedding_bytes > 0 and step.shares == 1  # else the GPUs share it
    ladder = list_savings(has_embedding, is_large, machine.dtype != torch.float32, can_stream)
    return [savings for savings in ladder if streams in (None, LAYERS in savings)] or [()]


def list_layers(layers: list[int], savings: Savings) -> list[int]:
    """Numbers of recomputed layers: layers that come from the host are all recomputed."""
    return layers if LAYERS not in savings else [] if layers == [0] else layers[-1:]


def fits_host(plan: Plan, machine: Machine) -> bool:
    """Whether host memory has room for what waits there; inputs of layers stay on the GPU otherwise."""
    assert plan.needs
    return not plan.savings or machine.host_budget is None or plan.needs.least_host <= machine.host_budget


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


def measure_cost(rows: Rows, plan: Plan, trained: int) -> float:
    """Mean cost of a step, in tokens' worth of arithmetic."""
    assert plan.layers and plan.recomputed_layers is not None
    again = 1 + RECOMPUTING * plan.recomputed_layers / plan.layers
    if not rows.is_packed:
        sizes = [rows.batch * rows.longest] * (rows.step // rows.batch)
        return count_tokens(plan.savings, [size + UNPACKING_TOKENS for size in sizes], again, trained)
    sample = np.random.default_rng(0).permutation(rows.lengths)[: SAMPLED_STEPS * rows.step].tolist()
    sizes = choose_sizes(plan.capacity, fixed=True)
    steps = [pack_rows(sample[at : at + rows.step], sizes) for at in range(0, len(sample), rows.step)]
    costs = [
        count_tokens(plan.savings, [size + UNPACKING_TOKENS for _, size in packed], again, trained)
        for packed in steps
    ]
    return sum(costs) / len(costs)
