"""Several replies of any model, a token each in turn: each has the model for itself while it is its turn.

So every reply is to the bit what it would be alone, at the price that the weights are read once for each.
"""

import os
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import DynamicLayer

from utils.decode.loop import Steps, read_prompt, stream_tokens
from utils.decode.reply import AdapterSwitch, OwnDraws, Reply
from utils.decode.token_choice import TokenChoice

# A template may take the end of a prompt back in the next turn: the thoughts of an answer, say.
GOES_ON = 0.9  # of the last prompt


def count_shared(reply: Reply, ids: list[int], asked: int, tuned: bool) -> int:
    """Tokens of the reply's prompt that need not be read again, `ids` being kept, `asked` of them a prompt.

    One is left to be read, as its logits start the reply. Another conversation with the same system message
    shares its beginning: it reads that anew, and what is kept stays whole.
    """
    shared = len(os.path.commonprefix([ids, reply.prompt[:-1]])) if tuned == reply.tuned else 0
    return shared if shared >= GOES_ON * asked else 0


@dataclass
class Kept:
    """Keys and values of a conversation that may go on."""

    ids: list[int]
    reply: Reply  # the last one
    cache: Any

    def count_shared(self, reply: Reply) -> int:
        return count_shared(reply, self.ids, len(self.reply.prompt), self.reply.tuned)


class Conversations:
    """The latest conversations, kept for their next turn."""

    def __init__(self, steps: Steps, most: int):
        self.steps, self.most = steps, most
        self.kept: list[Kept] = []  # the latest last
        self.can_keep = all(type(layer) is DynamicLayer for layer in steps.make_cache().layers)

    def limit(self, most: int) -> None:
        self.most = most
        self.kept = self.kept[len(self.kept) - min(most, len(self.kept)) :]

    def find_cache(self, reply: Reply) -> Any:
        """That of the conversation that goes on, cut to what the prompt shares with it; or an empty one."""
        best = max(self.kept, key=lambda kept: kept.count_shared(reply), default=None)
        if best is None or not best.count_shared(reply):
            return self.steps.make_cache()
        self.kept.remove(best)
        self.steps.cut(best.cache, best.count_shared(reply))
        return best.cache

    def keep(self, ids: list[int], reply: Reply, cache: Any) -> None:
        """`ids` were read into the cache, and maybe more that were not."""
        if self.can_keep:
            self.kept.append(Kept(ids[: cache.get_seq_length()], reply, cache))
            self.limit(self.most)


class UnderWay:
    """The replies under way, of `most` that have room, and the conversations behind them."""

    def __init__(self, steps: Steps, adapter: AdapterSwitch, most: int = 8, kept: int = 2):
        self.steps, self.adapter, self.most = steps, adapter, most
        self.conversations = Conversations(steps, kept)
        self.turns: dict[Reply, Any] = {}  # and what goes on with each

    @property
    def most_kept(self) -> int:
        return self.conversations.most

    @property
    def is_busy(self) -> bool:
        return bool(self.turns)

    @property
    def has_room(self) -> bool:
        return len(self.turns) < self.most

    def limit(self, most: int, kept: int) -> None:
        self.most = most
        self.conversations.limit(kept)

    def fail(self, error: Exception) -> None:
        for reply in self.turns:
            reply.end("error", error)
        self.turns.clear()


class Turns(UnderWay):
    """By the steps of one conversation (loop.py), each on a cache of its own."""

    def start(self, reply: Reply) -> None:
        """Raises NotCovered where generate must do it."""
        self.turns[reply] = self.speak(reply, self.steps.find_choice(reply.config))

    def step(self) -> None:
        """One token of each reply, or a part of its prompt."""
        for reply, turn in list(self.turns.items()):
            self.adapter.turn(reply.tuned)
            try:
                if reply.is_over():
                    turn.close()
                else:
                    next(turn, None)
            except Exception as error:  # raised again where the reply is read
                reply.end("error", error)
            if reply.is_over():
                del self.turns[reply]

    def speak(self, reply: Reply, choice: TokenChoice) -> Generator[None]:
        """Pauses after each token, and after each part of the prompt."""
        cache, said = self.conversations.find_cache(reply), reply.prompt
        reply.reused_tokens = cache.get_seq_length()
        draws = OwnDraws(self.steps.base.device, reply.seed).used if choice.samples else nullcontext
        logits = yield from read_prompt(self.steps, reply.prompt, cache)
        tokens = stream_tokens(
            self.steps, reply.prompt, cache, choice, reply.most, reply.stop_ids, reply.lookup, logits
        )
        try:
            with closing(tokens):
                while True:
                    with draws():
                        token = next(tokens)
                    said = [*reply.prompt, *reply.said, token]
                    if reply.add(token):
                        break
                    yield
        finally:
            self.conversations.keep(said, reply, cache)
