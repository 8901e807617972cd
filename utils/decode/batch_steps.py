"""Steps of up to eight conversations on a GPU: buffers for their keys and values, a graph for each number."""

from collections.abc import Generator

import torch

from utils.console import notice
from utils.decode.cuda_c import KernelError
from utils.decode.graph import GraphDecoder
from utils.decode.loop import finish
from utils.decode.model import WholeStep
from utils.decode.reply import AdapterSwitch
from utils.fast.graph_capture import CaptureError, capture_graph
from utils.fast.trials import describe_distance, draw_tokens

SIZES = (1, 2, 4, 8)  # conversations of a step; places that are left over are nobody's
TRIED = 16  # tokens of a prompt, before the first reply
NOBODY = -(1 << 30)  # a length that no number of steps makes one


class BatchSteps:
    """The GPU's side of slots.py: buffers, a graph for each number of conversations, adapter on or off."""

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
