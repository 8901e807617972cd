"""Which copies the computing stream waits for, on streams that only write down what is asked of them."""

from contextlib import nullcontext

import pytest
import torch
from helpers import architectures
from helpers.architectures import LINEARS, adapter_gradients, build_batch, build_model

from utils.fast import offload
from utils.fast.model import prepare_fast_model


class WrittenStream:
    device = torch.device("cpu")

    def __init__(self, device=None):
        self.under_way = 0

    def wait_stream(self, other):
        other.under_way = 0


def build_store(monkeypatch):
    """A HostOffload without a GPU: its copies are done at once, and counted until somebody waits for them."""
    computing = WrittenStream()
    monkeypatch.setattr(torch.cuda, "Stream", WrittenStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(setattr(stream, "under_way", 1)))
    pageable = torch.empty
    monkeypatch.setattr(
        offload.torch, "empty", lambda *sizes, pin_memory=False, **kwargs: pageable(*sizes, **kwargs)
    )
    return offload.HostOffload(torch.device("cpu"))


def build_upper_half(store=None):
    """A model of two layers that needs no gradient below the second, inputs of both kept by `store`."""
    model = build_model("llama", target_modules=LINEARS, layers_to_transform=[1])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_input_embeddings()._forward_hooks.clear()  # which would ask for one
    fast = prepare_fast_model(model, torch.float32)
    fast.store = store
    return fast


def test_no_copy_is_under_way_after_a_micro_batch(monkeypatch):
    store, scale = build_store(monkeypatch), torch.tensor(0.5)
    kept, recomputed = build_upper_half(store), build_upper_half()
    fetched, fetch = [], offload.HostOffload.fetch
    monkeypatch.setattr(offload.HostOffload, "fetch", lambda self, n: (fetched.append(n), fetch(self, n))[1])
    for seed in range(2):
        batch = build_batch(packed=True, seed=seed)
        assert torch.equal(kept.run(batch, scale), recomputed.run(batch, scale))
        assert not store.stream.under_way and not store.coming and store.leaving is None
    assert fetched == [1, 1] and len(store.pinned_buffers) == 2
    gradients = (adapter_gradients(fast.model) for fast in (kept, recomputed))
    assert all(torch.equal(a, b) for a, b in zip(*(g.values() for g in gradients), strict=True))


def test_copy_of_a_micro_batch_that_broke_off_is_waited_for(monkeypatch):
    store, settle = build_store(monkeypatch), offload.HostOffload.settle
    fast = build_upper_half(store)
    monkeypatch.setattr(offload.HostOffload, "settle", lambda self: None)  # as after an error on the way back
    fast.run(build_batch(packed=True), torch.tensor(0.5))
    assert store.coming and store.stream.under_way
    settle(store)
    assert not store.stream.under_way and not store.coming and not store.kept


@pytest.mark.parametrize("layers, waiting", [(4, 2), (5, 3)])
def test_every_second_input_waits_where_the_host_is_short(layers, waiting, monkeypatch, capsys):
    """The others are made again by the layer before them: the same numbers, with dropout too."""
    monkeypatch.setitem(architectures.SIZES, "num_hidden_layers", layers)
    size = build_batch(packed=True)["input_ids"].numel() * 64 * 4  # of a layer's input
    # A quarter must stay free, and the last of the inputs would take half of it.
    monkeypatch.setattr(offload, "read_host_memory", lambda: (4 * size, layers * size - size // 2))
    results = []
    for store in (None, build_store(monkeypatch)):
        model = build_model("llama", 0.3)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        fast = prepare_fast_model(model.train(), torch.float32)
        fast.store = store
        if store:
            store.layers = layers
        losses = []
        for seed in range(2):
            fast.keys.choose_step(seed=0, step=seed)
            losses.append(fast.run(build_batch(packed=True, seed=seed), torch.tensor(0.5)))
        results.append((losses, fast.flat.grads.clone()))
    assert all(map(torch.equal, results[0][0], results[1][0])) and torch.equal(results[0][1], results[1][1])
    assert len(store.pinned_buffers) == waiting and not store.is_full and not store.coming
    assert capsys.readouterr().out.count("every second layer's input waits there") == 1
