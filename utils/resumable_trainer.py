"""What the Trainer's steps and saves lack: whole checkpoints, exact resume, safe stops, skipped NaN steps."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from utils import signals
from utils.checkpoints import (
    STATE_FILE,
    WRITING,
    check_adapter_learned,
    check_free_space,
    disk_errors_explained,
    flush_to_disk,
    name_beside,
    publish_folder,
    remove_checkpoint,
    remove_old_checkpoints,
    seal_folder,
    verify_adapter,
)
from utils.console import UserError, notice
from utils.finite import all_finite, find_rows, report_skipped_step
from utils.resume import find_fixed_arguments, fingerprint
from utils.training_state import (
    load_rng,
    load_training_state,
    read_rng,
    restore_rng,
    rng_kept,
    save_rng,
    save_training_state,
)


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


class ResumableTrainer(transformers.Trainer):
    """Trainer that a kill, a signal, a full disk or a NaN costs at most the steps since the last save.

    A subclass sets `record` (run.json), and counts tokens in `tokens_since_log` and `tokens_seen`.
    """

    record: dict[str, Any]
    tokens_since_log: torch.Tensor  # []
    tokens_seen: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.last_checkpoint: Path | None = None
        self.skipped_steps = self.skipped_in_a_row = 0
        self.earlier_seconds, self.start_time = 0.0, time.perf_counter()
        self.resumed: dict[str, Any] | None = None
        self.step_start: tuple[torch.Tensor, torch.Tensor] | None = None  # loss, tokens before this step
        self.rng_after_step: dict[str, Any] | None = None
        self.step_batches: list[Any] = []
        self.evaluating = self.stop_agreed = False
        self.add_callback(StepHooks(self))

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of what decides the result: equal where a checkpoint may be gone on from."""
        rows = hashlib.sha256()
        if self.train_dataset is not None:
            rows.update(self.train_dataset.offsets.tobytes())
            for piece in self.train_dataset.read_tokens():
                rows.update(np.ascontiguousarray(piece))
        return {
            "base model": fingerprint(self.record["base_model"]),
            "training rows": rows.hexdigest(),
            "arguments": fingerprint(find_fixed_arguments(self.record["arguments"])),
        }

    @property
    def train_seconds(self) -> float:
        """Seconds of training, those of the starts that this one goes on from included."""
        return self.earlier_seconds + time.perf_counter() - self.start_time

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        check_free_space(Path(self.args.output_dir), self.estimate_checkpoint_bytes())
        self.last_checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.start_time = time.perf_counter()
        if self.args.world_size > 1:
            signals.hold_stop()  # the processes stop together, after the same step
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def estimate_checkpoint_bytes(self) -> int:
        """Trained weights, two moments of each, and the tokenizer (its json has 75 bytes a token)."""
        moment_bytes = 1 if "8bit" in str(self.args.optim) else 4
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return (
            2**20
            + 100 * len(self.processing_class)
            + sum(weight.numel() * (weight.element_size() + 2 * moment_bytes) for weight in trained)
        )

    # Steps

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

    # Saves

    def _save_checkpoint(self, model, trial=None) -> None:
        """checkpoint-N: written beside, verified, sealed with its manifest, renamed; then older ones go."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if folder == self.last_checkpoint and not self.evaluating:
            return
        with signals.stop_held():
            with self.written_beside(folder) as staging:
                self.write_checkpoint(folder, staging)
            self.last_checkpoint = folder
            if self.args.should_save:
                self.remove_old_checkpoints(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def write_checkpoint(self, folder: Path, staging: Path) -> None:
        """Every file of `folder`, as yet in `staging`."""
        self.note_best_checkpoint(folder)
        self.store_flos()
        if not self.args.save_only_model:
            save_rng(self.rng_after_step or read_rng(), staging / self.name_rng_file())
        if not self.args.should_save:
            return
        self._save(str(staging))
        if not self.args.save_only_model:
            save_training_state(self.describe_state(), staging)
        callbacks = [*self.callback_handler.callbacks, self.control]
        exportable = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        self.state.save_to_json(str(staging / STATE_FILE))

    @contextmanager
    def written_beside(self, folder: Path) -> Iterator[Path]:
        """A folder to write into, which becomes `folder` once the adapter in it is read back as it was."""
        if not all_finite(self.model.parameters()):
            raise UserError(
                f"the weights are not finite after step {self.state.global_step}, nothing is saved: lower "
                f"--learning_rate; {self.last_checkpoint or 'no checkpoint'} is the last good one"
            )
        staging = name_beside(folder, WRITING)
        with disk_errors_explained(folder, self.last_checkpoint):
            try:
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)
                    staging.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                yield staging
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if isinstance(self.model, PeftModel):
                        verify_adapter(self.model, staging)
                    seal_folder(staging, self.state.global_step, self.fingerprints)
                    publish_folder(staging, folder)
                self.accelerator.wait_for_everyone()
            finally:
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)  # there only after a failure

    def remove_old_checkpoints(self, saved: Path) -> None:
        best = self.state.best_model_checkpoint
        keep = {saved} | ({Path(best)} if best else set())
        first = saved.with_name("checkpoint-1")  # saved early (StepHooks), not because --save_steps said so
        if first.is_dir() and first not in keep and self.state.save_steps != 1:
            remove_checkpoint(first)
        remove_old_checkpoints(saved.parent, self.args.save_total_limit, keep)

    def note_best_checkpoint(self, folder: Path) -> None:
        best = self.state.best_global_step
        if best and (best == self.state.global_step or folder.with_name(f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(folder.with_name(f"checkpoint-{best}"))

    def save_final(self) -> None:
        """The finished adapter in the run's own folder, each file whole or not there."""
        output_dir = Path(self.args.output_dir)
        staging = output_dir / f".final.{WRITING}"
        if isinstance(self.model, PeftModel):
            check_adapter_learned(self.model, self.state.global_step)
        if not all_finite(self.model.parameters()):
            raise UserError(
                f"the weights are not finite after {self.state.global_step} steps: lower --learning_rate"
            )
        if self.args.should_save:
            with disk_errors_explained(output_dir, self.last_checkpoint):
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                self._save(str(staging))
                if isinstance(self.model, PeftModel):
                    verify_adapter(self.model, staging)
                for path in sorted(staging.iterdir()):
                    flush_to_disk(path)
                    os.replace(path, output_dir / path.name)
                staging.rmdir()
                flush_to_disk(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def save_stopped(self) -> None:
        """After a signal: save what the last whole step left, if no checkpoint holds it; say what is next."""
        name, step = signals.find_stop_signal(), self.state.global_step
        if self.rng_after_step is not None:  # a step was done since this process started
            self._save_checkpoint(self.model)
        where = (
            f"step {step} is in {self.last_checkpoint}" if self.last_checkpoint else "before the first step"
        )
        notice(f"stopped by {name}, {where}: the same command goes on from there")

    # State

    def describe_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        loss, tokens = self.step_start or (self._tr_loss, self.tokens_since_log)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "progress": {
                "loss_since_log": loss.item(),
                "loss_logged": self._total_loss_scalar,
                "logged_step": self._globalstep_last_logged,
                "initial_step": self._initial_global_step,
                "tokens_since_log": tokens.item(),
                "tokens_seen": self.tokens_seen,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "seconds": self.train_seconds,
                "evaluation_due": self.evaluating,
            },
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_training_state(Path(checkpoint))
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.resumed = state["progress"]

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: it comes with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_rng(load_rng(Path(checkpoint, self.name_rng_file())))

    def name_rng_file(self) -> str:
        return f"rng_state_{self.args.process_index}.json"

    def restore_progress(self) -> None:
        """Counters of the interrupted run, so that logs and metrics are those of an uninterrupted one."""
        if self.resumed is None:
            return
        progress, self.resumed = self.resumed, None
        self._tr_loss += progress["loss_since_log"]
        self._total_loss_scalar = progress["loss_logged"]
        self._globalstep_last_logged = progress["logged_step"]
        self._initial_global_step = progress["initial_step"]
        self.tokens_since_log += progress["tokens_since_log"]
        self.tokens_seen = progress["tokens_seen"]
        self.skipped_steps, self.skipped_in_a_row = progress["skipped_steps"], progress["skipped_in_a_row"]
        self.earlier_seconds = progress["seconds"]
        if progress["evaluation_due"]:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics, None)
