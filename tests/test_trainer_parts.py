"""The Trainer's parts, each without a Trainer: engines, guard, meter, keeper."""

import json

import pytest
import torch
from accelerate import Accelerator
from helpers.architectures import adapter_gradients, build_batch, build_model, share_masks
from helpers.models import relative_difference
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from utils.console import UserError
from utils.fast.model import prepare_fast_model
from utils.run.checkpoints import find_fault, find_valid_checkpoint, list_checkpoints
from utils.run.keeper import Keeper
from utils.train import token_loss as token_loss_module
from utils.train.engine import FastEngine, PlainEngine
from utils.train.meter import TokenMeter
from utils.train.step_guard import ROWS_FILE, StepGuard
from utils.train.token_loss import TokenLoss

NAME = "llama with grouped queries"
CPU = torch.device("cpu")


def alone(tensor):
    return tensor


def test_both_engines_give_one_loss_and_one_gradient_for_a_step_of_several_micro_batches():
    """The plain one by torch's own autograd, the fused one by its own backward pass."""
    accelerator = Accelerator(cpu=True)
    plain_model, fast_model = build_model(NAME, 0.3), build_model(NAME, 0.3)
    fast = FastEngine(prepare_fast_model(fast_model, torch.float32))
    plain, token_loss = PlainEngine(plain_model), TokenLoss(plain_model)
    share_masks(plain_model, fast.fast)
    parts = [build_batch(packed=True, seed=seed) for seed in range(3)]
    labels = torch.tensor(sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts))

    def run_micro_batch(part, label_tokens):
        fast.keys.read(part)
        loss = token_loss(plain_model, part).sum() / label_tokens
        loss.backward()
        return loss.detach()

    fast.keys.choose_step(seed=0, step=1)
    expected = plain.run_step(plain_model, parts, labels, accelerator, run_micro_batch)
    loss = fast.run_step(fast_model, parts, labels, accelerator, run_micro_batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_difference(adapter_gradients(fast_model), adapter_gradients(plain_model)) < 1e-5
    norm = torch.cat([gradient.flatten() for gradient in adapter_gradients(plain_model).values()]).norm()
    assert fast.clip_gradients(fast_model, None, accelerator, 0.01).item() == pytest.approx(
        norm.item(), rel=1e-5
    )
    assert fast.flat.grads.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_weights_that_the_optimizer_has_are_listed_piece_by_piece(ratio):
    model = build_model(NAME, 0.0)
    engine = FastEngine(prepare_fast_model(model, torch.float32))
    names = {weight: name for name, weight in model.named_parameters()}
    optimizer = engine.build_optimizer(model, lambda: (torch.optim.SGD, {"lr": 0.5}), 0.0, ratio)
    listed = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, start, shape in engine.list_pieces(parameter, names):
                weight = model.get_parameter(name)
                assert list(weight.shape) == shape
                assert torch.equal(parameter[start : start + weight.numel()].view(shape), weight)
                listed[name] = group["lr"]
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert listed == {name: 8.0 if ratio and ".lora_B." in name else 0.5 for name in trained}


@pytest.mark.parametrize(
    "loss, norm, allowed", [(1.0, 2.0, True), (float("nan"), 2.0, False), (1.0, float("inf"), False)]
)
def test_guard_allows_finite_steps_alone(loss, norm, allowed):
    guard = StepGuard(1, alone)
    assert guard.allows_step(torch.tensor(loss), torch.tensor(norm), None) is allowed
    assert (guard.skipped, guard.skipped_in_a_row) == ((0, 0) if allowed else (1, 1))


def test_guard_leaves_an_overflow_of_the_loss_scale_to_the_scaler():
    guard, scaler = StepGuard(1, alone), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    assert guard.allows_step(torch.tensor(1.0), torch.tensor(float("inf")), scaler)
    assert not guard.allows_step(torch.tensor(float("nan")), torch.tensor(1.0), scaler)


def test_guard_gives_up_after_five_bad_steps_in_a_row_and_a_good_one_starts_the_count_anew(tmp_path):
    guard, bad, fine = StepGuard(1, alone), torch.tensor(float("nan")), torch.tensor(1.0)
    for loss in (bad, bad, bad, bad, fine, bad, bad, bad, bad):
        if not guard.allows_step(loss, fine, None):
            guard.report_skipped_step(9, float("nan"), 1.0, [4, 2], ["four", "two"], tmp_path)
    again = StepGuard(1, alone)
    again.load_state_dict(guard.state_dict())  # as a resumed run has it
    again.allows_step(bad, fine, None)
    with pytest.raises(UserError, match="5 steps in a row"):
        again.report_skipped_step(10, float("nan"), 1.0, [7], ["seven"], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / ROWS_FILE).read_text().splitlines()]
    assert len(lines) == 9 and lines[0]["rows"][1] == {"row": 2, "begins": "two"} and again.skipped == 9


