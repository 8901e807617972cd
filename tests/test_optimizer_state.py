"""The optimizer's state goes with the weights it belongs to: under another order, on the other path, in pages."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from bitsandbytes.optim import AdamW as BitsAndBytesAdamW
from helpers.rows import write_sums
from helpers.runs import FLAGS
from safetensors.torch import load_file, save_file

from utils.console import UserError
from utils.fast.flat_adapter import FlatAdapter
from utils.run.checkpoints import read_manifest, write_manifest
from utils.run.optimizer_state import describe_optimizer, load_state, match_state

SHAPES = {"a": [3, 4], "b": [5], "c": [2, 6]}
RATE, BETAS, EPSILON, DECAY = 0.1, (0.9, 0.99), 1e-8, 0.1
OPTIMIZERS = {
    "torch": lambda weights: torch.optim.AdamW(weights, RATE, BETAS, EPSILON, DECAY),
    "paged": lambda weights: BitsAndBytesAdamW(weights, RATE, BETAS, EPSILON, DECAY, is_paged=True),
}
ORDERS = {"flat": "abc", "flat, another order": "cab", "plain": None}


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def step_by_hand(weights, steps):
    """AdamW (arXiv 1711.05101) weight by weight, as its paper writes it."""
    for name, weight in weights.items():
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(1, steps + 1):
            gradient = draw(step)[name]
            mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
            square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
            mean_now, square_now = mean / (1 - BETAS[0] ** step), square / (1 - BETAS[1] ** step)
            weight = weight - RATE * DECAY * weight - RATE * mean_now / (square_now.sqrt() + EPSILON)
        weights[name] = weight
    return weights


def build(order, values, make):
    """(weights by name, optimizer, layout) with the weights in one buffer in that order, or each for itself."""
    weights = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    if order is None:
        layout = [{"shape": SHAPES[name], "pieces": [[name, 0, SHAPES[name]]]} for name in weights]
        return weights, make(list(weights.values())), layout
    flat = FlatAdapter([[weights[name]] for name in order], torch.float32)
    pieces = [[name, flat.starts[weights[name]], SHAPES[name]] for name in order]
    optimizer = make([flat.weights])
    return weights, optimizer, [{"shape": list(flat.weights.shape), "pieces": pieces}]


def take_step(weights, optimizer, step):
    for name, gradient in draw(step).items():
        if weights[name].grad is None:
            weights[name].grad = torch.zeros_like(gradient)
        weights[name].grad.copy_(gradient)
    optimizer.step()


def save(optimizer, layout):
    """What a checkpoint holds of it."""
    optimizer.param_groups[0].setdefault("initial_lr", RATE)  # as every scheduler does
    kind = describe_optimizer(optimizer)
    return {"optimizer": deepcopy(optimizer.state_dict()), "optimizer_kind": kind, "layout": layout}


@pytest.mark.parametrize("after", ORDERS)
@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_next_step_under_any_order_is_adamws(make, before, after, capsys):
    weights, optimizer, layout = build(ORDERS[before], draw(0), make)
    for step in (1, 2):
        take_step(weights, optimizer, step)
    saved = save(optimizer, layout)
    weights, optimizer, layout = build(ORDERS[after], weights, make)
    load_state(optimizer, match_state(saved, optimizer, layout, "checkpoint-2", force=False))
    take_step(weights, optimizer, 3)
    for name, expected in step_by_hand(draw(0), 3).items():
        torch.testing.assert_close(weights[name].data, expected, rtol=1e-5, atol=1e-6)
    assert ("another order" in capsys.readouterr().out) == (before != after)


def test_state_of_another_weight_shape_or_optimizer_is_refused():
    make = OPTIMIZERS["torch"]
    weights, optimizer, layout = build("abc", draw(0), make)
    take_step(weights, optimizer, 1)
    saved = save(optimizer, layout)
    _, other, now = build("cab", draw(0), make)
    (c, *rest), shape = now[0]["pieces"], now[0]["shape"]
    for pieces, said in (
        ([c, *rest, ["d", 48, [2]]], r"d is \[2\] .* nothing of that name"),
        ([["c", 0, [6, 2]], *rest], r"c is \[6, 2\] .* has \[2, 6\]"),
        (rest, "is also of c, which is not trained here"),
    ):
        with pytest.raises(UserError, match=said):
            match_state(saved, other, [{"shape": shape, "pieces": pieces}], "checkpoint-1", force=True)
    _, paged, now = build("abc", draw(0), OPTIMIZERS["paged"])
    with pytest.raises(
        UserError, match="the state of torch AdamW, and --optim is now bitsandbytes AdamW, 32"
    ):
        match_state(saved, paged, now, "checkpoint-1", force=True)


def step_large(weight, optimizer, steps):
    for step in steps:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("is_paged", [True, False], ids=["paged", "unpaged"])
def test_state_of_blocks_goes_on_to_the_same_bits_and_is_never_cut(bits, is_paged):
    weights = [torch.nn.Parameter(torch.ones(2, 4096)) for _ in range(2)]
    make = [BitsAndBytesAdamW([weight], RATE, optim_bits=bits, is_paged=is_paged) for weight in weights]
    layout = [{"shape": [2, 4096], "pieces": [["a", 0, [4096]], ["b", 4096, [4096]]]}]
    step_large(weights[0], make[0], range(3))
    saved = save(make[0], layout)
    weights[1].data.copy_(weights[0].data)
    load_state(make[1], match_state(saved, make[1], layout, "checkpoint-3", force=False))
    for weight, optimizer in zip(weights, make, strict=True):
        step_large(weight, optimizer, range(3, 6))
    assert torch.equal(*weights) and make[1].state[weights[1]]["step"] == 6
    turned = [{"shape": [2, 4096], "pieces": [["b", 0, [4096]], ["a", 4096, [4096]]]}]
    if bits == 8:
        with pytest.raises(UserError, match="in another order, and its .* not to be cut"):
            match_state(saved, make[1], turned, "checkpoint-3", force=False)


@pytest.fixture(scope="module")
def whole_run(server, small_model, tmp_path_factory):
    """(folder, command) of a run of 4 steps with checkpoints 2 and 4, on the fused path, in float32."""
    folder = tmp_path_factory.mktemp("whole")
    argv = ["--model_name_or_path", small_model, "--dataset_name", write_sums(folder / "rows.jsonl"), *FLAGS]
    argv += ["--max_steps", "4", "--bits", "32", "--lora_dropout", "0", "--output_dir"]
    assert server.run(folder / "log", *argv, folder / "run") == 0, (folder / "log").read_text()
    return folder / "run", argv


@pytest.fixture
def half_run(whole_run, tmp_path):
    """A copy of the run as if it had been killed after its second step."""
    run = shutil.copytree(whole_run[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoint-4")
    (run / "adapter_model.safetensors").unlink()
    change_json(run / "run.json", lambda record: record.update(status="running"))
    return run


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_checkpoint(folder, change_state, change_tensors=lambda tensors: None):
    """Another program's checkpoint-2: sealed again after the change."""
    fingerprints = read_manifest(folder)["fingerprints"]
    change_json(folder / "training_state.json", change_state)
    tensors = load_file(folder / "optimizer.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder, 2, fingerprints)


def read_difference(run, whole):
    """Relative, of the finished adapters."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run, whole))
    difference = sum((ours[name] - weight).double().square().sum() for name, weight in theirs.items())
    return (difference / sum(weight.double().square().sum() for weight in theirs.values())).sqrt().item()


def go_on(server, tmp_path, argv, run, *flags):
    """(exit code, what was printed) of the same command, with more flags."""
    code = server.run(tmp_path / "log", *argv, run, *flags)
    return code, (tmp_path / "log").read_text()


def test_checkpoint_in_another_order_goes_on_to_the_same_bits(server, whole_run, half_run, tmp_path):
    state = json.loads((half_run / "checkpoint-2" / "training_state.json").read_text())
    (buffer,) = state["layout"]
    assert len(buffer["pieces"]) == 28 and buffer["pieces"][0][0].endswith("lora_A.default.weight")
    turned, end = [], 0
    for name, start, shape in reversed(buffer["pieces"]):
        turned.append((name, start, end, shape, torch.Size(shape).numel()))
        end += torch.Size(shape).numel()

    def turn(tensors):
        for key in [key for key in tensors if key.endswith(("exp_avg", "exp_avg_sq"))]:
            tensors[key] = torch.cat([tensors[key][start : start + n] for _, start, _, _, n in turned])

    layout = [{"shape": [end], "pieces": [[name, place, shape] for name, _, place, shape, _ in turned]}]
    change_checkpoint(half_run / "checkpoint-2", lambda state: state.update(layout=layout), turn)
    code, printed = go_on(server, tmp_path, whole_run[1], half_run)
    assert code == 0 and "checkpoint-2 is put into another order" in printed, printed
    assert read_difference(half_run, whole_run[0]) == 0


def test_run_goes_on_on_the_other_path_and_back(server, whole_run, half_run, tmp_path):
    whole, argv = whole_run
    flags = ["--fast_lora", "False", "--force_resume"]
    code, printed = go_on(server, tmp_path, argv, half_run, *flags)
    assert code == 0 and "is put into another order" in printed, printed
    assert json.loads((half_run / "run.json").read_text())["resolved"]["path"] == "plain"
    assert len(json.loads((half_run / "checkpoint-4" / "training_state.json").read_text())["layout"]) == 28
    assert 0 < read_difference(half_run, whole) < 1e-4
    code, printed = go_on(server, tmp_path, argv, half_run, "--max_steps", "6", "--force_resume")
    assert code == 0 and "is put into another order" in printed.rpartition("going on")[2], printed
    assert json.loads((half_run / "run.json").read_text())["resolved"]["path"] == "fused"


def test_checkpoint_without_a_layout_is_refused_unless_forced(server, whole_run, half_run, tmp_path):
    change_checkpoint(half_run / "checkpoint-2", lambda state: state.pop("layout"))
    code, printed = go_on(server, tmp_path, whole_run[1], half_run)
    assert code == 2 and "did not save which weight each part of the optimizer's state" in printed
    code, printed = go_on(server, tmp_path, whole_run[1], half_run, "--force_resume")
    assert code == 0 and read_difference(half_run, whole_run[0]) == 0


def test_run_takes_again_what_it_resolved_when_it_began(server, whole_run, half_run, tmp_path):
    began = json.loads((half_run / "run.json").read_text())["resolved"]
    assert (began["optim"], began["path"]) == ("adamw_torch", "fused")
    resolved = began | {"optim": "adamw_torch_fused", "path": "plain"}  # as on another machine
    change_json(half_run / "run.json", lambda record: record.update(resolved=resolved))
    code, printed = go_on(server, tmp_path, whole_run[1], half_run)
    assert code == 0, printed
    assert "--optim auto is adamw_torch_fused, which this run began with" in printed
    assert "--fast_lora: the plain path is used (this run began on it)" in printed
    assert json.loads((half_run / "run.json").read_text())["resolved"] == resolved
    assert read_difference(half_run, whole_run[0]) < 1e-4


def test_other_optimizer_is_named_and_refused(server, whole_run, half_run, tmp_path):
    flags = ["--optim", "paged_adamw_32bit", "--force_resume"]
    code, printed = go_on(server, tmp_path, whole_run[1], half_run, *flags)
    assert code == 2 and "Traceback" not in printed
    assert "--optim paged_adamw_32bit takes the place of adamw_torch" in printed
    assert "holds the state of torch AdamW, and --optim is now bitsandbytes AdamW, 32 bits" in printed
