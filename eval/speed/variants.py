"""What eval.train_speed times: the original's recipe of 2023, the plain path and the fast path."""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from eval.speed.workloads import Rows, build_packed, build_padded
from utils.console import UserError
from utils.fast.graphed_step import GraphedStep
from utils.fast.model import prepare_fast_model

VARIANTS = ("original", "plain", "fast")
MicroBatches = list[dict[str, Any]]


@dataclass
class Setup:
    """One variant, ready to train."""

    prepare: Callable[[Rows], MicroBatches]
    step: Callable[[MicroBatches], torch.Tensor | float]  # micro-batches of an optimizer step -> its loss
    optimizer: Any
    graphs: Sized = ()  # CUDA graphs captured so far


def build_variant(
    variant: str,
    model: Any,
    lora: LoraConfig,
    dtype: torch.dtype,
    checkpointed: bool,
    capacity: int,
    device: str,
) -> Setup:
    """`model` with an adapter, as the original, the plain or the fast path trains it."""
    if variant == "original":
        model = prepare_model_for_kbit_training(model, True, {"use_reentrant": False})
    elif checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, lora).train()
    if variant == "fast":
        return build_fast_step(model, dtype, capacity, device)
    if variant == "original":
        cast_like_original(model, dtype)
    return build_plain_step(model, dtype, device)


def cast_like_original(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """The dtypes of QLoRA's own script of 2023: 16-bit adapters and head, float32 norms."""
    for name, module in model.named_modules():
        if "lora_" in name and dtype == torch.bfloat16:
            module.to(dtype)
        if "norm" in name:
            module.to(torch.float32)
        if ("lm_head" in name or "embed_tokens" in name) and hasattr(module, "weight"):
            module.to(dtype)


def build_plain_step(model: Any, dtype: torch.dtype, device: str) -> Setup:
    """Padded micro-batches of four through PEFT and autocast, gradients added up, a paged optimizer."""
    import bitsandbytes as bnb

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    paged = device == "cuda"
    optimizer = (bnb.optim.PagedAdamW32bit if paged else torch.optim.AdamW)(weights, lr=2e-4)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    vocabulary = model.config.vocab_size

    def prepare(rows: Rows) -> MicroBatches:
        return [build_padded(rows[i : i + 4], vocabulary, device) for i in range(0, len(rows), 4)]

    def step(batches: MicroBatches) -> torch.Tensor:
        for batch in batches:
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(**batch, use_cache=False).loss / len(batches)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach() * len(batches)

    return Setup(prepare, step, optimizer)


def build_fast_step(model: Any, dtype: torch.dtype, capacity: int, device: str) -> Setup:
    """Packed micro-batches of fixed sizes, replayed as CUDA graphs where there is a GPU."""
    fast = prepare_fast_model(model, dtype)
    if isinstance(fast, str):
        raise UserError(f"the fast path does not cover this model: {fast}")
    run = GraphedStep(fast, "always")
    optimizer = torch.optim.AdamW([fast.flat.weights], lr=2e-4, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    vocabulary = model.config.vocab_size

    def prepare(rows: Rows) -> MicroBatches:
        return build_packed(rows, capacity, vocabulary)

    def step(batches: MicroBatches) -> torch.Tensor | float:
        labels = sum(len(batch["label_positions"]) for batch in batches)
        loss_scale = scaler.scale(torch.ones((), device=device)) / labels
        loss = sum(run(batch, loss_scale) for batch in batches)
        scaler.unscale_(optimizer)
        fast.flat.clip_gradients(0.3)
        scaler.step(optimizer)
        scaler.update()
        fast.flat.zero_gradients()
        return loss / labels

    return Setup(prepare, step, optimizer, run.graphs)
