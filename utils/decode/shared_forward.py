"""One forward pass for the newest tokens of eight conversations, on a CPU: weights are read once for all.

Most of a small step goes into reading weights and starting layers: of a 135M model in 4 bits a step for eight
takes 105 ms of one core, one for one 87. Each conversation keeps a cache of its own, and its attention is its
own:

    replies      Ann, 412 tokens   Bob, 77 tokens
    one forward  [[token of Ann], [token of Bob], [0], ... ] at the positions [[412], [77], [0], ...]

A reply is to the bit what it would be alone, whoever comes and goes. A product of 2 rows may round otherwise
than one of 8; among rows of a fixed number neither a row's place nor the others change it. So a step always
has eight rows, also for one conversation, and those that are left over are nobody's. A prompt is read in
parts that follow from the prompt alone, one of them between two steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from utils.console import notice
from utils.decode.loop import Steps
from utils.decode.reply import AdapterSwitch, Reply
from utils.decode.token_choice import TokenChoice
from utils.decode.turns import UnderWay
from utils.fast.rope import find_shared_length
from utils.fast.trials import describe_distance, draw_tokens

ROWS = 8  # of every step
PART = 16  # tokens of a prompt between two steps: 90 ms; with a step for eight 2.2 times a step for one
TRIED = 12  # tokens of the longest conversation that the step is tried with
NAME = "side_by_side"


class SideBySide:
    """The caches of several conversations as the one that a forward pass asks for; nobody has none."""

    def __init__(self, caches: Sequence[DynamicCache]):
        self.caches = caches

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        rows = zip(self.caches, keys.split(1), values.split(1), strict=False)
        grown = [cache.update(key, value, layer) for cache, key, value in rows]
        return [key for key, _ in grown], [value for _, value in grown]

    def get_seq_length(self, layer: int = 0) -> int:
        return max(cache.get_seq_length(layer) for cache in self.caches)


def attend_side_by_side(
    _: Any, query: torch.Tensor, keys: Any, values: Any, mask: Any, scaling: float | None = None, **__: Any
) -> tuple[torch.Tensor, None]:
    """Each row by itself; nobody's are zero.

    One new token sees all: the heads of a group go as tokens of one head, in a quarter of the time.
    """
    seen = torch.zeros_like(query)  # [rows, heads, 1, head_dim]
    for row, q, key, value in zip(seen, query.split(1), keys, values, strict=False):
        grouped = q.view(1, key.shape[1], -1, q.shape[-1])
        row.copy_(scaled_dot_product_attention(grouped, key, value, scale=scaling).view_as(row))
    return seen.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend_side_by_side)


@contextmanager
def own_attention(config: Any) -> Iterator[None]:
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def read_tokens(base: Any, tokens: Sequence[int], caches: Sequence[DynamicCache]) -> torch.Tensor:
    """Logits after the token of each  # [conversations, vocabulary]; the caches grow by it. At most ROWS."""
    nobody = [0] * (ROWS - len(tokens))
    positions = [*(cache.get_seq_length() for cache in caches), *nobody]
    with own_attention(base.config.get_text_config()):
        logits = base(
            input_ids=torch.tensor([*tokens, *nobody])[:, None],
            position_ids=torch.tensor(positions)[:, None],
            past_key_values=SideBySide(caches),
            use_cache=True,
        ).logits
    return logits[: len(tokens), -1]


def read_part(base: Any, ids: Sequence[int], cache: DynamicCache) -> None:
    """Without logits: the output layer would take half of the time."""
    base.base_model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)


@dataclass(eq=False)
class Place:
    """A reply under way; `unread`: of its prompt, without the last token, which is read by a step."""

    reply: Reply
    choice: TokenChoice
    cache: Any
    unread: list[int]

    @property
    def newest(self) -> int:
        return (self.reply.said or self.reply.prompt)[-1]


