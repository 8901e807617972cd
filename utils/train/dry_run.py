"""--dry_run: what a run would hold in memory and how long it would take, before weights are loaded."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import notice
from utils.data.token_rows import TokenRows
from utils.fast.capability import measure_matmul_tflops
from utils.fast.fused_mlp import TILE
from utils.fast.trials import takes_positions
from utils.models.base import CUDA_CONTEXT, build_without_weights, choose_compute_dtype, has_gpu, load_config
from utils.prompts.messages import TRAIN
from utils.run.resume import read_resolved
from utils.train.epoch_time import estimate_epoch_seconds
from utils.train.needs import WORKSPACE, StepNeeds, rehearse_model
from utils.train.plan import MARGIN, Arguments, Machine, Plan, find_machine, list_ladder, make_plan
from utils.train.savings import LAYERS, Savings

GIB = 2**30
LONG = 2**16  # tokens from which bytes grow evenly, of any model


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
    if training_args.num_gpus > 1:
        plan = print_ways(datasets, arguments, machine)
    else:
        plan = plan_without_weights(datasets, arguments, machine)
    time = describe_time(plan, len(datasets[TRAIN].lengths), model_args, training_args)
    notice("\n".join(render_table(plan) + find_longest_row(arguments, machine) + time))
    if not plan.fits:
        change = find_change(datasets, arguments, machine)
        notice(f"it fits with {change}" if change else "no single flag makes it fit: take a smaller model")


def print_ways(datasets: dict[str, TokenRows], arguments: Arguments, machine: Machine) -> Plan:
    """What each of --num_gpus GPUs holds in each way of using them; the plan of the first that fits."""
    model_args, gpus = arguments[0], arguments[3].num_gpus
    alone = plan_without_weights(datasets, arguments, machine, streams=False)
    shared = plan_without_weights(datasets, arguments, replace(machine, shares=gpus))
    ways = {f"one GPU, or a copy on each of {gpus} (scripts/distributed/)": alone}
    if machine.has_gpu and model_args.bits == 4 and alone.needs:
        streamed = plan_without_weights(datasets, arguments, machine, streams=True)
        if LAYERS in streamed.savings:
            ways["the same, with layers that come from host memory"] = streamed
    ways[f"one base that {gpus} GPUs share (--shard_layers)"] = shared
    lines = []
    for way, plan in ways.items():
        if plan.needs is None:
            lines.append(f"{way}: cannot be foreseen, {plan.obstacle}")
            continue
        verdict = "" if plan.budget is None else ": fits" if plan.fits else ": does not fit"
        host = f", {plan.needs.host / GIB:.2f} on the host" if plan.needs.host else ""
        lines.append(f"{(plan.needs.total + CUDA_CONTEXT) / GIB:9.2f} GiB a GPU{host}  {way}{verdict}")
    notice("\n".join(["ways to train:", *lines]))
    return next((plan for plan in ways.values() if plan.fits), shared)


def choose_machine(model_args: ModelArguments) -> Machine:
    """This one; without a GPU a GPU with bfloat16 of --max_memory_MB, unless --use_cpu."""
    if has_gpu(model_args) or model_args.use_cpu:
        return find_machine(model_args, choose_compute_dtype(model_args))
    dtype = torch.float16 if model_args.fp16 else torch.bfloat16
    cap = model_args.max_memory_MB
    return Machine(True, dtype, cap * 10**6 - CUDA_CONTEXT if cap else None)


def needs_streaming(
    datasets: dict[str, TokenRows],
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: TrainingArguments,
) -> bool:
    """Whether the layers must be loaded into host memory, as the GPU has no room for them."""
    if not has_gpu(model_args) or not training_args.do_train:
        return False
    if "LOCAL_RANK" in os.environ:  # its own GPU's memory counts, and no other may get a context of it
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    arguments = (model_args, data_args, lora_args, training_args)
    machine = find_machine(model_args, choose_compute_dtype(model_args))
    plan = plan_without_weights(datasets, arguments, machine, read_resolved(training_args))
    return LAYERS in plan.savings and model_args.bits == 4 and not model_args.shard_layers


def plan_without_weights(
    datasets: dict[str, TokenRows],
    arguments: Arguments,
    machine: Machine,
    earlier: dict[str, Any] | None = None,
    streams: bool | None = None,
) -> Plan:
    model_args, _, _, training_args = arguments
    packs = training_args.packing and takes_positions(build_without_weights(model_args))
    config, lengths = load_config(model_args), datasets[TRAIN].lengths
    return make_plan(config, arguments, machine, lengths, packs, earlier or {}, streams)


def find_longest_row(arguments: Arguments, machine: Machine) -> list[str]:
    """A line with the longest row that can be trained on, and what ends it; none where no memory is named.

    All layers are recomputed, and as much waits in host memory as gives the longest.
    """
    model_args, _, lora_args, training_args = arguments
    if not machine.has_gpu or machine.budget is None:
        return []
    offload = training_args.offload_checkpoints
    step = rehearse_model(load_config(model_args), model_args, lora_args, machine.dtype, True, offload)
    if isinstance(step, str):
        return []
    step.shares = machine.shares
    optim = "adamw_torch_fused" if training_args.optim == "auto" else training_args.optim
    ladder = list_ladder(step, machine, optim, model_args.bits, None)
    few, many, longest, limit = 4 * TILE, 8 * TILE, 0, ""
    for _ in range(2):  # bytes grow evenly between lengths like these, so the second time is near
        longest, limit = max(find_room(step, machine, optim, savings, few, many) for savings in ladder)
        few = min(max(64, longest * 9 // 10), LONG)
        many = max(few + 64, min(longest * 11 // 10, 2 * LONG))
    return [f"longest row that fits, every layer recomputed: {longest:,} tokens ({limit} ends it)"]


def find_room(
    step: StepNeeds, machine: Machine, optim: str, savings: Savings, few: int, many: int
) -> tuple[int, str]:
    """(tokens of the longest row, what ends it), by what `few` and `many` tokens need."""
    assert machine.budget is not None
    less, more = (step.measure(1, tokens, step.layers, optim, savings) for tokens in (few, many))
    room = {"the GPU": extend(few, many, less.total, more.total, (1 - MARGIN) * machine.budget)}
    if machine.host_budget is not None:
        host = less.least_host, more.least_host
        room["host memory"] = extend(few, many, *host, machine.host_budget)
    limit = min(room, key=lambda name: room[name])
    return max(0, int(room[limit]) // 64 * 64), limit


def extend(few: int, many: int, less: int, more: int, room: float) -> float:
    """Tokens that `room` bytes hold where `few` take `less` and `many` take `more`."""
    return few + (many - few) * (room - less) / (more - less) if more > less else 2.0**40


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
        f"activations of {plan.capacity:,} tokens and a chunk of logits, {recomputed}": needs.activations,
        "fragments of the allocator": needs.fragments,
        "cuBLAS": WORKSPACE,
        "CUDA's context and kernels": CUDA_CONTEXT,
    }
    lines = [f"{size / GIB:9.2f} GiB  {part}" for part, size in parts.items() if size]
    lines += plan.saving_lines
    total = (needs.total + CUDA_CONTEXT) / GIB
    verdict = ""
    if plan.budget is not None:
        verdict = (
            f" of {(plan.budget + CUDA_CONTEXT) / GIB:.2f}: {'it fits' if plan.fits else 'it does not fit'}"
        )
    return ["memory plan:", *lines, f"{total:9.2f} GiB  in all{verdict}"]


def describe_time(
    plan: Plan, rows: int, model_args: ModelArguments, training_args: TrainingArguments
) -> list[str]:
    """A line with the time of an epoch of so many `rows` on the GPU at hand; none without a GPU."""
    if plan.step_tokens is None or not has_gpu(model_args):
        return []
    model: Any = build_without_weights(model_args)
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    others = model.num_parameters() - model.get_input_embeddings().weight.numel()
    if weights < 0.9 * others:  # experts: how many a token meets is the model's own affair
        return []
    dtype = choose_compute_dtype(model_args)
    tflops = measure_matmul_tflops("cuda", dtype)
    step_rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    seconds = estimate_epoch_seconds(rows / step_rows, plan.step_tokens, weights, tflops)
    speed = f"matrix products reach {tflops:.0f} TFLOP/s"
    return [f"an epoch takes about {seconds / 60:.1f} minutes on this GPU (estimated: {speed})"]


def describe_plan(plan: Plan) -> str:
    """In one line."""
    assert plan.needs
    again = f"{plan.recomputed_layers} of {plan.layers} layers recomputed"
    budget = f" of {plan.budget / GIB:.1f} GiB" if plan.budget else ""
    return (
        f"memory plan: micro-batches of {plan.capacity:,} tokens, {again}, "
        f"{plan.needs.total / GIB:.2f}{budget}"
    )
