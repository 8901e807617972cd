"""Up to eight conversations a step: the weights, which are most of what a step reads, are read once for all.

Each conversation has a slot, room for its keys and values; a step is told where (cuda/attention.cu). A kernel
adds up a conversation's sums in the same order whoever is beside it, so a reply is to the bit what it would
be alone. Between steps a part of a waiting prompt is read (prompt_reader.py). When a reply has ended its slot
stays as it is until it is needed: the next turn of the conversation goes on from there.

    slots     0: Ann, 412 tokens    1: kept of Bob    2: Eve, 77 tokens    3: free
    a step    places [0, 2] -> their next tokens, written where the next step looks for them

The host is a step behind: it reads the tokens of a step while the next one runs. What a step computes for a
reply that had ended is forgotten.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from utils.console import notice
from utils.decode.batch_steps import SIZES, BatchSteps, find_slot_fault
from utils.decode.graph import GraphDecoder
from utils.decode.loop import READ_TOGETHER, Fetched
from utils.decode.reply import AdapterSwitch, Reply
from utils.decode.token_choice import TokenChoice
from utils.decode.turns import count_shared
from utils.fast.memory import read_host_memory

KEPT_FREE = 3 << 29  # bytes of GPU memory


@dataclass(eq=False)
class Slot:
    """Where a reply lies, or what the last one has left."""

    place: int
    ids: list[int] = field(default_factory=list)  # whose keys and values are there
    asked: int = 0  # of them the prompt
    tuned: bool = True
    reply: Reply | None = None
    choice: Any = None
    started: int = 0  # tokens of the reply that are under way or there
    # What is being read of the prompt, and how.
    part: list[int] = field(default_factory=list)
    reading: Generator[None, None, torch.Tensor] | None = None

    @property
    def is_read(self) -> bool:
        return self.started > 0


class Slots:
    """As turns.Turns: replies under way, here all of them a token further by each step."""

    def __init__(self, steps: BatchSteps, base: Any, wanted: int, kept: int):
        self.steps, self.base, self.wanted, self.most_kept = steps, base, wanted, kept
        self.most = steps.count
        self.slots = [Slot(place) for place in range(steps.count)]  # the one used last comes last
        self.fetched: deque[tuple[Fetched, list[tuple[Slot, Reply]]]] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self.fetched) or any(slot.reply for slot in self.slots)

    @property
    def has_room(self) -> bool:
        return sum(slot.reply is not None for slot in self.slots) < self.most

    def has(self, count: int, tokens: int) -> bool:
        return count <= self.wanted and tokens <= self.steps.capacity

    def limit(self, most: int, kept: int) -> None:
        self.most, self.most_kept = min(most, self.steps.count), kept
        left = [slot for slot in self.slots if slot.reply is None and slot.ids]
        for slot in left[: max(0, len(left) - kept)]:
            slot.ids = []

    def start(self, reply: Reply) -> None:
        """Raises NotCovered where generate must do it."""
        needed = len(reply.prompt) + reply.most
        if needed > self.steps.capacity:
            raise ValueError(f"prompt and reply are {needed} tokens, a slot has {self.steps.capacity}")
        choice = TokenChoice(self.base, reply.config)
        choice.generator = torch.Generator(self.steps.device).manual_seed(reply.seed)
        choice.begin(reply.prompt)
        free = [slot for slot in self.slots if slot.reply is None]

        def find(slot: Slot) -> int:
            return count_shared(reply, slot.ids, slot.asked, slot.tuned) if slot.ids else 0

        slot = max(free, key=lambda slot: (find(slot), not slot.ids))
        slot.ids = slot.ids[: find(slot)]
        reply.reused_tokens, slot.asked, slot.started = len(slot.ids), len(reply.prompt), 0
        slot.reply, slot.choice, slot.tuned = reply, choice, reply.tuned
        self.use(slot)

    def use(self, slot: Slot) -> None:
        self.slots.remove(slot)
        self.slots.append(slot)

    def step(self) -> None:
        """A part of a prompt; one token of each reply; and what the step before has found is read."""
        before = len(self.fetched)
        for slot in list(self.slots):
            if slot.reply and slot.reply.is_over():
                self.leave(slot)
        reading = next((slot for slot in self.slots if slot.reply and not slot.is_read), None)
        if reading and reading.reply:
            others_speak = any(slot.reply and slot.is_read for slot in self.slots)
            try:
                self.read(reading, reading.reply, others_speak)
            except Exception as error:  # raised again where the reply is read
                reading.reply.end("error", error)
        for tuned in (True, False):
            speaking = [
                slot
                for slot in sorted(self.slots, key=lambda slot: slot.place)
                if slot.reply and slot.is_read and slot.tuned == tuned and slot.started < slot.reply.most
            ]
            if speaking:
                self.speak(speaking, tuned)
        is_ahead = len(self.fetched) > before
        for _ in range(before if is_ahead else len(self.fetched)):
            self.hand_out(*self.fetched.popleft())

    def read(self, slot: Slot, reply: Reply, others_speak: bool) -> None:
        """The next of its prompt, no more of it than others may wait for; behind the last its first token."""
        self.steps.adapter.turn(slot.tuned)
        if slot.reading is None:
            past = len(slot.ids)
            slot.part = reply.prompt[past : past + READ_TOGETHER]
            slot.reading = self.steps.read(slot.place, slot.part, past)
        try:
            next(slot.reading)
            while not others_speak:
                next(slot.reading)
        except StopIteration as end:
            logits = end.value
        else:
            return
        slot.ids, slot.reading = slot.ids + slot.part, None
        if len(slot.ids) < len(reply.prompt):
            return
        token = slot.choice.choose(logits)
        self.steps.place(slot.place, len(slot.ids), token)
        slot.started = 1
        self.fetched.append((Fetched(token), [(slot, reply)]))

    def speak(self, slots: list[Slot], tuned: bool) -> None:
        logits = self.steps.step([slot.place for slot in slots], tuned)
        for i, slot in enumerate(slots):
            slot.started += 1
            if not slot.choice.is_likeliest:
                self.steps.tokens[slot.place : slot.place + 1] = slot.choice.choose(logits[i : i + 1])
        said = self.steps.tokens[self.steps.places[len(logits)]]
        self.fetched.append((Fetched(said), [(slot, slot.reply) for slot in slots if slot.reply]))

    def hand_out(self, fetched: Fetched, asked: list[tuple[Slot, Reply]]) -> None:
        for token, (slot, reply) in zip(fetched.wait(), asked, strict=False):
            if slot.reply is reply and reply.add(token):
                self.leave(slot)

    def leave(self, slot: Slot) -> None:
        """The slot is free; what it holds is kept, where there is something to go on from."""
        reply = slot.reply
        assert reply
        if slot.is_read:  # the last token has no keys and values yet
            slot.ids = [*reply.prompt, *reply.said][: len(reply.prompt) + max(0, len(reply.said) - 1)]
        slot.reply = slot.choice = slot.reading = None
        self.use(slot)
        self.limit(self.most, self.most_kept)

    def fail(self, error: Exception) -> None:
        self.fetched.clear()
        for slot in self.slots:
            if slot.reply:
                slot.reply.end("error", error)
            slot.reply, slot.reading, slot.ids = None, None, []


def open_slots(
    decoder: GraphDecoder, adapter: AdapterSwitch, wanted: int, tokens: int, kept: int
) -> Slots | None:
    """Slots of `tokens` tokens for as many as memory has room for; None, and a line, for none."""
    whole = decoder.whole
    if whole is None:  # a line has said why
        return None
    shape, like = whole.layers[0].shape, whole.embedding
    slot_bytes = 2 * len(whole.layers) * shape.kv_heads * shape.size * tokens * like.element_size()
    count = plan_slots(min(wanted, SIZES[-1]), slot_bytes, find_free_bytes(like.device))
    if count == 0:
        return None
    steps = BatchSteps(decoder, whole, adapter, count, tokens)
    fault = find_slot_fault(steps)
    if fault:
        notice(f"replies: one conversation after another ({fault})")
        return None
    return Slots(steps, decoder.base, wanted, kept)


def find_free_bytes(device: torch.device) -> int:
    """What keys and values may take: the rest is for unpacked weights and what a prompt's part needs."""
    if device.type != "cuda":
        return read_host_memory()[1] // 2
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved - KEPT_FREE


def plan_slots(wanted: int, slot_bytes: int, free: int) -> int:
    """How many of the `wanted` slots fit into `free` bytes; a line says so where not all do."""
    count = max(0, min(wanted, free // slot_bytes))
    if count < wanted:
        notice(
            f"replies: {count or 'none'} at once by one step, not {wanted}: each may take "
            f"{slot_bytes / 1e9:.1f} GB for keys and values, and {max(free, 0) / 1e9:.1f} GB are free"
        )
    return count
