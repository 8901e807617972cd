"""The loss of every label token, from the model's own forward."""

import functools
import inspect
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from utils.fast.loss import CHUNK_ELEMENTS, OutputLayer, find_loss_obstacle
from utils.fast.sharded_vocabulary import find_vocabulary
from utils.prompts.messages import IGNORE_INDEX


class TokenLoss:
    """Cross entropy at label positions alone.

    Most tokens of a row are prompt, and the vocabulary is the widest layer: logits are made only where a
    label follows, if the model's forward can do so (`logits_to_keep`). An evaluation needs no gradient and
    makes them a chunk at a time: of 8 rows of 1,280 tokens and Qwen's 152,000 ids they are 6 GB in float32.
    """

    def __init__(self, model: Any, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.base, self.head = base, OutputLayer(base)
        # An adapted head sees all tokens, as their keys are those of its dropout.
        self.keeps_logits = has_logits_to_keep(model) and not isinstance(
            model.get_output_embeddings(), LoraLayer
        )

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Losses of a micro-batch; zero where a row has no label  # float32 [rows, positions]"""
        # In NumPy: as a tensor they would go with the rows to the first GPU, and where the layers are spread
        # over several, the hidden state that they index lies on the last.
        positions: np.ndarray = inputs["label_positions"]
        names = ("input_ids", "attention_mask", "position_ids")
        forward = {name: inputs[name] for name in names if name in inputs} | {"use_cache": False}
        if not torch.is_grad_enabled() and self.head_obstacle is None:
            hidden = self.base.base_model(**forward)[0]  # [rows, width, hidden_size]
            return self.read_chunks(hidden[:, positions], inputs["labels"][:, positions + 1])
        if self.keeps_logits:
            logits = model(**forward, logits_to_keep=positions).logits  # [rows, positions, vocabulary]
        else:
            logits = model(**forward).logits[:, positions]
        return self.compare(logits, inputs["labels"][:, positions + 1])

    @functools.cached_property
    def head_obstacle(self) -> str | None:
        """Why logits must come from the model's own forward; tried on the model at the first evaluation."""
        return find_loss_obstacle(self.base, self.head)

    def read_chunks(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`hidden`  # [rows, positions, hidden_size]; `targets`  # [rows, positions]"""
        if vocabulary := find_vocabulary(self.head.linear):
            losses, _ = vocabulary.find_losses(self.head, hidden.flatten(0, 1), targets.flatten())
            return losses.view_as(targets)
        rows, vocabulary = len(hidden), self.head.linear.out_features
        size = max(1, CHUNK_ELEMENTS // (rows * vocabulary))
        pairs = zip(hidden.split(size, 1), targets.split(size, 1), strict=True)
        return torch.cat([self.compare(self.head.find_logits(part), goal) for part, goal in pairs], 1)

    def compare(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy, smoothed only where it is trained on  # float32 [rows, positions]"""
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            reduction="none",
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing if torch.is_grad_enabled() else 0.0,
        )
        return losses.view_as(targets)


def has_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward can make logits at chosen positions alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
