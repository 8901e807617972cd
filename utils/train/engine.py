"""The two engines: how the micro-batches of one optimizer step become its gradient.

The PlainEngine is PEFT's and the model's own forward under autograd. The FastEngine runs the fused forward
and backward of utils/fast, replayed as CUDA graphs on a GPU, with all adapter weights in one flat buffer:
clipping, zeroing and Adam are then one kernel launch each instead of one for each of some 450 small matrices.

Both answer the same five questions, so the Trainer holds one and does not know which:

    keys             what dropout masks follow from (utils/fast/token_keys.py)
    build_optimizer  over the adapter's weights, or None for the Trainer's own groups of them
    run_step         loss of a step, its gradient left where the optimizer finds it
    clip_gradients   the gradient's norm, scaled down to --max_grad_norm
    list_pieces      which weights lie where in an optimizer's parameter, for the checkpoint
    run_probe        the largest micro-batch, once before training, for its memory alone
    forget_step      nothing is left of the step under way, which memory was too short for
    recompute_all    less memory for a step; False where that is done already
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from utils.arguments import TrainingArguments
from utils.fast.graphed_step import GraphedStep
from utils.fast.keyed_noise import key_dropout
from utils.fast.model import FastModel, MicroBatch
from utils.train.host_adam import HostAdamW

# Optimizers that treat every weight alike, so that one flat buffer is as good as many matrices.
ELEMENTWISE = ("adamw", "paged_adamw", "lion", "paged_lion", "sgd", "rmsprop", "ademamix", "paged_ademamix")

ChooseOptimizer = Callable[[], tuple[Any, dict[str, Any]]]  # its class and the options that the flags give
Piece = list[Any]  # [name of a weight, its first element in the parameter, its shape]


class PlainEngine:
    """Autograd through the model's own forward; every weight is a parameter of the optimizer."""

    name = "plain"

    def __init__(self, model: nn.Module):
        self.keys = key_dropout(model)

    def join_processes(self, accelerator: Accelerator) -> None:
        """Nothing: DistributedDataParallel, which the Trainer wraps around the model, averages gradients."""

    def run_step(
        self,
        model: nn.Module,
        micro_batches: list[MicroBatch],
        label_tokens: torch.Tensor,
        accelerator: Accelerator,
        run_micro_batch: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Mean loss over the `label_tokens` of the step  # []

        `run_micro_batch` is forward and backward of one. Processes exchange gradients once, with the last.
        """
        *earlier, last = micro_batches
        with accelerator.no_sync(model) if earlier else contextlib.nullcontext():
            losses = [run_micro_batch(part, label_tokens) for part in earlier]
        losses.append(run_micro_batch(last, label_tokens))
        return torch.stack(losses).sum()

    def build_optimizer(
        self, model: nn.Module, choose: ChooseOptimizer, decay: float, ratio: float | None
    ) -> torch.optim.Optimizer | None:
        """`ratio`: LoRA+'s (arXiv 2402.12354), by which B's learning rate is higher than A's."""
        if ratio is None:
            return None
        kind, options = choose()
        own = {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": decay}
        return create_loraplus_optimizer(model, kind, **options, **own)  # type: ignore[arg-type]

    def clip_gradients(
        self, model: nn.Module, optimizer: Any, accelerator: Accelerator, max_norm: float
    ) -> torch.Tensor:
        return accelerator.clip_grad_norm_(model.parameters(), max_norm)

    def list_pieces(self, parameter: nn.Parameter, names: dict[nn.Parameter, str]) -> list[Piece]:
        return [[names[parameter], 0, list(parameter.shape)]]

    def run_probe(self, model: nn.Module, micro_batch: MicroBatch) -> None:
        """Nothing: without graphs every step allocates anew."""

    def forget_step(self, model: nn.Module) -> None:
        model.zero_grad()

    def recompute_all(self) -> bool:
        return False  # as --gradient_checkpointing has it


class FastEngine:
    """The fused path (utils/fast/model.py): the same rows, loss and adapter as the plain one, faster."""

    name = "fused"

    def __init__(self, fast: FastModel, keeps_state_on_host: bool = False):
        self.fast, self.flat, self.keys = fast, fast.flat, fast.keys
        self.keeps_state_on_host = keeps_state_on_host
        self.slices: dict[nn.Parameter, tuple[int, int]] = {}  # what the optimizer is given: start and end
        self.graphed_step = GraphedStep(fast)

    def join_processes(self, accelerator: Accelerator) -> None:
        """Begin with the same weights; run_step sums the gradients itself, in a buffer that stays.

        So no DistributedDataParallel is wanted, and the Trainer's zero_grad, which walks over every module,
        is one launch. And the model is in its place: moving it again ("cpu" to "cpu:0" copies) would take the
        weights out of the flat buffer.
        """
        model: Any = self.fast.model
        model.zero_grad = lambda set_to_none=True: self.flat.zero_gradients()
        self.flat.check_place()
        if accelerator.num_processes == 1:
            return
        prepare = accelerator.prepare_model
        accelerator.prepare_model = lambda model, **_: prepare(
            model, device_placement=False, evaluation_mode=True
        )
        torch.distributed.broadcast(self.flat.weights.data, src=0)

    def run_step(
        self,
        model: nn.Module,
        micro_batches: list[MicroBatch],
        label_tokens: torch.Tensor,
        accelerator: Accelerator,
        run_micro_batch: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """As PlainEngine.run_step; `run_micro_batch` is not used, the graphed step takes its place."""
        model.train()
        scaler, processes = accelerator.scaler, accelerator.num_processes
        one = torch.ones((), device=self.flat.weights.device)
        loss_scale = (scaler.scale(one) if scaler else one) / label_tokens
        if self.fast.shards:
            micro_batches = self.fast.shards.even_out(micro_batches)
        losses = torch.stack([self.graphed_step(part, loss_scale) for part in micro_batches])
        if processes > 1 and accelerator.sync_gradients:
            torch.distributed.all_reduce(self.flat.grads)
        return losses.sum() / label_tokens * processes

    def build_optimizer(
        self, model: nn.Module, choose: ChooseOptimizer, decay: float, ratio: float | None
    ) -> torch.optim.Optimizer:
        """As PlainEngine.build_optimizer: one parameter, or with a `ratio` the runs of A and those of B."""
        kind, options = choose()
        kind = HostAdamW if self.keeps_state_on_host else kind
        weights = self.flat.weights
        if ratio is None:
            self.slices = {weights: (0, weights.numel())}
            return kind([{"params": [weights], "weight_decay": decay}], **options)
        names = {weight: name for name, weight in model.named_parameters()}
        runs = self.flat.find_runs(lambda weight: ".lora_B." in names[weight])
        parts = [(is_b, self.flat.cut(start, end)) for is_b, start, end in runs]
        self.slices = {part: run[1:] for (_, part), run in zip(parts, runs, strict=True)}
        rates = {False: options["lr"], True: options["lr"] * ratio}
        groups = [
            {"params": [part for kind_b, part in parts if kind_b == is_b], "lr": rate, "weight_decay": decay}
            for is_b, rate in rates.items()
        ]
        return kind(groups, **options)

    def clip_gradients(
        self, model: nn.Module, optimizer: Any, accelerator: Accelerator, max_norm: float
    ) -> torch.Tensor:
        accelerator.unscale_gradients(optimizer)
        return self.flat.clip_gradients(max_norm)

    def list_pieces(self, parameter: nn.Parameter, names: dict[nn.Parameter, str]) -> list[Piece]:
        first, end = self.slices[parameter]
        return [
            [names[weight], start - first, list(weight.shape)]
            for weight, start in self.flat.starts.items()
            if first <= start < end
        ]

    def run_probe(self, model: nn.Module, micro_batch: MicroBatch) -> None:
        """A micro-batch forward and backward for the memory it takes; nothing is learned."""
        model.train()
        self.graphed_step(micro_batch, 0.0)
        self.flat.zero_gradients()

    def forget_step(self, model: nn.Module) -> None:
        self.graphed_step.forget_graphs()
        self.flat.attach_gradients()
        self.flat.zero_gradients()

    def recompute_all(self) -> bool:
        layers, recomputed = len(self.fast.layers), self.fast.recomputed_layers
        self.fast.recomputed_layers = layers
        return recomputed is not None and recomputed < layers


Engine = PlainEngine | FastEngine


def find_flag_obstacle(training_args: TrainingArguments) -> str | None:
    """The flag that the fused path does not cover, if any."""
    if not training_args.optim.startswith(ELEMENTWISE):
        return f"--optim {training_args.optim} looks at each matrix"
    if training_args.extra.get("label_smoothing_factor"):
        return "--label_smoothing_factor"
    return None
