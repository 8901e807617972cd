"""The CUDA kernels of a reply: on a GPU as they are, elsewhere their source compiled for the CPU."""

from itertools import product

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from helpers import slow_but
from helpers.architectures import CONFIGS, DEVICE, build_model
from helpers.cuda_on_cpu import COMPILER, compile_on_cpu
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, repeat_kv

from utils.decode import cuda_c
from utils.decode.attention import DecodeAttention, HeadShape
from utils.decode.cuda_c import compile_kernel
from utils.decode.growing_cache import keep_all
from utils.decode.layers import find_kernel_fault, install_decode_layers
from utils.decode.model import WholeStep, find_whole_obstacle
from utils.decode.packed_product import (
    MOST_BLOCKS,
    Kernels,
    PackedGroup,
    Shape,
    find_packed_obstacle,
    is_alike,
)
from utils.decode.prompt_reader import PromptReader

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not COMPILER, reason="needs g++ or a GPU")
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of a result that is rounded once
DTYPES = list(TOLERANCE)


def make_kernels(dtype):
    kernels = Kernels(torch.device(DEVICE), dtype, compile_kernel if DEVICE == "cuda" else compile_on_cpu)
    if DEVICE == "cpu":
        kernels.shape = Shape(warps=4)  # fewer coroutines
    return kernels


def empty(*sizes, dtype):
    """Not a number, to who reads what nobody wrote."""
    return torch.full(sizes, float("nan"), dtype=dtype, device=DEVICE)


def relative(got, expected):
    assert got.isfinite().all()
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def make_layer(rows, width, dtype, kind="nf4", double=True, block=64, bias=False):
    layer = Linear4bit(width, rows, bias=bias, compute_dtype=dtype, quant_type=kind)
    layer.weight = Params4bit(
        (torch.randn(rows, width) * 0.1).to(dtype),
        requires_grad=False,
        quant_type=kind,
        compress_statistics=double,
        blocksize=block,
    )
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows).to(dtype))
    layer.support_avx512bf16_for_cpu = False
    return layer.to(DEVICE)


def unpack(layer, dtype):
    """W as bitsandbytes defines it, also where a row is no whole number of blocks: its CPU form is wrong there."""
    state, codes = layer.weight.quant_state, layer.weight.data.flatten().int()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
    scales = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code[scales.int()] * outer + state.offset
    weights = state.code[codes] * scales.repeat_interleave(state.blocksize)[: len(codes)]
    return weights.to(dtype).view(layer.out_features, layer.in_features)


