"""The memory plan: held against plain arithmetic, against what bitsandbytes stores, and against a step cut short."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers.architectures import build_batch, build_model
from transformers import GPT2Config, LlamaConfig

from eval.speed.shapes import SHAPES, build_random_model, count_linear_weights
from eval.speed.workloads import REAL_LENGTHS
from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.fast.model import prepare_fast_model
from utils.fast.rehearsal import RehearsedOffload, make_packed_batch, rehearse_step
from utils.models.base import CUDA_CONTEXT, load_config
from utils.models.rehearsed import build_rehearsed, count_weight_bytes
from utils.train import dry_run
from utils.train.dry_run import describe_time, find_longest_row
from utils.train.epoch_time import estimate_epoch_seconds
from utils.train.needs import FRAGMENTS, GRANULES, WORKSPACE, count_state_bytes, rehearse_model
from utils.train.plan import Machine, Plan, Rows, choose_fastest, make_plan, measure_cost
from utils.train.savings import SAVINGS

HIDDEN, GATE, HEADS, KV_HEADS, RANK, LAYERS = 512, 1408, 8, 2, 16, 6
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=HIDDEN,
    intermediate_size=GATE,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    tie_word_embeddings=False,
)
GIB = 2**30


@pytest.fixture(scope="module")
def step():
    lora_args = LoraArguments(lora_r=RANK, lora_dropout=0.1)
    return rehearse_model(CONFIG, ModelArguments(), lora_args, torch.bfloat16, is_packed=True, offload=False)


def test_kept_layer_takes_what_its_formulas_keep(step):
    keys = HIDDEN * KV_HEADS // HEADS
    sixteen_bits = (
        HIDDEN + (HIDDEN + 3 * RANK)  # the norm's input; [x | xa] of q, k and v
        + HIDDEN + 2 * keys + HIDDEN  # q, k and v; attention's output
        + (HIDDEN + RANK)  # [x | xa] of the output projection
        + HIDDEN + (HIDDEN + 2 * RANK)  # the norm's input; [x | xa] of gate and up
        + 2 * GATE + RANK  # gate and up; the low-rank part of down
    )  # fmt: skip
    float32 = 2 + HEADS  # a number of each norm; of each head's attention
    tokens = 4096
    kept = [step.find_activations(1, tokens, recomputed) for recomputed in (0, 1)]
    inputs = 2 * HIDDEN * tokens  # what a recomputed layer leaves
    assert kept[0] - kept[1] + inputs == pytest.approx((2 * sixteen_bits + 4 * float32) * tokens, rel=0.002)


def test_weights_take_what_bitsandbytes_stores(step):
    model = build_random_model(CONFIG, 4, torch.float32, "cpu")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    codes = sum(layer.weight.numel() for layer in layers)  # packed: a byte holds two
    blocks = sum(layer.weight.quant_state.absmax.numel() for layer in layers)
    needs = step.measure(1, 256, 0, "adamw_torch")
    assert needs.codes == codes
    assert needs.scales == pytest.approx(
        blocks * (1 + 4 / 256)
    )  # double quantization; the model here has none
    dense = 2 * sum(weight.numel() for name, weight in model.named_parameters() if "_proj" not in name)
    assert needs.other_weights == dense


def test_adapter_gradients_and_optimizer_take_their_bytes_a_weight(step):
    wide = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, HIDDEN // 4)] * 2 + [(HIDDEN, GATE)] * 3
    trained = LAYERS * sum(RANK * (inner + outer) for inner, outer in wide)
    paged = step.measure(1, 256, 0, "paged_adamw_8bit")
    whole = step.measure(1, 256, 0, "adamw_torch_fused")
    assert (whole.adapter, whole.gradients, whole.optimizer) == (6 * trained, 4 * trained, 8 * trained)
    assert (paged.optimizer, paged.paged_optimizer) == (0, 2 * trained)
    assert count_state_bytes("lion_32bit") == 4 and count_state_bytes("sgd") == 4
    parts = sum(size for size in dataclasses.asdict(whole).values() if isinstance(size, int))
    assert whole.total == pytest.approx((1 + FRAGMENTS) * parts + WORKSPACE + GRANULES)


def test_short_micro_batches_of_a_narrow_model_take_small_blocks_beside(step, monkeypatch):
    """The allocator serves tensors of up to 1 MiB from a pool of their own.

    At 2,048 tokens those of 512 numbers a token are 2 MiB; at 1,024 they are 1 MiB, and the pool grows by them.
    """
    keys = HIDDEN * KV_HEADS // HEADS
    # Norms' inputs, q and attention's output, which are small at 1,024 tokens and large at 2,048. [x | xa] is
    # large, k, v and the parts of rank 16 are small at both: twice the tokens, twice the bytes.
    turned, always = 4 * HIDDEN, 2 * keys + RANK
    layer = 2 * (turned * 1024 + always * 1024 - always * 2048)
    assert step.find_small(2048, 0) == pytest.approx(LAYERS * layer, rel=0.1)
    assert step.find_small(1024, 0) == 0  # all are small already
    monkeypatch.setattr(step, "hidden_bytes", 8192)  # of LLaMA-7B
    assert step.find_small(8192, 0) == 0


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("recomputed", range(6))
def test_some_layers_recomputed_take_what_a_rehearsal_of_the_whole_model_takes(offload, recomputed):
    """As wide as --offload_checkpoints wants it, so the input of one layer is still on its way."""
    layers, lora_args = 5, LoraArguments(lora_r=RANK, lora_dropout=0.1)
    config = LlamaConfig(**CONFIG.to_dict() | {"hidden_size": 2048, "num_hidden_layers": layers})
    step = rehearse_model(config, ModelArguments(), lora_args, torch.bfloat16, True, offload)
    model = build_rehearsed(config, layers, ModelArguments(), lora_args, torch.bfloat16)
    fast = prepare_fast_model(model, torch.bfloat16, offload=False, recomputed_layers=recomputed)
    fast.store = RehearsedOffload() if offload else None
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    whole, _ = rehearse_step(fast, make_packed_batch(1024))
    assert step.find_activations(1, 1024, recomputed) == pytest.approx(whole, rel=0.002)


def test_of_plans_as_fast_the_one_with_fewer_savings_and_larger_micro_batches_is_taken():
    def plan(cost, capacity=2048, savings=()):
        return Plan("adamw_torch_fused", capacity, savings=savings, step_tokens=cost)

    least = plan(10_000.0)
    assert choose_fastest([plan(10_050.0, 4096), least, plan(10_090.0, 8192)]).capacity == 8192
    assert choose_fastest([least, plan(10_150.0, 8192)]) is least
    assert choose_fastest([plan(9_800.0, savings=SAVINGS[:3]), least]) is least
    much = plan(9_600.0, savings=SAVINGS[:3])
    assert choose_fastest([much, least]) is much


def test_padded_rows_keep_no_scores_where_a_kernel_attends():
    """What grows with the square of the length is the padding's mask as a bias, one for all heads of a layer."""
    lora_args = LoraArguments(lora_r=RANK)
    step = rehearse_model(CONFIG, ModelArguments(), lora_args, torch.bfloat16, is_packed=False, offload=False)
    short, long = (step.find_activations(1, tokens, 0) for tokens in (1024, 4096))
    bias = LAYERS * 2 * (4096**2 - 4 * 1024**2)
    assert long - 4 * short == pytest.approx(bias, rel=0.05)


