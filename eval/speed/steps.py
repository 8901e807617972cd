"""Measures the optimizer steps that eval.train_speed asks for: time, memory, and how near the GPU's limit."""

import gc
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig

from eval.speed.shapes import SHAPES, build_random_model, count_linear_weights
from eval.speed.variants import VARIANTS, MicroBatches, Setup, build_variant
from eval.speed.workloads import Rows, fill_each_size, parse_workload
from utils.console import notice
from utils.fast.capability import measure_matmul_tflops, synchronize
from utils.run.record import write_json

HEADER = (
    f"{'variant':<9} {'workload':<22} packed dtype drop   tokens/s   ratio peak GiB reserved  of Adam "
    "4N TFLOP/s of limit first, s captures"
)

if TYPE_CHECKING:
    from eval.train_speed import SpeedArguments


@dataclass
class Timing:
    variant: str
    workload: str
    capacity: int
    dtype: str
    dropout: float
    tokens_per_second: float
    peak_gib: float  # in tensors, those of a graph's pool included; a paged optimizer's state is not
    reserved_gib: float  # what the process held on the GPU for it
    optimizer_gib: float
    tflops: float
    of_limit: float  # of the tokens per second that matrix products alone would allow
    first_step_seconds: float
    captures: int  # CUDA graphs captured in the timed steps, 0.5 to 1 s each
    loss: float


def time_steps(
    setup: Setup, steps: list[MicroBatches], warm_ups: int, device: str
) -> tuple[float, float, int, float]:
    """(seconds of the steps after `warm_ups`, of the first one, graphs captured in between, last loss)

    All rows are new, as in a run.
    """
    start = time.perf_counter()
    setup.step(steps[0])
    synchronize(device)
    first = time.perf_counter() - start
    for batches in steps[1:warm_ups]:
        setup.step(batches)
    synchronize(device)
    graphs, start = len(setup.graphs), time.perf_counter()
    for batches in steps[warm_ups:]:
        loss = setup.step(batches)
    synchronize(device)
    return time.perf_counter() - start, first, len(setup.graphs) - graphs, float(loss)


