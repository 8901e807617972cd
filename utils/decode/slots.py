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
from utils.decode.cuda_c import KernelError
from utils.decode.graph import GraphDecoder
from utils.decode.loop import READ_TOGETHER, Fetched, finish
from utils.decode.model import WholeStep
from utils.decode.reply import AdapterSwitch, Reply
from utils.decode.token_choice import TokenChoice
from utils.decode.turns import count_shared
from utils.fast.graph_capture import CaptureError, capture_graph
from utils.fast.memory import read_host_memory
from utils.fast.trials import describe_distance, draw_tokens

SIZES = (1, 2, 4, 8)  # conversations of a step; places that are left over are nobody's
TRIED = 16  # tokens of a prompt, before the first reply
KEPT_FREE = 3 << 29  # bytes of GPU memory
NOBODY = -(1 << 30)  # a length that no number of steps makes one


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


class BatchSteps:
    """The GPU's side: buffers, and a graph for each number of conversations, adapter on or off."""

    def __init__(
        self, decoder: GraphDecoder, whole: WholeStep, adapter: AdapterSwitch, count: int, capacity: int
    ):
        self.decoder, self.whole, self.adapter = decoder, whole, adapter
        self.count, self.capacity = count, capacity
        shape, like = whole.layers[0].shape, whole.embedding
        self.device, self.is_gpu = like.device, like.is_cuda
        sizes = (count, shape.kv_heads, capacity, shape.size)
        self.caches = [(like.new_empty(sizes), like.new_empty(sizes)) for _ in whole.layers]
        self.rotations = whole.prepare_rotations(capacity)
        # The last entry is nobody's.
        self.lengths = torch.full((count + 1,), NOBODY, dtype=torch.int32, device=self.device)
        self.tokens = torch.zeros(count + 1, dtype=torch.long, device=self.device)
        self.places = {size: self.tokens.new_full((size,), count) for size in SIZES}
        self.placed: dict[int, list[int]] = {}
        self.stream = torch.cuda.Stream() if self.is_gpu else None
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def read(self, place: int, ids: list[int], past: int) -> Generator[None, None, torch.Tensor]:
        """Logits  # [1, vocabulary] of the last of `ids`, behind `past` tokens; with pauses on the way."""
        new, end = torch.tensor(ids, device=self.device), past + len(ids)
        caches = [(keys[place : place + 1], values[place : place + 1]) for keys, values in self.caches]
        if self.decoder.reader:
            return (yield from self.decoder.reader.read_in_parts(new, caches[: len(self.whole.layers)], past))
        cache = self.decoder.make_cache()
        for layer, (keys, values) in zip(cache.layers, caches, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys[:, :, :past], values[:, :, :past]
        logits = self.decoder.read(new[None], cache)
        for layer, (keys, values) in zip(cache.layers[: len(self.whole.layers)], caches, strict=False):
            keys[:, :, past:end], values[:, :, past:end] = layer.keys[:, :, past:], layer.values[:, :, past:]
        return logits

    def place(self, place: int, length: int, token: torch.Tensor) -> None:
        """From now on this conversation takes part: `token`  # [1] comes behind `length` others."""
        self.lengths[place].fill_(length)
        self.tokens[place : place + 1].copy_(token)

    def step(self, places: list[int], tuned: bool) -> torch.Tensor:
        """Logits  # [size, vocabulary] of each conversation's next token; the likeliest are in `tokens`."""
        size = self.choose_places(places)
        if (size, tuned) in self.graphs:
            graph, logits = self.graphs[size, tuned]
            graph.replay()
            return logits
        self.adapter.turn(tuned)
        return self.run(size) if self.stream is None else self.capture(size, tuned, self.stream)

    def choose_places(self, places: list[int]) -> int:
        """Let the next step of this size, which is returned, be for these."""
        size = next(size for size in SIZES if size >= len(places))
        places = places + [self.count] * (size - len(places))
        if self.placed.get(size) != places:
            wanted = torch.tensor(places, pin_memory=self.is_gpu)
            self.places[size].copy_(wanted, non_blocking=True)
            self.placed[size] = places
        return size

    def warm_up(self) -> None:
        """Compile and capture for every number of conversations, so that nobody waits for it later."""
        for size in SIZES:
            if size < 2 * self.count:
                self.step([self.count] * size, True)

    def run(self, size: int) -> torch.Tensor:
        places = self.places[size]
        ids = self.tokens[places][:, None]
        caches = self.caches[: len(self.whole.layers)]
        logits = self.whole.run(ids, caches, self.rotations, self.lengths, places)[:, 0]
        self.tokens.index_copy_(0, places, logits.argmax(-1))
        return logits

    def capture(self, size: int, tuned: bool, stream: torch.cuda.Stream) -> torch.Tensor:
        """This step, run eagerly, which warms up every kernel; the following ones are captured after it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = self.run(size)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            self.graphs[size, tuned] = capture_graph(lambda: self.run(size), stream, self.device)
        except CaptureError as error:  # every step is run like this one
            notice(f"replies: without CUDA graphs ({error})")
            self.stream = None
        return logits


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


@torch.no_grad()
def find_slot_fault(steps: BatchSteps) -> str | None:
    """Why the steps are not used: in the first layers they do something else than the model's own forward."""
    base, cache = steps.decoder.base, steps.decoder.make_cache()
    ids = draw_tokens(base, 1, TRIED)
    try:
        with steps.whole.shallow(base):
            expected = steps.decoder.plain(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
            finish(steps.read(0, ids[0, :-1].tolist(), 0))
            steps.place(0, TRIED - 1, ids[0, -1:])
            found = steps.run(steps.choose_places([0]))[0]
            last = len(steps.whole.layers) - 1
            own, theirs = cache.layers[last], [part[0, :, TRIED - 1] for part in steps.caches[last]]
            pairs = zip(theirs, (own.keys[0, :, -1], own.values[0, :, -1]), strict=True)
            fault = describe_distance(
                {"logits": (found, expected), **dict(zip(("keys", "values"), pairs, strict=True))}
            )
        if fault is None:
            steps.warm_up()
    except (CaptureError, KernelError) as error:
        return str(error)
    return fault and f"a step gives {fault}"
