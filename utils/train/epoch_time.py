"""How long an epoch takes on the GPU at hand: an estimate, from the speed of its matrix products.

A token costs 4 operations for each weight that it is multiplied with: 2 forward and 2 backward, as no weight
gets a gradient. Unpacking and recomputing count as more tokens (measure_cost in plan.py). The fused path
reaches 69 to 72% of what matrix products alone would, in nine settings of three models (docs/memory.md), and
a run 97% of that. LLaMA-7B on an H100, 32 Alpaca rows a step:

    9,950 tokens' worth x 4 x 6.6e9 / (0.69 x 685e12) = 0.56 s a step, 16,540 tokens/s
"""

REACHED = 0.69


def estimate_epoch_seconds(steps: float, step_tokens: float, weights: int, tflops: float) -> float:
    """Of so many `steps`, each worth `step_tokens` of arithmetic; `tflops` of the GPU's matrix products."""
    return steps * step_tokens * 4 * weights / (REACHED * tflops * 1e12)