def plan(budget, lengths, **flags):
    arguments = (
        ModelArguments(),
        DataArguments(source_max_len=1024, target_max_len=1024),
        LoraArguments(lora_r=RANK),
        TrainingArguments(**{"gradient_accumulation_steps": 32} | flags),
    )
    machine = Machine(True, torch.bfloat16, budget)
    return make_plan(CONFIG, arguments, machine, np.array(lengths), True, {})


LENGTHS = [300, 200, 500, 100, 900, 250] * 40


def test_plan_takes_the_fastest_choice_that_fits():
    plans = [plan(int(budget * GIB), LENGTHS) for budget in (80, 1.0, 0.6, 0.4, 0.3)]
    assert (plans[0].capacity, plans[0].recomputed_layers) == (8192, 0)
    sizes = [(one.recomputed_layers, -one.capacity) for one in plans]
    assert len(set(sizes)) > 2 and plans[-1].recomputed_layers > 0
    for one in plans:
        assert one.fits and one.needs.total <= one.budget and one.capacity >= max(LENGTHS)


def test_flag_means_all_or_none_and_nothing_fits_into_no_memory():
    assert plan(80 * GIB, LENGTHS, gradient_checkpointing="True").recomputed_layers == LAYERS
    assert plan(80 * GIB, LENGTHS, gradient_checkpointing="False").recomputed_layers == 0
    assert plan(80 * GIB, LENGTHS, gradient_checkpointing=True).recomputed_layers == LAYERS
    least = plan(GIB // 16, LENGTHS)
    assert not least.fits and least.recomputed_layers == LAYERS and least.capacity < 8192


def test_what_cannot_be_rehearsed_says_why_and_recomputes_all():
    blind = plan(80 * GIB, LENGTHS, fast_lora=False)
    assert blind.needs is None and blind.obstacle == "--fast_lora False" and blind.recomputed_layers is None


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_gradient_is_the_same_to_the_bit_however_many_layers_are_recomputed(recomputed):
    gradients = []
    for layers in (2, recomputed):
        model = build_model("llama", 0.1)
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        fast = prepare_fast_model(model.train(), torch.float32, recomputed_layers=layers)
        fast.keys.choose_step(seed=0, step=3)
        fast.run(build_batch(packed=True), torch.tensor(0.5))
        assert [layer.gradient_checkpointing for layer in fast.layers] == [n < layers for n in range(2)]
        gradients.append(fast.flat.grads.clone())
    assert torch.equal(*gradients) and gradients[0].any()


def test_dry_run_needs_no_weights_and_names_what_would_fit(call_main, tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, "--dry_run", "--output_dir", tmp_path / "run"]
    argv += ["--dataset_name", "data/guanaco_identity.jsonl", "--model_max_length", 256]
    wide = call_main("qlora_finetune", *argv, "--max_memory_MB", 9000)
    table = wide[wide.index("memory plan:") :].splitlines()
    *table, longest = table
    assert longest.startswith("longest row that fits")
    sizes = [float(line.split()[0]) for line in table[1:]]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.06) and ": it fits" in table[-1]
    assert sizes[-2] == pytest.approx(CUDA_CONTEXT / GIB, abs=0.01)
    eight = [*argv, "--max_memory_MB", 9000, "--bits", 8]
    alone, ways = (
        call_main("qlora_finetune", *eight, *more).splitlines() for more in ([], ["--num_gpus", 2])
    )
    assert alone[-1] == ways[-1]  # of one GPU, though two that share the base were looked at
    small = CUDA_CONTEXT // 10**6 + 1
    tight = call_main("qlora_finetune", *argv, "--max_memory_MB", small)
    assert "does not fit" in tight and "no single flag makes it fit" in tight
    assert not list((tmp_path / "run").glob("adapter*"))


