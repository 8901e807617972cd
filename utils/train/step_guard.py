"""The guard of an optimizer step.

One that is not finite changes nothing, and a signal never cuts one in half.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.console import UserError, is_main_process, notice
from utils.run import signals

MAX_IN_A_ROW = 5
ROWS_FILE = "non_finite_steps.jsonl"


class StepGuard:
    """Decides whether a step is taken, and when a signal may end the run.

    One row with an infinite loss would turn every weight into NaN, so such a step is skipped: weights,
    optimizer and schedule stay as they are. A signal waits while weights, optimizer and step number change
    together; several processes tell each other of it in the same all-reduce and stop after the same step.
    """

    def __init__(self, processes: int, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]):
        self.processes, self.sum_over_processes = processes, sum_over_processes
        self.start_loss: torch.Tensor | None = None  # the Trainer's running sum before the step that runs now
        self.skipped = self.skipped_in_a_row = 0
        self.stop_agreed = False

    def begin_training(self) -> None:
        if self.processes > 1:
            signals.hold_stop()  # the processes stop together, after the same step

    def begin_step(self, loss_sum: torch.Tensor) -> None:
        self.start_loss = loss_sum.clone()
        self.let_stop()

    def end_step(self) -> None:
        self.start_loss = None

    def let_stop(self) -> None:
        """Signals may interrupt from here on: at once, or where several processes have agreed to stop."""
        if self.processes == 1 or self.stop_agreed:
            signals.release_stop()

    def allows_step(self, loss: torch.Tensor, grad_norm: torch.Tensor | float, scaler: Any) -> bool:
        """Whether `loss` and `grad_norm` of all processes are finite. One host read a step."""
        finite_gradient = torch.as_tensor(grad_norm, device=loss.device).isfinite()
        if scaler is not None:  # its scale overflows now and then, it skips that itself
            finite_gradient |= scaler._get_scale_async() >= 1
        flags = torch.stack([~(loss.isfinite() & finite_gradient), torch.zeros_like(finite_gradient)]).int()
        if self.processes > 1:
            flags[1] = signals.find_stop_signal() is not None
            flags = self.sum_over_processes(flags)
        is_bad, must_stop = flags.tolist()
        if must_stop:
            signals.ask_to_stop("a signal to another process")
            self.stop_agreed = True
        self.skipped += bool(is_bad)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_bad else 0
        return not is_bad

    def report_skipped_step(
        self, step: int, loss: float, grad_norm: float, rows: list[int], texts: list[str], output_dir: Path
    ) -> None:
        """Append the step to ROWS_FILE and say so. Raises UserError after MAX_IN_A_ROW of them."""
        path = output_dir / ROWS_FILE
        if is_main_process():
            entry = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)}
            entry["rows"] = [{"row": row, "begins": text} for row, text in zip(rows, texts, strict=True)]
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        notice(f"step {step} is skipped: loss {loss}, gradient norm {grad_norm}, rows {shown} (see {path})")
        if self.skipped_in_a_row >= MAX_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to "
                f"step {step}: lower --learning_rate, or look at the rows in {path}; the last good "
                "checkpoint is as it was"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
