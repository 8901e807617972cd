"""What only a CUDA device shows: autocast in both 16-bit types, paged optimizers, speed of the quickstart."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import IDENTITY, ROOT
from helpers.models import relative_difference
from helpers.runs import load_weights, read_log, train, trainer_kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLAGS = ["--logging_steps", 1, "--save_strategy", "no", "--source_max_len", 200, "--target_max_len", 100]
FLAGS += ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2]
SETTINGS = {
    "bf16": ["--bf16"],
    "fp16": ["--fp16"],
    "fp16, dropout, kept activations": ["--fp16", "--lora_dropout", 0.1, "--gradient_checkpointing", "False"],
    "8 bits, fp16": ["--bits", 8, "--fp16"],
    "fp4, 8-bit paged optimizer": ["--quant_type", "fp4", "--optim", "paged_adamw_8bit"],
    "16 bits": ["--bits", 16],
    "padded": ["--packing", "False"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_real_model_learns_in_twelve_steps(call_main, smollm2, tmp_path, setting):
    flags = ["--max_steps", 12, "--lora_r", 16, "--learning_rate", 1e-3, *SETTINGS[setting]]
    printed = train(call_main, smollm2, tmp_path / "run", *FLAGS, *flags)
    assert "plain path" not in printed and "without CUDA graphs" not in printed
    load_weights(tmp_path / "run")
    losses = read_log(tmp_path / "run", "loss")
    assert len(losses) == 12 and sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("flags", [[], ["--fast_lora", "False", "--lora_r", 256]])  # pages 100,000 and more
def test_optimizer_state_is_paged(call_main, smollm2, tmp_path, flags):
    flags = ["--max_steps", 1, "--optim", "paged_adamw_32bit", *flags]
    with trainer_kept() as kept:
        train(call_main, smollm2, tmp_path / "run", *FLAGS, *flags)
    states = [state["state1"] for state in kept[0].optimizer.optimizer.state.values()]
    assert states and any(getattr(state, "is_paged", False) for state in states)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("fast_lora", ["True", "False"])
def test_optimizer_state_is_paged_again_after_a_resume(call_main, smollm2, tmp_path, fast_lora, optim):
    """And the run ends as the uninterrupted one: no page was filled before its zeros were written."""
    run, flags = tmp_path / "run", ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2]
    flags += ["--optim", optim, "--fast_lora", fast_lora, "--lora_r", 256, "--learning_rate", 1e-3]
    train(call_main, smollm2, run, *FLAGS, *flags)
    expected = load_weights(run)
    shutil.rmtree(run / "checkpoint-4")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with trainer_kept() as kept:
        printed = train(call_main, smollm2, run, *FLAGS, *flags)
    optimizer = kept[0].optimizer.optimizer
    assert "checkpoint-2" in printed and optimizer.is_paged
    large = [state for weight, state in optimizer.state.items() if weight.numel() >= 100_000]
    assert large and all(state[name].is_paged for state in large for name in ("state1", "state2"))
    assert relative_difference(load_weights(run), expected) < 1e-4


def test_batch_of_four_equals_four_accumulated_rows(call_main, smollm2, tmp_path):
    flags = ["--bits", 32, "--max_steps", 3, "--learning_rate", 1e-3, "--adam_epsilon", 1e-4]
    for name, batch, accumulation in (("whole", 4, 1), ("parts", 1, 4)):
        sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        train(call_main, smollm2, tmp_path / name, *FLAGS, *flags, *sizes)
    whole, parts = load_weights(tmp_path / "whole"), load_weights(tmp_path / "parts")
    assert relative_difference(parts, whole) < 1e-5


def test_packing_is_exact_in_bfloat16(smollm2):
    from utils.arguments import ModelArguments
    from utils.fast.attention import find_attention_obstacle
    from utils.fast.trials import find_packing_obstacle
    from utils.models.base import load_base

    model = load_base(ModelArguments(str(smollm2), bits=4), torch.bfloat16)
    assert find_packing_obstacle(model) is None and find_attention_obstacle(model) is None


def test_trained_run_chats_on_the_gpu(call_main, smollm2, tmp_path, monkeypatch):
    import io

    flags = ["--max_steps", 30, "--lora_r", 16, "--learning_rate", 1e-3, "--gradient_accumulation_steps", 1]
    train(call_main, smollm2, tmp_path / "run", *FLAGS, *flags)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
    start = time.perf_counter()
    printed = call_main("cli_demo", "--checkpoint_dir", tmp_path / "run", "--max_new_tokens", 32)
    assert "Guanaco" in printed and time.perf_counter() - start < 60
    assert "without CUDA graphs" not in printed


def test_fast_path_learns_what_the_plain_path_learns(call_main, smollm2, tmp_path):
    """In float32 the same losses. In 16 bits PEFT adds the adapter's part to rounded outputs, which rounds
    small parts away; the fused product rounds the sum, and stays with float32."""
    losses = {}
    for kind in ("--bits 32", "--bits 16 --bf16", "--bits 16 --fp16"):
        for fast in ("True", "False"):
            flags = ["--max_steps", 20, "--lora_r", 16, *kind.split(), "--fast_lora", fast]
            run = tmp_path / f"{kind}{fast}"
            train(call_main, smollm2, run, *FLAGS, *flags)
            losses[kind[-4:], fast] = read_log(run, "loss")
    exact = torch.tensor(losses.pop(("s 32", "True")))
    error = {name: (torch.tensor(other) - exact).abs().max().item() for name, other in losses.items()}
    print(error)
    assert error["s 32", "False"] < 1e-3
    assert all(error[kind, "True"] < min(1e-2, error[kind, "False"]) for kind in ("bf16", "fp16"))


def test_killed_run_ends_with_the_losses_of_the_unbroken_one(smollm2, tmp_path):
    """Fast path, CUDA graphs, dropout, accumulation: killed twice, started again by the same command."""
    command = [
        sys.executable,
        "qlora_finetune.py",
        "--model_name_or_path",
        smollm2,
        "--dataset_name",
        IDENTITY,
    ]
    command += (
        "--max_steps 24 --save_steps 4 --logging_steps 1 --lora_r 16 --lora_dropout 0.1 --seed 3".split()
    )
    command += "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 5e-4".split()

    def start(name):
        log = open(tmp_path / f"{name}.log", "a")
        words = [*map(str, command), "--output_dir", str(tmp_path / name)]
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    unbroken = start("unbroken")
    for last in (4, 12):
        process, wanted = start("killed"), tmp_path / "killed" / f"checkpoint-{last}"
        while not wanted.is_dir() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start("killed").wait() == unbroken.wait() == 0
    losses = {}
    for name in ("unbroken", "killed"):
        printed = (tmp_path / f"{name}.log").read_text()
        assert "plain path" not in printed and "without CUDA graphs" not in printed
        losses[name] = read_log(tmp_path / name, "loss")
    assert "going on from" in printed and len(losses["killed"]) == 24
    assert losses["killed"] == pytest.approx(losses["unbroken"], abs=1e-3)


def build_wide_model(folder, smollm2):
    """Eight layers of LLaMA-7B: what a step costs beside its GPU work weighs four times as much as with 32."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=8, **sizes)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure_bare_steps(trainer, steps=10):
    """Tokens per second of forward, backward and optimizer alone, three times over the same batches."""
    from utils.data.packing import find_micro_batches

    loader = zip(trainer.get_train_dataloader(), range(steps), strict=False)
    batches = [find_micro_batches(batch) for batch, _ in loader]
    tokens = sum(int(part["num_tokens"]) for parts in batches for part in parts)
    speeds = []
    for _ in range(3):  # the first may still capture a size
        torch.cuda.synchronize()
        start = time.perf_counter()
        for parts in batches:
            scale = 1 / sum(len(part["label_positions"]) for part in parts)
            for part in parts:
                trainer.engine.graphed_step(part, scale)
            trainer.engine.fast.flat.clip_gradients(0.3)
            trainer.optimizer.optimizer.step()
            trainer.engine.fast.flat.zero_gradients()
        torch.cuda.synchronize()
        speeds.append(tokens / (time.perf_counter() - start))
    return speeds


@pytest.mark.slow
def test_trainer_costs_little_over_its_bare_step(call_main, smollm2, tmp_path):
    build_wide_model(tmp_path / "wide", smollm2)
    lengths = json.loads((ROOT / "tests" / "instruction_lengths.json").read_text())
    rows = [{"prompt": "Count.", "completion": " count" * length} for length in lengths]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model_name_or_path", tmp_path / "wide", "--dataset_name", tmp_path / "rows.jsonl", "--bf16"]
    argv += ["--output_dir", tmp_path / "run", "--save_strategy", "no"]
    argv += ["--max_steps", 60, "--logging_steps", 10, "--optim", "adamw_torch_fused"]
    argv += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 8, "--lora_dropout", 0.1]
    with trainer_kept() as kept:
        call_main("qlora_finetune", *argv, "--source_max_len", 1024, "--target_max_len", 1024)
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    logged = [entry["tokens_per_second"] for entry in log if "loss" in entry]
    bare = measure_bare_steps(kept[0])
    print(f"tokens/s: logged {logged}, bare {bare}")
    assert max(logged[-2:]) > 0.95 * max(bare)
