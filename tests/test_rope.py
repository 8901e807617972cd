"""A row beyond the original context keeps to itself what it does to rotary frequencies."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.architectures import GQA
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from utils.data.packing import PackingCollator, PaddingCollator, find_micro_batches, split_at_long
from utils.fast.rope import find_shared_length, follow_each_batch

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
SIZES = GQA | {"initializer_range": 0.2}
CONFIGS = {  # original context: 32 tokens
    "dynamic": lambda: LlamaConfig(**SIZES | {"max_position_embeddings": 32}, rope_parameters=DYNAMIC),
    "longrope": lambda: Phi3Config(**SIZES, rope_parameters=LONG, original_max_position_embeddings=32),
}
FILE = "model.safetensors"
LENGTHS = (20, 70, 9, 40, 33, 32, 31)
COLLATORS = {
    "packed": lambda limit: PackingCollator(0, 96, False, limit),
    "packed and filled up": lambda limit: PackingCollator(0, 320, True, limit),  # fillings of over 32 tokens
    "padded": lambda limit: PaddingCollator(0, 1, limit),
    "padded to a multiple": lambda limit: PaddingCollator(0, 24, limit),
}


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    drawn = (generator.integers(3, 96, length) for length in LENGTHS)
    return [{"input_ids": ids, "labels": ids, "row": row} for row, ids in enumerate(drawn)]


def build(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


@torch.no_grad()
def read_losses_alone(model, rows):
    """Sum of each row's token losses by transformers, a fresh model each."""
    ids = [torch.from_numpy(row["input_ids"])[None] for row in rows]
    found = [copy.deepcopy(model)(input_ids=row, labels=row, use_cache=False).loss.item() for row in ids]
    return [loss * (len(row["input_ids"]) - 1) for loss, row in zip(found, rows, strict=True)]


@torch.no_grad()
def read_losses(model, batch):
    """{row: sum of its token losses} of packed or padded micro-batches."""
    found = {}
    for part in find_micro_batches(batch):
        inputs = {
            name: part[name] for name in ("input_ids", "position_ids", "attention_mask") if name in part
        }
        logits = model(**inputs, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), part["labels"][:, 1:], reduction="none")
        ends = part["cu_seqlens"][1:-1] if "cu_seqlens" in part else []
        each = (
            losses[0].tensor_split(torch.as_tensor(ends, dtype=torch.long))
            if "cu_seqlens" in part
            else losses
        )
        found |= {row: one.sum().item() for row, one in zip(part["rows"].tolist(), each, strict=False)}
    return found


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_row_has_the_loss_it_has_alone(name, collator, rows):
    model = build(name)
    expected = read_losses_alone(model, rows)
    follow_each_batch(model)
    batch = COLLATORS[collator](find_shared_length(model.config))(rows)
    assert len(find_micro_batches(batch)) < len(rows)
    for _ in range(2):  # whatever rows came before
        found = read_losses(model, batch)
        assert [found[row] for row in range(len(rows))] == pytest.approx(expected, rel=1e-5)
    found = read_losses(model, COLLATORS[collator](None)(rows))  # what the limit is for
    assert [found[row] for row in range(len(rows))] != pytest.approx(expected, rel=1e-3)


def test_rows_keep_their_order_and_long_ones_stay_alone():
    assert split_at_long([3, 9, 2, 4, 9, 9, 5], 5) == [[0], [1], [2, 3], [4], [5], [6]]
    assert split_at_long([3, 9, 2], None) == [[0, 1, 2]] and split_at_long([], 5) == []


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_frequencies_that_no_row_changes_let_all_rows_share(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        rope |= {"factor": 4.0, "original_max_position_embeddings": 32}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert find_shared_length(LlamaConfig(**SIZES, rope_parameters=rope)) is None


@torch.no_grad()
def test_questions_beyond_the_original_context_are_asked_alone(smol_tokenizer):
    from utils.train.mmlu import compute_letter_logits, find_letter_tokens

    sizes = SIZES | {"vocab_size": len(smol_tokenizer), "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, rope_parameters=DYNAMIC)).eval()
    questions = [f"Which letter is it, {'or not ' * count}?\nAnswer:" for count in (1, 30, 5, 12, 14, 4)]
    ids = [smol_tokenizer(question, return_tensors="pt").input_ids for question in questions]
    assert [x.shape[1] > 32 for x in ids] == [False, True, False, True, True, False]
    letters = list(find_letter_tokens(smol_tokenizer).values())
    alone = [copy.deepcopy(model)(input_ids=x, use_cache=False).logits[0, -1, letters] for x in ids]
    follow_each_batch(model)
    found = compute_letter_logits(model, smol_tokenizer, questions, 2048, 8)
    assert torch.allclose(found, torch.stack(alone), atol=1e-4)


@pytest.fixture
def long_model(small_model, tmp_path):
    """The byte-reading model with an original context that half of the rows are beyond, and larger weights."""
    folder = shutil.copytree(small_model, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": LONG | factors}))
    weights = {name: x * (10 if "proj" in name else 1) for name, x in load_file(folder / FILE).items()}
    save_file(weights, folder / FILE, {"format": "pt"})
    return folder


def test_training_and_evaluation_are_those_of_rows_alone(long_model, call_main, tmp_path):
    """Rows together, packed or padded, against one row a micro-batch: gradients and held-out loss."""
    rows = [{"instruction": f"{i} + {i}?", "output": str(2 * i) * (i % 9 * 5 + 2)} for i in range(10, 58)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--model_name_or_path {long_model} --dataset_name {tmp_path / 'rows.jsonl'}"
    words += (
        " --template vanilla --bits 32 --max_steps 2 --do_train --do_eval --eval_dataset_size 12 --lora_r 4"
    )
    words += (
        " --source_max_len 100 --target_max_len 100 --save_strategy no --logging_steps 1 --learning_rate 1e-2"
    )
    logs = {}
    for name, flags in {
        "alone": "--packing False --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --per_device_eval_batch_size 1",
        "packed": "--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --per_device_eval_batch_size 5",
        "padded": "--packing False --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --fast_lora False",
    }.items():
        run = tmp_path / name
        call_main("qlora_finetune", *words.split(), *flags.split(), "--output_dir", run)
        log = json.loads((run / "metrics.json").read_text())["log"]
        logs[name] = [
            entry[key] for entry in log for key in ("loss", "grad_norm", "eval_loss") if key in entry
        ]
    assert logs["packed"] == pytest.approx(logs["alone"], rel=1e-4)
    assert logs["padded"] == pytest.approx(logs["alone"], rel=1e-4)