CASES = {
    "three layers of one input": (dict(), [48, 16, 40], 256, 1, Shape(4, 1, 2)),
    "rows that end within a block": (dict(), [48, 16], 352, 3, Shape(4, 2, 2)),
    "FP4 with single scales, eight tokens": (
        dict(kind="fp4", double=False, block=128),
        [96],
        512,
        8,
        Shape(4, 2, 3),
    ),
    "large blocks, half the rows from registers": (dict(block=256), [32, 32], 768, 8, Shape(2, 2, 2, 1, 2)),
    "fewer chunks than warps, a cut tile": (dict(double=False), [20], 64, 2, Shape(16, 1, 2, 1, 1)),
    "one tile that all blocks share": (dict(), [16], 1152, 1, Shape(4, 1, 2)),
    "small blocks": (dict(block=32), [64], 1024, 1, Shape(16, 2, 2, 1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_weights_that_bitsandbytes_unpacks(dtype, case):
    """Bit for bit: rows of the unit matrix give columns of W."""
    torch.manual_seed(0)
    settings, sizes, width, tokens, shape = CASES[case]
    layers = [make_layer(rows, width, dtype, bias=rows == 16, **settings) for rows in sizes]
    assert is_alike(layers) and not any(find_packed_obstacle(layer, dtype) for layer in layers)
    group, kernels = PackedGroup(layers, dtype), make_kernels(dtype)
    W = torch.cat([unpack(layer, dtype) for layer in layers])
    if width % settings.get("block", 64) == 0:
        assert torch.equal(
            W, torch.cat([dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])
        )
    x, y = torch.randn(tokens, width).to(DEVICE, dtype), empty(tokens, sum(sizes), dtype=dtype)
    kernels.multiply(group, x, y, shape=shape)
    biases = [
        torch.zeros(layer.out_features, device=DEVICE) if layer.bias is None else layer.bias
        for layer in layers
    ]
    assert relative(y, x.double() @ W.double().T + torch.cat(biases).double()) < TOLERANCE[dtype]

    group.biases = [None] * len(layers)
    unit = torch.eye(width, dtype=dtype, device=DEVICE)[torch.randperm(width)[:8]]
    columns = empty(8, sum(sizes), dtype=dtype)
    kernels.multiply(group, unit, columns, shape=shape)
    assert torch.equal(columns.double(), unit.double() @ W.double().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_adapter_residual_and_gate_are_part_of_the_product(dtype, tokens):
    torch.manual_seed(0)
    gate, up = (make_layer(32, 256, dtype) for _ in range(2))
    group, kernels = PackedGroup([gate, up], dtype), make_kernels(dtype)
    group.ranks = [8, 40]  # 40 of 64 columns of a chunk's two
    group.B = [torch.randn(32, rank).to(DEVICE, dtype) for rank in group.ranks]
    x, xa = torch.randn(tokens, 256).to(DEVICE, dtype), torch.randn(tokens, 48).to(DEVICE, dtype)
    y, gated, alone = (empty(tokens, width, dtype=dtype) for width in (64, 32, 32))
    left, right = (
        x.double() @ unpack(layer, dtype).double().T + part.double() @ B.double().T
        for layer, part, B in zip((gate, up), xa.split(group.ranks, 1), group.B, strict=True)
    )
    kernels.multiply(group, x, y, xa)
    assert relative(y, torch.cat([left, right], 1)) < TOLERANCE[dtype]
    kernels.multiply(group, x, gated, xa, gated=True)
    assert relative(gated, nn.functional.silu(left) * right) < 2 * TOLERANCE[dtype]
    single, residual = PackedGroup([up], dtype), torch.randn(tokens, 32).to(DEVICE, dtype)
    single.ranks, single.B = group.ranks[1:], group.B[1:]
    kernels.multiply(single, x, alone, xa[:, 8:].contiguous(), residual=residual)
    assert relative(alone, right + residual.double()) < 2 * TOLERANCE[dtype]
    added = residual.clone()
    kernels.multiply(single, x, added, xa[:, 8:].contiguous(), residual=added)  # in place
    assert torch.equal(added, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, width, tokens, normed, at_once, blocks",
    [
        (20, 256, 1, True, 1, None),
        (20, 2304, 3, False, 4, 2),
        (6, 96, 8, True, 4, 3),
        (0, 64, 2, True, 1, None),
    ],
)
def test_rows_are_multiplied_by_what_the_norm_makes_of_x(dtype, rows, width, tokens, normed, at_once, blocks):
    torch.manual_seed(0)
    x, W = torch.randn(tokens, width).to(DEVICE, dtype), torch.randn(rows, width).to(DEVICE, dtype)
    norm = LlamaRMSNorm(width, 1e-5).to(DEVICE, dtype)
    nn.init.normal_(norm.weight)
    y, kept = empty(tokens, rows, dtype=dtype), empty(tokens, width, dtype=dtype)
    weight = norm.weight.detach() if normed else None
    make_kernels(dtype).multiply_rows(
        W if rows else None, x, y if rows else None, weight, 1e-5, kept if normed else None, at_once, blocks
    )
    expected = norm(x) if normed else x
    if normed:
        assert relative(kept, expected) < TOLERANCE[dtype] / 3  # a last bit, where the sum of squares rounds
    if rows:
        assert relative(y, expected.double() @ W.double().T) < TOLERANCE[dtype]


ATTENTION = {
    "one conversation": (4, 4, 16, 1, [37], 64, False),
    "eight new tokens, normed heads": (4, 2, 64, 8, [70], 128, True),
    "two conversations of unlike lengths": (8, 1, 128, 1, [5, 130], 160, False),
    "an empty one, two tokens each": (6, 2, 80, 2, [0, 33, 64], 96, False),
    "more queries than a block has": (9, 1, 64, 2, [300], 512, True),
    "a window of the latest tokens": (4, 2, 64, 3, [5, 0, 90, 33], 128, False, 33),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_over_the_tokens_that_exist_and_the_new_ones_are_kept(dtype, case):
    torch.manual_seed(0)
    heads, kv_heads, size, fresh, lengths, capacity, has_norms, window = (*ATTENTION[case], 0)[:8]
    count = len(lengths)
    attention = DecodeAttention(
        make_kernels(dtype), HeadShape(heads, kv_heads, size, 0.1, 1e-6), count, fresh, torch.device(DEVICE)
    )
    attention.split(3)
    qkv = torch.randn(count * fresh, (heads + 2 * kv_heads) * size).to(DEVICE, dtype)
    keys, values = (torch.randn(count, kv_heads, capacity, size).to(DEVICE, dtype) for _ in range(2))
    for i, length in enumerate(lengths):
        keys[i, :, length:] = values[i, :, length:] = float("nan")  # what is not there yet
    angles = torch.arange(capacity)[:, None] * 10000 ** -(torch.arange(0, size, 2) / size)
    cos, sin = (turn(torch.cat([angles, angles], 1)).to(DEVICE, dtype) for turn in (torch.cos, torch.sin))
    norms = [LlamaRMSNorm(size, 1e-6).to(DEVICE, dtype) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight)
    weights = tuple(norm.weight.detach() for norm in norms) if has_norms else (None, None)
    before, out = (keys.clone(), values.clone()), empty(count * fresh, heads * size, dtype=dtype)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # a second launch finds everything as the first did
        attention.attend(qkv, keys, values, (cos, sin), counts, out, weights, window=window)
    for i, (length, rows, got) in enumerate(zip(lengths, qkv.split(fresh), out.split(fresh), strict=True)):
        parts = rows.view(fresh, -1, size).transpose(0, 1)[None].split([heads, kv_heads, kv_heads], 1)
        q, k = (norm(part) for norm, part in zip(norms, parts, strict=False)) if has_norms else parts[:2]
        places = torch.arange(length, length + fresh, device=DEVICE)
        q, k = apply_rotary_pos_emb(q, k, cos[places][None], sin[places][None])
        old = [part[i : i + 1, :, :length] for part in before]
        all_keys, all_values = torch.cat([old[0], k], 2), torch.cat([old[1], parts[2]], 2)
        assert torch.equal(values[i : i + 1, :, : length + fresh], all_values)
        assert relative(keys[i, :, : length + fresh], all_keys[0]) < TOLERANCE[dtype] / 3
        scores = q.double() @ repeat_kv(all_keys, heads // kv_heads).double().mT * 0.1
        distance = places[:, None] - torch.arange(length + fresh, device=DEVICE)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected = shares @ repeat_kv(all_values, heads // kv_heads).double()
        assert relative(got, expected[0].transpose(0, 1).reshape(fresh, -1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_conversations_at_places_of_their_own_leaves_the_other_places_alone(dtype):
    """To the bit what each is alone; and nobody's place is not looked at."""
    torch.manual_seed(0)
    kernels, shape, size = make_kernels(dtype), HeadShape(4, 2, 64, 0.1), 64
    lengths = torch.tensor([70, -(1 << 30), 20, 41, -(1 << 30)], dtype=torch.int32, device=DEVICE)
    keys, values = (torch.randn(4, 2, 96, size).to(DEVICE, dtype) for _ in range(2))
    angles = torch.rand(96, size).to(DEVICE)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = torch.randn(4, 8 * size).to(DEVICE, dtype)
    asked = [2, 4, 0, 1]
    places = torch.tensor(asked, device=DEVICE)
    before, out = (keys.clone(), values.clone()), empty(4, 4 * size, dtype=dtype)
    together = DecodeAttention(kernels, shape, 4, 1, torch.device(DEVICE))
    together.attend(qkv, keys, values, turns, lengths, out, places=places)
    single = DecodeAttention(kernels, shape, 1, 1, torch.device(DEVICE))
    for row, place in ((0, 2), (2, 0)):
        own = [part[place : place + 1].clone() for part in before]
        alone = empty(1, 4 * size, dtype=dtype)
        single.attend(qkv[row : row + 1], *own, turns, lengths[place : place + 1].clone(), alone)
        assert torch.equal(out[row], alone[0])
        assert torch.equal(keys[place], own[0][0]) and torch.equal(values[place], own[1][0])
    assert all(torch.equal(keys[place], before[0][place]) for place in (1, 3))
    assert out[1].isnan().all() and out[3].isnan().all()


WHOLE = ["llama with grouped queries", "qwen2 with biases", "qwen3", "mistral with a window"]


@pytest.fixture(params=slow_but(["qwen2 with biases", "mistral with a window"], WHOLE))
def whole(request):
    """(model with adapter, its whole step, caches and ids of a conversation of 18 tokens)"""
    model = build_model(request.param, dtype=torch.bfloat16, bits=4).eval()
    base, kernels = model.get_base_model(), make_kernels(torch.bfloat16)
    ids = torch.randint(3, 90, (1, 26), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        cache = DynamicCache(config=keep_all(base.config))
        base(input_ids=ids[:, :18], past_key_values=cache, use_cache=True)
        heads, size = cache.layers[0].keys.shape[1], cache.layers[0].keys.shape[3]
        caches = [[empty(1, heads, 32, size, dtype=base.dtype) for _ in "kv"] for _ in cache.layers]
        for layer, (keys, values) in zip(cache.layers, caches, strict=True):
            keys[:, :, :18], values[:, :, :18] = layer.keys, layer.values
        expected = {}
        for name in ("on", "off"):
            copy = DynamicCache(config=keep_all(base.config))
            [copy.update(layer.keys, layer.values, i) for i, layer in enumerate(cache.layers)]
            if name == "off":
                with model.disable_adapter():
                    expected[name] = base(input_ids=ids[:, 18:], past_key_values=copy, use_cache=True).logits
            else:
                expected[name] = base(input_ids=ids[:, 18:], past_key_values=copy, use_cache=True).logits
    groups = install_decode_layers(base, torch.bfloat16, kernels)
    assert find_whole_obstacle(base, groups) is None
    return model, WholeStep(base, kernels, groups), caches, ids, expected


@torch.no_grad()
def test_whole_step_gives_the_logits_of_the_model(whole):
    """One token after another, several at once, and with the adapter off; 16 bits round a percent away."""
    model, step, caches, ids, expected = whole
    rotations, lengths = step.prepare_rotations(32), torch.tensor([18], dtype=torch.int32, device=DEVICE)
    single = [step.run(ids[:, i : i + 1], caches, rotations, lengths).clone() for i in range(18, 26)]
    assert lengths.item() == 26
    together = step.run(ids[:, 18:], caches, rotations, lengths.fill_(18)).clone()
    assert relative(torch.cat(single, 1), expected["on"]) < 0.015
    assert relative(together, expected["on"]) < 0.015
    with model.disable_adapter():
        off = step.run(ids[:, 18:], caches, rotations, lengths.fill_(18))
        assert relative(off, expected["off"]) < 0.015 < relative(off, expected["on"])


@torch.no_grad()
def test_what_a_step_launches_is_compiled_before_and_at_once(whole):
    """Then nothing is left to compile, and a step gives what it gave."""
    _, step, caches, ids, expected = whole
    compiler, made = step.kernels.compiler, []
    step.kernels.made.clear()
    step.kernels.compiler = lambda *words: made.append(words) or compiler(*words)
    step.compile_ahead()
    names = [words[0] for words in made]
    assert {names.count(name) >= 2 for name in ("multiply_packed", "multiply_rows", "attend")} == {True}
    step.kernels.compiler = None
    rotations, lengths = step.prepare_rotations(32), torch.tensor([18], dtype=torch.int32, device=DEVICE)
    together = step.run(ids[:, 18:], caches, rotations, lengths)
    assert relative(together, expected["on"]) < 0.015
    step.run(ids[:, :1], caches, rotations, lengths.fill_(3))


@torch.no_grad()
def test_prompt_is_read_to_the_logits_of_the_model(whole):
    """At once and in parts, with the adapter on and off; keys and values are those of the model too."""
    model, step, caches, ids, expected = whole
    reader = PromptReader(step)
    for sizes in ([26], [18, 8], [7, 3, 15, 1]):
        own, past = [[torch.full_like(part, float("nan")) for part in pair] for pair in caches], 0
        for size in sizes:
            got = reader.read(ids[0, past : past + size], own, past)
            past += size
        assert relative(got, expected["on"][:, -1]) < 0.015
        for pair, wanted in zip(own, caches, strict=True):
            assert all(
                relative(a[:, :, :18], b[:, :, :18]) < 0.015 for a, b in zip(pair, wanted, strict=True)
            )
    with model.disable_adapter():
        reader.read(ids[0, :18], own, 0)
    kept = [[part.clone() for part in pair] for pair in caches]
    with model.disable_adapter():
        off = reader.read(ids[0, 18:], kept, 18)
    assert relative(off, expected["off"][:, -1]) < 0.015 < relative(off, expected["on"][:, -1])


@torch.no_grad()
def test_whole_step_of_several_conversations_is_each_ones_own(whole):
    _, step, caches, ids, _ = whole
    rotations = step.prepare_rotations(32)
    alone = []
    for length in (18, 7):
        copies = [(keys.clone(), values.clone()) for keys, values in caches]
        lengths = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        alone.append(step.run(ids[:, length : length + 1], copies, rotations, lengths).clone())
    both = [(keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1)) for keys, values in caches]
    lengths = torch.tensor([18, 7], dtype=torch.int32, device=DEVICE)
    together = step.run(torch.stack([ids[0, 18:19], ids[0, 7:8]]), both, rotations, lengths)
    assert torch.equal(together, torch.cat(alone)) and lengths.tolist() == [19, 8]


@torch.no_grad()
@pytest.mark.parametrize("name", slow_but(["qwen3", "gemma2 with caps", "bloom", "opt", "phi3"], CONFIGS))
def test_layers_where_they_stand_give_the_logits_of_the_model(name):
    """Of every architecture: up to 8 tokens by the kernels, more by bitsandbytes and two products."""
    model = build_model(name, dtype=torch.bfloat16, bits=4).eval()
    base, ids = model.get_base_model(), torch.arange(5, 25, device=DEVICE)[None]
    calls = [ids[:, :12], ids[:, 12:13], ids[:, 13:20]]

    def run():
        cache = DynamicCache(config=base.config)
        return [base(input_ids=part, past_key_values=cache, use_cache=True).logits for part in calls]

    expected = run()
    with model.disable_adapter():
        off = run()
    kernels = make_kernels(torch.bfloat16)
    assert find_kernel_fault(base, torch.bfloat16, kernels) is None
    groups = install_decode_layers(base, torch.bfloat16, kernels)
    assert len(groups) >= 8
    for got, wanted in zip(run(), expected, strict=True):
        assert relative(got, wanted) < 0.03
    with model.disable_adapter():
        for got, wanted in zip(run(), off, strict=True):
            assert relative(got, wanted) < 0.03


@pytest.mark.parametrize(
    ("processors", "blocks"),
    [
        pytest.param(*pair, marks=() if pair in ((1, 1), (5, MOST_BLOCKS), (13, 2)) else pytest.mark.slow)
        for pair in product((1, 5, 13), (1, 2, MOST_BLOCKS))
    ],
)
def test_product_is_the_same_by_any_number_of_blocks(processors, blocks):
    """Also where many blocks share one tile, and again with the flags that the launch before has left."""
    torch.manual_seed(0)
    dtype, kernels = torch.bfloat16, make_kernels(torch.bfloat16)
    kernels.spread(processors)
    for sizes, width, tokens in (([16], 1152, 1), ([96, 32], 640, 8)):
        layers = [make_layer(rows, width, dtype) for rows in sizes]
        group, x = PackedGroup(layers, dtype), torch.randn(tokens, width).to(DEVICE, dtype)
        expected = x.double() @ torch.cat([unpack(layer, dtype) for layer in layers]).double().T
        for _ in range(2):
            y = empty(tokens, sum(sizes), dtype=dtype)
            kernels.multiply(group, x, y, shape=Shape(4, 2, 2, blocks))
            assert relative(y, expected) < TOLERANCE[dtype] and not kernels.is_handed.any()


def test_every_block_of_a_launch_has_a_place_for_its_sums(monkeypatch):
    """As many of both as the launch has blocks, whatever its shape."""
    kernels, grids = make_kernels(torch.bfloat16), []
    layer = make_layer(4096, 64, torch.bfloat16)
    group, x = PackedGroup([layer], torch.bfloat16), torch.randn(8, 64).to(DEVICE, torch.bfloat16)

    class Noted:
        def launch(self, grid, threads, shared_bytes, argument):
            grids.append(grid[0])

    monkeypatch.setattr(kernels, "compile", lambda *args: Noted())
    for processors in (3, 132):
        kernels.spread(processors)
        for shape in (Shape(), Shape(16, 2, 2, 1), Shape(8, 1, 2, 3), Shape(4, 2, 2, MOST_BLOCKS)):
            kernels.multiply(group, x, empty(8, 4096, dtype=torch.bfloat16), shape=shape)
            sums = shape.tiles * 16 * 8
            assert grids[-1] <= kernels.is_handed.numel()
            assert grids[-1] * sums <= kernels.handed.numel()
    assert max(grids) > 132  # more than one on a multiprocessor


def test_kernel_is_compiled_once_for_all_starts_of_the_program(monkeypatch, tmp_path):
    """For each source, GPU and compiler version; where nothing can be kept it is compiled again."""
    made = []
    monkeypatch.setattr(cuda_c, "read_nvrtc_version", lambda: versions[-1])
    monkeypatch.setattr(cuda_c, "run_nvrtc", lambda *words: made.append(words) or f"{words}".encode())
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    versions, compile_anew = ["13.0"], cuda_c.compile_source.__wrapped__  # as a new start of the program does
    asked = [("int a;", "sm_90"), ("int b;", "sm_90"), ("int a;", "sm_80")]
    first = [compile_anew(*words) for words in asked]
    assert len(made) == 3 and [compile_anew(*words) for words in asked] == first and len(made) == 3
    assert len(list((tmp_path / "cache" / "kernels").glob("*"))) == 3
    versions.append("13.1")
    compile_anew(*asked[0])
    assert len(made) == 4
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    assert [compile_anew(*asked[0]) for _ in range(2)] == [first[0]] * 2 and len(made) == 6
