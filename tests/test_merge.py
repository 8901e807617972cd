"""The merged folder is the adapter on its base: same weights, same words, same stop."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch
from helpers import IDENTITY, ROOT, slow_but
from helpers.chats import stream_reply
from helpers.families import FAMILIES, build_baichuan
from helpers.models import read_logits, save_random_model
from helpers.runs import train
from helpers.shell import find_free_port
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.arguments import GenerationArguments, ModelArguments
from utils.chat.generation import load_run
from utils.console import UserError
from utils.merge.held_out import find_examples
from utils.merge.shards import save_sharded
from utils.merge.weights import check_all_used
from utils.models.base import load_base
from utils.models.folder import resolve_model
from utils.models.tokenizer import load_run_tokenizer
from utils.models.tokenizer_files import load_own_tokenizer

FLAGS = """--model_max_length 200 --lora_r 4 --gradient_checkpointing False --gradient_accumulation_steps 1
    --max_steps 4 --learning_rate 1e-2 --eval_dataset_size 4""".split()


@pytest.fixture(scope="module")
def run(trained_run):
    return trained_run("--dataset_name", IDENTITY, *FLAGS)


def merge(call_main, run, folder, *flags):
    return call_main("utils.merge_adapter", "--checkpoint_dir", run, "--output_dir", folder, *flags)


def test_merged_folder_is_complete_and_certified(call_main, run, tmp_path):
    printed = merge(call_main, run, tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "parity.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    parity = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert parity["verdict"] == "passed" and parity["kl"] < 1e-3 and parity["answer_tokens"] > 20
    assert f"vllm serve {tmp_path / 'merged'} --served-model-name merged" in printed
    assert f"transformers serve {tmp_path / 'merged'}" in printed and "convert_hf_to_gguf.py" in printed


def test_merged_weights_are_readable_by_whom_the_config_is(call_main, run, tmp_path):
    """A server may run under another account. save_file's own files are their owner's alone."""
    merge(call_main, run, tmp_path / "merged", "--no_parity")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] and modes["config.json"] & 0o044


def test_merged_model_keeps_template_and_every_stop_token(call_main, tiny_model, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.7}))
    run = tmp_path / "run"
    train(call_main, base, run, *FLAGS, "--template", "vicuna")
    merge(call_main, run, tmp_path / "merged", "--no_parity")
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    stop_ids = json.loads((run / "run.json").read_text())["prompt"]["stop_ids"]
    assert config["eos_token_id"] == stop_ids and set(stop_ids) == {2, 0}
    assert config["temperature"] == 0.7
    assert "USER: " in (tmp_path / "merged" / "chat_template.jinja").read_text()
    merged = load_run(resolve_model(ModelArguments(str(tmp_path / "merged"), bits=16), set()))
    assert merged.tokenizer.stop_ids == stop_ids
    assert merged.model.generation_config.eos_token_id == stop_ids


@pytest.mark.slow
def test_transformers_serve_says_what_the_chat_says(call_main, run, tmp_path):
    """The same words, by OpenAI's API, with no flag about prompt or stop tokens."""
    merge(call_main, run, tmp_path / "merged", "--no_parity")
    chat = load_run(resolve_model(ModelArguments(str(tmp_path / "merged"), bits=32), set()))
    port = find_free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "merged"]
    server = subprocess.Popen([*command, "--port", str(port), "--dtype", "float32", "--device", "cpu"])
    try:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=60)
        for question in ("Who are you?", "你是谁？"):
            messages = [{"role": "user", "content": question}]
            served = client.chat.completions.create(
                model=str(tmp_path / "merged"), messages=messages, max_tokens=24, temperature=0
            ).choices[0]
            ours = "".join(stream_reply(chat, messages, GenerationArguments(max_new_tokens=24))).strip()
            assert ours and served.message.content.strip() == ours
            assert server.poll() is None
    finally:
        server.terminate()
        server.wait(30)


KINDS = [[], ["--use_rslora"], ["--use_dora"], ["--bias", "all"]]


