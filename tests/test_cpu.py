"""Both kinds of CPU on either: what is computed in, and what happens to 4-bit weights."""

import logging
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from helpers.families import build_llama1
from helpers.models import assert_close_in_bfloat16, read_logits

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.models.base import choose_compute_dtype, load_base
from utils.models.cpu import choose_cpu_dtype, fits_repacking, has_bfloat16_instructions

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    monkeypatch.setenv("QLORA_CPU_DTYPE", request.param)
    return KINDS[request.param]


@pytest.fixture
def layers_can_repack(monkeypatch):
    """Layers that are made from here on take the CPU for one with AVX512-BF16, which is not used yet."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def test_dtype_is_the_hardwares_unless_forced(monkeypatch):
    monkeypatch.delenv("QLORA_CPU_DTYPE", raising=False)
    assert (choose_cpu_dtype() == torch.bfloat16) == has_bfloat16_instructions()
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_bfloat16_instructions() == any(flag in flags for flag in ("avx512_bf16", "amx_tile"))
    for name, dtype in KINDS.items():
        monkeypatch.setenv("QLORA_CPU_DTYPE", name)
        assert choose_cpu_dtype() == dtype
    monkeypatch.setenv("QLORA_CPU_DTYPE", "fp16")
    with pytest.raises(UserError, match="QLORA_CPU_DTYPE fp16: a CPU computes in bfloat16 or float32"):
        choose_cpu_dtype()


def test_flags_meet_the_cpu(kind, capsys):
    """A dtype that was asked for and is not to be had is replaced, and a line says so."""
    for flags, replaced in (({}, False), ({"bits": 16}, True), ({"bf16": True}, True), ({"bits": 8}, False)):
        assert choose_compute_dtype(ModelArguments(use_cpu=True, **flags)) == kind
        assert ("this CPU has no fast bfloat16" in capsys.readouterr().out) == (
            replaced and kind == torch.float32
        )
    assert choose_compute_dtype(ModelArguments(use_cpu=True, fp16=True)) == torch.float32
    assert "--fp16: this CPU has no fast float16" in capsys.readouterr().out
    assert choose_compute_dtype(ModelArguments(use_cpu=True, bits=32)) == torch.float32


@pytest.mark.parametrize("out_features, in_features", [(64, 64), (32, 128), (64, 96), (48, 64), (32, 32)])
def test_layers_that_fit_are_those_that_bitsandbytes_can_repack(out_features, in_features, layers_can_repack):
    layer = Linear4bit(in_features, out_features, quant_type="nf4").to("cpu")
    fits = fits_repacking(layer)
    try:
        _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    except (AssertionError, RuntimeError):
        assert not fits
    else:
        assert fits


def find_linears(model):
    """(their kinds, whether bitsandbytes is to repack any) of the layers' linears."""
    linears = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
    return {type(layer) for layer in linears}, any(
        getattr(layer, "support_avx512bf16_for_cpu", False) for layer in linears
    )


def test_weights_are_repacked_for_chat_in_bfloat16_and_dense_otherwise(
    tiny_model, kind, layers_can_repack, tmp_path
):
    args = ModelArguments(str(tiny_model), use_cpu=True)
    assert find_linears(load_base(args, kind, trainable=True)) == ({Linear4bit}, False)
    repacked = kind == torch.bfloat16
    chosen = Linear4bit if repacked else torch.nn.Linear
    assert find_linears(load_base(args, kind, trainable=False)) == ({chosen}, repacked)
    build_llama1(tmp_path)  # 96 wide, which is no multiple of the block size
    odd = ModelArguments(str(tmp_path), use_cpu=True)
    assert find_linears(load_base(odd, kind, trainable=False)) == ({torch.nn.Linear}, False)


def test_chat_in_bfloat16_says_what_chat_in_float32_says(tiny_model):
    """By weights that are repacked where this CPU can, dense where it cannot."""
    args = ModelArguments(str(tiny_model), use_cpu=True)
    model, exact = (load_base(args, dtype, trainable=False) for dtype in (torch.bfloat16, torch.float32))
    assert_close_in_bfloat16(read_logits(model), read_logits(exact))
    assert find_linears(model)[1] == has_bfloat16_instructions()


@pytest.fixture
def warnings_seen(caplog):
    def warn(logger, message, *args):
        caplog.clear()
        logging.getLogger(logger).warning(message, *args)
        return caplog.messages

    return warn


def test_a_line_of_another_package_reaches_nobody(warnings_seen):
    """The line about `kernels` is as bitsandbytes words it."""
    start = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"
    source = Path(bitsandbytes.__file__).parent / "backends" / "cpu" / "ops.py"
    assert start in source.read_text() and "logging.getLogger(__name__)" in source.read_text()
    assert warnings_seen("bitsandbytes.backends.cpu.ops", start, "no kernels") == []
    assert warnings_seen("bitsandbytes.backends.cpu.ops", "something else") == ["something else"]
