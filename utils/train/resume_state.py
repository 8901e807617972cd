"""What a checkpoint holds beside the adapter: optimizer, schedule, loss scale and counters of a Trainer."""

import copy
import itertools
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_callback import ExportableState, TrainerState

from utils.run.checkpoints import STATE_FILE
from utils.run.keeper import copy_adapter
from utils.run.optimizer_state import Layout, describe_optimizer, load_state, match_schedule, match_state
from utils.run.training_state import (
    load_training_state,
    name_rng_file,
    read_rng,
    save_rng,
    save_training_state,
)
from utils.train.best import drop_evaluation, name_best
from utils.train.model_card import render_model_card
from utils.train.schedule import follow_schedule, report_extension


def write_checkpoint(trainer: Any, folder: Path) -> None:
    """What an exact resume needs, in `folder`; nothing pickled."""
    args = trainer.args
    trainer.store_flos()
    if not args.save_only_model:
        save_rng(trainer.rng_after_step or read_rng(), folder / name_rng_file(args.process_index))
    if not args.should_save:
        return
    save_model(trainer, folder)
    if not args.save_only_model:
        save_training_state(describe_state(trainer), folder)
    save_trainer_state(trainer, folder)


def save_model(
    trainer: Any, folder: Path, state_dict: dict[str, Any] | None = None, initial: Path | None = None
) -> None:
    """Adapter, tokenizer and model card. `initial`: an adapter that PEFT subtracts from the trained one."""
    if not trainer.args.should_save:
        return
    options: dict[str, Any] = {}
    if isinstance(trainer.model, PeftModel):
        # No token is ever added, so embeddings need no saving (and no look-up of the base on the hub).
        options["save_embedding_layers"] = False
        if initial:  # which it reads beside the trained one
            options["path_initial_model_for_weight_conversion"] = str(initial)
        elif state_dict is None:
            state_dict = copy_adapter(trainer.model)
    trainer.model.save_pretrained(folder, state_dict=state_dict, **options)
    trainer.processing_class.save_pretrained(folder)
    (folder / "README.md").write_text(render_model_card(trainer.record), encoding="utf-8")


def describe_state(trainer: Any) -> dict[str, Any]:
    """A tree of numbers and tensors, as utils/run/training_state.py writes it."""
    scaler = trainer.accelerator.scaler
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "optimizer_kind": describe_optimizer(trainer.optimizer),
        "layout": describe_layout(trainer),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "progress": describe_progress(trainer),
    }


def describe_progress(trainer: Any) -> dict[str, Any]:
    """Counters as they were after the last whole step, which is not always now."""
    start_loss = trainer.guard.start_loss
    progress = {
        "loss_since_log": (trainer._tr_loss if start_loss is None else start_loss).item(),
        "loss_logged": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
        "initial_step": trainer._initial_global_step,
        "evaluation_due": owes_evaluation(trainer),
    }
    return progress | trainer.meter.state_dict() | trainer.guard.state_dict()


def owes_evaluation(trainer: Any) -> bool:
    """Whether one of this step is under way, or comes at the epoch's end, after what is saved now."""
    state, args = trainer.state, trainer.args
    measured, _ = trainer.last_evaluation or (None, {})
    is_last = trainer.control.should_training_stop or state.global_step % trainer.steps_per_epoch == 0
    by_epoch = args.eval_strategy == "epoch" and args.eval_delay <= state.epoch
    return trainer.evaluating or (by_epoch and is_last and measured != state.global_step)


def restore_progress(trainer: Any, progress: dict[str, Any]) -> None:
    """Counters of the interrupted run, so that logs and metrics are those of an uninterrupted one."""
    trainer._tr_loss += progress["loss_since_log"]
    trainer._total_loss_scalar = progress["loss_logged"]
    trainer._globalstep_last_logged = progress["logged_step"]
    trainer._initial_global_step = progress["initial_step"]
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
    trainer.meter.load_state_dict(progress)
    trainer.guard.load_state_dict(progress)
    if progress["evaluation_due"]:
        trainer.state.log_history = drop_evaluation(trainer.state.log_history, trainer.state.global_step)
        metrics = trainer._evaluate(None, None)
        trainer._determine_best_metric(metrics, None)
    name_best(trainer)


def describe_layout(trainer: Any) -> Layout:
    """Which weights lie where in the optimizer's parameters."""
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    parameters = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    return [
        {"shape": list(parameter.shape), "pieces": trainer.engine.list_pieces(parameter, names)}
        for parameter in parameters
    ]


def load_state_into(trainer: Any, folder: Path, force: bool) -> dict[str, Any]:
    """Give the Trainer's optimizer, schedule and scaler what `folder` holds; returns the counters.

    Raises UserError where it is the state of another optimizer or of other weights (match_state).
    """
    state = load_training_state(folder)
    layout = describe_layout(trainer)
    saved = match_state(state, trainer.optimizer, layout, str(folder), force)
    schedule = match_schedule(state, trainer.optimizer, layout)
    load_state(trainer.optimizer, saved)
    trainer.lr_scheduler.load_state_dict(schedule)
    follow_schedule(trainer.lr_scheduler, trainer.optimizer)
    planned = TrainerState.load_from_json(str(folder / STATE_FILE)).max_steps
    report_extension(trainer.args, trainer.state.global_step, planned, trainer.state.max_steps)
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    return state["progress"]


def save_trainer_state(trainer: Any, folder: Path) -> None:
    """transformers' own trainer_state.json: steps, log, and the state of callbacks that have one."""
    callbacks = [*trainer.callback_handler.callbacks, trainer.control]
    exportable: list[Any] = [callback for callback in callbacks if isinstance(callback, ExportableState)]
    state: Any = copy.copy(trainer.state)
    state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
    # What is logged once training has ended, it logs again when it goes on from here.
    state.log_history = list(
        itertools.takewhile(lambda entry: "train_runtime" not in entry, state.log_history)
    )
    state.logging_steps = state.eval_steps = state.save_steps = None  # the flags of each start decide
    state.save_to_json(str(folder / STATE_FILE))
