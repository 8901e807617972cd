"""What the parts of eval.decode_speed share: time in a graph, distance of results."""

import itertools
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from utils.decode import cuda_c

if TYPE_CHECKING:
    from eval.decode_speed import DecodeSpeedArguments

DEVICE = "cuda"
DTYPE = torch.bfloat16


def say(*words: Any) -> None:
    print(*words, flush=True)


def say_failure(what: Any, error: Exception) -> None:
    say(what, "failed:", type(error).__name__, str(error)[:300])


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def time_call(run: Callable[..., Any], *arguments: Any, repeats: int = 20, **named: Any) -> float:
    """Milliseconds of the median replay of run(*arguments, **named) in a CUDA graph."""
    run(*arguments, **named)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*arguments, **named)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run(*arguments, **named)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(3):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in itertools.pairwise(events))
    return times[len(times) // 2]


def describe_machine(arguments: "DecodeSpeedArguments") -> None:
    obstacle = cuda_c.find_kernel_obstacle()
    say("torch", torch.__version__, "CUDA", torch.version.cuda, "kernels:", obstacle or "ok")
    say(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), cuda_c.load_nvrtc())
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    say(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target, words = torch.empty_like(source), source.view(torch.int64)
    copied, read = time_call(target.copy_, source), time_call(words.sum)
    size = len(source) / 1e9
    say(f"copy {2 * size / copied:.2f} TB/s, both ways; read {size / read:.2f} TB/s")
    empty = time_call(lambda: [target[:8].zero_() for _ in range(100)]) * 10
    say(f"a tiny kernel in a graph of 100: {empty:.2f} us each")
