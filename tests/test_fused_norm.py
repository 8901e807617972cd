"""Norms and rotary embedding in one kernel, against the forward and the gradients of transformers' own code."""

import importlib
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import IDENTITY, ROOT
from helpers.architectures import CONFIGS, DEVICE
from torch import nn
from transformers import AutoModelForCausalLM, Glm4Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from utils.arguments import LoraArguments, ModelArguments
from utils.fast import compiling, fused_norm, fused_rotation, kernels
from utils.fast.fused_norm import CONVENTIONS, FusedNorm, find_convention, fuse_norms
from utils.fast.fused_rotation import NAME, Rotation, choose_rotation, fuse_rotation
from utils.train.needs import rehearse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = {LlamaRMSNorm: CONVENTIONS[0], Olmo2RMSNorm: CONVENTIONS[1], GemmaRMSNorm: CONVENTIONS[2]}


def build_norm(kind, width, dtype):
    torch.manual_seed(0)
    norm = kind(width)
    norm.weight.data += 0.5 * torch.randn(width)
    return norm.to(DEVICE, dtype).requires_grad_(False)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def differentiate(function, inputs, upstream):
    """What `function` makes of `inputs`, and their gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*inputs)
    torch.autograd.backward(outs, upstream)
    return [*(outs if isinstance(outs, tuple) else [outs]), *(x.grad for x in inputs)]


def assert_near(found, expected, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [16, 576, 4096])
def test_norm_is_that_of_its_family_with_its_gradient(kind, width, dtype):
    norm, x = build_norm(kind, width, dtype), draw(3, 7, width, dtype=dtype)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    convention = find_convention(norm, norm.weight, eps)
    assert dtype == torch.float32 or convention == NORMS[kind]  # in float32 nothing tells when it is rounded
    upstream = torch.randn_like(x)
    found = differentiate(lambda x: FusedNorm.apply(x, norm.weight, eps, convention), [x], upstream)
    assert_near(found, differentiate(norm, [x], upstream), dtype)
    if DEVICE == "cpu" and dtype == torch.bfloat16 and kind is not GemmaRMSNorm:
        assert torch.equal(found[0], norm(x))


def test_norm_that_computes_something_else_keeps_its_forward(capsys):
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) / 2

    model = nn.ModuleList(
        [build_norm(HalfRMSNorm, 64, torch.float32), build_norm(LlamaRMSNorm, 64, torch.float32)]
    )
    model.append(LlamaRMSNorm(64).to(DEVICE))  # its weight is trained
    fuse_norms(model)
    assert ["forward" in vars(norm) for norm in model] == [False, True, False]
    assert capsys.readouterr().out == (
        "fast path: the model's own HalfRMSNorm is used (ours computes something else)\n"
    )


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma", "gemma2 with caps", "phi3", "granite with divided logits"]
)
def test_every_norm_of_a_family_is_taken_and_computes_the_same(name, monkeypatch):
    """On a CPU too, where the kernels' arithmetic stands in for them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(DEVICE).requires_grad_(False)
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.weight.data += 0.1 * torch.randn_like(norm.weight)
    ids = torch.arange(3, 40, device=DEVICE)[None]
    expected = model(ids).logits
    fuse_norms(model)
    norms = [norm for norm in model.modules() if type(norm).__name__.endswith("RMSNorm")]
    assert norms and all("forward" in vars(norm) for norm in norms)
    assert DEVICE == "cuda" or torch.equal(model(ids).logits, expected)  # a CPU keeps the model's own
    calls = []
    forward = fused_norm.FusedNorm.apply
    monkeypatch.setattr(fused_norm.FusedNorm, "apply", lambda *args: calls.append(1) or forward(*args))
    if DEVICE == "cpu":
        for norm in norms:
            given = norm.forward.args
            norm.forward = lambda x, given=given: fused_norm.FusedNorm.apply(x, *given[1:])
    assert_near([model(ids).logits], [expected], torch.float32)
    assert len(calls) == len(norms)


