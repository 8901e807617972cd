"""Which step is kept, and when to stop: both follow from a run's evaluations.

    step        20     40     60     80          --early_stopping_patience 2
    eval_loss   1.21   1.08   1.10   1.09        after 80 two were no better, so the run stops; 40 is kept

Nothing else is counted: the log has every evaluation and each checkpoint holds the log, so a run that was
interrupted anywhere keeps the step that the uninterrupted one keeps. A new best is saved at once, whatever
--save_steps says.
"""

import math
from typing import Any

import transformers
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from utils.console import notice

Log = list[dict[str, Any]]
MEASURED = ("eval_", "mmlu_")  # how the names of figures begin that an evaluation logs


class BestStep:
    """The best step by transformers' own `args`; those of early stopping are ours, as they are `recorded`."""

    def __init__(self, args: transformers.TrainingArguments, recorded: dict[str, Any]):
        self.args, self.patience = args, recorded.get("early_stopping_patience")
        self.threshold = recorded.get("early_stopping_threshold", 0.0)
        self.metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"

    def list_evaluations(self, log: Log) -> list[tuple[int, float]]:
        """(step, value) of each; what --eval_on_start measures is no step's."""
        return [
            (entry["step"], entry[self.metric]) for entry in log if self.metric in entry and entry["step"]
        ]

    def choose(self, evaluations: list[tuple[int, float]]) -> tuple[int, float] | None:
        """The first of the best; NaN is never best."""
        best = max if self.args.greater_is_better else min
        numbers = [evaluation for evaluation in evaluations if not math.isnan(evaluation[1])]
        return best(numbers, key=lambda evaluation: evaluation[1], default=None)

    def is_patience_over(self, log: Log) -> bool:
        if not self.patience:
            return False
        rule, state = EarlyStoppingCallback(self.patience, self.threshold), TrainerState()
        seen: list[tuple[int, float]] = []
        for evaluation in self.list_evaluations(log):
            rule.check_metric_value(self.args, state, TrainerControl(), evaluation[1])
            seen.append(evaluation)
            _, state.best_metric = self.choose(seen) or (None, None)
        return rule.early_stopping_patience_counter >= self.patience

    def act_on_evaluation(self, is_best: bool, log: Log, control: TrainerControl) -> None:
        """Save a new best step, and stop where the patience is over."""
        if self.args.load_best_model_at_end:
            is_over = self.is_patience_over(log)
            control.should_training_stop |= is_over
            control.should_save |= is_best or is_over

    def describe(self, kept: int | None, last: int, planned: int, log: Log) -> dict[str, Any]:
        """Which step is `kept` (None: the `last`) and why, for metrics.json; says it in a line."""
        evaluations = self.list_evaluations(log)
        best, value = self.choose(evaluations) or (None, math.nan)
        if kept is None and not self.args.load_best_model_at_end:
            if best and value != evaluations[-1][1]:
                notice(
                    f"step {last}, the last, is kept; {self.metric} was best at step {best} ({value:.4f}, "
                    f"then {evaluations[-1][1]:.4f}): --load_best_model_at_end keeps the best"
                )
            return {}
        how = "highest" if self.args.greater_is_better else "lowest"
        why = f"its {self.metric} {value:.4f} is the {how} of {len(evaluations)} evaluations"
        described: dict[str, Any] = {
            "kept_step": kept or last,
            "kept_because": why if kept else f"no evaluation gave a number for {self.metric}",
        }
        line = f"step {described['kept_step']} of {last} is kept: {described['kept_because']}"
        if last < planned:
            described["stopped_early"] = (
                f"at step {last} of {planned}: the last {self.patience} evaluations were no better "
                "(--early_stopping_patience)"
            )
            line += f"; stopped {described['stopped_early']}"
        notice(line)
        return described


def name_best(trainer: Any) -> None:
    """Note the best step's checkpoint in the Trainer's state, if it is there or about to be written."""
    best = trainer.state.best_global_step
    folder = trainer.keeper.name_checkpoint(best) if best else None
    if folder and (best == trainer.state.global_step or folder.is_dir()):
        trainer.state.best_model_checkpoint = str(folder)


def load_best(trainer: Any) -> int:
    """Give the model the best step's weights, read back as they were saved; returns the step."""
    state, keeper = trainer.state, trainer.keeper
    if state.best_global_step != state.global_step:
        folder = keeper.name_checkpoint(state.best_global_step)
        keeper.check_undamaged(folder)
        trainer._load_from_checkpoint(str(folder))
        keeper.verify(folder)
    state.best_model_checkpoint = None  # with --save_total_limit 1 the Trainer would remove all others
    return state.best_global_step


def find_evaluation(log: Log, step: int) -> dict[str, float]:
    """What was measured at `step`."""
    entries = [entry for entry in log if entry["step"] == step]
    return {name: value for entry in entries for name, value in entry.items() if name.startswith(MEASURED)}


def drop_evaluation(log: Log, step: int) -> Log:
    """`log` without an evaluation of `step`, which did not come to its end."""
    return [entry for entry in log if entry["step"] != step or not any(n.startswith(MEASURED) for n in entry)]
