"""The Trainer: transformers' loop and flags, with a loss by label tokens and an exact resume.

A step of the loop, and who does what in it:

    begin_step          guard and meter note where the step starts; a signal may stop the run here
    training_step       engine: forward and backward of the step's micro-batches; meter: tokens
    _clip_grad_norm     engine: the norm of the whole gradient
    _get_grad_norm      guard: is it finite? if not, nothing is changed and the rows are named
    optimizer.step()    the Trainer's own, as is the schedule
    end_step            the random numbers are noted, for a checkpoint of exactly this moment
    _save_checkpoint    keeper: written beside, verified, renamed

The loss is the mean over the label tokens of the whole optimizer step, never a mean of micro-batches' means:
a row of 10 label tokens in a micro-batch of its own would weigh as much as one of 1,000. So (batch 4,
accumulation 1) and (batch 1, accumulation 4) give the same gradient, packed or not.
"""

import functools
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from utils.data.epoch_order import EpochOrder, deal_out_rows
from utils.data.packing import PaddingCollator, find_micro_batches, list_rows
from utils.fast.keyed_noise import add_embedding_noise
from utils.prompts.messages import IGNORE_INDEX
from utils.run import signals
from utils.run.keeper import Keeper, estimate_checkpoint_bytes
from utils.run.training_state import load_rng, read_rng, restore_rng, rng_kept
from utils.train.best import BestStep, load_best, name_best
from utils.train.engine import Engine
from utils.train.meter import TokenMeter
from utils.train.resume_state import load_state_into, restore_progress, save_model, write_checkpoint
from utils.train.step_guard import StepGuard
from utils.train.step_hooks import StepHooks
from utils.train.step_memory import StepMemory
from utils.train.token_loss import TokenLoss


