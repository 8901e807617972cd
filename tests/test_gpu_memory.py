"""What lies in host memory computes on a GPU what it would compute in place."""

import pytest
import torch
from helpers.architectures import build_batch, build_model

from eval.speed.shapes import build_random_model, describe_llama
from utils.arguments import LoraArguments
from utils.fast.host_embedding import move_embedding
from utils.fast.memory import pin_copy
from utils.fast.model import prepare_fast_model
from utils.fast.streamed_layers import find_store
from utils.models.adapter import add_lora
from utils.run.keeper import copy_adapter, verify_adapter
from utils.train.host_adam import PIECE, HostAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def build(streams, moves=False):
    torch.manual_seed(0)
    model = build_random_model(describe_llama(2048, 5504, 6, 16, 8), 4, torch.bfloat16, "cuda", streams)
    if moves:
        move_embedding(model)
    model = add_lora(model, LoraArguments(lora_r=16)).train()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.02)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return prepare_fast_model(model, torch.bfloat16, recomputed_layers=6)


def run(fast):
    losses = []
    for seed in range(4):
        batch = build_batch(packed=True, seed=seed)
        batch = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        losses.append(fast.run(batch, torch.tensor(0.5, device="cuda")))
    return torch.stack(losses), fast.flat.grads.clone()


def is_same(gradient, expected):
    """But for the order in which attention's backward pass adds up."""
    return (gradient - expected).norm() < 2e-3 * expected.norm()


def test_streamed_layers_and_moved_rows_train_as_those_in_place():
    losses, gradient = run(build(streams=False))
    streamed = build(streams=True, moves=True)
    ours, our_gradient = run(streamed)
    assert find_store(streamed.model) and streamed.causal_model.get_input_embeddings().weight.isnan().all()
    assert torch.equal(ours, losses) and is_same(our_gradient, gradient)


def test_rows_of_a_moved_embedding_are_replayed_in_a_graph():
    table = torch.randn(1000, 96, dtype=torch.bfloat16)
    embedding = torch.nn.Embedding(1000, 96).to("cuda", torch.bfloat16)
    embedding.weight.data.copy_(table)

    class Model:
        get_input_embeddings = staticmethod(lambda: embedding)
        get_output_embeddings = staticmethod(lambda: None)

    move_embedding(Model())
    ids = torch.randint(1000, (2, 40), device="cuda")
    assert torch.equal(embedding(ids).cpu(), table[ids.cpu()])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = embedding(ids)
    ids.copy_(torch.randint(1000, (2, 40)))
    graph.replay()
    assert torch.equal(rows.cpu(), table[ids.cpu()])


def test_pinned_memory_is_exact_and_copied_without_waiting():
    x = torch.randn(3 * 2**20 + 5)
    pinned = pin_copy(x)
    assert pinned.untyped_storage().nbytes() == x.nbytes and pinned.is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).cpu(), x)


def test_adam_with_moments_on_the_host_is_the_fused_adam():
    start = torch.randn(4 * PIECE + 1000, device="cuda")
    made = []
    for kind in (HostAdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=1e-3, weight_decay=0.1, fused=True)
        for seed in range(3):
            weight.grad = torch.randn(
                len(start), generator=torch.Generator("cuda").manual_seed(seed), device="cuda"
            )
            optimizer.step()
        made.append((weight, optimizer.state_dict()["state"][0]))
    (ours, our_state), (theirs, their_state) = made
    assert torch.equal(ours, theirs)
    assert all(torch.equal(our_state[name].cuda(), value.cuda()) for name, value in their_state.items())


def test_saving_an_adapter_takes_no_memory_of_the_gpu(tmp_path):
    model = build(streams=False).model  # its adapter is one buffer
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.save_pretrained(tmp_path, state_dict=copy_adapter(model), save_embedding_layers=False)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    verify_adapter(model, tmp_path)


def test_adapter_without_a_copy_trains_as_with_one():
    results = []
    for keeps_copy in (True, False):
        model = build_model("llama", 0.1, torch.bfloat16, bits=4)
        results.append(run(prepare_fast_model(model.train(), torch.bfloat16, keeps_copy=keeps_copy)))
    assert torch.equal(results[0][0], results[1][0]) and is_same(results[1][1], results[0][1])
