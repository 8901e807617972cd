"""Forward and backward of a micro-batch as one CUDA graph: replayed, it costs the CPU a single launch.

A 7B QLoRA step launches some ten thousand kernels, which takes the CPU a quarter of a second. On short
micro-batches the GPU waits for most of them; 8,192 tokens keep it busy for half a second, and a graph gains
nothing. So a size is captured only where it computes for less time than it is launched.
"""

import time
from dataclasses import dataclass

import torch

from utils.console import notice
from utils.fast.graph_capture import CaptureError, capture_graph, round_to_power
from utils.fast.model import FastModel, MicroBatch
from utils.fast.rope import find_ropes, is_dynamic
from utils.fast.streamed_layers import find_store

Size = tuple[int, ...]  # what graph_key makes of a micro-batch
# Of an eager run: its start and end on the GPU, and the seconds that the CPU took to launch it.
EagerTime = tuple[torch.cuda.Event, torch.cuda.Event, float]
LAUNCH_SHARE = 0.8  # of a run's time: launching that takes less is hidden behind the arithmetic
# A queue of 1,024 kernels holds the CPU back where a run is long: that is no launching.
LONGEST = 4  # times the launching of a few tokens


@dataclass(frozen=True)
class CapturedStep:
    """A graph with the tensors that it reads and the one that it fills."""

    graph: torch.cuda.CUDAGraph
    batch: MicroBatch
    loss_scale: torch.Tensor
    loss: torch.Tensor


class GraphedStep:
    """FastModel.run, captured once for each micro-batch size that gains by it, and replayed.

    The first two micro-batches of a size run eagerly, real steps: one compiles every kernel, one is timed.
    The third is captured, if it pays (`captures`: "timed", "always" or "never"). Captures cost half a second
    and memory, so sizes that come seldom are never captured.
    """

    def __init__(self, fast: FastModel, captures: str = "timed"):
        self.fast, self.captures = fast, captures
        self.graphs: dict[Size, CapturedStep] = {}
        self.seen: dict[Size, EagerTime | None] = {}  # eager runs so far; None after the first
        self.launch_seconds: float | None = None  # of the kernels of any size
        self.obstacle = find_graph_obstacle(fast)
        if not self.obstacle:
            # One pool and stream for all graphs and eager runs: never at work at once, they share memory.
            torch.cuda.empty_cache()  # what loading leaves free would be out of the pool's reach
            self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    def forget_graphs(self) -> None:
        """Give back what the graphs hold; the sizes to come are captured anew."""
        self.graphs, self.seen = {}, {}
        if not self.obstacle:
            self.pool = torch.cuda.MemPool()

    def __call__(self, micro_batch: MicroBatch, loss_scale: float | torch.Tensor) -> torch.Tensor:
        """Sum of the token losses  # [] on the device; gradients are added to `fast.flat.grads`.

        `micro_batch`: as FastModel.run takes it, on any device; a missing max_length is read from cu_seqlens,
        which waits for the GPU if they are there. `loss_scale` multiplies the gradients: 1 / label tokens of
        the whole optimizer step, times GradScaler's scale in float16.
        """
        device = self.fast.flat.weights.device
        scale = torch.as_tensor(loss_scale, dtype=torch.float32, device=device)
        self.fast.flat.attach_gradients()  # before a capture or a replay, which could not
        positions = torch.as_tensor(micro_batch["label_positions"])  # the collators leave them in NumPy
        micro_batch = micro_batch | {"label_positions": positions}
        if self.obstacle or "cu_seqlens" not in micro_batch:
            batch = add_max_length(micro_batch)
            return self.fast.run(move(batch, device), scale)
        batch = pad_to_fixed_sizes(micro_batch)
        size = graph_key(batch)
        if size in self.graphs:
            return self.replay(size, batch, scale)
        batch = move(batch, device)
        if size not in self.seen or not self.pays(size):
            return self.run_timed(size, batch, scale)
        if not self.capture(size, batch, scale):
            return self.fast.run(batch, scale)
        return self.replay(size, batch, scale)

    def run_timed(self, size: Size, batch: MicroBatch, scale: torch.Tensor) -> torch.Tensor:
        """An eager run; the second one of a size is timed."""
        if size not in self.seen:
            self.seen[size] = None
        elif self.seen[size] is None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin = time.perf_counter()
            start.record()
            loss = self.run_in_pool(batch, scale)
            end.record()
            self.seen[size] = start, end, time.perf_counter() - begin
            return loss
        return self.run_in_pool(batch, scale)

    def pays(self, size: Size) -> bool:
        """Whether a graph of `size` would be faster: launching takes a good part of its time.

        The two are of one run. A CPU launches LLaMA-7B's 10,000 kernels in 0.19 s now and in 0.40 s a minute
        later, as others use it too: held against a figure from another moment, 2,048 tokens seemed to hide
        their launching, and were never captured.
        """
        if self.captures != "timed":
            return self.captures == "always"
        timed = self.seen[size]
        if timed is None:
            return False
        if self.launch_seconds is None:
            self.launch_seconds = self.measure_launch()
        start, end, launching = timed
        end.synchronize()
        return LAUNCH_SHARE * (start.elapsed_time(end) / 1000) < launching < LONGEST * self.launch_seconds

    def measure_launch(self) -> float:
        """Seconds that the kernels of a micro-batch take to launch: a few tokens compute for no longer."""
        device, tokens = self.fast.flat.weights.device, 64
        places = torch.arange(tokens, device=device)[None]
        batch: MicroBatch = {name: places for name in ("input_ids", "labels", "position_ids", "token_keys")}
        batch["label_positions"] = places[0, :-1]
        batch |= {
            "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32, device=device),
            "max_length": tokens,
        }
        scale = torch.zeros((), device=device)  # what is added to the gradients is zero
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.run_in_pool(batch, scale)
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds

    def run_in_pool(self, batch: MicroBatch, scale: torch.Tensor) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        # The pool is this thread's, so the backward pass stays on it.
        with torch.autograd.set_multithreading_enabled(False), torch.cuda.stream(self.stream):
            with torch.cuda.use_mem_pool(self.pool):
                loss = self.fast.run(batch, scale)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss.clone()  # out of the pool

    def capture(self, size: Size, batch: MicroBatch, scale: torch.Tensor) -> bool:
        """Record the step on copies of `batch` that later ones are written into; runs nothing yet."""
        static = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        static_scale = scale.clone()
        try:
            # On the eager run's thread, whose cuBLAS handle exists: one made during a capture would spoil it.
            with torch.autograd.set_multithreading_enabled(False):
                graph, loss = capture_graph(
                    lambda: self.fast.run(static, static_scale), self.stream, scale.device, self.pool.id
                )
        except CaptureError as error:
            self.obstacle = str(error)
            notice(f"fast path: without CUDA graphs, capturing failed ({error})")
            return False
        self.graphs[size] = CapturedStep(graph, static, static_scale, loss)
        return True

    def replay(self, size: Size, batch: MicroBatch, scale: torch.Tensor) -> torch.Tensor:
        captured = self.graphs[size]
        for name, x in batch.items():
            if isinstance(x, torch.Tensor):  # from pinned memory the CPU need not wait for the copy
                captured.batch[name].copy_(x if x.is_cuda else x.pin_memory(), non_blocking=True)
        captured.loss_scale.copy_(scale)
        captured.graph.replay()
        return captured.loss.clone()


