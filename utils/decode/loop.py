"""A reply token by token: the GPU is never waited for but to read the token before the one it works on.

transformers' generate asks the GPU after each token whether to go on, and prepares the next step meanwhile:
a millisecond, where the step itself takes two or three. Here the chosen token goes into the next step on the
GPU; the host, one step behind, reads it and stops. One step too many is computed then, and forgotten.

With proposals (prompt lookup) a step reads the newest token and those that came after the same words
before, in the prompt say: where the model itself would have said them, several tokens are done in one step.
"""

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from utils.decode.token_choice import TokenChoice

LONGEST_MATCH = 3  # tokens that must have come before, to propose what came after them
READ_TOGETHER = 512  # tokens of a prompt: others wait no longer for theirs than for these
MOST_PROPOSED = 7  # with the newest token 8, which the kernels read at once


class Steps(Protocol):
    """Computes steps of one conversation after another: GraphDecoder on a GPU, GrowingSteps elsewhere."""

    base: Any  # the model
    runs_ahead: bool  # whether a step is started and not waited for

    def find_choice(self, config: GenerationConfig) -> TokenChoice:
        """How `config` chooses a token; raises NotCovered."""

    def make_cache(self) -> Any:
        """Of a new conversation."""

    def read(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits of the last of the new tokens `ids`  # [1, tokens] -> [1, vocabulary]"""

    def advance(self, cache: Any, choice: TokenChoice) -> torch.Tensor:
        """Read the token that was chosen last, and choose the next  # int64 [1]"""

    def place(self, cache: Any, token: int) -> None:
        """Another conversation came between: `token` was chosen last in this one."""

    def verify(self, ids: list[int], cache: Any) -> list[int]:
        """The likeliest token after each of `ids`, which are read at once."""

    def cut(self, cache: Any, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def holds(self, cache: Any) -> bool:
        """Whether no other conversation came between."""


class GrowingSteps:
    """Steps on a cache that grows, by the model's own forward: on a CPU."""

    runs_ahead = False

    def __init__(self, model: Any):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.base = base
        self.token = torch.zeros(1, 1, dtype=torch.long, device=self.base.device)
        self.owner: Callable[[], Any] = lambda: None

    def find_choice(self, config: GenerationConfig) -> TokenChoice:
        return TokenChoice(self.base, config)

    def make_cache(self) -> Any:
        return DynamicCache(config=self.base.config.get_text_config())

    def read(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return self.base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def advance(self, cache: Any, choice: TokenChoice) -> torch.Tensor:
        token = choice.choose(self.read(self.token, cache))
        self.token.copy_(token)
        return token.clone()

    def place(self, cache: Any, token: int) -> None:
        self.owner = weakref.ref(cache)
        self.token.fill_(token)

    def verify(self, ids: list[int], cache: Any) -> list[int]:
        input_ids = torch.tensor([ids], device=self.base.device)
        logits = self.base(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
        return logits[0].argmax(-1).tolist()

    def cut(self, cache: Any, length: int) -> None:
        self.owner = lambda: None
        keeps_all = all(type(layer) is DynamicLayer for layer in cache.layers)  # no window of them
        if keeps_all and cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())

    def holds(self, cache: Any) -> bool:
        return self.owner() is cache


class Fetched:
    """Tokens on their way from the GPU."""

    def __init__(self, token: torch.Tensor):
        self.host, self.event = token, None
        if token.is_cuda:
            self.host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self.host.copy_(token, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()

    def wait_for_one(self) -> int:
        (token,) = self.wait()
        return token


def read_prompt(steps: Steps, ids: Sequence[int], cache: Any) -> Generator[None, None, torch.Tensor]:
    """Logits after `ids`, of which the cache holds the first; with a pause between parts of it.

    The parts follow from the prompt alone: whoever else is replied to, the same products are made.
    """
    new = torch.tensor([ids[cache.get_seq_length() :]], device=steps.base.device)
    *parts, last = new.split(READ_TOGETHER, 1)
    for part in parts:
        steps.read(part, cache)
        yield
    return steps.read(last, cache)


def finish(generator: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    """What it returns, without its pauses."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def stream_tokens(
    steps: Steps,
    prompt: Sequence[int],
    cache: Any,
    choice: TokenChoice,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    proposed: int = 0,
    logits: torch.Tensor | None = None,
) -> Generator[int]:
    """The reply's tokens, the stop token last where it comes to one. `cache` holds the prompt's first tokens
    already, or none; in the end it holds all but the last token. Between two tokens others may use `steps`.

    `proposed`: this many tokens at most are taken from what was said before and verified in one step.
    `logits`: those of the prompt, where it has been read.
    """
    ids = list(prompt)
    try:
        if logits is None:
            logits = finish(read_prompt(steps, ids, cache))
        choice.begin(ids)
        found = Fetched(choice.choose(logits))
        if proposed and choice.is_likeliest:
            tokens = speculate(steps, ids, cache, found.wait_for_one(), min(proposed, MOST_PROPOSED))
        else:
            tokens = look_ahead(steps, ids, cache, choice, found, max_new_tokens)
        for count, token in enumerate(tokens, 1):
            ids.append(token)
            yield token
            if token in stop_ids or count == max_new_tokens:
                return
    finally:
        steps.cut(cache, len(ids) - 1)


def look_ahead(
    steps: Steps,
    ids: list[int],
    cache: Any,
    choice: TokenChoice,
    found: Fetched,
    max_new_tokens: int,
) -> Iterator[int]:
    """Tokens; with `runs_ahead` each is handed out when the step after it has been started.

    The caller appends them to `ids`.
    """
    begun = len(ids)

    def start(newest: Callable[[], int]) -> Fetched:
        if not steps.holds(cache):  # at first, and where another conversation came between
            steps.place(cache, newest())
            said = ids if steps.runs_ahead is False else [*ids, newest()]
            choice.begin(said, len(said) - begun)
        return Fetched(steps.advance(cache, choice))

    while True:
        is_last = len(ids) - begun + 1 >= max_new_tokens
        ahead = start(found.wait_for_one) if steps.runs_ahead and not is_last else None
        yield found.wait_for_one()
        found = ahead or start(found.wait_for_one)


def speculate(steps: Steps, ids: list[int], cache: Any, token: int, proposed: int) -> Iterator[int]:
    """The likeliest tokens, verified several at once. The caller appends them to `ids`."""
    said = Continuations(ids)
    while True:
        yield token
        said.add(token)
        guess = said.find(proposed)
        length = len(ids) - 1  # in the cache; the newest token is not
        likeliest = steps.verify([token, *guess], cache)
        agreed = next((i for i, word in enumerate(guess) if word != likeliest[i]), len(guess))
        steps.cut(cache, length + 1 + agreed)
        for word in guess[:agreed]:
            yield word
            said.add(word)
        token = likeliest[agreed]


class Continuations:
    """What came after the latest earlier place where the last three tokens stood, or two, or one.

    After 7 8 9 5 7 8 it is 9 5 7 8.
    """

    def __init__(self, ids: Sequence[int]):
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # where the latest place of some tokens ends
        self.found: int | None = None
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.found = None
        for size in range(1, min(LONGEST_MATCH, len(self.ids)) + 1):
            last = tuple(self.ids[-size:])
            self.found = self.after.get(last, self.found)
            self.after[last] = len(self.ids)

    def find(self, count: int) -> list[int]:
        return [] if self.found is None else self.ids[self.found : self.found + count]
