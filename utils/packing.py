"""From rows to a micro-batch: laid end to end in one sequence, or padded to the longest."""

from dataclasses import dataclass
from typing import Any

import torch

from utils.prompts import IGNORE_INDEX

Example = dict[str, list[int]]


@dataclass(frozen=True)
class PackingCollator:
    """All rows of the micro-batch in one sequence without padding; positions restart with each row.

    Attention sees where positions restart and keeps the rows apart, as long as no attention_mask is passed.
    Gives input_ids, labels, position_ids  # [1, tokens]; label_positions  # [positions]; num_tokens  # []
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        input_ids = [token for example in examples for token in example["input_ids"]]
        labels = [label for example in examples for label in [IGNORE_INDEX, *example["labels"][1:]]]
        position_ids = [position for example in examples for position in range(len(example["input_ids"]))]
        num_tokens = len(input_ids)
        padding = -num_tokens % self.multiple
        batch = {
            "input_ids": torch.tensor([input_ids + [self.pad_token_id] * padding]),
            "labels": torch.tensor([labels + [IGNORE_INDEX] * padding]),
            "position_ids": torch.tensor([position_ids + list(range(padding))]),
        }
        return batch | find_label_positions(batch["labels"]) | {"num_tokens": torch.tensor(num_tokens)}


@dataclass(frozen=True)
class PaddingCollator:
    """Each row padded on the right to the longest; masks go by length, so that the pad id never matters.

    Gives input_ids, labels, attention_mask  # [rows, width]; label_positions  # [positions]; num_tokens  # []
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        width = -(-longest // self.multiple) * self.multiple
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(examples), width), dtype=torch.long)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[i, :length] = torch.tensor(example["input_ids"])
            labels[i, :length] = torch.tensor(example["labels"])
            attention_mask[i, :length] = 1
        batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        return batch | find_label_positions(labels) | {"num_tokens": attention_mask.sum()}


def find_label_positions(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions whose next token is a label in some row: only there are logits computed  # [positions]"""
    return {"label_positions": (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().flatten()}


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Whether packing leaves a row the logits it has alone, tried on the model itself.

    False for architectures that take positions from elsewhere (ALiBi in BLOOM, the mask in OPT).
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    rows = torch.randint(vocabulary, (1, 24), generator=generator).to(model.device)
    positions = torch.arange(24, device=model.device)[None]

    def read_second_row(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits[:, -12:].float()

    try:
        alone = read_second_row(rows[:, 12:], positions[:, :12])
        packed = read_second_row(rows, positions % 12)
        joined = read_second_row(rows, positions)
    except TypeError:  # its forward takes no position_ids
        return False
    finally:
        model.train(was_training)
    # Packed rows must differ from the row alone by rounding only, one long row by its context.
    return bool((packed - alone).norm() < 0.25 * (joined - alone).norm())
