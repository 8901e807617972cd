"""A run on disk -> a model that replies.

Base, quantization, template and stop tokens are read from run.json, so that a reply is asked for exactly as
the run was trained: the original trained with one prompt and chatted with another. Replies of many prompts at
once are made here, a reply that streams in streaming.py; on a GPU both replay a CUDA graph for each token
(utils/fast/graph_decode.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from utils.arguments import GenerationArguments, ModelArguments
from utils.chat.model_lock import ModelLock
from utils.console import UserError, notice
from utils.fast.decode_loop import GrowingSteps, Steps
from utils.fast.decode_setup import install_graph_decode
from utils.messages import Chat, Messages
from utils.models.adapter import load_adapter
from utils.models.base import choose_compute_dtype, load_base
from utils.models.encoding import encode_prompt
from utils.models.folder import find_context
from utils.models.tokenizer import load_stop_ids, load_tokenizer
from utils.run.record import TOKENIZATION, find_run_record

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}


@dataclass(frozen=True)
class ChatModel:
    """A model ready to reply, and what its prompts need."""

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    context: int | None  # tokens
    lock: ModelLock
    keeps_blank: bool = False  # prompts end in the blanks of their template: a run of an older version
    steps: Steps | None = None  # tokens one at a time, faster than by generate; None where generate must do


def load_run(model_args: ModelArguments, config: dict[str, Any], template: str | None = None) -> ChatModel:
    """Base and adapter for inference: `model_args` from resolve_model, `config` of the base."""
    from utils.arguments import DataArguments

    tokenizer = load_tokenizer(model_args, DataArguments(template=template))
    stop_ids = find_stop_ids(model_args, tokenizer, template)
    model: Any = load_base(model_args, choose_compute_dtype(model_args), trainable=False)
    if model_args.checkpoint_dir and not model_args.full_finetune:
        model = load_adapter(model, model_args.checkpoint_dir)
    model.eval()
    steps = install_graph_decode(model) if model.device.type == "cuda" else GrowingSteps(model)
    apart = was_tokenized_apart(model_args)
    return ChatModel(model, tokenizer, stop_ids, find_context(config), ModelLock(model), apart, steps)


def was_tokenized_apart(model_args: ModelArguments) -> bool:
    """True for a run trained while prompts and answers were tokenized apart; says so."""
    record = find_run_record(Path(model_args.checkpoint_dir)) if model_args.checkpoint_dir else None
    if record is None or record.get("tokenization") == TOKENIZATION:
        return False
    notice(
        f"{model_args.checkpoint_dir} was trained by an older version, which tokenized prompts and answers "
        "apart: it is asked as it was trained, and training anew gives better answers"
    )
    return True


def find_stop_ids(model_args: ModelArguments, tokenizer: Any, template: str | None = None) -> list[int]:
    """Ids that end a reply: the run's own, unless another template is asked for."""
    record = find_run_record(Path(model_args.checkpoint_dir)) if model_args.checkpoint_dir else None
    if record and template is None:
        return record["prompt"]["stop_ids"]
    return load_stop_ids(model_args, tokenizer)


def build_generation_config(
    generation_args: GenerationArguments, tokenizer: Any, stop_ids: list[int]
) -> GenerationConfig:
    """transformers' GenerationConfig; sampling flags count only with --do_sample."""
    flags = {name: value for name, value in vars(generation_args).items() if value is not None}
    if flags.pop("prompt_lookup") and (generation_args.do_sample or generation_args.repetition_penalty != 1):
        notice("--prompt_lookup guesses the likeliest tokens: with sampling or penalties it has no effect")
    if not generation_args.do_sample:
        changed = [name for name, default in SAMPLING_DEFAULTS.items() if flags[name] != default]
        if changed:
            notice(f"without --do_sample {', '.join(f'--{name}' for name in changed)} has no effect")
        flags = {name: value for name, value in flags.items() if name not in SAMPLING_DEFAULTS}
    if generation_args.num_beams == 1:
        flags.pop("length_penalty")
    return GenerationConfig(**flags, eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)


def generate_replies(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Messages | Chat],
    stop_ids: list[int],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int = 8,
) -> list[str]:
    """One reply to each chat, in batches padded on the left. Leaves training mode and RNG as they were."""
    prompts = [encode_prompt(tokenizer, chat, stop_ids) for chat in chats]
    replies = generate_ids(model, tokenizer, prompts, stop_ids, generation_args, seed, batch_size)
    return [decode_reply(tokenizer, ids, stop_ids) for ids in replies]


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    stop_ids: list[int],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int = 8,
) -> list[list[int]]:
    """Token ids of one reply to each prompt (token ids), its stop token last where it came to one."""
    config = build_generation_config(generation_args, tokenizer, stop_ids)
    replies, was_training = [], model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(len(prompt) for prompt in batch)
            input_ids = torch.tensor(
                [[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in batch]
            )
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
            replies += [cut_after_stop(ids[width:], stop_ids) for ids in output.tolist()]
    model.train(was_training)
    return replies


def cut_after_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))]


def decode_reply(tokenizer: Any, ids: list[int], stop_ids: list[int]) -> str:
    """Text up to the first stop token; of a reply without one, up to its last whole character."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return (drop_cut_character(text) if end == len(ids) else text).strip()


def drop_cut_character(text: str) -> str:
    """`text` without a last character of which not all bytes were generated: a Chinese one has three."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def trim_history(chat: ChatModel, messages: Messages, max_new_tokens: int) -> tuple[Messages, int]:
    """(messages whose prompt leaves room for the reply, oldest messages dropped). A system message stays.

    Raises UserError where the last message alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns, dropped = messages[len(system) :], 0
    while chat.context is not None:
        length = len(encode_prompt(chat.tokenizer, system + turns, chat.stop_ids, chat.keeps_blank))
        if length + max_new_tokens <= chat.context:
            break
        if len(turns) == 1:
            raise UserError(
                f"the message is {length} tokens and the reply may take {max_new_tokens}: the model's "
                f"context is {chat.context}; shorten it or lower --max_new_tokens"
            )
        count = next(
            (i for i, message in enumerate(turns[1:], 1) if message["role"] == "user"), len(turns) - 1
        )
        turns, dropped = turns[count:], dropped + count
    return system + turns, dropped
