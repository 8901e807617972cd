"""The Trainer on the fused path: the same rows, loss and adapter, gradients and optimizer on flat buffers."""

from typing import Any

import torch

from utils.arguments import TrainingArguments
from utils.fast.graphed_step import GraphedStep
from utils.fast.model import FastModel
from utils.train.trainer import QLoraTrainer, find_micro_batches

# Optimizers that treat every weight alike, so that one flat buffer is as good as many matrices.
ELEMENTWISE = ("adamw", "paged_adamw", "lion", "paged_lion", "sgd", "rmsprop", "ademamix", "paged_ademamix")


def find_flag_obstacle(training_args: TrainingArguments) -> str | None:
    """The flag that the fused path does not cover, if any."""
    if not training_args.optim.startswith(ELEMENTWISE):
        return f"--optim {training_args.optim} looks at each matrix"
    if training_args.extra.get("label_smoothing_factor"):
        return "--label_smoothing_factor"
    return None


class FastQLoraTrainer(QLoraTrainer):
    """QLoraTrainer whose micro-batches run through FastModel, replayed as CUDA graphs on a GPU."""

    path = "fused"

    def __init__(self, *args: Any, fast: FastModel, **kwargs: Any):
        super().__init__(*args, keys=fast.keys, **kwargs)
        self.fast, self.run_step = fast, GraphedStep(fast)
        if self.accelerator.num_processes > 1:
            # training_step sums the gradients itself, so no DistributedDataParallel; and the model is in its
            # place: moving it ("cpu" to "cpu:0" copies) would take the weights out of the flat buffer.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **_: prepare(
                model, device_placement=False, evaluation_mode=True
            )
            torch.distributed.broadcast(fast.flat.weights.data, src=0)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            group = {"params": [self.fast.flat.weights], "weight_decay": self.args.weight_decay}
            self.optimizer = optimizer_class([group], **options)
        return self.optimizer

    def list_pieces(self, parameter: torch.nn.Parameter, names: dict[torch.nn.Parameter, str]) -> list[Any]:
        return [[names[weight], start, list(weight.shape)] for weight, start in self.fast.flat.starts.items()]

    def training_step(self, model, inputs, num_items_in_batch=None):
        parts = find_micro_batches(self._prepare_inputs(inputs))
        self.count_tokens(parts)
        self.keys.choose_step(self.args.seed, self.state.global_step)
        model.train()
        processes = self.accelerator.num_processes
        if not self.args.average_tokens_across_devices:  # then the processes' own means are averaged
            num_items_in_batch = num_items_in_batch * processes
        scaler, one = self.accelerator.scaler, torch.ones((), device=self.args.device)
        loss_scale = (scaler.scale(one) if scaler else one) / num_items_in_batch
        losses = torch.stack([self.run_step(part, loss_scale) for part in parts])
        if processes > 1 and self.accelerator.sync_gradients:
            torch.distributed.all_reduce(self.fast.flat.grads)
        return losses.sum() / num_items_in_batch * processes

    def _clip_grad_norm(self, model):
        self.accelerator.unscale_gradients(self.optimizer)
        return self.fast.flat.clip_gradients(self.args.max_grad_norm)
