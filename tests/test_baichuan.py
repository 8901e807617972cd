"""Baichuan-7B read as LLaMA: the logits of its published architecture, the ids of its sentencepiece file."""

import json
import shutil

import pytest
import torch
from helpers.families import build_baichuan, build_opt, read_corpus, train_sentencepiece
from helpers.shell import run_script
from safetensors.torch import load_file
from torch.nn import functional as F

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.convert_weights import convert_folder
from utils.models.baichuan import is_baichuan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("baichuan")
    build_baichuan(path)
    return path


def load(folder, bits=32):
    from utils.models.base import load_base

    return load_base(ModelArguments(model_name_or_path=str(folder), bits=bits), torch.float32)


def normalize(hidden, weight, epsilon):
    return weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()


def rotate(states, cos, sin):
    """states  # [heads, tokens, head_dim]; the two halves of a head are the two coordinates."""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def run_published_architecture(folder, ids):
    """Logits of the published BaiChuanForCausalLM  # [tokens, vocabulary], from its config and weights."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim, epsilon = width // heads, config["rms_norm_eps"]
    frequencies = 1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(len(ids)).float(), frequencies).repeat(1, 2)  # [tokens, head_dim]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    hidden = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = normalize(hidden, weights[layer + "input_layernorm.weight"], epsilon)
        packed = (normed @ weights[layer + "self_attn.W_pack.weight"].T).unflatten(-1, (3, heads, head_dim))
        query, key, value = packed.permute(1, 2, 0, 3)  # each [heads, tokens, head_dim]
        query, key = (rotate(states, angles.cos(), angles.sin()) for states in (query, key))
        scores = query @ key.transpose(1, 2) / head_dim**0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        hidden = hidden + mixed @ weights[layer + "self_attn.o_proj.weight"].T
        normed = normalize(hidden, weights[layer + "post_attention_layernorm.weight"], epsilon)
        gate, up, down = (weights[layer + f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        hidden = hidden + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return normalize(hidden, weights["model.norm.weight"], epsilon) @ weights["lm_head.weight"].T


def test_logits_equal_the_published_architectures(folder):
    ids = torch.randint(700, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = load(folder)(ids[None]).logits[0]
    expected = run_published_architecture(folder, ids)
    assert expected.std() > 0.1  # a constant would prove nothing
    assert (logits - expected).abs().max() < 1e-5


def test_packed_projection_is_quantized_as_three_layers(folder):
    model = load(folder, bits=4)
    attention = model.model.layers[0].self_attn
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(attention, "W_pack")
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_state.shape == (64, 64)


def test_base_saved_again_is_an_ordinary_llama(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = load(folder)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(10, 40)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_other_llamas_are_saved_as_ever_in_the_same_process(folder, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    load(folder)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "model.safetensors")


def test_13b_and_baichuan_2_are_refused_by_name():
    assert is_baichuan({"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]})
    assert not is_baichuan({"model_type": "llama"})
    with pytest.raises(UserError, match="only Baichuan-7B"):
        is_baichuan({"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"]})


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("joins_blanks", [True, False])
def test_ids_equal_sentencepieces_own(rule, dummy_prefix, joins_blanks, tmp_path):
    import random

    import sentencepiece

    from utils.models.tokenizer_files import load_sentencepiece

    options = {"normalization_rule_name": rule, "add_dummy_prefix": dummy_prefix}
    options |= {"remove_extra_whitespaces": joins_blanks, "allow_whitespace_only_pieces": not joins_blanks}
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_sentencepiece(str(tmp_path / "tokenizer.model"), {"add_bos_token": False})
    letters = list("".join(read_corpus()) + "①ＡＢ㎏ﬁé\u3000🙂\t\n")
    draw = random.Random(0)
    texts = ["".join(draw.choices(letters, k=60)) for _ in range(500)]
    texts += [*read_corpus(), "", " ", "  two  blanks ", "人人人人工智能智能", "haha" * 9, "=" * 40]
    assert [tokenizer(text).input_ids for text in texts] == [reference.encode(text) for text in texts]


def pickle_weights(folder, target, **more):
    shutil.copytree(folder, target)
    torch.save(load_file(target / "model.safetensors") | more, target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    return target


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder, tmp_path):
    pickled = pickle_weights(folder, tmp_path / "pickled")
    result = run_script(
        "qlora_finetune.py", "--model_name_or_path", pickled, "--output_dir", tmp_path / "run"
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "python -m utils.convert_weights FOLDER NEW_FOLDER" in result.stderr


def test_converted_baichuan_is_a_llama_folder_with_the_same_logits_and_ids(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pickled = pickle_weights(folder, tmp_path / "pickled")
    convert_folder(pickled, tmp_path / "llama")
    names = sorted(path.name for path in (tmp_path / "llama").iterdir())
    assert names == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    ids = torch.arange(10, 40)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")(ids[None]).logits[0]
    assert (logits - run_published_architecture(folder, ids)).abs().max() < 1e-5
    text = "Who are you? 你是谁？\n"
    from utils.models.tokenizer_files import load_own_tokenizer

    expected = load_own_tokenizer(str(folder), trust_remote_code=False)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")(text).input_ids == expected


def test_conversion_of_other_models_keeps_their_layout_and_ties(tmp_path):
    from utils.models.base import load_base

    build = tmp_path / "opt"
    build.mkdir()
    build_opt(build)
    tied = load_file(build / "model.safetensors")["model.decoder.embed_tokens.weight"]
    pickled = tmp_path / "pickled"
    shutil.copytree(build, pickled)
    weights = load_file(build / "model.safetensors")
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    convert_folder(pickled, tmp_path / "converted")
    model = load_base(ModelArguments(model_name_or_path=str(tmp_path / "converted"), bits=32), torch.float32)
    assert torch.equal(model.lm_head.weight, tied)
    assert (tmp_path / "converted" / "merges.txt").is_file()


class Malicious:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_with_code_is_refused_and_nothing_is_left(folder, tmp_path, capsys):
    pickled = pickle_weights(folder, tmp_path / "pickled", extra=Malicious())
    with pytest.raises(UserError, match="more than tensors"):
        convert_folder(pickled, tmp_path / "converted")
    assert "this ran" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pickled"]
