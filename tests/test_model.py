"""Where a base goes: one GPU, one of several processes, or its layers over all GPUs of one process."""

import pytest
import torch

from utils.arguments import ModelArguments
from utils.model import choose_placement


@pytest.fixture
def gpus(monkeypatch):
    """A machine with this many GPUs, as far as torch can tell."""

    def pretend(count, local_rank=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return pretend


def test_plain_python_on_several_gpus_spreads_the_layers_and_says_what_the_batch_flags_mean(gpus, capsys):
    gpus(4)
    placement = choose_placement(ModelArguments(max_memory_MB=24000))
    assert placement == {"device_map": "auto", "max_memory": dict.fromkeys(range(4), "24000MB")}
    (line,) = capsys.readouterr().out.splitlines()
    assert "4 GPUs" in line and "layers are spread" in line and "batch flags are global" in line


def test_without_a_cap_the_layers_may_fill_every_gpu(gpus):
    gpus(2)
    assert choose_placement(ModelArguments()) == {"device_map": "auto"}


def test_a_launched_process_takes_the_whole_model_onto_its_own_gpu(gpus, capsys):
    gpus(4, local_rank=2)
    placement = choose_placement(ModelArguments(max_memory_MB=24000))
    assert placement == {"device_map": {"": 2}, "max_memory": {2: "24000MB"}}
    assert capsys.readouterr().out == ""


def test_one_gpu_and_the_cpu_need_no_map(gpus):
    gpus(1)
    assert choose_placement(ModelArguments()) == {"device_map": {"": 0}}
    assert choose_placement(ModelArguments(use_cpu=True)) == {"device_map": {"": "cpu"}}
    gpus(0)
    assert choose_placement(ModelArguments(max_memory_MB=24000)) == {"device_map": {"": "cpu"}}
