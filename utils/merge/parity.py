"""parity.json: does the merged model say what the adapter on its quantized base says?

Both read the same held-out rows (loss, likeliest token, KL of the next-token distributions over the answers'
tokens) and both write replies, greedily; one model is in memory at a time.
"""

import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import torch

from utils.arguments import DataArguments, GenerationArguments, ModelArguments
from utils.chat.generation import BatchAnswerer, ChatModel, load_run
from utils.console import notice
from utils.data.rows import Rows
from utils.data.token_rows import Example
from utils.data.tokenizing import tokenize_rows
from utils.models.folder import ResolvedModel, resolve_model
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.messages import EVAL, IGNORE_INDEX, TEST
from utils.run.record import write_json

MAX_TOKENS = 1024  # answer tokens compared; each holds 0.6 MB of log-probabilities at a 152k vocabulary
REPLIES, REPLY_TOKENS = 8, 48
# Past these the merged model is another model. A right one of SmolLM2-135M is far below.
LIMITS = {"loss_difference": 0.02, "top1_disagreement": 0.03, "kl": 0.01}

Examples = list[Example]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one model makes of the held-out rows."""

    log_probs: torch.Tensor  # [answer tokens, vocabulary]
    replies: list[list[int]]


def certify(resolved: ResolvedModel, rows: tuple[Rows, DataArguments], folder: Path) -> bool:
    """Compare, write parity.json into `folder`, print the verdict; True where it is within LIMITS."""
    trained = find_reference(resolved)
    merged_args = dataclasses.replace(
        trained.args, model_name_or_path=str(folder), checkpoint_dir=None, bits=16, revision=None
    )
    chat = load_run(trained)
    asked = (trained.record or {"arguments": {}})["arguments"].get("thinking", "auto")
    parts = tokenize_rows(rows[0], dataclasses.replace(chat.tokenizer, thinking=asked), rows[1])
    held_out = next(parts[part] for part in (EVAL, TEST) if len(parts[part]))
    examples = limit_tokens([held_out[i] for i in range(len(held_out))])
    reference, tokenizer = read_examples(chat, examples), chat.tokenizer
    del chat
    gc.collect()
    merged = read_examples(load_run(resolve_model(merged_args, set())), examples)
    result = compare(reference, merged, examples, tokenizer)
    exceeded = {key: result[key] for key, limit in LIMITS.items() if not result[key] <= limit}
    verdict = {"verdict": "failed" if exceeded else "passed", "limits": LIMITS}
    about = {"adapter": trained.args.checkpoint_dir, "base": trained.args.base, "bits": trained.args.bits}
    write_json(verdict | result | about, folder / "parity.json")
    report(result, exceeded, folder)
    return not exceeded


def find_reference(resolved: ResolvedModel) -> ResolvedModel:
    """The adapter as it was trained: the run's own base and bits, whatever the merge was told to take."""
    if resolved.record is None:
        return resolved
    kept = ("checkpoint_dir", "use_cpu", "max_memory_MB", "trust_remote_code", "cache_dir")
    return resolve_model(ModelArguments(**{name: getattr(resolved.args, name) for name in kept}), set())


def limit_tokens(examples: Examples) -> Examples:
    """The first examples, with MAX_TOKENS answer tokens together at most, one at least."""
    kept: Examples = []
    tokens = 0
    for example in examples:
        tokens += len(find_answer(example))
        if kept and tokens > MAX_TOKENS:
            break
        kept.append(example)
    return kept


def find_answer(example: Example) -> list[int]:
    """Positions of the answer's tokens; a row's first token has none before it to be predicted from."""
    return [i for i, label in enumerate(example["labels"]) if i > 0 and label != IGNORE_INDEX]


@torch.no_grad()
def read_examples(chat: ChatModel, examples: Examples) -> Reading:
    log_probs = []
    for example in examples:
        input_ids = torch.from_numpy(example["input_ids"])[None].to(chat.model.device)
        logits = chat.model(input_ids=input_ids).logits[0, [i - 1 for i in find_answer(example)]]
        log_probs.append(logits.float().log_softmax(-1).cpu())
    prompts = [example["input_ids"][: find_answer(example)[0]].tolist() for example in examples[:REPLIES]]
    flags = GenerationArguments(max_new_tokens=REPLY_TOKENS)
    answerer = BatchAnswerer(chat.model, chat.tokenizer, flags, seed=0, batch_size=1)
    return Reading(torch.cat(log_probs), answerer.generate(prompts))


def compare(
    reference: Reading, merged: Reading, examples: Examples, tokenizer: ChatTokenizer
) -> dict[str, Any]:
    labels = torch.tensor([int(example["labels"][i]) for example in examples for i in find_answer(example)])
    ours, theirs = (-reading.log_probs.gather(1, labels[:, None]).mean() for reading in (reference, merged))
    kl = (reference.log_probs.exp() * (reference.log_probs - merged.log_probs)).sum(-1)
    same = reference.log_probs.argmax(-1) == merged.log_probs.argmax(-1)
    pairs = list(zip(reference.replies, merged.replies, strict=True))
    return {
        "adapter_loss": round(ours.item(), 5),
        "merged_loss": round(theirs.item(), 5),
        "loss_difference": round(abs(ours - theirs).item(), 5),
        "top1_disagreement": round(1 - same.float().mean().item(), 5),
        "kl": round(kl.mean().item(), 6),
        "kl_max": round(kl.max().item(), 5),
        "answer_tokens": len(labels),
        "replies": len(pairs),
        "identical_replies": sum(a == b for a, b in pairs),
        "adapter_stopped": sum(ours[-1] in tokenizer.stop_ids for ours, _ in pairs),
        "merged_stopped": sum(theirs[-1] in tokenizer.stop_ids for _, theirs in pairs),
        "first_difference": find_first_difference(pairs, tokenizer.raw),
    }


def find_first_difference(pairs: list[tuple[list[int], list[int]]], tokenizer: Any) -> dict[str, Any] | None:
    """Where the first two unequal replies part, and what each says from there."""
    for number, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            at = len(os.path.commonprefix([ours, theirs]))
            rest = {"adapter": tokenizer.decode(ours[at:]), "merged": tokenizer.decode(theirs[at:])}
            return {"reply": number, "token": at, "before": tokenizer.decode(ours[:at])} | rest
    return None


def report(result: dict[str, Any], exceeded: dict[str, float], folder: Path) -> None:
    notice(
        f"parity on {result['answer_tokens']} answer tokens: loss {result['adapter_loss']:.4f} (adapter) and "
        f"{result['merged_loss']:.4f} (merged), top-1 differs on {result['top1_disagreement']:.1%}, "
        f"KL {result['kl']:.5f}; {result['identical_replies']} of {result['replies']} replies are identical"
    )
    if exceeded:
        limits = ", ".join(f"{name} {value} (limit {LIMITS[name]})" for name, value in exceeded.items())
        notice(f"parity FAILED: {limits}; the merged model is another model than the adapter on its base")
    else:
        notice(f"parity passed: {folder / 'parity.json'}")