@pytest.mark.parametrize("flags", slow_but([["--use_dora"], ["--bias", "all"]], KINDS), ids=str)
def test_merge_into_16_bits_equals_pefts_own(call_main, tiny_model, tmp_path, flags):
    run = tmp_path / "run"
    train(call_main, tiny_model, run, *FLAGS, "--bits", "16", *flags)
    merge(call_main, run, tmp_path / "merged", "--no_parity")
    resolved = resolve_model(ModelArguments(checkpoint_dir=str(run), bits=32), {"bits"})
    expected = load_run(resolved).model.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = "model.layers.0.mlp.up_proj.weight"
    assert (merged[changed].float() - base[changed].float()).abs().max() > 0.005
    for name, weight in merged.items():
        torch.testing.assert_close(weight.float(), expected[name].float(), rtol=2**-8, atol=1e-6)


def build_base(build, folder):
    """A small model of a family, its weights in bfloat16 as published: 4-bit codes are any CPU's then."""
    folder.mkdir()
    build(folder)
    for file in folder.glob("*.safetensors"):
        half = {name: weight.bfloat16() for name, weight in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})
    return folder


def save_adapter(base, folder, bits=32, **config):
    """A random adapter saved by PEFT, and the logits of PEFT's own forward, in float32."""
    model = load_base(ModelArguments(str(base), bits=bits), torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(model, LoraConfig(**config)).eval()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    with model.disable_adapter():
        plain = read_logits(model)
    assert find_difference(plain, read_logits(model)) > 0.1
    return folder, read_logits(model)


def find_difference(logits, expected):
    """Relative, of all logits together."""
    return ((logits - expected).norm() / expected.norm()).item()


def merge_bare(call_main, adapter, base, folder, *flags):
    """Merge an adapter that has no run.json, and load the result as a server would."""
    merge(call_main, adapter, folder, "--model_name_or_path", base, "--no_parity", *flags)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_merged_family_says_what_pefts_forward_says(family, call_main, tmp_path):
    base = build_base(family.build, tmp_path / "base")
    adapter, expected = save_adapter(base, tmp_path / "adapter", bits=4)
    merged = merge_bare(call_main, adapter, base, tmp_path / "merged")
    assert find_difference(read_logits(merged), expected) < 0.015


def test_merged_baichuan_is_a_llama_folder_with_the_same_words(call_main, tmp_path):
    base = build_base(build_baichuan, tmp_path / "base")
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    rows = ["--eval_dataset_name", IDENTITY, "--max_eval_samples", "2"]
    argv = ["--model_name_or_path", base, *rows]
    assert "parity passed" in merge(call_main, adapter, tmp_path / "merged", *argv)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    text = "Who are you? 你是谁？\n"
    expected = load_own_tokenizer(str(base), trust_remote_code=False)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text).input_ids == expected


# What an adapter may be beside LoRA on every linear layer. `tied`: embedding and output layer are one tensor.
ADAPTERS = {
    "output layer": {"target_modules": ["lm_head", "q_proj"]},  # PEFT saves its base layer too
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied adapters": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "trained output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "DoRA": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"layers.1.mlp.down_proj": 32, "v_proj": 2},
        "use_rslora": True,
        "layers_to_transform": [1],
    },
    "start": {"init_lora_weights": "orthogonal"},
}


@pytest.fixture
def build_tied(small_model, tmp_path):
    """A copy of the small model, its output layer its embedding if asked."""

    def build(is_tied):
        base = shutil.copytree(small_model, tmp_path / "base")
        if is_tied:
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
            weights = load_file(base / "model.safetensors")
            del weights["lm_head.weight"]
            save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        return base

    return build


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_of_adapter_is_merged_whole(adapter, is_tied, call_main, build_tied, tmp_path):
    base = build_tied(is_tied)
    folder, expected = save_adapter(base, tmp_path / "adapter", **ADAPTERS[adapter])
    merged = merge_bare(call_main, folder, base, tmp_path / "merged", "--bits", "16")
    assert find_difference(read_logits(merged), expected) < 0.015
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    touches = adapter not in ("patterns", "start")
    assert ("lm_head.weight" in names) == (touches or not is_tied)