class SharedForward(UnderWay):
    """All a token further by each step."""

    @property
    def places(self) -> list[Place]:
        return list(self.turns.values())

    def start(self, reply: Reply) -> None:
        """Raises NotCovered where generate must do it."""
        choice = self.steps.find_choice(reply.config)
        choice.generator = torch.Generator().manual_seed(reply.seed)
        choice.begin(reply.prompt)
        cache = self.conversations.find_cache(reply)
        reply.reused_tokens = cache.get_seq_length()
        self.turns[reply] = Place(reply, choice, cache, reply.prompt[reply.reused_tokens : -1])

    def step(self) -> None:
        """A part of the prompt that has waited longest; one token of each reply."""
        for place in filter(lambda place: place.reply.is_over(), self.places):
            self.leave(place)
        reading = next((place for place in self.places if place.unread), None)
        if reading:
            self.adapter.turn(reading.reply.tuned)
            with self.own_fault(reading):
                read_part(self.steps.base, reading.unread[:PART], reading.cache)
                del reading.unread[:PART]
        for tuned in (True, False):
            speaking = [place for place in self.places if place.reply.tuned == tuned and not place.unread]
            for first in range(0, len(speaking), ROWS):
                self.adapter.turn(tuned)
                self.speak(speaking[first : first + ROWS])

    def speak(self, places: list[Place]) -> None:
        tokens, caches = [place.newest for place in places], [place.cache for place in places]
        logits = read_tokens(self.steps.base, tokens, caches)
        for place, row in zip(places, logits.split(1), strict=True):
            with self.own_fault(place):
                if place.reply.add(int(place.choice.choose(row))):
                    self.leave(place)

    @contextmanager
    def own_fault(self, place: Place) -> Iterator[None]:
        """A fault in what belongs to one reply ends that reply alone; one of the shared pass ends all."""
        try:
            yield
        except Exception as error:  # raised again where the reply is read
            self.turns.pop(place.reply, None)
            place.reply.end("error", error)

    def leave(self, place: Place) -> None:
        del self.turns[place.reply]
        self.conversations.keep([*place.reply.prompt, *place.reply.said], place.reply, place.cache)


def open_shared_forward(steps: Steps, adapter: AdapterSwitch, count: int, kept: int) -> SharedForward | None:
    """For `count` replies at once; None, and a line, where a step for several is not the step of each."""
    fault = find_fault(steps.base)
    if fault:
        notice(f"replies: a token each in turn ({fault})")
    return None if fault else SharedForward(steps, adapter, count, kept)


def find_fault(base: Any) -> str | None:
    """Why conversations cannot share a step of this model."""
    config = base.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"attention by {config._attn_implementation}"
    if find_shared_length(config):
        return "positions that depend on the longest conversation"
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers):
        return "layers that see a window of the latest tokens"
    for name, module in base.named_modules():
        if "expert" in name or (isinstance(module, Linear8bitLt) and module.state.threshold):
            return f"{name} computes a row by those beside it"
    return try_step(base)


@torch.no_grad()
def try_step(base: Any) -> str | None:
    """A fault if logits are not the model's own, or not the same bits in another place beside others."""
    rows = [row[i:].tolist() for i, row in enumerate(draw_tokens(base, ROWS, TRIED))]
    caches = [DynamicCache(config=base.config.get_text_config()) for _ in rows]
    for row, cache in zip(rows, caches, strict=True):
        read_part(base, row[:-1], cache)

    def read(places: Sequence[int]) -> torch.Tensor:
        try:
            return read_tokens(base, [rows[i][-1] for i in places], [caches[i] for i in places])
        finally:
            for i in places:
                caches[i].crop(len(rows[i]) - 1 - caches[i].get_seq_length())

    try:
        found = read(range(ROWS))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # attention of its own kind
        return f"a step gives {type(error).__name__}: {error}"
    for places in (range(ROWS)[::-1], [5], [2, 7, 3]):
        if not torch.equal(read(places), found[list(places)]):
            return "a row's bits depend on its place"
    expected = torch.stack([base(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
    return describe_distance({"logits": (found, expected)})