class QLoraTrainer(transformers.Trainer):
    """transformers' Trainer that has its parts instead of being them.

    engine      how a step's gradient comes about: plain autograd, or the fused path (engine.py)
    keeper      checkpoints that are whole or not there (utils/run/keeper.py)
    guard       steps that are not finite, and signals (step_guard.py)
    meter       tokens and seconds (meter.py)
    best        the step that is kept, and early stopping (best.py)
    token_loss  losses of the label tokens, for the plain engine and for evaluations (token_loss.py)
    step_memory how large micro-batches are, and what is done when memory is too short (step_memory.py)
    record      run.json (utils/run/record.py)
    """

    # What they are here; transformers' annotations allow more.
    model: Any  # a PreTrainedModel, or the PeftModel around one
    processing_class: Any  # the tokenizer
    train_dataset: Any  # TokenRows
    data_collator: Any  # PackingCollator or PaddingCollator

    def __init__(self, *args: Any, engine: Engine, keeper: Keeper, record: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.engine, self.keeper, self.record = engine, keeper, record
        self.best = BestStep(self.args, record["arguments"])
        self.guard = StepGuard(self.args.world_size, self.accelerator.reduce)
        self.meter = TokenMeter(self.args.device, self.accelerator.reduce)
        self.token_loss = TokenLoss(self.model, self.args.label_smoothing_factor)
        self.step_memory = StepMemory(
            self.data_collator, self.train_dataset, engine, self.accelerator.num_processes
        )
        engine.join_processes(self.accelerator)
        if self.neftune_noise_alpha:
            add_embedding_noise(self.model.get_input_embeddings(), engine.keys, self.neftune_noise_alpha)
        self.neftune_noise_alpha = None  # the Trainer's noise goes by the length of the batch
        # compute_loss below divides by num_items_in_batch, whatever the model's own forward accepts.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = self._loss_shifts_labels = True
        self.step_batches: list[Any] = []  # of the step that runs now
        self.rng_after_step: dict[str, Any] | None = None  # of the last whole step of this start
        self.resumed: dict[str, Any] | None = None  # counters of the checkpoint, until training begins
        self.evaluating = False
        self.last_evaluation: tuple[int, dict[str, float]] | None = None  # step, metrics
        self.saved_evaluation: tuple[int, dict[str, float]] | None = None  # the last before the last save
        self.kept_step: int | None = None  # whose weights the model has, where they are not the last step's
        self.add_callback(StepHooks(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):  # type: ignore[override]  # a path
        moment_bytes = 1 if "8bit" in str(self.args.optim) else 4
        self.keeper.begin(
            Path(resume_from_checkpoint) if resume_from_checkpoint else None,
            estimate_checkpoint_bytes(self.model, len(self.processing_class), moment_bytes),
        )
        self.meter.start()
        self.guard.begin_training()
        self.args.eval_on_start &= resume_from_checkpoint is None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # A step

    def begin_step(self) -> None:
        self.meter.begin_step()
        self.guard.begin_step(self._tr_loss)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """All micro-batches of one batch, which are the whole optimizer step."""
        self.meter.count(find_micro_batches(inputs))
        self.engine.keys.choose_step(self.args.seed, self.state.global_step)
        if not self.args.average_tokens_across_devices:  # then the processes' own means are averaged
            num_items_in_batch = num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        run_micro_batch = functools.partial(super().training_step, model)

        def run_step(batch: dict[str, Any]) -> torch.Tensor:
            micro_batches = find_micro_batches(self._prepare_inputs(batch))
            return self.engine.run_step(
                model, micro_batches, num_items_in_batch, self.accelerator, run_micro_batch
            )

        return self.step_memory.run_within(model, inputs, run_step)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's share of the step's mean loss; what the plain engine differentiates."""
        self.engine.keys.read(inputs)
        losses = self.token_loss(model, inputs)
        # Several processes average their gradients; the mean wanted is over the tokens of all of them.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            choose = functools.partial(self.get_optimizer_cls_and_kwargs, self.args, self.model)
            decay, ratio = self.args.weight_decay, self.record["arguments"].get("loraplus_lr_ratio")
            self.optimizer = self.engine.build_optimizer(self.model, choose, decay, ratio)
        return super().create_optimizer(model)

    def _clip_grad_norm(self, model):
        return self.engine.clip_gradients(model, self.optimizer, self.accelerator, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = self._tr_loss - self.guard.start_loss
        if self.guard.allows_step(loss, grad_norm, self.accelerator.scaler):
            return grad_norm
        self.skip_step(loss, grad_norm)
        return None

    def skip_step(self, loss: torch.Tensor, grad_norm: torch.Tensor | float) -> None:
        """Leave weights, optimizer and logged losses as they are, and name the step's rows."""
        assert self.guard.start_loss is not None  # the step has begun
        self.accelerator.gradient_state._set_sync_gradients(False)  # optimizer.step() does nothing then
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        rows = list_rows(self.step_batches)
        texts = [self.processing_class.decode(self.train_dataset[row]["input_ids"][:40]) for row in rows]
        self.guard.report_skipped_step(
            self.state.global_step + 1, loss.item(), float(grad_norm), rows, texts, self.keeper.output_dir
        )
        # Logged losses are means over the steps that were taken.
        self._tr_loss.copy_(self.guard.start_loss)
        self._globalstep_last_logged += 1
        self._initial_global_step += 1

    def end_step(self) -> None:
        self.meter.end_step()
        self.guard.end_step()
        self.rng_after_step = read_rng()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens_per_second"] = self.meter.read_speed()
            if self.guard.skipped:
                logs["skipped_steps"] = self.guard.skipped
        if "train_runtime" in logs:
            self.meter.correct_runtime(logs)
        super().log(logs, start_time)

    # Rows

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.step_batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.step_batches, count

    def _get_num_items_in_batch(self, batch_samples, device):
        parts = [part for inputs in batch_samples for part in find_micro_batches(inputs)]
        return super()._get_num_items_in_batch(parts, device)

    def floating_point_ops(self, inputs):
        """6 a weight and token; counting the weights walks over thousands of modules, so it is done once."""
        tokens = sum(part["input_ids"].numel() for part in find_micro_batches(inputs))
        return 6 * tokens * self.counted_weights

    @functools.cached_property
    def counted_weights(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        dataloader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(dataloader, "base_dataloader", dataloader)  # what accelerate wraps makes the workers
        inner.worker_init_fn = functools.partial(signals.start_data_worker, then=inner.worker_init_fn)
        if kwargs.get("is_training"):
            deal_out_rows(dataloader, self.order, self.args)
        return dataloader

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        batch, processes = self.args.train_batch_size, self.args.world_size
        assert self.args.data_seed is not None  # the flag has a default
        self.order = EpochOrder(
            self.train_dataset.lengths,
            self.args.train_sampling_strategy,
            batch * self.args.gradient_accumulation_steps * processes,
            self.args.data_seed,
        )
        return self.order

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> Any:
        self.order.epoch, self.steps_per_epoch = epoch, kwargs["num_update_steps_per_epoch"]
        is_over = self.state.global_step >= self.state.max_steps
        if is_over or self.best.is_patience_over(self.state.log_history):  # as it goes on after its last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(model, epoch, *args, **kwargs)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        """Padded batches: each row's loss is read apart."""
        packing = self.data_collator
        multiple = 1 if self.args.device.type == "cpu" else 8
        self.data_collator = PaddingCollator(packing.pad_token_id, multiple, packing.limit)
        dataloader = super().get_eval_dataloader(eval_dataset)
        self.data_collator = packing
        return dataloader

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Mean loss over all label tokens: the same for every batch size and number of processes."""
        start, was_training = time.perf_counter(), self.model.training
        dataloader = self.get_eval_dataloader(eval_dataset)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models:
            model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        model.eval()
        loss_sum, token_count, row_count = self.sum_losses(model, dataloader)
        model.train(was_training)
        metrics = {
            "loss": loss_sum / token_count,
            "tokens": token_count,
            "rows": row_count,
            "seconds": round(time.perf_counter() - start, 2),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        losses = set(metrics)  # callbacks measure too (MMLU, ROUGE), some for minutes, and add to `metrics`
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if added := {name: value for name, value in metrics.items() if name not in losses}:
            self.log(added)
        self.meter.leave_out(time.perf_counter() - start)
        self.last_evaluation = (self.state.global_step, metrics)
        return metrics

    def sum_losses(self, model: torch.nn.Module, dataloader: DataLoader) -> tuple[float, int, int]:
        """(sum of the losses, label tokens, rows) over all processes."""
        loss_sum, token_count, row_count = 0.0, 0, 0
        for batch in dataloader:
            parts = find_micro_batches(self._prepare_inputs(batch))
            with self.accelerator.autocast():
                losses = torch.cat([self.token_loss(model, part).sum(1) for part in parts])  # [rows]
            counts = torch.cat([(part["labels"][:, 1:] != IGNORE_INDEX).sum(1) for part in parts])  # [rows]
            losses, counts = self.accelerator.gather_for_metrics((losses, counts))
            loss_sum, token_count = loss_sum + losses.double().sum().item(), token_count + counts.sum().item()
            row_count += len(counts)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return loss_sum, token_count, row_count

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation takes no random numbers from training: it may be interrupted and repeated."""
        self.evaluating = True
        with rng_kept():
            metrics = super()._evaluate(*args, **kwargs)
        signals.hold_stop()  # up to the next step: what follows from the evaluation belongs to it
        self.evaluating = False
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        self.best.act_on_evaluation(is_best, self.state.log_history, self.control)
        return is_best

    def _load_best_model(self) -> None:
        self.kept_step = load_best(self)

    # Saving and going on

    def _save_checkpoint(self, model, trial=None) -> None:
        step = self.state.global_step
        is_saved = self.keeper.name_checkpoint(step) == self.keeper.last_checkpoint
        is_up_to_date = self.saved_evaluation == self.last_evaluation and not self.evaluating
        if (is_saved and is_up_to_date) or self.kept_step not in (None, step):
            return
        name_best(self)
        with signals.stop_held():
            self.keeper.save_checkpoint(step, functools.partial(write_checkpoint, self))
            self.saved_evaluation = self.last_evaluation
            best = self.state.best_model_checkpoint
            self.keeper.remove_old(
                self.args.save_total_limit, Path(best) if best else None, self.state.save_steps == 1
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_model(self, Path(output_dir or self.keeper.output_dir), state_dict)

    def save_final(self) -> None:
        write = functools.partial(save_model, self, initial=self.keeper.initial)
        self.keeper.save_final(self.state.global_step, write)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            force = self.record["arguments"].get("force_resume", False)
            self.resumed = load_state_into(self, Path(checkpoint), force)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: it comes with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_rng(load_rng(Path(checkpoint), self.args.process_index))

    def restore_progress(self) -> None:
        if self.resumed is not None:
            progress, self.resumed = self.resumed, None
            restore_progress(self, progress)