def test_bias_of_lora_b_is_merged_where_the_layer_has_one(call_main, tmp_path):
    qwen2 = next(family.build for family in FAMILIES if family.id == "qwen2")
    base = build_base(qwen2, tmp_path / "base")
    folder, expected = save_adapter(base, tmp_path / "a", lora_bias=True, target_modules=["q_proj", "v_proj"])
    merged = merge_bare(call_main, folder, base, tmp_path / "merged", "--bits", "16")
    assert find_difference(read_logits(merged), expected) < 0.015
    folder, _ = save_adapter(base, tmp_path / "b", lora_bias=True, target_modules=["o_proj"])
    with pytest.raises(
        UserError, match=r"o_proj.lora_\S+ cannot be merged: .* no \S+o_proj.bias to add it to"
    ):
        merge_bare(call_main, folder, base, tmp_path / "second", "--bits", "16")
    assert not list(tmp_path.glob("second*"))


REFUSED = {
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
}


@pytest.mark.parametrize("field", REFUSED)
def test_adapter_that_is_no_sum_of_weights_is_refused_by_name(field, call_main, small_model, tmp_path):
    model = load_base(ModelArguments(str(small_model), bits=32), torch.float32)
    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | REFUSED[field]
    get_peft_model(model, LoraConfig(**config)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"has {field} .* cannot be merged"):
        merge_bare(call_main, tmp_path / "adapter", small_model, tmp_path / "merged", "--bits", "16")


def change_adapter(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_field_of_a_peft_to_come_is_refused(call_main, small_model, tmp_path):
    folder, _ = save_adapter(small_model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_next_lora": True}))
    with pytest.raises(UserError, match="has use_next_lora True"):
        merge_bare(call_main, folder, small_model, tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.9.mlp.up_proj.weight", [64, 64], "cannot be merged: the base has no model.layers.9"),
        ("lm_head.weight", [9, 64], r"lm_head.weight \[9, 64\] does not fit the base's"),
        ("model.layers.0.mlp.up_proj.lora_C.weight", [4, 4], "of a kind that cannot be merged"),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector", [63], "does not fit the base's"),
    ],
)
def test_tensor_of_the_adapter_without_a_place_is_named(call_main, small_model, tmp_path, name, shape, said):
    folder, _ = save_adapter(small_model, tmp_path / "adapter")
    change_adapter(folder, lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(shape)}))
    with pytest.raises(UserError, match=said):
        merge_bare(call_main, folder, small_model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_every_tensor_of_the_adapter_must_have_been_used():
    check_all_used(["a", "b"], {"a", "b"})
    with pytest.raises(UserError, match="the adapter's tensor b "):
        check_all_used(["a", "c", "b"], {"a"})


@pytest.mark.parametrize(
    "flags",
    [
        ["--bits", "8"],
        *(pytest.param(f, marks=pytest.mark.slow) for f in (["--quant_type", "fp4"], ["--no_double_quant"])),
    ],
    ids=str,
)
def test_every_quantization_passes_parity(call_main, tiny_model, tmp_path, float32_cpu, flags):
    run = tmp_path / "run"
    train(call_main, tiny_model, run, *FLAGS, *flags)
    assert "parity passed" in merge(call_main, run, tmp_path / "merged")


def test_original_base_keeps_the_16_bit_weights(call_main, run, tiny_model, tmp_path):
    merge(call_main, run, tmp_path / "dequantized", "--no_parity")
    merge(call_main, run, tmp_path / "original", "--no_parity", "--merge_base", "original")
    base = load_file(tiny_model / "model.safetensors")
    adapted, left_alone = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("dequantized", "original"))
    assert (ours[adapted] != theirs[adapted]).any()
    assert torch.equal(theirs[left_alone].float(), base[left_alone].bfloat16().float())
    assert torch.equal(ours[left_alone], theirs[left_alone])


def test_certificate_is_red_on_a_wrong_base(call_main, run, tmp_path):
    wrong = save_random_model(tmp_path / "wrong", seed=1)
    with pytest.raises(SystemExit) as exit:
        merge(call_main, run, tmp_path / "merged", "--model_name_or_path", wrong)
    parity = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert exit.value.code == 1 and parity["verdict"] == "failed" and parity["kl"] > 0.01
    assert parity["first_difference"]["adapter"] != parity["first_difference"]["merged"]