def test_run_records_its_plan(trained_run):
    folder = trained_run(
        "--dataset_name", "data/guanaco_identity.jsonl", "--max_steps", 2, "--model_max_length", 256
    )
    record = json.loads((folder / "run.json").read_text())
    assert record["resolved"]["recomputed_layers"] == 0 and record["resolved"]["capacity"] > 0
    assert record["memory"]["needs"]["total"] > record["memory"]["needs"]["activations"] > 0


@pytest.fixture(scope="module")
def wide_step():
    """An adapter so wide that Adam's moments weigh."""
    return rehearse_model(
        CONFIG, ModelArguments(), LoraArguments(lora_r=256), torch.bfloat16, is_packed=True, offload=True
    )


def plan_for(budget, host=None, streams=None, earlier=None):
    arguments = (
        ModelArguments(),
        DataArguments(source_max_len=1024, target_max_len=1024),
        LoraArguments(lora_r=256),
        TrainingArguments(gradient_accumulation_steps=32, gradient_checkpointing="True"),
    )
    machine = Machine(True, torch.bfloat16, budget, host_budget=host)
    return make_plan(CONFIG, arguments, machine, np.array(LENGTHS), True, earlier or {}, streams)


@functools.cache
def find_capacity():
    return plan_for(80 * GIB).capacity


@pytest.mark.parametrize("count", range(5))
def test_short_memory_is_met_by_as_few_savings_as_fit(wide_step, count):
    needs = wide_step.measure(1, find_capacity(), LAYERS, "adamw_torch_fused", SAVINGS[:count])
    one = plan_for(int(needs.total / 0.97) + 1)
    assert one.fits and one.savings == SAVINGS[:count] and len(one.saving_lines) == count
    assert all(re.fullmatch(r"memory is short: .* \(0\.\d\d GiB less\)", line) for line in one.saving_lines)


def test_savings_are_the_bytes_that_they_leave_out(wide_step):
    whole, *saved = (
        wide_step.measure(1, 256, LAYERS, "adamw_torch_fused", SAVINGS[:count]) for count in range(5)
    )
    table, trained = 2 * CONFIG.vocab_size * HIDDEN, wide_step.trained
    inputs = LAYERS * 256 * HIDDEN * 2 if wide_step.offloads else 0
    assert whole.host == inputs and saved[0].host == inputs + table
    assert whole.other_weights - saved[0].other_weights == table
    assert saved[0].adapter - saved[1].adapter == 2 * trained
    pieces = 3 * 2 * 4 * 2**21  # of two moments
    assert (saved[2].host - saved[1].host, saved[2].optimizer) == (8 * trained, pieces)
    assert saved[3].codes == 2 * whole.codes // LAYERS
    assert saved[3].host - saved[2].host == whole.codes + whole.scales
    assert whole.activations == saved[3].activations


