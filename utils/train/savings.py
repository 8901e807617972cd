"""What a run does to hold less on the GPU, where recomputing and small micro-batches are not enough.

None changes what is learned beyond the rounding of 16 bits. They come in the order of what they cost, and a
plan takes the first few (plan.py). LLaMA-7B with rank 64, and what each leaves out on the GPU:

    embedding   rows of the table are read from host memory            0.24 GiB (LLaMA-3-8B 0.98)
    copy        the adapter is rounded to 16 bits when it is used      0.30 GiB
    optimizer   Adam's moments wait in host memory                     1.15 GiB
    layers      frozen layers come from host memory, two at a time     3.0 GiB
"""

from typing import Any

EMBEDDING, COPY, OPTIMIZER, LAYERS = SAVINGS = ("embedding", "copy", "optimizer", "layers")
# What each costs, in tokens' worth of arithmetic (LLaMA-7B's on an H100): estimates from bytes over PCIe 5,
# but for the last: micro-batches of 2,048 tokens took 0.35 s each, recomputed, as no graph launches them.
ROWS_SHARE = 0.007  # of a micro-batch, whose rows of the embedding are read from the host
ROUNDING_TOKENS = 40  # a micro-batch, to round the adapter thrice
MOMENTS_TOKENS = 2.6e-6  # a step and trained weight: 16 bytes there and back
STREAMED_TOKENS = 4600  # a micro-batch is no faster than its launches, and the layers come in less
LINES = {
    EMBEDDING: "rows of the embedding are read from host memory",
    COPY: "the adapter is rounded to 16 bits where it is used, no copy is kept",
    OPTIMIZER: "Adam's moments wait in host memory",
    LAYERS: "frozen layers come from host memory, two are on the GPU at a time",
}

Savings = tuple[str, ...]


def list_savings(
    has_embedding: bool, has_large_state: bool, in_16_bits: bool, can_stream: bool
) -> list[Savings]:
    """Those that this run can take, one more in each: (), (embedding,), (embedding, copy), ..."""
    can = {
        EMBEDDING: has_embedding,
        COPY: in_16_bits,
        OPTIMIZER: has_large_state,
        LAYERS: can_stream,
    }
    able = [name for name in SAVINGS if can[name]]
    return [tuple(able[:count]) for count in range(len(able) + 1)]


def describe_savings(savings: Savings, needs: Any, without: Any) -> list[str]:
    """A line each. `needs` with them, `without` them: utils.train.needs.Needs."""
    parts = {
        EMBEDDING: without.other_weights - needs.other_weights,
        COPY: without.adapter - needs.adapter,
        OPTIMIZER: without.optimizer - needs.optimizer,
        LAYERS: without.codes + without.scales - needs.codes - needs.scales,
    }
    return [f"memory is short: {LINES[name]} ({parts[name] / 2**30:.2f} GiB less)" for name in savings]


def count_tokens(savings: Savings, sizes: list[int], again: float, trained: int) -> float:
    """Cost of a step of micro-batches of `sizes`, in tokens. `again`: 1, and what recomputing adds."""
    costs = [size * (1 + (ROWS_SHARE if EMBEDDING in savings else 0)) for size in sizes]
    costs = [again * (cost + (ROUNDING_TOKENS if COPY in savings else 0)) for cost in costs]
    if LAYERS in savings:
        costs = [max(cost, again * STREAMED_TOKENS) for cost in costs]
    return sum(costs) + (MOMENTS_TOKENS * trained if OPTIMIZER in savings else 0)