def test_meters_state_in_the_middle_of_a_step_is_that_of_the_last_whole_step():
    meter = TokenMeter(CPU, alone)
    for tokens in (100, 40):
        meter.begin_step()
        meter.count([{"num_tokens": torch.tensor(tokens)}])
        if tokens == 100:
            meter.end_step()
    state = meter.state_dict()
    assert (state["tokens_since_log"], meter.all_tokens) == (100, 140)
    again = TokenMeter(CPU, alone)
    again.load_state_dict(state | {"seconds": 50.0})
    assert again.all_tokens == 100 and 50 <= again.seconds < 60


@pytest.fixture
def keeper(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(0.5)
    return Keeper(tmp_path, model, {"base model": "a"}, True, lambda: None)


def write(keeper, folder):
    keeper.model.save_pretrained(folder)
    for name in ("trainer_state.json", "training_state.json", "optimizer.safetensors"):
        (folder / name).write_text("{}")


def test_keepers_checkpoint_is_whole_and_carries_the_runs_fingerprints(keeper, tmp_path):
    keeper.save_checkpoint(3, lambda folder: write(keeper, folder))
    assert keeper.last_checkpoint == tmp_path / "checkpoint-3" and find_fault(keeper.last_checkpoint) is None
    manifest = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())
    assert manifest["fingerprints"] == {"base model": "a"} and manifest["step"] == 3


def test_save_that_breaks_off_leaves_the_last_checkpoint_and_no_rest(keeper, tmp_path):
    keeper.save_checkpoint(3, lambda folder: write(keeper, folder))

    def break_off(folder):
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="checkpoint-3"):
        keeper.save_checkpoint(4, break_off)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert find_valid_checkpoint(tmp_path) == keeper.last_checkpoint == tmp_path / "checkpoint-3"


def test_keeper_saves_no_weights_that_differ_from_memory_or_are_not_finite(keeper, tmp_path):
    def write_others(folder):
        write(keeper, folder)
        keeper.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data += 1

    with pytest.raises(UserError, match="differs from the one in memory"):
        keeper.save_checkpoint(1, write_others)
    next(p for p in keeper.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    for save in (keeper.save_checkpoint, keeper.save_final):
        with pytest.raises(UserError, match="the weights are not finite"):
            save(1, lambda folder: write(keeper, folder))
    assert list(tmp_path.iterdir()) == []


def test_keeper_keeps_the_last_and_the_best(keeper, tmp_path):
    for step in (1, 5, 10, 15, 20):
        keeper.save_checkpoint(step, lambda folder: write(keeper, folder))
    keeper.remove_old(2, tmp_path / "checkpoint-5", keeps_first=False)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20"]


def test_process_that_does_not_write_waits_three_times_and_makes_nothing(tmp_path, keeper):
    waits = []
    other = Keeper(tmp_path, keeper.model, {}, False, lambda: waits.append(1))
    other.save_checkpoint(3, lambda folder: None)
    assert len(waits) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["llama", "gemma2 with caps", "cohere with scaled logits", "granite with divided logits"]
)
def test_evaluation_reads_logits_in_chunks_and_finds_the_models_own_losses(name, monkeypatch):
    monkeypatch.setattr(
        token_loss_module, "CHUNK_ELEMENTS", 96 * 3 * 4
    )  # three rows, four positions at a time
    model, batch = build_model(name, 0.0).eval(), build_batch(packed=False)
    token_loss = TokenLoss(model)
    expected = token_loss(model, batch)  # with gradients: the model's own logits, whole
    with torch.no_grad():
        seen = []
        monkeypatch.setattr(
            token_loss, "compare", lambda *pair: seen.append(pair[0]) or TokenLoss.compare(token_loss, *pair)
        )
        found = token_loss(model, batch)
    assert len(seen) > 2 and all(logits.shape[1] <= 4 for logits in seen)
    assert torch.allclose(found, expected, atol=1e-5)
