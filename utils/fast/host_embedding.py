"""The embedding's table in host memory: the GPU reads the rows of a micro-batch from there.

LLaMA-3-8B's table takes 0.98 GiB, and 2,048 tokens need 16 MB of it. A kernel reads those rows from pinned
memory, over PCIe and without the CPU, so that a CUDA graph can hold it. A table that is the output layer's
weight too stays where it is.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from utils.fast.kernels import launch, takes_kernel
from utils.fast.memory import pin_copy

BLOCK = 1024


def find_host_embedding(model: Any) -> nn.Embedding | None:
    """The embedding of `model`, if its table may lie on the host."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    return None if head is not None and head.weight is embedding.weight else embedding


def move_embedding(model: Any) -> None:
    """Move the table to the host. The weight that stays has its shape, no memory, and NaN everywhere."""
    embedding = find_host_embedding(model)
    assert embedding is not None
    weight = embedding.weight.data
    table = pin_copy(weight)
    nothing = weight.new_full((1, 1), torch.nan).expand(weight.shape)
    embedding.weight = nn.Parameter(nothing, requires_grad=False)
    embedding.forward = partial(gather_rows, table)  # type: ignore[method-assign]


@torch.no_grad()
def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of `table`  # [..., width], on the device of `ids`  # [...]"""
    if not takes_kernel(ids):
        return F.embedding(ids, table)
    width = table.shape[1]
    out = torch.empty(*ids.shape, width, dtype=table.dtype, device=ids.device)
    grid = (ids.numel(), -(-width // BLOCK))
    launch(out, "gather_rows_kernel", grid, table, ids.contiguous(), out, width, BLOCK=BLOCK)
    return out
