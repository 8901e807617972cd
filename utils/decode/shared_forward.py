"""One forward pass for a token of each of several conversations, on a CPU: the weights are read once for all.

Most of a small step goes into reading weights and starting layers, so a step for eight takes little longer
than one: of a 135M model in 4 bits 80 ms of one core, where one takes 42. Each conversation keeps its own
cache, and its attention is its own:

    replies      Ann, 412 tokens   Bob, 77 tokens
    one forward  [[token of Ann], [token of Bob]] at the positions [[412], [77]]

A reply must be what it would be alone, to the bit. Whether a row of a product has the same bits among 2, 4 or
8 rows depends on the CPU's kernels, so it is tried: where 4 and 8 agree and 1 does not, a reply that is alone
goes as one of 4, beside rows that are nobody's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from utils.fast.rope import find_shared_length

SIZES = (1, 2, 4, 8)  # rows of a step
TRIED = (5, 9, 6, 12, 7, 5, 8, 11)  # tokens of the conversations that a step is tried with
MAX_DIFFERENCE = 0.01  # of the logits, relative: another number of rows may round otherwise, no more
READ_BETWEEN = 16  # tokens of a prompt between two steps: a step and a part take 2.6 times a step alone
NAME = "side_by_side"


class SideBySide:
    """The caches of several conversations as the one that a forward pass asks for; other rows have none."""

    def __init__(self, caches: Sequence[DynamicCache]):
        self.caches = caches

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        rows = list(zip(keys.split(1), values.split(1), strict=True))
        for i, cache in enumerate(self.caches):
            rows[i] = cache.update(*rows[i], layer)
        return [key for key, _ in rows], [value for _, value in rows]

    def get_seq_length(self, layer: int = 0) -> int:
        return max(cache.get_seq_length(layer) for cache in self.caches)


def attend_side_by_side(
    module: Any, query: torch.Tensor, keys: Any, values: Any, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Each row by itself, as it would be alone: a single new token needs no mask."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    rows = zip(query.split(1), keys, values, strict=True)
    return torch.cat([attend(module, q, k, v, None, **options)[0] for q, k, v in rows]), None


@contextmanager
def own_attention(config: Any) -> Iterator[None]:
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class SharedForward:
    """`sizes`: the numbers of rows whose results agree to the bit; the largest, of replies at once."""

    def __init__(self, base: Any, sizes: Sequence[int]):
        self.base, self.sizes = base, sizes
        self.found: dict[int, torch.Tensor] = {}  # {id of a cache: logits after its newest token}

    @torch.no_grad()
    def read(
        self, tokens: Sequence[int], caches: Sequence[DynamicCache], size: int | None = None
    ) -> torch.Tensor:
        """Logits after the token of each  # [conversations, vocabulary]; the caches grow by it."""
        count = len(tokens)
        size = size or next(size for size in self.sizes if size >= count)
        positions = [cache.get_seq_length() for cache in caches] + [0] * (size - count)
        with own_attention(self.base.config.get_text_config()):
            logits = self.base(
                input_ids=torch.tensor([*tokens, *[0] * (size - count)])[:, None],
                position_ids=torch.tensor(positions)[:, None],
                past_key_values=SideBySide(caches),
                use_cache=True,
            ).logits
        return logits[:count, -1]


def open_shared_forward(base: Any, count: int) -> SharedForward | None:
    """For `count` replies at once, 8 at most; None where a step for several is not the step of each."""
    config = base.config.get_text_config()
    layers = DynamicCache(config=config).layers
    if count < 2 or find_shared_length(config) or not all(type(layer) is DynamicLayer for layer in layers):
        return None
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_side_by_side)
    try:
        sizes = find_equal_sizes(base, next(size for size in SIZES if size >= min(count, SIZES[-1])))
    except Exception:  # an architecture with attention of its own
        return None
    return SharedForward(base, sizes) if sizes else None


@torch.no_grad()
def find_equal_sizes(base: Any, largest: int) -> list[int]:
    """The sizes up to `largest` that give the same bits in any place; none where the logits are not right."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.get_input_embeddings().num_embeddings
    rows = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in TRIED]
    caches = [DynamicCache(config=base.config.get_text_config()) for _ in rows[:largest]]
    for row, cache in zip(rows, caches, strict=False):
        base(input_ids=torch.tensor([row[:-1]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens, shared = [row[-1] for row in rows[:largest]], SharedForward(base, SIZES)

    def read(places: Sequence[int], size: int) -> torch.Tensor:
        logits = shared.read([tokens[i] for i in places], [caches[i] for i in places], size)
        for i in places:
            caches[i].crop(-1)
        return logits

    every = range(largest)
    expected = read(every, largest)
    alone = base(input_ids=torch.tensor([rows[0]]), logits_to_keep=1).logits[0, -1:]
    turned = read(every[::-1], largest).flip(0)
    is_near = (alone - expected[:1]).norm() <= MAX_DIFFERENCE * alone.norm()
    if not is_near or not torch.equal(turned, expected):
        return []
    sizes = [size for size in SIZES if size < largest and all_equal(read, size, expected)]
    return [*sizes, largest]


def all_equal(read: Any, size: int, expected: torch.Tensor) -> bool:
    """Whether `size` rows have the bits of more: full, and with a row that is nobody's."""
    some = [range(size), range(1, max(2, size))]
    return all(torch.equal(read(places, size), expected[list(places)]) for places in some)
