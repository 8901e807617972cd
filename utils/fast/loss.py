"""Cross entropy at the label positions, a chunk of logits at a time.

A vocabulary of 32,000 makes the logits of 8,192 tokens 1 GB in float32, more than all else of a micro-batch.
Two things avoid that. Only positions with a label get logits. And the loss is the last operation of the
forward pass while the output layer is frozen, so the gradient of a chunk's hidden states can be computed
right after its logits: the chunk is then thrown away, and the backward pass only multiplies by what comes
from above.

A chunk is about 64 MiB, but never of fewer than 384 positions: each one reads the whole output layer twice,
and of 220 positions, which are 64 MiB of Qwen2.5's 152,064 words, an H100 waits for those reads. 8,192
positions take it 38.3 ms by 220, 30.2 by 384 and 30.3 by 1,024; of 256,000 words 91, 45 and 46.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.fast.kernels import cross_entropy_
from utils.fast.sharded_vocabulary import find_vocabulary
from utils.fast.trials import ROW, draw_tokens, evaluating, is_near, shallow
from utils.prompts.messages import IGNORE_INDEX

CHUNK_ELEMENTS = 2**25  # logits in memory at once: 64 MiB in 16 bits
LEAST_POSITIONS, TILE = 384, 128  # of a chunk; a product's tiles are filled


def count_positions(vocabulary: int) -> int:
    """Positions of a chunk of logits."""
    return max(LEAST_POSITIONS, CHUNK_ELEMENTS // vocabulary // TILE * TILE)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the token losses  # []. Its gradient in `hidden` comes on the way forward; the head has none."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, head: "OutputLayer"):
        """`hidden`  # [tokens, hidden_size]; `targets`  # [tokens], IGNORE_INDEX where there is none"""
        if vocabulary := find_vocabulary(head.linear):
            shared_losses, grads = vocabulary.find_losses(head, hidden, targets, with_grads=True)
            ctx.save_for_backward(grads)
            return shared_losses.sum()
        weight, bias = head.linear.weight.detach(), head.linear.bias
        rows = count_positions(len(weight))
        losses, grads = [], torch.empty_like(hidden)
        for part, target, grad in zip(
            hidden.split(rows), targets.split(rows), grads.split(rows), strict=True
        ):
            logits = nn.functional.linear(part, weight, bias)
            losses.append(cross_entropy_(logits, target, head.scale, head.softcap, IGNORE_INDEX))
            torch.mm(logits, weight, out=grad)
        ctx.save_for_backward(grads)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (grads,) = ctx.saved_tensors
        # In float16 the loss scale comes in only here, where it cannot overflow the softmax.
        return grads.mul_(upstream), None, None


class OutputLayer:
    """The output layer of a causal model with what the model does to its logits."""

    def __init__(self, causal_model: PreTrainedModel):
        config = causal_model.config.get_text_config()
        self.linear = causal_model.get_output_embeddings()
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0)
        # Cohere multiplies its logits, Granite divides them.
        self.scale = float(getattr(config, "logit_scale", None) or 1) / float(
            getattr(config, "logits_scaling", None) or 1
        )

    def find_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's real logits  # [..., vocabulary], from hidden states  # [..., hidden_size]"""
        return self.bend(self.linear(hidden.to(self.linear.weight.dtype)))

    def bend(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model makes of its output layer's product  # float32"""
        logits = logits.float() * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of bend where it gives `logits`."""
        return self.scale * (1 - (logits / self.softcap).square()) if self.softcap else self.scale

    def sum_losses(self, hidden: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the label after each of `positions`, summed  # []

        `hidden`  # [rows, width, hidden_size]; `labels`  # [rows, width]; `positions`  # [positions]
        """
        picked = hidden.index_select(1, positions).flatten(0, 1).to(self.linear.weight.dtype)
        return ChunkedCrossEntropy.apply(picked, pick_targets(labels, positions), self)


def pick_targets(labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The label after each position, none after the last token  # [rows * positions]"""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX).index_select(1, positions + 1).flatten()


def find_loss_obstacle(causal_model: PreTrainedModel, head: OutputLayer) -> str | None:
    """Why the loss needs the model's own logits; None if ours are the same, tried on the model itself."""
    if type(head.linear) is not nn.Linear or head.linear.weight.requires_grad:
        return "its output layer is trained or quantized"
    if head.linear.weight.is_meta:  # a rehearsal takes it that the trial succeeds
        return None
    ids = draw_tokens(causal_model, 1, ROW)
    with evaluating(causal_model), shallow(causal_model):
        expected = causal_model(input_ids=ids, use_cache=False).logits.float()
        logits = head.find_logits(causal_model.base_model(input_ids=ids, use_cache=False)[0])
    is_same = expected.shape == logits.shape and is_near(logits, expected, 0.02)
    return None if is_same else "its logits are more than the output layer's"
