"""What the trials say of a model is what transformers' own forward of each row alone says."""

import pytest
import torch
from helpers.architectures import CONFIGS, DEVICE, GQA, VOCABULARY, build_model
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
    StableLmConfig,
    XGLMConfig,
)

from utils.fast.attention import attend_packed, find_attention_obstacle, packed_attention
from utils.fast.trials import find_packing_obstacle, shallow

OLD = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "gpt": lambda: OpenAIGPTConfig(**OLD, **NO_DROPOUT),
    "gpt2": lambda: GPT2Config(**OLD, **NO_DROPOUT),
    "gpt2 with dropout": lambda: GPT2Config(**OLD),
    "xglm": lambda: XGLMConfig(
        vocab_size=VOCABULARY, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4,
        max_position_embeddings=128, dropout=0.0, attention_dropout=0.0,
    ),
    "opt with its norm behind": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0, do_layer_norm_before=False,
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt_oss with sinks": lambda: GptOssConfig(**GQA, **EXPERTS, head_dim=16, sliding_window=16),
    "llama4 with chunks": lambda: Llama4TextConfig(
        **GQA, **EXPERTS, head_dim=16, attention_chunk_size=16, interleave_moe_layer_step=2,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "phimoe with a window": lambda: PhimoeConfig(**GQA, **EXPERTS, sliding_window=16),
    "qwen3 with experts": lambda: Qwen3MoeConfig(**GQA, num_experts=4, num_experts_per_tok=2, head_dim=16),
    "stablelm": lambda: StableLmConfig(**GQA),
}  # fmt: skip
LENGTHS = (9, 40, 1, 25)  # longer than any trial: a window of 16 tokens is not seen there


def build_base(name):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config((CONFIGS | OTHERS)[name]())
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    return base.to(DEVICE).train()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).to(DEVICE) for length in LENGTHS]


@torch.no_grad()
def read_alone(model, rows):
    model.eval()
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


@torch.no_grad()
def read_packed(model, rows, **bounds):
    model.eval()
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None].to(DEVICE)
    ids = torch.cat(rows)[None]
    return model(input_ids=ids, position_ids=positions, use_cache=False, **bounds).logits[0]


def is_equal(found, expected):
    return bool((found - expected).norm() < 1e-4 * expected.norm())


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_rows_are_packed_where_each_keeps_the_logits_it_has_alone(name, rows):
    model = build_base(name)
    before = torch.get_rng_state()
    obstacle = find_packing_obstacle(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    if name == "bloom":  # its positions are the mask's
        assert obstacle
    else:
        assert is_equal(read_packed(model, rows), read_alone(model, rows)) == (obstacle is None), obstacle
    assert (obstacle is None) == (name.split()[0] not in {"bloom", "opt", "gpt", "xglm", "falcon", "gpt_oss"})


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_packed_attention_is_used_where_it_computes_the_models_own(name, rows):
    model = build_base(name)
    before = torch.get_rng_state(), model.config._attn_implementation
    obstacle = find_attention_obstacle(model)
    assert torch.equal(torch.get_rng_state(), before[0]) and model.training
    assert model.config._attn_implementation == before[1]
    expected = read_alone(model, rows)
    ends = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).to(torch.int32)
    try:
        with packed_attention(model):
            found = read_packed(model, rows, cu_seq_lens_q=ends, max_length_q=max(LENGTHS))
        same = is_equal(found, expected)
    except (TypeError, ValueError):
        same = False
    own = name in (
        "gemma2 with caps",
        "gpt",
        "xglm",
        "gpt2 with dropout",
    )  # unlike in training, or unsupported
    assert (obstacle is None) == (same and not own), obstacle
    assert (obstacle is None) == (
        name in CONFIGS and name not in ("bloom", "gemma2 with caps")
    ) or name in OTHERS


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_base_with_an_adapter_packs(bits, dtype):
    model = build_model("llama with grouped queries", dtype=dtype, bits=bits)
    assert find_packing_obstacle(model) is None and find_attention_obstacle(model.get_base_model()) is None


@pytest.mark.parametrize("extra", ["s_aux", "position_bias", "softcap", "attention_mask", "cu_seq_lens_q"])
def test_attention_refuses_what_it_would_leave_out(extra):
    query = torch.randn(1, 2, 8, 16)
    given = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 8]), "max_length_q": 8}
    given[extra] = {"softcap": 30.0, "cu_seq_lens_q": None}.get(extra, torch.ones(2))
    with pytest.raises(
        ValueError, match="where rows begin" if extra == "cu_seq_lens_q" else f"takes {extra}"
    ):
        attend_packed(None, query, query, query, **given)


def test_a_model_that_mixes_rows_is_padded_and_a_line_says_why(capsys):
    from utils.arguments import TrainingArguments
    from utils.train.build import find_packing

    training_args = TrainingArguments()
    assert find_packing(build_base("gpt2"), training_args)
    assert "--packing" not in capsys.readouterr().out
    assert not find_packing(build_base("xglm"), training_args)
    assert capsys.readouterr().out == (
        "--packing: xglm gets padded batches instead (a row changes the logits of the next)\n"
    )
    assert not find_packing(build_base("gpt2"), training_args.with_values(packing=False))


def test_a_trial_runs_two_layers_and_one_of_each_kind_and_leaves_the_model_whole():
    kinds = ["sliding_attention"] * 4 + ["full_attention"] + ["sliding_attention"] * 3
    config = Gemma3TextConfig(**GQA | {"num_hidden_layers": 8}, head_dim=16, layer_types=kinds)
    model = AutoModelForCausalLM.from_config(config).eval()
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    ids = torch.arange(12)[None]
    before = model(ids).logits
    assert calls == list(range(8))
    calls.clear()
    with pytest.raises(RuntimeError), shallow(model):
        model(ids)
        raise RuntimeError
    assert calls == [0, 1, 2, 3, 4]
    assert torch.equal(model(ids).logits, before)