def angles(tokens, width, rows=1, dtype=torch.float32):
    half = torch.rand(rows, tokens, width // 2) * 6
    return tuple(torch.cat([turn(half)] * 2, -1).to(DEVICE, dtype) for turn in (torch.cos, torch.sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "family, heads, kv_heads, dim, rotated",
    [("llama", 9, 3, 64, 64), ("qwen3", 4, 4, 128, 128), ("phi3", 4, 2, 96, 48), ("gpt_neox", 2, 2, 80, 20)],
)
def test_rotation_is_that_of_its_family_with_its_gradient(family, heads, kv_heads, dim, rotated, rows, dtype):
    torch.manual_seed(0)
    own = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), NAME)
    own = getattr(own, "plain", own)
    q, k = (draw(rows, 7, n, dim, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
    cos, sin = angles(7, rotated, dtype=dtype)
    upstream = torch.randn_like(q), torch.randn_like(k)
    found = differentiate(lambda q, k: Rotation.apply(q, k, cos, sin), [q, k], upstream)
    assert_near(found, differentiate(lambda q, k: own(q, k, cos, sin), [q, k], upstream), dtype)


@pytest.fixture
def every_device(monkeypatch):
    """A CPU takes the fused form too, by the kernels' arithmetic in torch."""
    if DEVICE == "cpu":
        turn = fused_rotation.turn
        both = lambda q, k, cos, sin, way: (turn(q, cos, sin, way), turn(k, cos, sin, way))  # noqa: E731
        monkeypatch.setattr(fused_rotation, "rotate", both)
        monkeypatch.setattr(fused_rotation, "takes_kernel", lambda _: True)


@pytest.mark.parametrize(
    "name",
    ["llama", "llama with grouped queries", "qwen3", "gemma", "phi3 with half of a head rotated", "gpt_neox"],
)
def test_rotation_is_taken_where_hidden_states_stay_the_same(name, every_device, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(DEVICE)
    module = sys.modules[type(model).__module__]
    own = getattr(module, NAME)
    monkeypatch.setattr(module, NAME, getattr(own, "plain", own))  # set back after the test
    ids = torch.arange(3, 40, device=DEVICE)[None]
    expected = model(ids).logits
    for _ in range(2):  # two runs in one process
        fuse_rotation(model)
        assert getattr(module, NAME).plain is getattr(own, "plain", own)
        assert_near([model(ids).logits], [expected], torch.float32)


def test_a_rehearsal_leaves_the_rotation_of_models_with_weights_as_it_was(every_device, monkeypatch):
    module = importlib.import_module("transformers.models.glm4.modeling_glm4")  # which turns neighbours
    own = getattr(module, NAME)
    own = getattr(own, "plain", own)
    monkeypatch.setattr(module, NAME, own)  # set back after the test
    config = Glm4Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        fuse_rotation(AutoModelForCausalLM.from_config(config))
    q, k = (draw(2, 7, heads, 16, dtype=torch.float32).transpose(1, 2) for heads in (4, 2))
    cos, sin = angles(7, 16, dtype=torch.float32)
    assert all(map(torch.equal, getattr(module, NAME)(q, k, cos, sin), own(q, k, cos, sin)))
    rehearsed = getattr(module, NAME)(*(x.to("meta").requires_grad_() for x in (q, k, cos, sin)))
    assert type(rehearsed[0].grad_fn).__name__ == "RotationBackward"


@pytest.mark.parametrize("name", ["cohere with scaled logits", "glm4"])
def test_model_that_turns_other_pairs_keeps_its_own(name, every_device, monkeypatch, capsys):
    torch.manual_seed(0)
    config = Glm4Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config if name == "glm4" else CONFIGS[name]()).to(DEVICE)
    if name != "glm4":
        for weight in model.parameters():
            weight.data.mul_(10)  # scores that matter
    module = sys.modules[type(model).__module__]
    own = getattr(module, NAME)
    monkeypatch.setattr(module, NAME, getattr(own, "plain", own))
    fuse_rotation(model)
    assert not hasattr(getattr(module, NAME), "plain")
    assert "the model's own rotary embedding is used" in capsys.readouterr().out


def test_tensors_on_a_cpu_and_calls_of_another_form_take_the_models_own():
    calls = []

    def plain(*args, **kwargs):
        calls.append(kwargs)
        return args[0], args[1]

    q, (cos, sin) = torch.randn(1, 2, 7, 16), angles(7, 16)
    choose_rotation(plain)(q, q, cos.cpu(), sin.cpu())
    q, cos, sin = q.to("meta"), cos.to("meta"), sin.to("meta")
    choose_rotation(plain)(q, q, cos, sin, unsqueeze_dim=2)
    choose_rotation(plain)(q, q.half(), cos, sin)
    choose_rotation(plain)(q, q, cos[:, :3], sin[:, :3])
    assert calls == [{}, {"unsqueeze_dim": 2}, {}, {}]
    assert choose_rotation(plain)(q, q, cos, sin)[0].is_meta and len(calls) == 4


def test_rehearsal_notes_each_kernel_that_a_step_and_an_evaluation_launch(monkeypatch):
    monkeypatch.setattr(kernels, "rehearsed", set())
    step = rehearse(
        CONFIGS["llama"](), ModelArguments(), LoraArguments(lora_dropout=0.1), torch.bfloat16, True, True
    )
    assert not isinstance(step, str), step
    found = {(name, dict(options).get("DROPS")) for name, _, options in kernels.rehearsed}
    assert found >= {
        ("unpack_4bit_kernel", None), ("place_low_rank_kernel", None), ("norm_kernel", None),
        ("norm_backward_kernel", None), ("rotate_kernel", None), ("cross_entropy_kernel", None),
        ("drop_kernel", True), ("gate_kernel", True), ("gate_kernel", False), ("gate_backward_kernel", True),
        ("add_low_rank_kernel", True),
    }  # fmt: skip
    kinds = {name: arguments for name, arguments, _ in kernels.rehearsed}
    assert kinds["unpack_4bit_kernel"][:2] == (torch.uint8, torch.bfloat16)
    assert kinds["unpack_4bit_kernel"][4:] == (torch.float32, torch.uint8, *[torch.float32] * 3)


def test_each_kernel_is_compiled_by_one_thread_on_this_processs_gpu(monkeypatch):
    calls, devices = [], []

    class Kernel:
        def warmup(self, *arguments, grid, **options):
            calls.append((self, arguments, options, threading.get_ident()))
            return SimpleNamespace(_init_handles=lambda: None)

    one, other = Kernel(), Kernel()
    monkeypatch.setattr(compiling, "kernels", SimpleNamespace(one=one, other=other))
    noted = {
        ("one", (torch.bfloat16, 64), (("BLOCK", 8),)),
        ("one", (torch.bfloat16, 65), ()),
        ("other", (1.0,), ()),
    }
    monkeypatch.setattr(compiling, "rehearsed", noted)
    monkeypatch.setattr(compiling, "load_products", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.append((device, threading.get_ident()))
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiling.start_compiling()
    assert not compiling.compiling
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiling.start_compiling()
    compiling.wait_until_compiled()
    assert sorted(map(str, (call[1:3] for call in calls))) == sorted(
        map(str, [((torch.bfloat16, 64), {"BLOCK": 8}), ((torch.bfloat16, 65), {}), ((1.0,), {})])
    )
    assert len({thread for kernel, *_, thread in calls if kernel is one}) == 1
    assert {device for device, _ in devices} == {3}
    assert {thread for _, thread in devices} >= {call[-1] for call in calls}


def test_kernel_that_does_not_compile_ahead_is_told(monkeypatch, capsys):
    class Broken:
        def warmup(self, *arguments, grid):
            raise ValueError("no such option")

    monkeypatch.setattr(compiling, "kernels", SimpleNamespace(one=Broken()))
    monkeypatch.setattr(compiling, "load_products", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    compiling.compile_all({("one", (1.0,), ())}, 0)
    told = "not compiled ahead, but where it is launched first: ValueError: no such option\n"
    assert capsys.readouterr().out == told


COUNT = """
import runpy, sys, threading
import triton.runtime.jit as jit
compile_one, late = jit.JITFunction._do_compile, []
def compile_and_count(self, *args, **kwargs):
    if threading.current_thread() is threading.main_thread():
        late.append(self.fn.__name__)
    return compile_one(self, *args, **kwargs)
jit.JITFunction._do_compile = compile_and_count
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("compiled late:", late)
"""


@pytest.mark.gpu
def test_kernels_are_compiled_while_the_weights_load(smollm2, tmp_path):
    flags = [
        "--model_name_or_path",
        smollm2,
        "--dataset",
        IDENTITY,
        "--output_dir",
        tmp_path / "run",
        "--bf16",
    ]
    flags += ["--max_steps", 2, "--lora_dropout", 0.1, "--save_strategy", "no"]
    command = [sys.executable, "-c", COUNT, ROOT / "qlora_finetune.py", *flags]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "compiled late: []"
