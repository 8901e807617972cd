"""Embedding and output layer by rows: each process holds the tokens of its 1/N of the vocabulary.

They are no layers to gather: of LLaMA-3-8B each is 1 GiB in 16 bits, a third of all 32 quantized layers. The
rows stay and the hidden states come to them (arXiv 1909.08053, section 3). Of every token each process knows
its own share of the logits, and two small sums over the processes make the loss and its gradient exact:

    log(sum of exp) over all shares, and the logit of the label, which lies in one of them

Processes have different numbers of tokens, so each fills up to the most.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.nn import functional as F

from utils.prompts.messages import IGNORE_INDEX

if TYPE_CHECKING:
    from utils.fast.loss import OutputLayer

CHUNK_ELEMENTS = 2**25  # logits in memory at once, of all processes' tokens in one's share of the vocabulary
CHUNK_TOKENS = 2048  # of each process, embedded at once


class ShardedVocabulary:
    """Rows `first` up to `end` of a vocabulary of so many `tokens`."""

    def __init__(self, tokens: int):
        self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
        self.tokens = tokens
        self.share = -(-tokens // self.processes)
        self.first = min(self.rank * self.share, tokens)
        self.end = min(self.first + self.share, tokens)
        # Numbers of tokens are agreed on by the CPUs: a GPU need not be waited for.
        self.cpu_group = distributed.new_group(backend="gloo")

    def install(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Let both compute with the rows that their weights hold."""
        vars(embedding)["forward"] = lambda ids: self.embed(ids, embedding.weight)
        vars(head)["forward"] = lambda hidden: self.find_logits(hidden, head)
        vars(head)["vocabulary"] = self

    def find_most(self, count: int) -> int:
        """The largest `count` of all processes."""
        most = torch.tensor(count)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX, group=self.cpu_group)
        return int(most)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of all processes, one below the other."""
        out = x.new_empty(self.processes * len(x), *x.shape[1:])
        distributed.all_gather_into_tensor(out, x.contiguous())
        return out

    def sum_own(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of `x`, of which each gets its own part of the rows."""
        out = x.new_empty(len(x) // self.processes, *x.shape[1:])
        distributed.reduce_scatter_tensor(out, x.contiguous())
        return out

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`weight` of this process  # [rows, hidden_size]; returns  # [..., hidden_size]"""
        flat = ids.flatten()
        padded = F.pad(flat, (0, self.find_most(len(flat)) - len(flat)))
        parts = []
        for part in padded.split(CHUNK_TOKENS):
            own = self.gather(part) - self.first
            is_own = (own >= 0) & (own < len(weight))
            rows = weight[own.clamp(0, len(weight) - 1)] * is_own[:, None]
            parts.append(self.sum_own(rows))
        return torch.cat(parts)[: len(flat)].view(*ids.shape, -1)

    @torch.no_grad()
    def find_logits(self, hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        """The output layer's product  # [..., vocabulary]; few tokens at a time, and without gradient."""
        flat = hidden.flatten(0, -2)
        most = self.find_most(len(flat))
        own = F.linear(self.gather(pad_rows(flat, most)), head.weight, head.bias)
        own = F.pad(own, (0, self.share - own.shape[1]))
        shares = self.gather(own).view(self.processes, self.processes, most, self.share)
        logits = shares[:, self.rank].transpose(0, 1).reshape(most, -1)[: len(flat), : self.tokens]
        return logits.view(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def find_losses(
        self, head: "OutputLayer", hidden: torch.Tensor, targets: torch.Tensor, with_grads: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token losses  # float32 [tokens] and their gradient in `hidden`  # [tokens, hidden_size]"""
        most, rows = self.find_most(len(hidden)), max(1, CHUNK_ELEMENTS // self.tokens)
        padded = F.pad(targets, (0, most - len(targets)), value=IGNORE_INDEX)
        losses, grads = [], []
        for part, target in zip(pad_rows(hidden, most).split(rows), padded.split(rows), strict=True):
            loss, grad = self.compare(head, part, target, with_grads)
            losses.append(loss)
            grads.append(grad)
        return torch.cat(losses)[: len(hidden)], torch.cat(grads)[: len(hidden)]

    def compare(
        self, head: "OutputLayer", part: torch.Tensor, target: torch.Tensor, with_grads: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """find_losses of a chunk that is equally long everywhere."""
        weight, goals = head.linear.weight, self.gather(target)
        is_labelled, goals = goals != IGNORE_INDEX, goals - self.first
        logits = head.bend(F.linear(self.gather(part), weight, head.linear.bias))  # [all tokens, rows]
        highest = logits.amax(1)
        distributed.all_reduce(highest, op=distributed.ReduceOp.MAX)
        is_own = is_labelled & (goals >= 0) & (goals < len(weight))
        goals = goals.clamp(0, len(weight) - 1)[:, None]
        chosen = torch.where(is_own, logits.gather(1, goals)[:, 0] - highest, 0)
        shares = (logits - highest[:, None]).exp_()
        sums = torch.stack([shares.sum(1), chosen])
        distributed.all_reduce(sums)
        losses = torch.where(is_labelled, sums[0].log() - sums[1], 0).chunk(self.processes)[self.rank]
        if not with_grads:
            return losses, part[:, :0]
        shares.div_(sums[0][:, None]).scatter_add_(1, goals, -is_own.float()[:, None])
        slopes = head.slope(logits) * is_labelled[:, None]
        return losses, self.sum_own(shares.mul_(slopes).to(part.dtype) @ weight)


def pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, rows - len(x)))


def find_vocabulary(head: Any) -> ShardedVocabulary | None:
    """That of an output layer of which each process holds a share."""
    return getattr(head, "vocabulary", None)


def count_elsewhere(model: Any) -> int:
    """Weights of embedding and output layer that other processes hold."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = find_vocabulary(head)
    if shared is None:
        return 0
    rows = {embedding.weight, head.weight}  # one where they are tied
    return sum((shared.tokens - len(weight)) * weight.shape[1] for weight in rows)
