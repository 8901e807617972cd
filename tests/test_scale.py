"""A large set is ready in little more than its bare tokenization takes, in memory that does not grow."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from helpers import ROOT

WORDS = (ROOT / "LICENSE").read_text().split()  # English that nobody rewrites
# Runs in a process of its own, so that its peak memory is its own.
PREPARE = """
import json, re, sys, time
from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.data.report import build_report
from utils.data.rows import load_rows
from utils.data.tokenizing import tokenize_rows
from utils.models.tokenizer import load_chat_tokenizer
import bitsandbytes, datasets, peft  # what a run imports besides
path, model = sys.argv[1:]
data_args, training_args = DataArguments(path), TrainingArguments()
start = time.perf_counter()
rows = load_rows(ModelArguments(), data_args, training_args)
scanned = time.perf_counter() - start
tokenizer = load_chat_tokenizer(ModelArguments(model), data_args)
datasets = tokenize_rows(rows, tokenizer, data_args)
tokenized = time.perf_counter() - start
report = build_report(rows, datasets, len(tokenizer.raw), data_args, training_args, on_gpu=False)
ready = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 2**20
print(json.dumps({"rows": len(datasets["train"]), "tokens": len(datasets["train"].tokens), "scanned": scanned,
                  "tokenized": tokenized, "ready": ready, "peak_gib": peak}))
"""
# The bare library on the same text, which is what the speed is held against.
BARE = """
import itertools, json, sys, time
from tokenizers import Tokenizer
path, model = sys.argv[1:]
tokenizer, start, tokens, seconds = Tokenizer.from_file(model + "/tokenizer.json"), time.perf_counter(), 0, 0.0
with open(path) as lines:
    for chunk in iter(lambda: list(itertools.islice(lines, 1000)), []):
        rows = [json.loads(line) for line in chunk]
        texts = ["<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n"
                 f"<|im_start|>user\\n{row['instruction']}<|im_end|>\\n<|im_start|>assistant\\n{row['output']}<|im_end|>"
                 for row in rows]
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        seconds += time.perf_counter() - start
        tokens += sum(len(encoding.ids) for encoding in encoded)
print(json.dumps({"tokens": tokens, "seconds": seconds}))
"""


def write_alpaca_rows(path, count):
    """Rows of about 140 tokens with SmolLM2's prompt."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {
                "instruction": " ".join(rng.choices(WORDS, k=20)),
                "input": "",
                "output": " ".join(rng.choices(WORDS, k=60)),
            }
            file.write(json.dumps(row) + "\n")
    return path


def measure(program, path, model, **environment):
    command = [sys.executable, "-c", program, str(path), str(model)]
    start = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(found | {"process_seconds": round(time.perf_counter() - start, 1)})
    return found


@pytest.mark.slow
def test_five_thousand_rows_are_ready_and_cached(smollm2, tmp_path):
    path = write_alpaca_rows(tmp_path / "rows.jsonl", 5_000)
    first = measure(PREPARE, path, smollm2, QLORA_CACHE=str(tmp_path / "cache"))
    again = measure(PREPARE, path, smollm2, QLORA_CACHE=str(tmp_path / "cache"))
    bare = measure(BARE, path, smollm2)
    assert first["rows"] == again["rows"] == 5_000 and first["tokens"] == again["tokens"] == bare["tokens"]
    assert again["tokenized"] < 0.5 * first["tokenized"] and first["peak_gib"] < 2


@pytest.mark.alone
@pytest.mark.slow
def test_a_million_rows_are_ready_at_sixty_percent_of_bare_tokenization(smollm2, tmp_path):
    small = write_alpaca_rows(tmp_path / "small.jsonl", 100_000)
    large = write_alpaca_rows(tmp_path / "large.jsonl", 1_000_000)
    cache = {"QLORA_CACHE": str(tmp_path / "cache")}
    of_small, of_large = measure(PREPARE, small, smollm2, **cache), measure(PREPARE, large, smollm2, **cache)
    bare, cached = measure(BARE, large, smollm2), measure(PREPARE, large, smollm2, **cache)
    assert of_large["rows"] == 1_000_000 and of_large["tokens"] == bare["tokens"]
    assert bare["seconds"] / of_large["ready"] >= 0.6
    assert of_large["peak_gib"] < 2 and of_large["peak_gib"] < 1.3 * of_small["peak_gib"]
    assert cached["ready"] < 10
