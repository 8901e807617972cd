"""Ten real optimizer steps under a cap on memory: do they fit, does the loss fall, how fast are they?

Each case is a process of its own, as a run is: the cap is set, the plan made for it, a base of random weights
built in 4 bits, and what the plan chose is put together by the functions that a run calls (train/build.py).
One batch is repeated. What is held is all that the process has on the GPU at its peak: reserved by the
allocator, in managed memory, and CUDA's context with kernels and graphs.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eval.speed.case_processes import run_cases, save
from eval.speed.shapes import SHAPES, build_random_model
from eval.speed.steps import synchronize
from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import notice
from utils.data.packing import PackingCollator, PaddingCollator, find_micro_batches
from utils.models.adapter import add_lora
from utils.models.base import CUDA_CONTEXT, cap_memory
from utils.train.build import choose_engine
from utils.train.dry_run import describe_plan
from utils.train.plan import Plan, find_machine, make_plan
from utils.train.savings import LAYERS

if TYPE_CHECKING:
    from eval.memory import MemoryArguments

GIB = 2**30
STREAMS = {"streamed": True, "resident": False}  # layers from host memory, or not; else the plan chooses


@dataclass
class Promise:
    """What came of a case; memory in GiB."""

    case: str
    planned: float
    reserved: float
    managed: float
    context: float
    host: float
    first_loss: float
    last_loss: float
    steps_per_second: float
    tokens_per_second: float
    savings: list[str]
    recomputed_layers: int
    steps: int

    @property
    def held(self) -> float:
        return self.reserved + self.managed + self.context


def keep_promises(arguments: "MemoryArguments") -> None:
    """Print a line for each case and save them."""
    kept = []
    cases = [f"{case} {arguments.steps}" for case in arguments.promises]
    for lines, found in run_cases("eval.speed.promises", cases):
        promise = Promise(**found)
        notice("\n".join([*lines, describe(promise)]))
        kept.append(asdict(promise) | {"held": promise.held})
    save({"promises": kept}, Path(arguments.output_dir, "promises.json"))


def describe(promise: Promise) -> str:
    cap = float(promise.case.split(":")[3])
    learns = promise.steps == 1 or promise.last_loss < promise.first_loss
    verdict = "kept" if promise.held <= cap and learns else "BROKEN"
    return (
        f"{promise.case}: {promise.held:.2f} GiB ({promise.reserved:.2f} reserved, {promise.managed:.2f} "
        f"managed, {promise.context:.2f} context; planned {promise.planned:.2f}), {promise.host:.1f} on the "
        f"host, loss {promise.first_loss:.3f} -> {promise.last_loss:.3f}, "
        f"{promise.steps_per_second:.2f} steps/s, {promise.tokens_per_second:,.0f} tokens/s: {verdict}"
    )


def keep(case: str, steps: int) -> Promise:
    shape, rank, batch, cap, *words = case.split(":")
    rows, width = map(int, batch.split("x"))
    arguments = choose_arguments(int(rank), rows, width, float(cap), words)
    model_args, _, lora_args, training_args = arguments
    config, streams = SHAPES[shape](), next((STREAMS[word] for word in words if word in STREAMS), None)
    cap_memory(model_args, 0)
    machine = find_machine(model_args, torch.bfloat16)
    plan = make_plan(config, arguments, machine, np.full(rows, width), training_args.packing, {}, streams)
    assert plan.needs, plan.obstacle
    notice("\n".join([describe_plan(plan), *plan.saving_lines]))
    torch.manual_seed(0)
    streams = LAYERS in plan.savings
    model: Any = build_random_model(config, model_args.bits, torch.bfloat16, "cuda", streams)
    model = add_lora(model, lora_args).train()
    losses, seconds = train(model, torch.bfloat16, plan, training_args, rows, width, steps)
    free, total = torch.cuda.mem_get_info()
    return Promise(
        case,
        round((plan.needs.total + CUDA_CONTEXT) / GIB, 3),
        round(torch.cuda.max_memory_reserved() / GIB, 3),
        round(plan.needs.paged_optimizer / GIB, 3),
        round((total - free - torch.cuda.memory_reserved()) / GIB, 3),
        round(plan.needs.host / GIB, 2),
        losses[0],
        losses[-1],
        1 / seconds,
        rows * width / seconds,
        list(plan.savings),
        plan.recomputed_layers or 0,
        steps,
    )


def choose_arguments(rank: int, rows: int, width: int, cap: float, words: list[str]) -> Any:
    """A run's, with the flags' defaults but for what the case says."""
    recomputes, is_padded = "True" if "recomputed" in words else "auto", "padded" in words
    return (
        ModelArguments(bits=8 if "8bit" in words else 4, max_memory_MB=round(cap * GIB / 10**6)),
        DataArguments(model_max_length=width),
        LoraArguments(lora_r=rank),
        TrainingArguments(
            per_device_train_batch_size=rows if is_padded else 1,
            gradient_accumulation_steps=1 if is_padded else rows,
            gradient_checkpointing=recomputes,
            packing=not is_padded,
        ),
    )


def train(
    model: Any,
    dtype: torch.dtype,
    plan: Plan,
    training_args: TrainingArguments,
    rows: int,
    width: int,
    steps: int,
) -> tuple[list[float], float]:
    """(the loss of each step, seconds of one: the median of the second half)"""
    if plan.recomputed_layers:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    args = training_args.with_values(optim=plan.optim)
    engine: Any = choose_engine(model, args, dtype, plan, None)
    options = {"lr": args.learning_rate, "fused": True}
    optimizer = engine.build_optimizer(model, lambda: (torch.optim.AdamW, options), 0.0, None)
    ids = [torch.randint(5, model.config.vocab_size, (width,)).numpy() for _ in range(rows)]
    examples: Any = [{"input_ids": row, "labels": row, "row": np.int64(i)} for i, row in enumerate(ids)]
    collator = PackingCollator(0, plan.capacity, fixed=True) if args.packing else PaddingCollator(0)
    parts = find_micro_batches(collator(examples))
    losses, times, labels = [], [], rows * (width - 1)
    for _ in range(steps):
        start = time.perf_counter()
        loss = sum(engine.graphed_step(part, 1 / labels) for part in parts)
        engine.flat.clip_gradients(args.max_grad_norm)
        optimizer.step()
        engine.flat.zero_gradients()
        losses.append(float(loss) / labels)
        synchronize(engine.flat.weights.device.type)
        times.append(time.perf_counter() - start)
    return losses, float(np.median(times[len(times) // 2 :]))


if __name__ == "__main__":
    case, steps = sys.stdin.readline().split()
    print(json.dumps(asdict(keep(case, int(steps)))))