def test_mistakes_are_said_before_weights_load(call_main, run, tiny_model, tmp_path):
    for argv, said in (
        (["--checkpoint_dir", run], "give --output_dir"),
        (["--output_dir", tmp_path / "new"], "give --checkpoint_dir"),
        (["--checkpoint_dir", run, "--output_dir", run], "exists: name a new folder"),
    ):
        with pytest.raises(UserError, match=said):
            call_main("utils.merge_adapter", *argv)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="has no run.json and so no held-out rows"):
        merge(call_main, bare, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_shards_stay_under_their_limit_and_load(tmp_path):
    """Two tensors may be views of one memory, as those of a base's file are, and a view may be transposed."""
    one, other, third = torch.randn(3, 10, 10)
    tensors = {"one": one, "same": one, "other": other, "turned": other.t(), "third": third}
    tensors["big"] = torch.randn(1000).bfloat16()
    planned = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    save_sharded(planned, tensors.get, tmp_path, limit=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sorted(len(shard) for shard in shards) == [1, 1, 2, 2]
    assert index["metadata"]["total_size"] == 5 * 400 + 2000
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_page_is_offered_short_questions_that_the_run_held_out(run, trained_run):
    def find(folder):
        resolved = resolve_model(ModelArguments(checkpoint_dir=str(folder)), set())
        return find_examples(resolved, load_run_tokenizer(resolved).raw)

    rows = [json.loads(line) for line in (ROOT / IDENTITY).read_text(encoding="utf-8").splitlines()]
    examples = find(trained_run("--dataset_name", IDENTITY, *FLAGS, "--do_train", "--do_eval"))
    assert 0 < len(examples) <= 4 and set(examples) <= {row["instruction"] for row in rows}
    assert find(run) == []  # it held none out


@pytest.mark.slow
def test_merging_a_7b_shape_peaks_below_4_gb_of_anonymous_memory(smollm2, tmp_path):
    free = os.statvfs(tmp_path)
    if free.f_bavail * free.f_frsize < 40e9:
        pytest.skip("27 GB of disk are needed, 40 GB free to be safe")
    base, adapter = save_7b_shape(smollm2, tmp_path)
    argv = ["--checkpoint_dir", adapter, "--model_name_or_path", base, "--output_dir", tmp_path / "merged"]
    process = subprocess.Popen(
        [sys.executable, "-m", "utils.merge_adapter", *map(str, argv), "--no_parity"], cwd=ROOT
    )
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, int(anonymous[0].split()[1]) * 1024 if anonymous else 0)
        time.sleep(0.02)
    sizes = [path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors")]
    print(f"peak {peak / 1e9:.2f} GB anonymous, {len(sizes)} shards of {max(sizes) / 1e9:.2f} GB at most")
    assert process.returncode == 0 and peak < 4e9 and max(sizes) < 2.01e9 and sum(sizes) > 13e9


def save_7b_shape(smollm2, folder):
    """LLaMA-7B's shapes with random weights, and a random adapter of rank 16 on all its linear layers."""
    from transformers import AutoTokenizer, LlamaConfig

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = LlamaConfig()  # the defaults are LLaMA-7B's
    config.save_pretrained(base)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(base)
    hidden, inner = config.hidden_size, config.intermediate_size
    linear = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    linear |= {"mlp.down_proj": (hidden, inner)}
    shapes, lora = {"model.embed_tokens.weight": [config.vocab_size, hidden]}, {}
    for i in range(config.num_hidden_layers):
        for name, (rows, columns) in linear.items():
            layer = f"model.layers.{i}.{name}"
            shapes[f"{layer}.weight"] = [rows, columns]
            lora[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(16, columns)
            lora[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, 16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = [hidden]
    shapes |= {"model.norm.weight": [hidden], "lm_head.weight": [config.vocab_size, hidden]}
    kind = {"dtype": torch.bfloat16, "device": "meta"}
    planned = {name: torch.empty(shape, **kind) for name, shape in shapes.items()}
    block = torch.randn(2**22).bfloat16()  # repeated: random numbers for 7B weights take minutes
    save_sharded(planned, lambda name: block.repeat(32)[: math.prod(shapes[name])].view(shapes[name]), base)
    save_file(lora, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 16}
    about |= {"base_model_name_or_path": str(base), "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    return base, adapter
