"""A run on disk -> a model that replies.

Base, quantization, template and stop tokens are read from run.json, so that a reply is asked for exactly as
the run was trained: the original trained with one prompt and chatted with another. Replies that stream come
from streaming.py, all of them by one decoder (utils/decode/shared_decoder.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from utils.arguments import GenerationArguments
from utils.console import UserError, notice
from utils.decode.loop import GrowingSteps
from utils.decode.setup import install_graph_decode
from utils.decode.shared_decoder import SharedDecoder
from utils.models.adapter import load_adapter
from utils.models.base import choose_compute_dtype, load_base
from utils.models.folder import ResolvedModel, find_context
from utils.models.tokenizer import ChatTokenizer, load_run_tokenizer
from utils.prompts.messages import Chat, Messages

SAMPLING_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}


@dataclass(frozen=True)
class ChatModel:
    """A model ready to reply, and what its prompts need."""

    model: Any
    tokenizer: ChatTokenizer
    context: int | None  # tokens
    decoder: SharedDecoder

    @property
    def has_adapter(self) -> bool:
        return bool(self.decoder.adapter.layers)


def load_run(resolved: ResolvedModel, dtype: torch.dtype | None = None) -> ChatModel:
    """Base and adapter for inference, computing in `dtype`, else in what suits the hardware."""
    args, tokenizer = resolved.args, load_run_tokenizer(resolved)
    model: Any = load_base(args, dtype or choose_compute_dtype(args), trainable=False)
    if resolved.has_adapter:
        model = load_adapter(model, str(args.checkpoint_dir))
    model.eval()
    steps = install_graph_decode(model) if model.device.type == "cuda" else None
    if args.thinking != "auto" and not tokenizer.style.has_switch:
        notice(f"--thinking {args.thinking} changes nothing: the chat template has no switch for thinking")
    if tokenizer.keeps_blank:
        notice(
            f"{args.checkpoint_dir} was trained by an older version, which tokenized prompts and answers "
            "apart: it is asked as it was trained, and training anew gives better answers"
        )
    decoder = SharedDecoder(model, steps or GrowingSteps(model))
    return ChatModel(model, tokenizer, find_context(resolved.config), decoder)


GREEDY_BELOW = 1e-3  # a temperature: logits divided by less leave the range of 16 bits


def build_generation_config(
    generation_args: GenerationArguments, tokenizer: ChatTokenizer
) -> GenerationConfig:
    """transformers' GenerationConfig; sampling flags count only with --do_sample."""
    if generation_args.do_sample and generation_args.temperature < GREEDY_BELOW:
        generation_args = replace(generation_args, do_sample=False, **SAMPLING_DEFAULTS)
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
    ids = {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.raw.pad_token_id}
    return GenerationConfig(**flags, **ids)


@dataclass(frozen=True)
class BatchAnswerer:
    """Replies of `model` to many prompts, in batches padded on the left. Training mode and RNG stay."""

    model: Any
    tokenizer: ChatTokenizer
    generation_args: GenerationArguments
    seed: int
    batch_size: int = 8

    def answer(self, chats: Sequence[Messages | Chat]) -> list[str]:
        """One reply to each chat, a thought in <think> tags first."""
        replies = self.generate([self.tokenizer.encode_prompt(chat) for chat in chats])
        return [self.tokenizer.decode_reply(ids) for ids in replies]

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Token ids of one reply to each prompt (token ids), its stop token last where it came to one."""
        model, tokenizer = self.model, self.tokenizer
        config = build_generation_config(self.generation_args, tokenizer)
        replies, was_training = [], model.training
        model.eval()
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(self.seed)
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                inputs = pad_rows(batch, tokenizer.raw.pad_token_id, "left", model.device)
                output = model.generate(**inputs, generation_config=config)
                written = [ids[inputs["input_ids"].shape[1] :] for ids in output.tolist()]
                replies += [ids[: tokenizer.find_stop(ids) + 1] for ids in written]
        model.train(was_training)
        return replies


def pad_rows(
    rows: list[list[int]], pad_token_id: int, side: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """{input_ids, attention_mask} of rows of token ids, each as long as the longest  # [rows, tokens]"""
    ids = [torch.tensor(row, device=device) for row in rows]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    mask = pad([torch.ones_like(row) for row in ids])
    return {"input_ids": pad(ids, padding_value=pad_token_id), "attention_mask": mask}


def trim_history(chat: ChatModel, messages: Messages, max_new_tokens: int) -> tuple[Messages, int]:
    """(messages whose prompt leaves room for the reply, oldest messages dropped). A system message stays.

    Raises UserError where the last message alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns, dropped = messages[len(system) :], 0
    while chat.context is not None:
        length = len(chat.tokenizer.encode_prompt(system + turns))
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
