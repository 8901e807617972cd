"""The fast path inside transformers' Trainer: its step, its one-tensor optimizer, its clipping."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from utils.cuda_graph import GraphedStep
from utils.fast_model import FastModel, MicroBatch

if TYPE_CHECKING:
    from transformers import Trainer


def install_fast_path(trainer: "Trainer", fast: FastModel) -> GraphedStep:
    """Give `trainer` an optimizer over the flat adapter; returns the step for run_micro_batches.

    The schedule, the loss scale, logging, evaluation and checkpoints stay the Trainer's own.
    """
    trainer.create_optimizer = partial(create_flat_optimizer, trainer, fast)
    trainer._clip_grad_norm = partial(clip_flat_gradients, trainer, fast)
    return GraphedStep(fast)


def create_flat_optimizer(trainer: "Trainer", fast: FastModel, model: Any = None) -> torch.optim.Optimizer:
    """The optimizer of --optim over one flat tensor: a launch where there were one or more a matrix."""
    if trainer.optimizer is None:
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, fast.model)
        group = {"params": [fast.flat.weights], "weight_decay": trainer.args.weight_decay}
        trainer.optimizer = kind([group], **options)
    return trainer.optimizer


def clip_flat_gradients(trainer: "Trainer", fast: FastModel, model: Any = None) -> torch.Tensor:
    trainer.accelerator.unscale_gradients()
    return fast.flat.clip_gradients(trainer.args.max_grad_norm)


def run_micro_batches(
    trainer: "Trainer", step: GraphedStep, micro_batches: list[MicroBatch], num_items: int | torch.Tensor
) -> torch.Tensor:
    """Forward and backward of an optimizer step's micro-batches, for Trainer.training_step.

    `num_items`: label tokens of the whole step, of all processes. Returns this process's part of the loss
    """
    scaler, device = trainer.accelerator.scaler, step.fast.seed.device
    one = torch.ones((), device=device)
    loss_scale = (one if scaler is None else scaler.scale(one)) / num_items
    losses = [step(micro_batch, loss_scale) for micro_batch in micro_batches]
    if trainer.accelerator.num_processes > 1 and trainer.accelerator.sync_gradients:
        distributed.all_reduce(step.fast.flat.grads)
    return torch.stack(losses).sum() / num_items
