"""Where a step begins and ends: transformers' Trainer tells it to callbacks alone."""

from typing import Any

from transformers import TrainerCallback

from utils.run import signals


class StepHooks(TrainerCallback):
    """Tells the Trainer's parts. Between pre_optimizer_step and step_end signals wait."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_progress()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        signals.hold_stop()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()
        if state.global_step == 1 and args.save_strategy != "no":
            control.should_save = True  # from here on there is a checkpoint, and saving is known to work

    def on_prediction_step(self, args, state, control, **kwargs):
        self.trainer.guard.let_stop()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.guard.let_stop()
