"""Kernels are compiled while the weights load.

Triton compiles a kernel where it is launched first: some 20, 0.1 to 0.8 s each, in a machine's first run
(later ones find them in ~/.triton). But the step was rehearsed before (rehearsal.py), by the code that
launches them, so what it will launch is known: each kernel with the types of its arguments. Threads compile
that beside the one that reads the weights. What no rehearsal foresaw is compiled as ever.
"""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Thread

import torch

from utils.console import notice
from utils.fast.kernels import Launch, kernels, rehearsed

THREADS = 4
compiling: list[Thread] = []


def start_compiling() -> None:
    """Begin with all that rehearsals of this process have met; nothing where no GPU or no Triton is."""
    if kernels is not None and rehearsed and torch.cuda.is_available():
        arguments = (set(rehearsed), torch.cuda.current_device())
        compiling.append(Thread(target=compile_all, args=arguments, daemon=True))
        compiling[-1].start()


def compile_all(launches: set[Launch], device: int) -> None:
    """On the GPU `device`: a thread would begin on the first one, which may be another process's."""
    forms = defaultdict(list)  # of each kernel, which Triton tells apart itself
    for launch in launches:
        forms[launch[0]].append(launch)
    by_forms = sorted(forms.values(), key=len)
    with ThreadPoolExecutor(THREADS, initializer=lambda: torch.cuda.set_device(device)) as pool:
        jobs = [pool.submit(compile_kernel, by_forms[0])]  # it reads Triton's own files, once for all
        wait(jobs)
        jobs += [pool.submit(load_products), *(pool.submit(compile_kernel, found) for found in by_forms[1:])]
    for job in jobs:
        if error := job.exception():
            notice(f"not compiled ahead, but where it is launched first: {type(error).__name__}: {error}")


def compile_kernel(launches: list[Launch]) -> None:
    """Compile and load one kernel for each. What fails fails again, and is seen, where it is launched."""
    for name, arguments, options in launches:
        compiled = getattr(kernels, name).warmup(*arguments, grid=(1,), **dict(options))
        compiled._init_handles()  # the C code that launches it is compiled here, and the kernel loaded


def load_products() -> None:
    """The first product reads cuBLAS from the disk, hundreds of MB, and the first attention cuDNN."""
    x = torch.ones(1, 1, 64, 64, dtype=torch.float16, device="cuda")
    torch.mm(x[0, 0], x[0, 0])
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def wait_until_compiled() -> None:
    while compiling:
        compiling.pop().join()
