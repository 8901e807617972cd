"""A training step on tensors without data, to learn what the real one will hold in GPU memory.

The meta device knows shapes and dtypes and computes nothing. So the very code that trains can run there, in
milliseconds and without weights or a GPU, while every tensor that it makes is counted as long as it lives:

    forward    each kept layer leaves what its backward pass needs; a recomputed one leaves its input
    loss       logits a chunk at a time
    backward   the last layer's gradients on top of all that is kept: here is the peak

Kernels launch nothing there (kernels.py), and two things are stood in for: attention to padded rows keeps no
scores, as torch's kernels on a GPU do not (on the meta device torch takes the formula, with scores of every
pair of tokens: 38 GiB for OPT-6.7B and 4 rows of 1,024), and the layer inputs that wait in host memory
(offload.py) leave the GPU.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from utils.fast.attention import packed_attention
from utils.fast.graphed_step import count_rows
from utils.fast.model import FastModel, MicroBatch
from utils.fast.offload import checkpoint_layer
from utils.fast.trials import evaluating

BLOCK = 512  # bytes: the CUDA allocator rounds up to multiples of this
SMALL = 2**20  # bytes: tensors up to this come from a pool that serves no larger ones


class LiveBytes(TorchDispatchMode):
    """Within it, bytes of the meta tensors that live, and their peak; `given` ones are not counted.

    Of small tensors alone `live_small` and `peak_small`.
    """

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.given = [x.untyped_storage() for x in given]
        self.known = {storage._cdata for storage in self.given}
        self.live = self.peak = self.live_small = self.peak_small = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: Any) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self.known:
            self.known.add(key)
            self.change(size, 1)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.change(size, -1)

    def change(self, size: int, sign: int) -> None:
        self.live += sign * size
        self.live_small += sign * size if size <= SMALL else 0
        self.peak, self.peak_small = max(self.peak, self.live), max(self.peak_small, self.live_small)


class RehearsedAttention(torch.autograd.Function):
    """What torch's kernels hold: query, key, value, the padding's mask as a bias, a float32 a query."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        rows, _, width, _ = query.shape
        out = query.new_empty(*query.shape[:-1], value.shape[-1])  # whose heads may be narrower (DeepSeek-V2)
        bias = query.new_empty(rows, width, key.shape[2])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, bias, sums)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attend_rehearsed(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """As a model calls its attention; query, key, value  # [rows, heads, width, head_dim]"""
    return RehearsedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def rehearse_attention(model: nn.Module) -> None:
    """Let padded rows be attended to by a kernel, where the model would ask torch for one."""
    config: Any = model.config
    config = config.get_text_config()
    if config._attn_implementation == "sdpa":
        AttentionInterface.register("rehearsed", attend_rehearsed)
        config._attn_implementation = "rehearsed"


class RehearsedOffload:
    """HostOffload without its copies: on the GPU are the inputs of the layer at work and of the next.

    Where kept layers follow, the last input to leave stays until the backward pass fetches the first.
    """

    def __init__(self) -> None:
        self.leaving: torch.Tensor | None = None
        self.coming: torch.Tensor | None = None

    def settle(self) -> None:
        self.leaving = self.coming = None

    def __call__(self, run: Callable, x: torch.Tensor, *args: Any) -> torch.Tensor:
        first, shape, dtype, needs_grad = [x], x.shape, x.dtype, x.requires_grad
        self.leaving = x.detach()

        def run_again(*args: Any) -> torch.Tensor:
            if first:
                return run(first.pop(), *args)
            self.leaving = None
            x, self.coming = self.coming, torch.empty(shape, dtype=dtype, device="meta")
            x = torch.empty(shape, dtype=dtype, device="meta") if x is None else x
            return run(x.requires_grad_(needs_grad), *args)

        return checkpoint_layer(run_again, *args)


def rehearse_step(fast: FastModel, batch: MicroBatch) -> tuple[int, int]:
    """Bytes at the peak of one micro-batch's forward and backward pass, beside the model and `batch`.

    Of all tensors, and of small ones.
    """
    scale = torch.zeros((), device="meta")
    given = [*fast.model.parameters(), *fast.model.buffers(), fast.flat.weights, fast.flat.grads]
    given += [
        *([] if fast.flat.copy is None else [fast.flat.copy]),
        scale,
        *(x for x in batch.values() if isinstance(x, torch.Tensor)),
    ]
    with LiveBytes(given) as bytes_:
        fast.run(batch, scale)
    return bytes_.peak, bytes_.peak_small


def rehearse_evaluation(fast: FastModel) -> None:
    """Calls without gradient, as trials and evaluations are, launch kernels of their own: without dropout."""
    batch = make_packed_batch(64)
    bounds = {"cu_seq_lens_q": batch["cu_seqlens"], "max_length_q": batch["max_length"]}
    with evaluating(fast.model), packed_attention(fast.causal_model):
        fast.sum_losses(batch, **bounds)


def make_packed_batch(tokens: int) -> MicroBatch:
    """A packed micro-batch of rows of two lengths; half of the tokens are labels, as graphs pad them."""
    names = ("input_ids", "labels", "position_ids", "token_keys")
    with torch.device("meta"):
        batch: MicroBatch = {name: torch.zeros(1, tokens, dtype=torch.int64) for name in names}
        batch["label_positions"] = torch.zeros(-(-tokens // 2), dtype=torch.int64)
        batch["cu_seqlens"] = torch.zeros(count_rows(tokens) + 1, dtype=torch.int32)
    longest = 1024 if count_rows(tokens) * 1024 != tokens else 1000  # not rows of one length
    return batch | {"max_length": min(longest, tokens)}


def make_padded_batch(rows: int, width: int) -> MicroBatch:
    """A batch of full rows: models look into an attention mask, and there is nothing in one here."""
    names = ("input_ids", "labels", "token_keys")
    with torch.device("meta"):
        batch: MicroBatch = {name: torch.zeros(rows, width, dtype=torch.int64) for name in names}
        batch["label_positions"] = torch.zeros(width, dtype=torch.int64)
    return batch
