"""Where a base goes (one GPU, one of several processes, all GPUs of one process), and what its 8-bit layers do."""

import pytest
import torch

from utils.arguments import ModelArguments
from utils.fast.frozen_weights import read_weight, unpack_8bit_layers
from utils.models.base import choose_placement, load_base


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


def test_a_launched_process_takes_the_whole_model_onto_its_own_gpu(gpus):
    gpus(4, local_rank=2)
    placement = choose_placement(ModelArguments(max_memory_MB=24000))
    assert placement == {"device_map": {"": 2}}


def test_one_gpu_and_the_cpu_need_no_map(gpus):
    gpus(1)
    assert choose_placement(ModelArguments()) == {"device_map": {"": 0}}
    assert choose_placement(ModelArguments(use_cpu=True)) == {"device_map": {"": "cpu"}}
    gpus(0)
    assert choose_placement(ModelArguments(max_memory_MB=24000)) == {"device_map": {"": "cpu"}}


SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "kind, config, experts",
    [
        (
            "Mixtral",
            {"intermediate_size": 128, "num_local_experts": 4, "num_hidden_layers": 2},
            2 * 4 * 3 * 64 * 128,
        ),
        (
            "Qwen3Moe",
            {"moe_intermediate_size": 32, "num_experts": 8, "num_hidden_layers": 3, "mlp_only_layers": [1]},
            2 * 8 * 3 * 64 * 32,
        ),
        ("Qwen3", {"num_hidden_layers": 2, "intermediate_size": 128}, 0),
    ],
)
def test_experts_that_stay_in_16_bits_are_said_before_weights_load(tmp_path, capsys, kind, config, experts):
    """Their number by hand: three matrices an expert, of the layers that have some."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, **config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for bits in (4, 8, 16):
        load_base(ModelArguments(str(tmp_path), bits=bits), torch.bfloat16)
        line = f"of {model.num_parameters():,} weights are theirs, and stay in 16 bits, {experts * 2 / 2**30:,.2f} GiB"
        printed = capsys.readouterr().out
        assert (line in printed) is (experts > 0 and bits < 16)
        assert (f", {16 // bits} times what layers take at --bits {bits}\n" in printed) is (
            experts > 0 and bits < 16
        )
        assert not experts or bits == 16 or f"experts: {experts / model.num_parameters():.0%}" in printed
    loaded = load_base(ModelArguments(str(tmp_path), bits=4), torch.bfloat16)
    held = [weight for weight in loaded.parameters() if weight.ndim == 3]
    assert sum(weight.numel() for weight in held) == experts
    assert all(weight.dtype == torch.bfloat16 for weight in held)
    capsys.readouterr()
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(Exception, match="."):
        load_base(ModelArguments(str(tmp_path), bits=4), torch.bfloat16)
    assert ("stay in 16 bits" in capsys.readouterr().out) is (experts > 0)


@pytest.mark.parametrize("hooked", [False, True])
def test_8_bit_layers_multiply_by_their_unpacked_weights(tiny_model, hooked):
    """No activation is rounded: values and gradients are those of the same weights in float32."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from bitsandbytes.nn import Linear8bitLt

    eight = load_base(ModelArguments(str(tiny_model), bits=8), torch.float32)
    layers = {name: layer for name, layer in eight.named_modules() if isinstance(layer, Linear8bitLt)}
    if hooked:  # as where layers are spread over several GPUs
        for layer in layers.values():
            del layer.forward
            add_hook_to_module(layer, AlignDevicesHook())
        unpack_8bit_layers(eight)
    plain = load_base(ModelArguments(str(tiny_model), bits=32), torch.float32)
    assert len(layers) == 14
    for name, layer in layers.items():
        plain.get_submodule(name).weight.data = read_weight(layer, torch.float32)
    results = []
    for model in (eight, plain):
        x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logits = model(inputs_embeds=x).logits
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_chat_on_a_cpu_unpacks_quantized_weights_once(tiny_model, bits, monkeypatch, capsys):
    """The same weights, dense, where no kernel multiplies by them as they are and the memory allows it."""
    from utils.fast import frozen_weights

    args = ModelArguments(str(tiny_model), bits=bits, use_cpu=True)
    ids = torch.arange(5, 25)[None]
    quantized, dense = (load_base(args, torch.float32, trainable=trainable) for trainable in (True, False))
    assert torch.equal(quantized(ids).logits, dense(ids).logits)
    linear = [layer for layer in dense.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(type(layer) is torch.nn.Linear and not layer.weight.requires_grad for layer in linear)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(frozen_weights, "read_host_memory", lambda: (1e6, 1e5))
    load_base(args, torch.float32, trainable=False)
    assert "are unpacked for every token: all at once need 0.0 GB" in capsys.readouterr().out
