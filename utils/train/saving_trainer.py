"""What the Trainer's saves lack: whole, verified checkpoints that hold all an exact resume needs."""

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
from transformers.trainer_callback import ExportableState, TrainerState

from utils.console import UserError, notice
from utils.run import signals
from utils.run.checkpoints import (
    STATE_FILE,
    WRITING,
    check_adapter_learned,
    disk_errors_explained,
    flush_to_disk,
    name_beside,
    publish_folder,
    remove_checkpoint,
    remove_old_checkpoints,
    seal_folder,
    verify_adapter,
)
from utils.run.optimizer_state import Layout, describe_optimizer, load_state, match_schedule, match_state
from utils.run.resume import find_fixed_arguments, fingerprint
from utils.run.training_state import (
    load_rng,
    load_training_state,
    read_rng,
    restore_rng,
    save_rng,
    save_training_state,
)
from utils.train.non_finite import all_finite


class SavingTrainer(transformers.Trainer):
    """Trainer whose checkpoints are whole or not there, and hold all that a run goes on from.

    A subclass sets `record` (run.json), counts tokens in `tokens_since_log` and `tokens_seen`, and keeps
    `step_start` and `rng_after_step`.
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
        self.evaluating = False

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

    def estimate_checkpoint_bytes(self) -> int:
        """Trained weights, two moments of each, and the tokenizer (its json has 75 bytes a token)."""
        moment_bytes = 1 if "8bit" in str(self.args.optim) else 4
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return (
            2**20
            + 100 * len(self.processing_class)
            + sum(weight.numel() * (weight.element_size() + 2 * moment_bytes) for weight in trained)
        )

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

    def save_stopped(self) -> None:
        """After a signal: save what the last whole step left, if no checkpoint holds it; say what is next."""
        name, step = signals.find_stop_signal(), self.state.global_step
        if self.rng_after_step is not None:  # a step was done since this process started
            self._save_checkpoint(self.model)
        where = (
            f"step {step} is in {self.last_checkpoint}" if self.last_checkpoint else "before the first step"
        )
        again = " without --overwrite_output_dir" if self.record["arguments"]["overwrite_output_dir"] else ""
        notice(f"stopped by {name}, {where}: the same command{again} goes on from there")

    # State

    def describe_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        loss, tokens = self.step_start or (self._tr_loss, self.tokens_since_log)
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_kind": describe_optimizer(self.optimizer),
            "layout": self.describe_layout(),
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

    def describe_layout(self) -> Layout:
        """Which weights lie where in the optimizer's parameters."""
        names = {weight: name for name, weight in self.model.named_parameters()}
        parameters = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        return [
            {"shape": list(parameter.shape), "pieces": self.list_pieces(parameter, names)}
            for parameter in parameters
        ]

    def list_pieces(self, parameter: torch.nn.Parameter, names: dict[torch.nn.Parameter, str]) -> list[Any]:
        """[name, first element, shape] of each weight in a parameter of the optimizer: here they are one."""
        return [[names[parameter], 0, list(parameter.shape)]]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_training_state(Path(checkpoint))
        force = self.record["arguments"].get("force_resume", False)
        saved = match_state(state, self.optimizer, self.describe_layout(), checkpoint, force)
        load_state(self.optimizer, saved)
        self.lr_scheduler.load_state_dict(match_schedule(state, len(self.optimizer.param_groups)))
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
