"""--dry_run: what a run would hold in memory and how long it would take, before weights are loaded."""

from dataclasses import replace

import torch

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import notice
from utils.data.token_rows import TokenRows
from utils.fast.loss import CHUNK_ELEMENTS
from utils.fast.trials import takes_positions
from utils.messages import TRAIN
from utils.models.base import CUDA_CONTEXT, build_without_weights, choose_compute_dtype, has_gpu, load_config
from utils.train.needs import WORKSPACE
from utils.train.plan import Arguments, Machine, Plan, find_machine, make_plan

GIB = 2**30


def print_plan(
    datasets: dict[str, TokenRows],
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: TrainingArguments,
) -> None:
    """The table of the plan, and where it does not fit the cheapest single change that makes it fit."""
    arguments = (model_args, data_args, lora_args, training_args)
    machine = choose_machine(model_args)
    plan = plan_without_weights(datasets, arguments, machine)
    if training_args.num_gpus > 1:
        plan = print_ways(datasets, arguments, machine, plan)
    notice("\n".join(render_table(plan)))
    if not plan.fits:
        change = find_change(datasets, arguments, machine)
        notice(f"it fits with {change}" if change else "no single flag makes it fit: take a smaller model")


def print_ways(datasets: dict[str, TokenRows], arguments: Arguments, machine: Machine, alone: Plan) -> Plan:
    """What each of --num_gpus GPUs holds in each way of using them; the plan of the first that fits.

    `alone`: that of one GPU, which is also that of a copy on each.
    """
    gpus = arguments[3].num_gpus
    shared = plan_without_weights(datasets, arguments, replace(machine, shares=gpus))
    ways = {
        "one GPU alone": alone,
        f"a copy on each of {gpus} GPUs (accelerate launch --multi_gpu --num_processes {gpus})": alone,
        f"one base shared by {gpus} GPUs (the same with --shard_layers)": shared,
    }
    lines = []
    for way, plan in ways.items():
        if plan.needs is None:
            lines.append(f"{way}: cannot be foreseen, {plan.obstacle}")
        else:
            verdict = "" if plan.budget is None else ", fits" if plan.fits else ", does not fit"
            lines.append(f"{(plan.needs.total + CUDA_CONTEXT) / GIB:9.2f} GiB a GPU  {way}{verdict}")
    notice("\n".join(["ways to train:", *lines]))
    return alone if alone.fits else shared


def choose_machine(model_args: ModelArguments) -> Machine:
    """This one; without a GPU a GPU with bfloat16 of --max_memory_MB, unless --use_cpu."""
    if has_gpu(model_args) or model_args.use_cpu:
        return find_machine(model_args, choose_compute_dtype(model_args))
    dtype = torch.float16 if model_args.fp16 else torch.bfloat16
    cap = model_args.max_memory_MB
    return Machine(True, dtype, cap * 10**6 - CUDA_CONTEXT if cap else None)


def plan_without_weights(datasets: dict[str, TokenRows], arguments: Arguments, machine: Machine) -> Plan:
    model_args, _, _, training_args = arguments
    packs = training_args.packing and takes_positions(build_without_weights(model_args))
    return make_plan(load_config(model_args), arguments, machine, datasets[TRAIN].lengths, packs, {})


def find_change(datasets: dict[str, TokenRows], arguments: Arguments, machine: Machine) -> str | None:
    """The flag that costs least and makes the run fit; None where no single one does."""
    model_args, data_args, lora_args, training_args = arguments
    changes: dict[str, Arguments] = {}
    for name, value in (("gradient_checkpointing", "auto"), ("optim", "paged_adamw_8bit")):
        changed = training_args.with_values(**{name: value})
        changes[f"--{name} {value}"] = (model_args, data_args, lora_args, changed)
    for rank in (32, 16, 8):
        if rank < lora_args.lora_r:
            lower = replace(lora_args, lora_r=rank)
            changes[f"--lora_r {rank}"] = (model_args, data_args, lower, training_args)
    if model_args.bits > 4:
        changes["--bits 4"] = (replace(model_args, bits=4), data_args, lora_args, training_args)
    plans = ((flag, plan_without_weights(datasets, changed, machine)) for flag, changed in changes.items())
    return next((flag for flag, plan in plans if plan.needs and plan.fits), None)


def render_table(plan: Plan) -> list[str]:
    """A line for each part, in GiB, and the sum."""
    if plan.needs is None:
        return [f"the memory of this run cannot be foreseen: {plan.obstacle}"]
    needs, recomputed = plan.needs, f"{plan.recomputed_layers} of {plan.layers} layers recomputed"
    parts = {
        "quantized weights": needs.codes,
        "their scales": needs.scales,
        "weights in 16 bits": needs.other_weights,
        "two whole layers and a share of the logits": needs.gathered,
        "adapter": needs.adapter,
        "gradients": needs.gradients,
        f"optimizer ({plan.optim})": needs.optimizer,
        "optimizer, paged": needs.paged_optimizer,
        f"activations of {plan.capacity:,} tokens, {recomputed}": needs.activations,
        "fragments of the allocator": needs.fragments,
        "cuBLAS": WORKSPACE,
        "CUDA's context and kernels": CUDA_CONTEXT,
    }
    lines = [f"{size / GIB:9.2f} GiB  {part}" for part, size in parts.items() if size]
    total = (needs.total + CUDA_CONTEXT) / GIB
    verdict = ""
    if plan.budget is not None:
        verdict = (
            f" of {(plan.budget + CUDA_CONTEXT) / GIB:.2f}: {'it fits' if plan.fits else 'it does not fit'}"
        )
    chunk = f"a chunk of logits of {2 * CHUNK_ELEMENTS / 2**20:.0f} MiB at most is in the activations"
    return ["memory plan:", *lines, f"{total:9.2f} GiB  in all{verdict} ({chunk})"]


def describe_plan(plan: Plan) -> str:
    """In one line."""
    assert plan.needs
    again = f"{plan.recomputed_layers} of {plan.layers} layers recomputed"
    budget = f" of {plan.budget / GIB:.1f} GiB" if plan.budget else ""
    return (
        f"memory plan: micro-batches of {plan.capacity:,} tokens, {again}, "
        f"{plan.needs.total / GIB:.2f}{budget}"
    )
