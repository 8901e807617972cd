"""The next token from its logits, chosen where the logits are, so that a graph holds the whole step.

The processors are transformers' own, made by it from the GenerationConfig, in its order. Two of them look at
the tokens so far, whose number grows, which a graph does not bear: what they need is kept here in tensors of
a fixed size, which tokens were seen and how many are new.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Of these a token's score depends on the scores alone.
WITHOUT_MEMORY = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)
REPETITION = logits_process.RepetitionPenaltyLogitsProcessor
SHORTEST = logits_process.MinNewTokensLengthLogitsProcessor


class NotCovered(Exception):
    """What of a GenerationConfig is left to transformers' generate."""


class TokenChoice:
    """What `config` says, for replies one after another: `begin` each with its prompt."""

    def __init__(self, base: PreTrainedModel, config: GenerationConfig):
        model: Any = base
        prepared, _ = model._prepare_generation_config(config)
        if prepared.get_generation_mode() not in MODES or (prepared.num_return_sequences or 1) > 1:
            raise NotCovered(str(prepared.get_generation_mode()))
        model._prepare_special_tokens(prepared, device=base.device)
        self.samples = bool(prepared.do_sample)
        self.generator: torch.Generator | None = None  # of its draws; None: torch's own
        self.processors: list[Any] = list(
            model._get_logits_processor(prepared, input_ids_seq_length=1, device=base.device)
        )
        for processor in self.processors:
            if type(processor) not in (*WITHOUT_MEMORY, REPETITION, SHORTEST):
                raise NotCovered(type(processor).__name__)
        vocabulary = base.get_output_embeddings().weight.shape[0]
        self.seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=base.device)
        self.count = torch.zeros(1, dtype=torch.long, device=base.device)  # of new tokens
        self.stops = torch.zeros_like(self.seen)
        for processor in self.processors:
            if type(processor) is SHORTEST:
                self.stops[0, processor.eos_token_id] = True
        numbers = [
            (type(processor), *(v for v in vars(processor).values() if isinstance(v, (int, float))))
            for processor in self.processors
        ]
        # Equal for choices of one graph.
        self.key = self.samples, *numbers, *self.stops.nonzero().flatten().tolist()

    @property
    def is_likeliest(self) -> bool:
        """Whether the likeliest token is taken, whatever came before."""
        return not self.samples and not self.processors

    def begin(self, ids: Sequence[int], new: int = 0) -> None:
        """`ids` have come so far, the last `new` of them in the reply."""
        self.seen.zero_()
        self.seen[0, torch.tensor(ids, device=self.seen.device)] = True
        self.count.fill_(new)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The token  # int64 [1] after logits  # [1, vocabulary]"""
        scores = logits.float()
        for processor in self.processors:
            scores = self.process(processor, scores)
        if self.samples:  # torch.multinomial's own draw of one, without what waits for the GPU
            shares = scores.softmax(-1)
            token = (shares / torch.empty_like(shares).exponential_(1, generator=self.generator)).argmax(-1)
        else:
            token = scores.argmax(-1)
        self.seen.scatter_(1, token[:, None], True)
        self.count.add_(1)
        return token

    def process(self, processor: Any, scores: torch.Tensor) -> torch.Tensor:
        if type(processor) is REPETITION:
            penalty = processor.penalty
            changed = torch.where(scores < 0, scores * penalty, scores / penalty)
            return torch.where(self.seen, changed, scores)
        if type(processor) is SHORTEST:
            is_short = self.count < processor.min_new_tokens
            return scores.masked_fill(self.stops & is_short[:, None], -math.inf)
        return processor(None, scores)
