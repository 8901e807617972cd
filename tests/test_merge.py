"""The merged folder is the adapter on its base: same weights, same words, same stop."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch
from conftest import ROOT, save_random_model
from safetensors.torch import load_file, save_file
from shell_runs import find_free_port
from test_generation import FLAGS

from utils.arguments import GenerationArguments, ModelArguments
from utils.checks import read_model_config, resolve_model
from utils.console import UserError
from utils.generation import load_run, stream_reply
from utils.shards import Entry, plan_shards, save_shards


def train(call_main, model, folder, *flags):
    argv = ["--model_name_or_path", model, *FLAGS, "--output_dir", folder, "--max_steps", "4"]
    call_main("qlora_finetune", *argv, "--learning_rate", "1e-2", "--eval_dataset_size", "4", *flags)
    return folder


@pytest.fixture
def run(call_main, tiny_model, tmp_path):
    return train(call_main, tiny_model, tmp_path / "run")


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


def test_merged_model_keeps_template_and_every_stop_token(call_main, tiny_model, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.7}))
    run = train(call_main, base, tmp_path / "run", "--template", "vicuna")
    merge(call_main, run, tmp_path / "merged", "--no_parity")
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    stop_ids = json.loads((run / "run.json").read_text())["prompt"]["stop_ids"]
    assert config["eos_token_id"] == stop_ids and set(stop_ids) == {2, 0}
    assert config["temperature"] == 0.7
    assert "USER: " in (tmp_path / "merged" / "chat_template.jinja").read_text()
    args = ModelArguments(str(tmp_path / "merged"), bits=16)
    merged = load_run(args, read_model_config(args))
    assert merged.stop_ids == stop_ids
    assert merged.model.generation_config.eos_token_id == stop_ids


@pytest.mark.slow
def test_transformers_serve_says_what_the_chat_says(call_main, run, tmp_path):
    """The same words, by OpenAI's API, with no flag about prompt or stop tokens."""
    merge(call_main, run, tmp_path / "merged", "--no_parity")
    args = ModelArguments(str(tmp_path / "merged"), bits=32)
    chat = load_run(args, read_model_config(args))
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


@pytest.mark.parametrize("flags", [[], ["--use_rslora"], ["--use_dora"], ["--bias", "all"]], ids=str)
def test_merge_into_16_bits_equals_pefts_own(call_main, tiny_model, tmp_path, flags):
    run = train(call_main, tiny_model, tmp_path / "run", "--bits", "16", *flags)
    merge(call_main, run, tmp_path / "merged", "--no_parity")
    args = resolve_model(ModelArguments(checkpoint_dir=str(run), bits=32), {"bits"})
    expected = load_run(args, read_model_config(args)).model.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = "model.layers.0.mlp.up_proj.weight"
    assert (merged[changed].float() - base[changed].float()).abs().max() > 0.005
    for name, weight in merged.items():
        torch.testing.assert_close(weight.float(), expected[name].float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("flags", [["--quant_type", "fp4"], ["--no_double_quant"], ["--bits", "8"]], ids=str)
def test_every_quantization_passes_parity(call_main, tiny_model, tmp_path, float32_cpu, flags):
    run = train(call_main, tiny_model, tmp_path / "run", *flags)
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
    entries = [Entry(f"t{i}", "F32", [10, 10]) for i in range(5)] + [Entry("big", "BF16", [1000])]
    assert [len(shard) for shard in plan_shards(entries, limit=1000)] == [2, 2, 1, 1]
    tensors = {entry.name: torch.randn(entry.shape) for entry in entries}
    tensors["big"] = tensors["big"].bfloat16()
    save_shards(entries, lambda entry: tensors[entry.name], tmp_path, limit=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


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
    entries, lora = [Entry("model.embed_tokens.weight", "BF16", [config.vocab_size, hidden])], {}
    for i in range(config.num_hidden_layers):
        for name, (rows, columns) in linear.items():
            layer = f"model.layers.{i}.{name}"
            entries.append(Entry(f"{layer}.weight", "BF16", [rows, columns]))
            lora[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(16, columns)
            lora[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, 16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            entries.append(Entry(f"model.layers.{i}.{norm}.weight", "BF16", [hidden]))
    entries += [Entry("model.norm.weight", "BF16", [hidden])]
    entries += [Entry("lm_head.weight", "BF16", [config.vocab_size, hidden])]
    block = torch.randn(2**22).bfloat16()  # repeated: random numbers for 7B weights take minutes
    save_shards(entries, lambda entry: block.repeat(16 * 2)[: entry.size // 2].reshape(entry.shape), base)
    save_file(lora, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 16}
    about |= {"base_model_name_or_path": str(base), "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    return base, adapter
