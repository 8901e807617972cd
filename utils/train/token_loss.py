"""The loss of every label token, from the model's own forward."""

import inspect
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from utils.messages import IGNORE_INDEX


class TokenLoss:
    """Cross entropy at label positions alone.

    Most tokens of a row are prompt, and the vocabulary is the widest layer: logits are made only where a
    label follows, if the model's forward can do so (`logits_to_keep`).
    """

    def __init__(self, model: Any, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing
        # An adapted head sees all tokens, as their keys are those of its dropout.
        self.keeps_logits = takes_positions(model) and not isinstance(
            model.get_output_embeddings(), LoraLayer
        )

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Losses of a micro-batch; zero where a row has no label  # float32 [rows, positions]"""
        # In NumPy: as a tensor they would go with the rows to the first GPU, and where the layers are spread
        # over several, the hidden state that they index lies on the last.
        positions: np.ndarray = inputs["label_positions"]
        names = ("input_ids", "attention_mask", "position_ids")
        forward = {name: inputs[name] for name in names if name in inputs} | {"use_cache": False}
        if self.keeps_logits:
            logits = model(**forward, logits_to_keep=positions).logits  # [rows, positions, vocabulary]
        else:
            logits = model(**forward).logits[:, positions]
        targets = inputs["labels"][:, positions + 1]
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            reduction="none",
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
        )
        return losses.view_as(targets)


def takes_positions(model: Any) -> bool:
    """Whether the model's forward can make logits at chosen positions alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
