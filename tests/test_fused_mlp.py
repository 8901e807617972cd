"""An MLP that takes its tokens in tiles computes what it computes at once, with the same dropout masks."""

import pytest
import torch
from helpers.architectures import build_batch, build_model

from utils.fast import fused_mlp
from utils.fast.model import prepare_fast_model


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_tiles_compute_what_the_whole_does(name, recomputed, monkeypatch):
    results, sizes = [], []
    begin = fused_mlp.MLP.begin
    monkeypatch.setattr(fused_mlp.MLP, "begin", lambda self, x: (sizes.append(len(x)), begin(self, x))[1])
    for tile in (8192, 7):
        model = build_model(name, dropout=0.3)
        if recomputed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        fast = prepare_fast_model(model.train(), torch.float32, recomputed_layers=recomputed)
        fast.keys.choose_step(seed=0, step=3)
        batch = build_batch(packed=True)
        monkeypatch.setattr(fused_mlp, "TILE", tile)
        sizes.clear()
        results.append((fast.run(batch, torch.tensor(0.5)), fast.flat.grads.clone()))
        tokens = batch["input_ids"].numel()
        assert set(sizes) == ({tokens} if tile > tokens else {7, tokens % 7} - {0})
        passes = {True: 2, False: 1 + bool(recomputed)}[
            tile < tokens
        ]  # forward and backward; a recomputed layer
        assert len(sizes) == 2 * passes * -(-tokens // tile)
    (loss, gradient), (tiled_loss, tiled_gradient) = results
    assert torch.allclose(loss, tiled_loss, rtol=1e-6) and gradient.any()
    assert torch.allclose(gradient, tiled_gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())
