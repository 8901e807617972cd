"""Measures the cases of eval.memory: what the plan says, and what the GPU holds in the end."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval.speed.case_processes import run_cases, save
from eval.speed.shapes import SHAPES, build_random_model
from eval.speed.workloads import build_packed, build_padded, draw_rows
from utils.arguments import LoraArguments, ModelArguments
from utils.console import UserError, notice
from utils.data.packing import choose_sizes
from utils.fast.graphed_step import GraphedStep
from utils.fast.model import prepare_fast_model
from utils.models.adapter import add_lora
from utils.models.base import CUDA_CONTEXT
from utils.train.needs import StepNeeds, rehearse_model

if TYPE_CHECKING:
    from eval.memory import MemoryArguments

GIB = 2**30
AUTO_BUDGET = 16 * GIB  # of a case whose mode is auto
MEASURED_SIZES = 4  # of packed micro-batches, the largest first


@dataclass
class Comparison:
    case: str
    recomputed_layers: int
    planned_gib: float
    measured_gib: float  # at the peak, all that the process holds on the GPU: the next two
    reserved_gib: float
    outside_gib: float  # of the allocator: CUDA's context, kernels, what the driver keeps for graphs
    peak_gib: float  # in tensors

    @property
    def error(self) -> float:
        return self.planned_gib / self.measured_gib - 1


def compare_plans(arguments: "MemoryArguments") -> None:
    """Print a row for each case and save them."""
    notice(f"{'case':<32} recomputed  planned measured  error reserved outside in tensors, GiB")
    rows = []
    for lines, found in run_cases("eval.speed.memory", arguments.cases):
        if lines:
            notice("\n".join(lines))
        comparison = Comparison(**found)
        rows.append(asdict(comparison) | {"error": comparison.error})
        notice(
            f"{comparison.case:<32} {comparison.recomputed_layers:>10} {comparison.planned_gib:>8.2f} "
            f"{comparison.measured_gib:>8.2f} {comparison.error:>+6.1%} {comparison.reserved_gib:>8.2f} "
            f"{comparison.outside_gib:>7.2f} {comparison.peak_gib:>8.2f}"
        )
    save({"cases": rows}, Path(arguments.output_dir, "memory.json"))


def compare(case: str) -> Comparison:
    shape, rank, tokens, mode = case.split(":")
    config, lora_args = SHAPES[shape](), LoraArguments(lora_r=int(rank), lora_dropout=0.1)
    is_packed = "x" not in tokens
    rows, width = (1, int(tokens)) if is_packed else map(int, tokens.split("x"))
    step = rehearse_model(config, ModelArguments(), lora_args, torch.bfloat16, is_packed, offload=True)
    if isinstance(step, str):
        raise UserError(f"no plan: {step}")
    recomputed, optim = choose_recomputed(step, rows, width, mode), "adamw_torch_fused"
    needs = step.measure(rows, width, recomputed, optim)
    torch.manual_seed(0)
    model: Any = build_random_model(config, 4, torch.bfloat16, "cuda")
    model = add_lora(model, lora_args).train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # from here on: training
    trained = train_two_steps(model, recomputed, rows, width, is_packed)  # with all that it holds
    free, total = torch.cuda.mem_get_info()
    reserved, outside = torch.cuda.max_memory_reserved(), total - free - torch.cuda.memory_reserved()
    del trained
    return Comparison(
        case,
        recomputed,
        round((needs.total + CUDA_CONTEXT) / GIB, 3),
        round((reserved + outside) / GIB, 3),
        round(reserved / GIB, 3),
        round(outside / GIB, 3),
        round(torch.cuda.max_memory_allocated() / GIB, 3),
    )


def choose_recomputed(step: StepNeeds, rows: int, width: int, mode: str) -> int:
    if mode != "auto":
        return step.layers if mode == "all" else 0
    totals = (step.measure(rows, width, layers, "adamw_torch_fused").total for layers in range(step.layers))
    return next((layers for layers, total in enumerate(totals) if total < AUTO_BUDGET), step.layers)


def train_two_steps(model: Any, recomputed: int, rows: int, width: int, is_packed: bool) -> Any:
    """Micro-batches of several sizes, the largest first, each run, captured and replayed."""
    if recomputed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    fast = prepare_fast_model(model, torch.bfloat16, True, recomputed)
    if isinstance(fast, str):
        raise UserError(f"the fast path does not cover this model: {fast}")
    run, vocabulary = GraphedStep(fast, "always"), model.config.vocab_size
    optimizer = torch.optim.AdamW([fast.flat.weights], lr=2e-4, fused=True)
    if is_packed:
        sizes = choose_sizes(width, fixed=True)[:: -max(1, 11 // MEASURED_SIZES)]
        batches = [build_packed(draw_rows(size), size, vocabulary)[0] for size in sizes]
    else:
        batches = [build_padded_batch(rows, width, vocabulary)]
    for _ in range(3):
        for batch in batches:
            run(batch, 1 / width)
        fast.flat.clip_gradients(0.3)
        optimizer.step()
        fast.flat.zero_gradients()
    torch.cuda.synchronize()
    return run, optimizer


def build_padded_batch(rows: int, width: int, vocabulary: int) -> dict[str, Any]:
    batch: dict[str, Any] = build_padded([width] * rows, vocabulary, "cuda")
    keys = torch.arange(rows * width).view(rows, width)
    return batch | {"label_positions": torch.arange(width - 1), "token_keys": keys}


if __name__ == "__main__":
    print(json.dumps(asdict(compare(sys.stdin.readline().strip()))))
