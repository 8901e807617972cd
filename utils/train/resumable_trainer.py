"""What the Trainer's steps lack: exact resume, safe stops, skipped NaN steps."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from utils.data.epoch_order import EpochOrder
from utils.run import signals
from utils.run.checkpoints import check_free_space
from utils.run.training_state import read_rng, rng_kept
from utils.train.non_finite import find_rows, report_skipped_step
from utils.train.saving_trainer import SavingTrainer


class StepHooks(TrainerCallback):
    """Where a step begins and ends: signals wait while weights, optimizer and step number change together."""

    def __init__(self, trainer: "ResumableTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_progress()

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.step_start = trainer._tr_loss.clone(), trainer.tokens_since_log.clone()
        trainer.let_stop()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        signals.hold_stop()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.step_start, self.trainer.rng_after_step = None, read_rng()
        if state.global_step == 1 and args.save_strategy != "no":
            control.should_save = True  # from here on there is a checkpoint, and saving is known to work

    def on_prediction_step(self, args, state, control, **kwargs):
        self.trainer.let_stop()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.let_stop()


class ResumableTrainer(SavingTrainer):
    """Trainer that a kill, a signal, a full disk or a NaN costs at most the steps since the last save."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step_batches: list[Any] = []
        self.stop_agreed = False
        self.add_callback(StepHooks(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        check_free_space(Path(self.args.output_dir), self.estimate_checkpoint_bytes())
        self.last_checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.start_time = time.perf_counter()
        if self.args.world_size > 1:
            signals.hold_stop()  # the processes stop together, after the same step
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        dataloader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(dataloader, "base_dataloader", dataloader)  # what accelerate wraps makes the workers
        inner.worker_init_fn = partial(signals.start_data_worker, then=inner.worker_init_fn)
        return dataloader

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        batch, processes = self.args.train_batch_size, self.args.world_size
        self.order = EpochOrder(
            self.train_dataset.lengths,
            self.args.train_sampling_strategy,
            batch * self.args.gradient_accumulation_steps * processes,
            self.args.data_seed,
        )
        return self.order

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> Any:
        self.order.epoch = epoch
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.step_batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.step_batches, count

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        return None if self.skip_bad_step(grad_norm) else grad_norm

    def skip_bad_step(self, grad_norm: torch.Tensor | float) -> bool:
        """Leave weights and optimizer alone where loss or gradient is not finite. One host read a step."""
        start_loss, _ = self.step_start
        loss = self._tr_loss - start_loss
        grad_norm = torch.as_tensor(grad_norm, device=loss.device)
        finite_gradient = grad_norm.isfinite()
        if self.accelerator.scaler is not None:  # its scale overflows now and then, it skips that itself
            finite_gradient |= self.accelerator.scaler._get_scale_async() >= 1
        flags = torch.stack([~(loss.isfinite() & finite_gradient), torch.zeros_like(finite_gradient)]).int()
        if self.args.world_size > 1:
            flags[1] = signals.find_stop_signal() is not None
            flags = self.accelerator.reduce(flags, "sum")
        is_bad, must_stop = flags.tolist()
        if must_stop:
            signals.ask_to_stop("a signal to another process")
            self.stop_agreed = True
        if not is_bad:
            self.skipped_in_a_row = 0
            return False
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self.accelerator.gradient_state._set_sync_gradients(False)  # optimizer.step() does nothing then
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        rows = find_rows(self.step_batches)
        texts = [self.processing_class.decode(self.train_dataset[row]["input_ids"][:40]) for row in rows]
        report_skipped_step(
            self.state.global_step + 1, loss.item(), grad_norm.item(), rows, texts, self.skipped_in_a_row,
            Path(self.args.output_dir),
        )  # fmt: skip
        # Logged losses are means over the steps that were taken.
        self._tr_loss.copy_(start_loss)
        self._globalstep_last_logged += 1
        self._initial_global_step += 1
        return True

    def let_stop(self) -> None:
        """Signals may interrupt from here on: at once, or where several processes have agreed to stop."""
        if self.args.world_size == 1 or self.stop_agreed:
            signals.release_stop()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation takes no random numbers from training: it may be interrupted and repeated."""
        self.evaluating = True
        with rng_kept():
            metrics = super()._evaluate(*args, **kwargs)
        self.evaluating = False
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.skipped_steps and "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps
        if "train_runtime" in logs:  # the steps are those of all starts: so is the time
            share = logs["train_runtime"] / self.train_seconds
            logs["train_runtime"] = round(self.train_seconds, 4)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs[name] = round(logs[name] * share, 3)
        super().log(logs, start_time)
