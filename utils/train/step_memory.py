"""A step that memory is too short for is taken again in smaller pieces, and the run goes on.

A step's gradient is a sum over its rows, and its dropout masks follow from the rows (token_keys.py in
utils/fast). So after an out-of-memory error the gradients so far are dropped and the same rows are packed
anew into micro-batches of half the size: 8,192 tokens, 4,096, 2,048, down to the longest row. Then all layers
are recomputed. If even that does not fit, the run ends with a checkpoint of its last whole step and one line.
"""

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from utils.console import UserError, notice
from utils.data.packing import PackingCollator, PaddingCollator, find_micro_batches, list_rows
from utils.train.engine import Engine, FastEngine

Collator = PackingCollator | PaddingCollator


class OutOfRoom(UserError):
    """Not even the smallest micro-batch fits."""


class StepMemory:
    """Runs a step within the memory there is; `collator` is what it made micro-batches with last."""

    def __init__(self, collator: Collator, rows: Any, engine: Engine, processes: int):
        self.collator, self.rows, self.engine = collator, rows, engine
        self.is_shrunk = False
        # Where processes exchange gradients or layers on the way, one cannot repeat a step by itself.
        self.may_repeat = processes == 1 or (isinstance(engine, FastEngine) and not engine.fast.shards)
        self.is_probed = not (isinstance(engine, FastEngine) and engine.flat.weights.is_cuda)

    def run_within(
        self,
        model: torch.nn.Module,
        batch: dict[str, Any],
        run_step: Callable[[dict[str, Any]], torch.Tensor],
    ) -> torch.Tensor:
        """run_step(batch), `batch` cut smaller until memory suffices. Raises OutOfRoom."""
        while True:
            try:
                self.probe(model)
                return run_step(self.cut(batch))
            except torch.OutOfMemoryError as error:
                if not self.may_repeat:
                    raise
                asked = re.search(r"allocate [\d.]+ \w+", str(error))
                failure = asked.group() if asked else str(error).splitlines()[0]
            self.shrink(model, failure)

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The rows of `batch` in micro-batches of today's size."""
        if not self.is_shrunk:
            return batch
        return self.collator([self.rows[row] for row in list_rows([batch])])

    def probe(self, model: torch.nn.Module) -> None:
        """Before the first step, the largest micro-batch that can come: what does not fit shows now."""
        if self.is_probed or self.rows is None:
            return
        self.engine.run_probe(model, max(self.pack_longest(), key=lambda part: part["input_ids"].numel()))
        self.is_probed = True

    def pack_longest(self) -> list[dict[str, Any]]:
        """Micro-batches of the longest rows, as many as one holds."""
        order = np.argsort(-self.rows.lengths, kind="stable")[: 1 << 14]
        if isinstance(self.collator, PackingCollator):
            ends = np.cumsum(self.rows.lengths[order])
            count = max(1, int(np.searchsorted(ends, self.collator.capacity, side="right")))
        else:
            count = self.collator.rows or 1
        return find_micro_batches(self.collator([self.rows[int(row)] for row in order[:count]]))

    def shrink(self, model: torch.nn.Module, failure: str) -> None:
        """Half as large micro-batches from now on; then every layer recomputed. Raises OutOfRoom."""
        self.engine.forget_step(model)
        gc.collect()
        torch.cuda.empty_cache()
        smaller, what = halve(self.collator, int(self.rows.lengths.max()))
        if smaller is not None:
            self.collator, self.is_shrunk = smaller, True
        elif self.engine.recompute_all():
            what = "all layers are recomputed"
        else:
            raise OutOfRoom(
                f"memory is full ({failure}) with micro-batches of one row: use --optim paged_adamw_8bit, a "
                "smaller --lora_r, --gradient_checkpointing True, or shorter rows (--source_max_len, "
                "--target_max_len)"
            )
        notice(f"memory was too short ({failure}): {what} from now on, and the step is taken again")


def halve(collator: Collator, longest: int) -> tuple[Collator | None, str]:
    """(the collator with half the room, but enough for a row of `longest` tokens; what it makes now)

    (None, "") where there is nothing to halve.
    """
    if isinstance(collator, PackingCollator):
        capacity = max(longest, collator.capacity // 2)
        if capacity < collator.capacity:
            return replace(collator, capacity=capacity), f"micro-batches have {capacity:,} tokens"
    elif collator.rows and collator.rows > 1:
        return replace(collator, rows=collator.rows // 2), f"micro-batches have {collator.rows // 2} rows"
    return None, ""
