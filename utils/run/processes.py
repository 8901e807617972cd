"""The processes of one run, that accelerate launch or torchrun starts: each has the base or a share."""

from datetime import timedelta

from utils.console import read_rank_and_size

TIMEOUT_SECONDS = 1800  # that processes wait for one another; --ddp_timeout


def join_processes(use_cpu: bool, timeout: int | None) -> None:
    """Find the others, where a launcher started several. The Trainer would set no timeout on CPUs."""
    _, processes = read_rank_and_size()
    if processes > 1:
        from accelerate import PartialState

        PartialState(cpu=use_cpu, timeout=timedelta(seconds=timeout or TIMEOUT_SECONDS))