def find_graph_obstacle(fast: FastModel) -> str | None:
    """Why steps of this model run eagerly; None if they can be captured."""
    if fast.flat.weights.device.type != "cuda":
        return "no GPU"
    obstacle = fast.attention_obstacle or fast.loss_obstacle
    if any(is_dynamic(rope) for rope in find_ropes(fast.causal_model.config)):
        obstacle = "its rotary frequencies are chosen on the host, by the longest row"
    if fast.shards:
        obstacle = "its layers come from several GPUs"
    if fast.has_own_dropout:
        obstacle = "the base model has dropout of its own"
    if find_store(fast.model):
        obstacle = "its layers come from host memory"
    if obstacle:
        notice(f"fast path: without CUDA graphs ({obstacle})")
    return obstacle


def add_max_length(batch: MicroBatch) -> MicroBatch:
    if "cu_seqlens" not in batch or "max_length" in batch:
        return batch
    return batch | {"max_length": int(batch["cu_seqlens"].diff().max())}


def pad_to_fixed_sizes(batch: MicroBatch) -> MicroBatch:
    """The micro-batch with all that varies padded to a few sizes: a graph replays fixed shapes alone.

    Each size costs one capture (seconds), each padding some empty work, so the sizes are few:

    rows             a power of two of at least tokens / 128 (and 16, at most 64); the added rows are empty
    longest row      a power of two of at least 1,024 tokens, at most all tokens
    label positions  half of the tokens or all of them; the added ones are ignored

    A packed micro-batch of 2,048 tokens with 9 rows, the longest of 700 tokens, and 800 labels becomes one of
    16 rows, longest 1,024, and 1,024 label positions.
    """
    tokens, ends, positions = batch["input_ids"].shape[1], batch["cu_seqlens"], batch["label_positions"]
    rows, longest = len(ends) - 1, add_max_length(batch)["max_length"]
    if rows * longest != tokens:  # rows of one length stay as they are, for attend_dense
        rows = round_to_power(rows, count_rows(tokens))
        longest = min(round_to_power(longest, 1024), tokens)
    places = -(-tokens // 2) if 2 * len(positions) <= tokens else tokens
    padding = positions.new_full((places - len(positions),), tokens - 1)  # no label follows the last token
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "token_keys": batch["token_keys"],
        "labels": batch["labels"],
        "label_positions": torch.cat([positions, padding]),
        "cu_seqlens": torch.cat([ends, ends.new_full((rows + 1 - len(ends),), tokens)]).to(torch.int32),
        "max_length": longest,
    }


def count_rows(tokens: int) -> int:
    """How many rows a packed micro-batch is padded to, at least.

    For each one attention's backward pass holds 128 tokens' worth of gradients in float32: 1,024 rows beside
    a long one would double what 131,072 tokens need.
    """
    return max(16, min(tokens, 8192) // 128)


def graph_key(batch: MicroBatch) -> Size:
    return (
        batch["input_ids"].shape[1],
        len(batch["label_positions"]),
        len(batch["cu_seqlens"]),
        batch["max_length"],
    )


def move(batch: MicroBatch, device: torch.device) -> MicroBatch:
    return {
        name: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x
        for name, x in batch.items()
    }