def plan_steps(
    variant: str, workload: str, capacity: int, arguments: "SpeedArguments", device: str
) -> tuple[list[Rows], int, bool]:
    """(rows of each optimizer step, how many of them only warm up, whether activations are recomputed)"""
    if variant == "fast" and device == "cuda":
        steps, checkpointed = parse_workload(workload, arguments.steps)
        warm_ups = fill_each_size(capacity) if workload.startswith("real-") else steps[:1] * 6
        return warm_ups + steps, len(warm_ups), checkpointed
    (rows, *_), checkpointed = parse_workload(workload, 1)
    timed = min(arguments.steps, 3)
    if variant != "fast" and workload.startswith("real-"):  # padded by fours, of which 24 are enough to time
        timed *= max(1, 32 // len(rows))
    steps, _ = parse_workload(workload, 1 + timed)
    return [rows[:32] if variant != "fast" else rows for rows in steps], 1, checkpointed


def measure(
    variant: str,
    workload: str,
    capacity: int,
    dtype_name: str,
    dropout: float,
    arguments: "SpeedArguments",
    peak_tflops: float,
) -> Timing:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    steps, warm_ups, checkpointed = plan_steps(variant, workload, capacity, arguments, device)
    torch.manual_seed(0)
    model = build_random_model(SHAPES[arguments.model](), arguments.bits, dtype, device)
    lora = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=16,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    setup = build_variant(variant, model, lora, dtype, checkpointed, capacity, device)
    gc.collect()  # the model before this one
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = [setup.prepare(rows) for rows in steps]
    seconds, first, captures, loss = time_steps(setup, batches, warm_ups, device)
    if arguments.profile and device == "cuda":
        print_profile(setup, setup.prepare(steps[-1]))
    steps = steps[warm_ups:]
    states = (values.values() for values in setup.optimizer.state.values())
    state = [x for values in states for x in values if isinstance(x, torch.Tensor)]
    tokens, weights = sum(map(sum, steps)), count_linear_weights(SHAPES[arguments.model]())
    recomputed = checkpointed or variant == "original"
    return Timing(
        variant,
        workload,
        capacity,
        dtype_name,
        dropout,
        round(tokens / seconds, 1),
        round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else 0.0,
        round(torch.cuda.max_memory_reserved() / 2**30, 2) if device == "cuda" else 0.0,
        round(sum(x.numel() * x.element_size() for x in state) / 2**30, 2),
        round(4 * weights * tokens / seconds / 1e12, 3),
        round((6 if recomputed else 4) * weights * tokens / seconds / 1e12 / peak_tflops, 3),
        round(first, 2),
        captures,
        round(loss, 3),
    )


def print_profile(setup: Setup, batches: MicroBatches) -> None:
    """GPU time of one step by kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        setup.step(batches)
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    notice(f"{total / 1e3:9.2f} ms in all kernels")
    for event in events[:30]:
        notice(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6} x {event.key[:90]}")


def name_original(workload: str) -> str:
    """What the original runs for it: it always recomputes, and of many rows 32 tell its speed."""
    workload = workload.removesuffix("-checkpointed")
    return "real-32" if workload.startswith("real-") and int(workload[5:]) > 32 else workload


def list_runs(arguments: "SpeedArguments") -> list[tuple[str, str, int, str, float]]:
    """(variant, workload, capacity, dtype, dropout)"""
    runs = []
    once = {name_original(workload): workload for workload in reversed(arguments.workloads)}
    for variant in VARIANTS:  # the fast path comes last: it replaces a function of the model code
        settings = list(product(arguments.capacity, arguments.dtypes, arguments.dropouts))
        for setting in settings if variant == "fast" else settings[-1:]:
            workloads = reversed(once.values()) if variant == "original" else arguments.workloads
            runs += [(variant, workload, *setting) for workload in workloads]
    return [run for run in runs if run[0] in arguments.variants]


def format_row(timing: Timing, original: dict[str, float]) -> str:
    base = original.get(name_original(timing.workload))
    ratio = f"{timing.tokens_per_second / base:6.2f}x" if base else "      -"
    return (
        f"{timing.variant:<9} {timing.workload:<22} {timing.capacity:>6} {timing.dtype:<5} "
        f"{timing.dropout:<4g} {timing.tokens_per_second:>10,.0f} {ratio} {timing.peak_gib:>8.2f} "
        f"{timing.reserved_gib:>8.2f} {timing.optimizer_gib:>7.2f} {timing.tflops:>9.3g} "
        f"{timing.of_limit:>8.1%} {timing.first_step_seconds:>8.1f} {timing.captures:>8}"
    )


def time_workloads(arguments: "SpeedArguments") -> None:
    """Print a row for each variant and workload, and save them."""
    for workload in arguments.workloads:
        parse_workload(workload, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = measure_matmul_tflops(device, torch.bfloat16 if device == "cuda" else torch.float32)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    notice(
        f"{arguments.model} on {name}, torch {torch.__version__}: matrix products reach {peak:.3g} TFLOP/s"
    )
    notice(HEADER)
    timings, original = [], {}
    for variant, workload, capacity, dtype, dropout in list_runs(arguments):
        try:
            timing = measure(variant, workload, capacity, dtype, dropout, arguments, peak)
        except torch.OutOfMemoryError:
            notice(f"{variant:<9} {workload:<22} {capacity:>6} {dtype:<5} {dropout:<4g} out of memory")
            continue
        if variant == "original":
            original[name_original(workload)] = timing.tokens_per_second
        notice(format_row(timing, original))
        timings.append(asdict(timing))
    path = Path(arguments.output_dir, f"{arguments.model}.json")
    write_json({"device": name, "matmul_tflops": peak, "timings": timings}, path)
    notice(f"saved to {path}")