def test_layers_from_the_host_are_all_recomputed_and_need_host_memory(wide_step):
    needs = wide_step.measure(1, find_capacity(), LAYERS, "adamw_torch_fused", SAVINGS)
    budget = int(needs.total / 0.97) + 1
    assert plan_for(budget).savings == SAVINGS and plan_for(budget).fits
    assert needs.least_host == needs.host - (LAYERS * find_capacity() * HIDDEN * 2 * wide_step.offloads) // 2
    least = needs.least_host
    assert not plan_for(budget, host=least - 1).fits and plan_for(budget, host=least).fits
    assert (
        not plan_for(budget, streams=False).fits and "layers" not in plan_for(budget, streams=False).savings
    )
    roomy = plan_for(80 * GIB, streams=True)
    assert roomy.savings == SAVINGS and roomy.recomputed_layers == LAYERS
    earlier = {
        "optim": "adamw_torch_fused", "capacity": 4096, "recomputed_layers": LAYERS, "savings": list(SAVINGS),
    }  # fmt: skip
    again = plan_for(80 * GIB, earlier=earlier)
    assert (again.savings, again.capacity) == (SAVINGS, 4096)


def test_longest_row_is_the_longest_whose_needs_fit(tiny_model):
    arguments = (
        ModelArguments(model_name_or_path=str(tiny_model)), DataArguments(), LoraArguments(lora_r=4),
        TrainingArguments(),
    )  # fmt: skip
    config, budget = load_config(arguments[0]), int(0.3 * GIB)
    tiny = rehearse_model(config, *arguments[::2], torch.bfloat16, is_packed=True, offload=True)
    (line,) = find_longest_row(arguments, Machine(True, torch.bfloat16, budget))
    tokens = int(re.search(r"([\d,]+) tokens \(the GPU ends it\)", line).group(1).replace(",", ""))
    few, many = (
        tiny.measure(1, size, 2, "adamw_torch_fused", SAVINGS[:2]) for size in (tokens, tokens + 256)
    )
    assert few.total <= 0.97 * budget * 1.01 and many.total > 0.97 * budget * 0.95
    assert find_longest_row(arguments, Machine(True, torch.bfloat16, None)) == []


@pytest.mark.parametrize(
    ("shape", "capacity", "recomputed", "tflops", "measured"),
    [
        ("llama-7b", 2048, 0, 684, 15_336), ("llama-7b", 4096, 0, 685, 16_601),
        ("llama-7b", 8192, 0, 677, 17_010), ("llama-7b", 8192, 32, 682, 12_607),
        ("llama-7b", 4096, 32, 682, 12_104),
        ("qwen2.5-7b", 4096, 0, 684, 15_744), ("qwen2.5-7b", 8192, 0, 684, 16_173),
        ("llama3-8b", 4096, 0, 680, 14_763), ("llama3-8b", 8192, 0, 680, 15_287),
    ],
)  # fmt: skip
def test_time_of_an_epoch_is_near_the_speeds_that_were_measured(
    shape, capacity, recomputed, tflops, measured
):
    """Tokens/s of eval.train_speed on one H100 (docs/memory.md)."""
    lengths = np.random.default_rng(0).choice(REAL_LENGTHS, 4_000)
    rows = Rows(lengths, batch=32, step=32, max_len=2048, is_packed=True)
    layers = SHAPES[shape]().num_hidden_layers
    cost = measure_cost(rows, Plan("adamw_torch_fused", capacity, recomputed, layers), trained=160_000_000)
    weights = count_linear_weights(SHAPES[shape]())
    seconds = estimate_epoch_seconds(len(lengths) / 32, cost, weights, tflops)
    assert lengths.sum() / seconds == pytest.approx(measured, rel=0.06)


def test_dry_run_says_the_time_where_a_gpu_tells_its_speed(tiny_model, monkeypatch):
    """4 operations a weight and token, of 0.001 TFLOP/s of which 69% are reached."""
    plan = Plan("adamw_torch", 2048, 0, 2, step_tokens=1_000.0)
    model_args = ModelArguments(str(tiny_model))
    assert describe_time(plan, 3_200, model_args, TrainingArguments()) == []
    monkeypatch.setattr(dry_run, "has_gpu", lambda _: True)
    monkeypatch.setattr(dry_run, "measure_matmul_tflops", lambda *_: 1e-3)
    config = load_config(model_args)
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = (attention + 3 * config.intermediate_size) * config.hidden_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    minutes = 3_200 / 16 * 1_000 * 4 * weights / 0.69e9 / 60
    (line,) = describe_time(plan, 3_200, model_args, TrainingArguments())
    assert float(re.search(r"about ([\d.]+) minutes", line)[1]) == pytest.approx(minutes, abs=0.06)


def test_matrices_that_are_stored_transposed_are_planned_in_4_bits():
    """GPT-2's, which bitsandbytes packs as it packs linear layers: 12 n^2 weights a layer."""
    config, model_args = GPT2Config(n_embd=64, n_layer=4, n_head=2), ModelArguments()
    model = build_rehearsed(config, 2, model_args, LoraArguments(lora_r=4), torch.bfloat16)
    assert count_weight_bytes(model)[0] == 2 * 12 * 64**2 // 2
