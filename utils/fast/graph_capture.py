"""Recording a CUDA graph, for training steps and for replies."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class CaptureError(RuntimeError):
    """Why a step cannot be captured, in one line."""


def capture_graph(
    run: Callable[[], Result], stream: torch.cuda.Stream, device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """(graph of what `run` launches, what it returns, which each replay fills); nothing is computed yet.

    Raises CaptureError, and OutOfMemoryError where that was the reason.
    """
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[device.index or 0]
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    before = generator.clone_state()
    try:
        with torch.cuda.stream(stream):  # a capture that fails does not leave the stream itself
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                return graph, run()
    except RuntimeError as error:
        generator.graphsafe_set_state(before.graphsafe_get_state())  # else it waits for a capture's end
        stop_recording(device, pool)
        cause = error.__context__ or error
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise CaptureError(str(cause).splitlines()[0]) from error


def stop_recording(device: torch.device, pool: Any) -> None:
    """End what a failed capture leaves open: memory freed later, by the garbage collector, would abort."""
    try:
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
    except RuntimeError as error:
        if "not currently recording" not in str(error):  # the capture came to its own end
            raise


def round_to_power(number: int, smallest: int) -> int:
    """The first of smallest, 2 * smallest, 4 * smallest, ... that is not below `number`."""
    return smallest << max(0, -(-number // smallest) - 1).bit_length()
