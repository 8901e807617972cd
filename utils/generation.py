"""A run on disk -> a model that replies. Base, quantization, template and stop tokens come from run.json."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from utils.arguments import GenerationArguments, ModelArguments
from utils.checks import CONTEXT_KEYS
from utils.console import UserError, notice
from utils.model import choose_compute_dtype, load_adapter, load_base, load_stop_ids, load_tokenizer
from utils.prompts import Messages, encode_prompt
from utils.run_record import find_run_record

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}


@dataclass(frozen=True)
class ChatModel:
    """A model ready to reply, and what its prompts need."""

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    context: int | None  # tokens


def load_run(model_args: ModelArguments, config: dict[str, Any], template: str | None = None) -> ChatModel:
    """Base and adapter for inference: `model_args` from checks.resolve_model, `config` of the base."""
    from utils.arguments import DataArguments

    tokenizer = load_tokenizer(model_args, DataArguments(template=template))
    record = find_run_record(Path(model_args.checkpoint_dir)) if model_args.checkpoint_dir else None
    if record and template is None:
        stop_ids = record["prompt"]["stop_ids"]
    else:
        stop_ids = load_stop_ids(model_args, tokenizer)
    model = load_base(model_args, choose_compute_dtype(model_args), trainable=False)
    if model_args.checkpoint_dir and not model_args.full_finetune:
        model = load_adapter(model, model_args.checkpoint_dir)
    model.eval()
    text_config = config.get("text_config", config)
    context = next((text_config[key] for key in CONTEXT_KEYS if isinstance(text_config.get(key), int)), None)
    return ChatModel(model, tokenizer, stop_ids, context)


def build_generation_config(
    generation_args: GenerationArguments, tokenizer: Any, stop_ids: list[int]
) -> GenerationConfig:
    """transformers' GenerationConfig; sampling flags count only with --do_sample."""
    flags = {name: value for name, value in vars(generation_args).items() if value is not None}
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
    chats: list[Messages],
    stop_ids: list[int],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int = 8,
) -> list[str]:
    """One reply to each chat, in batches padded on the left. Leaves training mode and RNG as they were."""
    replies = generate_ids(model, tokenizer, chats, stop_ids, generation_args, seed, batch_size)
    return [decode_reply(tokenizer, ids, stop_ids) for ids in replies]


def generate_ids(
    model: Any,
    tokenizer: Any,
    chats: list[Messages],
    stop_ids: list[int],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int = 8,
) -> list[list[int]]:
    """Token ids of one reply to each chat, its stop token last where it came to one."""
    config = build_generation_config(generation_args, tokenizer, stop_ids)
    prompts = [encode_prompt(tokenizer, chat, stop_ids) for chat in chats]
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
    """Text up to the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


class StopOnEvent(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class ReplyStreamer(TextIteratorStreamer):
    """Text of the reply only: without the prompt and without the stop token, special or not."""

    def __init__(self, tokenizer: Any, stop_ids: list[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop_ids = stop_ids

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1 and value.item() in self.stop_ids and not self.next_tokens_are_prompt:
            return
        super().put(value)


def stream_reply(chat: ChatModel, messages: Messages, generation_args: GenerationArguments) -> Iterator[str]:
    """Pieces of the reply as they are generated. Closing the iterator stops the generation."""
    prompt = torch.tensor([encode_prompt(chat.tokenizer, messages, chat.stop_ids)], device=chat.model.device)
    config = build_generation_config(generation_args, chat.tokenizer, chat.stop_ids)
    if generation_args.num_beams > 1:  # beams are final only at the end: nothing to stream before it
        with torch.no_grad():
            output = chat.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
            )
        yield decode_reply(chat.tokenizer, output[0, prompt.shape[1] :].tolist(), chat.stop_ids)
        return
    streamer, stopped, failures = ReplyStreamer(chat.tokenizer, chat.stop_ids), threading.Event(), []

    def generate() -> None:
        try:
            with torch.no_grad():
                chat.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=streamer,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([StopOnEvent(stopped)]),
                )
        except Exception as error:  # raised again where the reply is read
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stopped.set()
        thread.join()
    if failures:
        raise failures[0]


def trim_history(chat: ChatModel, messages: Messages, max_new_tokens: int) -> tuple[Messages, int]:
    """(messages whose prompt leaves room for the reply, oldest messages dropped). A system message stays.

    Raises UserError where the last message alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns, dropped = messages[len(system) :], 0
    while chat.context is not None:
        length = len(encode_prompt(chat.tokenizer, system + turns, chat.stop_ids))
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
