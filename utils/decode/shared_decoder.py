"""One model, many replies under way: they advance together, and each is what it would be alone.

    decoder = SharedDecoder(model, steps)            # any model: a token each in turn (turns.py)
    decoder.open_slots(count=8, tokens=3072)         # one step for all, where kernels apply (slots.py)
    decoder.open_slots(8, 3072, for_many=True)       # on a CPU too (shared_forward.py)
    reply = decoder.reply(prompt_ids, config, tuned=True, seed=7, max_seconds=60)
    for token in reply.tokens(): ...                 # from any thread; the stop token last
    reply.cancel()                                   # from any thread, at any time: its place is free
    reply.finish_reason                              # stop, length, time or cancelled

`config` is a transformers GenerationConfig of the reply's own: max_new_tokens, eos_token_id (the stop ids),
do_sample, temperature, top_k, top_p, typical_p, repetition_penalty, min_new_tokens. `tuned` False: the base
without its adapter. Replies beyond the room there is wait in order of arrival: how many may wait is the
caller's business. What a reply says follows from its prompt, config and seed, whoever else is replied to;
only a conversation that goes on from keys and values that were kept rounds otherwise, in 16 bits.
Beams and n-gram rules are left to transformers' generate, one such reply after another, while others go on.

One thread has the model while there is something to do; nobody else may use it then.
"""

import atexit
import random
import threading
from collections import deque
from typing import Any
from weakref import WeakSet

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from utils.decode.graph import GraphDecoder
from utils.decode.loop import GrowingSteps, Steps
from utils.decode.reply import AdapterSwitch, OwnDraws, Reply
from utils.decode.shared_forward import SharedForward, open_shared_forward
from utils.decode.slots import Slots, open_slots
from utils.decode.token_choice import NotCovered
from utils.decode.turns import Turns

DECODERS: "WeakSet[SharedDecoder]" = WeakSet()


@atexit.register
def end_all() -> None:
    """A thread that still computes while Python ends would abort the process."""
    for decoder in list(DECODERS):
        decoder.end()


class SharedDecoder:
    def __init__(self, model: Any, steps: Steps, kept: int = 2):
        self.model, self.steps = model, steps
        self.adapter = AdapterSwitch(model)
        self.turns = Turns(steps, self.adapter, kept=kept)
        self.engine: Turns | Slots | SharedForward = self.turns
        self.guard = threading.Lock()
        self.waiting: deque[Reply] = deque()
        self.plain: deque[Reply] = deque()  # those that wait for generate
        self.generated: Reply | None = None  # the one that it is at
        self.thread: threading.Thread | None = None
        self.replies: WeakSet[Reply] = WeakSet()
        DECODERS.add(self)

    def open_slots(self, count: int, tokens: int, kept: int | None = None, for_many: bool = False) -> None:
        """Let `count` replies of at most `tokens` tokens, prompt included, be under way at once.

        One step for all, 8 at most, where kernels apply and memory has room; else a token each in turn.
        `kept`: so many of the latest conversations are kept for their next turn. `for_many`: on a CPU, too,
        one step for all, of eight rows even for one. Waits for what is under way.
        """
        thread = self.thread
        if thread is not None:
            thread.join()
        kept = self.engine.most_kept if kept is None else kept
        slots = self.engine if isinstance(self.engine, Slots) else None
        if isinstance(self.steps, GraphDecoder) and not (slots and slots.has(count, tokens)):
            self.engine = self.turns  # the old buffers go first
            del slots
            self.engine = open_slots(self.steps, self.adapter, count, tokens, kept) or self.turns
        elif isinstance(self.steps, GrowingSteps) and self.model.device.type == "cpu":
            shared = for_many and count > 1 and open_shared_forward(self.steps, self.adapter, count, kept)
            self.engine = shared or self.turns
        self.engine.limit(count, kept)

    @property
    def shares_steps(self) -> bool:
        return self.engine is not self.turns

    @property
    def is_busy(self) -> bool:
        return self.thread is not None

    def reply(
        self,
        prompt: list[int],
        config: GenerationConfig,
        tuned: bool = True,
        seed: int | None = None,
        max_seconds: float | None = None,
        lookup: int = 0,
    ) -> Reply:
        """Begin a reply to these token ids, now or as soon as there is room.

        `seed` None: one of `random`. `lookup`: tokens guessed from the prompt and verified at once, of no
        effect among slots.
        """
        reply = Reply(prompt, config, tuned, random.getrandbits(62) if seed is None else seed, max_seconds)
        reply.lookup = lookup
        with self.guard:
            self.replies.add(reply)
            self.waiting.append(reply)
            if self.thread is None:
                self.thread = threading.Thread(target=self.work, daemon=True)
                self.thread.start()
        return reply

    def end(self) -> None:
        """Break off what is still said, and wait until its thread has left the model."""
        with self.guard:
            thread = self.thread
            for reply in list(self.replies):
                reply.cancel()
        if thread is not None:
            thread.join()

    # By the thread that has the model.

    @torch.no_grad()
    def work(self) -> None:
        while True:
            with self.guard:
                if not (self.waiting or self.plain or self.engine.is_busy):
                    self.adapter.turn(True)
                    self.thread = None
                    return
            try:
                self.advance()
            except Exception as error:  # nobody shall wait for ever
                self.engine.fail(error)

    def advance(self) -> None:
        self.admit()
        self.engine.step()
        if self.plain and self.generated is None:
            self.generated = self.plain.popleft()
            try:
                self.generate(self.generated)
            except Exception as error:  # raised again where the reply is read
                self.generated.end("error", error)
            self.generated = None

    def admit(self) -> None:
        """Give those who wait their place. Who has gone meanwhile needs none."""
        with self.guard:
            self.waiting = deque(reply for reply in self.waiting if not reply.is_over())
        while self.waiting and self.engine.has_room:
            reply = self.waiting.popleft()
            try:
                if not self.model._supports_default_dynamic_cache():
                    raise NotCovered("a cache of its own kind")
                self.engine.start(reply)
            except NotCovered:
                self.plain.append(reply)
            except Exception as error:
                reply.end("error", error)

    def generate(self, reply: Reply) -> None:
        """By transformers' generate; after each of its tokens all others have theirs."""
        ids = torch.tensor([reply.prompt], device=self.model.device)
        streams = reply.config.num_beams == 1  # beams are final only at the end
        self.adapter.turn(reply.tuned)
        with OwnDraws(self.model.device, reply.seed).used():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=reply.config,
                stopping_criteria=StoppingCriteriaList([Between(self, reply)]),
                **({"streamer": IntoReply(reply)} if streams else {}),
            )
        for token in [] if streams else output[0, len(reply.prompt) :].tolist():
            if reply.add(token):
                break
        reply.end("length")


class Between(StoppingCriteria):
    """Between two tokens of generate the others go on; a reply that is over ends."""

    def __init__(self, decoder: SharedDecoder, reply: Reply):
        self.decoder, self.reply = decoder, reply

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_over = self.reply.is_over()
        if not is_over and (self.decoder.waiting or self.decoder.engine.is_busy):
            self.decoder.advance()
            self.decoder.adapter.turn(self.reply.tuned)
        return torch.full((len(input_ids),), is_over, device=input_ids.device)


class IntoReply(BaseStreamer):
    def __init__(self, reply: Reply):
        self.reply, self.has_prompt = reply, False

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt:
            self.reply.add(int(value))
        self.has_prompt = True

    def end(self) -> None:
        pass
