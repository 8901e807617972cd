"""What the user reads: notices on rank 0, and one clear line for a user's mistake."""

import functools
import os
import re
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake only the user can fix: names the flag or file, the value seen, and the cure."""

    exit_code = 2


def is_main_process() -> bool:
    """True on rank 0, and in a run that no launcher started (environment of torchrun and accelerate)."""
    return int(os.environ.get("RANK", "0")) == 0


def read_rank_and_size() -> tuple[int, int]:
    """(number of this process, number of processes), 0 and 1 where no launcher started it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def notice(message: str) -> None:
    """Print something inferred, replaced or ignored, once per run; above a progress bar, not behind it."""
    if not is_main_process():
        return
    if "tqdm.auto" in sys.modules:
        from tqdm.auto import tqdm

        with tqdm.external_write_mode(sys.stdout):
            print(message, flush=True)
    else:
        print(message, flush=True)


@functools.cache
def notice_once(message: str) -> None:
    """notice() of what comes up again and again."""
    notice(message)


def close_bars() -> None:
    """End open progress bars, so that what follows starts a line of its own."""
    if "tqdm.auto" in sys.modules:
        from tqdm.auto import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def bound_memory() -> None:
    """Set what bounds torch's memory, before its first use; settings of the user's own stay.

    On a GPU, let torch extend the blocks it holds: steps of many sizes otherwise held 76 GiB for 36 in use.
    On a CPU, keep the compiled kernels of some 64 shapes: oneDNN and what torch lays around it (ideep) keep
    1,024 each, half a MB a piece, so a run grew by 700 MB in its first thousand steps and was no faster.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(); a UserError, and full memory, become one line on stderr and exit code 2."""
    bound_memory()
    try:
        main()
    except UserError as error:
        close_bars()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        close_bars()
        print(f"error: {describe_out_of_memory(error)}", file=sys.stderr)
        raise SystemExit(UserError.exit_code) from None


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU, where torch says it, or of the host."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def describe_out_of_memory(error: Exception) -> str:
    asked = re.search(r"allocate [\d.]+ \w+", str(error))
    return (
        f"memory is full ({asked.group() if asked else type(error).__name__}): lower "
        "--per_device_train_batch_size and raise --gradient_accumulation_steps as much, set "
        "--gradient_checkpointing True, or shorten rows with --source_max_len and --target_max_len; in chat, "
        "use --bits 4 or a lower --max_new_tokens"
    )
