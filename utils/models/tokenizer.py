"""The tokenizer of chats: with a template, a pad token, and the tokens that end a reply.

For SmolLM2, "Hi" becomes the prompt <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n, and a reply ends
where <|im_end|> comes. Template, tokenizer and these stop tokens belong together: with another template a
model is asked otherwise than it was trained, with other stop tokens its reply does not end. So they travel as
one ChatTokenizer, from training into run.json and from there into chat, evaluation and merging.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from utils.arguments import DataArguments, ModelArguments
from utils.console import UserError, notice
from utils.models.base import unknown_models_explained
from utils.models.encoding import encode_rows, find_own_bos
from utils.models.folder import ResolvedModel
from utils.models.reply_text import tag_thought
from utils.models.tokenizer_files import load_own_tokenizer
from utils.prompts.answer_spans import (
    RenderedRow,
    find_border,
    find_stop_tokens,
    read_template,
    split_prompt,
    template_names,
)
from utils.prompts.messages import Chat, Messages, Thinking, find_half_character
from utils.prompts.rendering import MODES, ThoughtStyle, find_style, render_chat, set_default
from utils.run.record import hash_text


@dataclass(frozen=True)
class ChatTokenizer:
    """Chats -> token ids, and the ids of a reply -> its text."""

    raw: Any  # transformers' tokenizer, with the chat template set
    stop_ids: list[int]  # end a reply; the first closes an answer in the template
    keeps_blank: bool = False  # prompts end in the blanks of their template, as in runs of an older version
    thinking: Thinking = "auto"  # of rows: each as it is; of prompts: the template's default

    @functools.cached_property
    def stops(self) -> list[str]:
        """The texts of `stop_ids`."""
        return self.raw.convert_ids_to_tokens(self.stop_ids)

    def encode_prompt(self, asked: Messages | Chat) -> list[int]:
        """Token ids from which a reply to `asked` is generated: those of a training row up to that answer."""
        chat = asked if isinstance(asked, Chat) else Chat(asked)
        render = functools.partial(render_chat, self.raw, tools=chat.tools)
        text, answers = split_prompt(render, chat.messages, self.stops, MODES[self.thinking])
        if half := find_half_character(text):
            raise UserError(f"the messages hold half a character ({half!r}, a lone surrogate)")
        end = len(text) if self.keeps_blank else find_border(text)
        ((pieces, _),) = encode_rows(self.raw, [RenderedRow([], text[:end], answers, [])])
        return [token for ids, _ in pieces for token in ids]

    def find_stop(self, ids: list[int]) -> int:
        """Where the first stop token of a reply stands, or the reply's length."""
        return next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))

    @functools.cached_property
    def style(self) -> ThoughtStyle:
        """What the template does with thoughts."""
        return find_style(self.raw)

    @property
    def thinks(self) -> bool:
        """Whether the prompts are those of thinking on."""
        return self.style.default if self.thinking == "auto" else self.thinking == "on"

    @functools.cached_property
    def skips_special(self) -> bool:
        """Whether special tokens are left out of a reply's text; gpt-oss's marks of a thought are such."""
        ids = self.raw(self.style.opening + self.style.closing, add_special_tokens=False).input_ids
        return self.raw.decode(ids) == self.raw.decode(ids, skip_special_tokens=True)

    def decode_reply(self, ids: list[int]) -> str:
        """Text up to the first stop token, a thought in <think> tags before the answer."""
        return "".join(self.tag([self.decode_written(ids)])).strip()

    def decode_written(self, ids: list[int]) -> str:
        """The same with the model's own marks; of a reply without an end, up to its last whole character."""
        end = self.find_stop(ids)
        text = self.raw.decode(ids[:end], skip_special_tokens=self.skips_special)
        return drop_cut_character(text) if end == len(ids) else text

    def tag(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of a reply with its thought in <think> tags (reply_text.py)."""
        return tag_thought(pieces, self.style, self.style.is_opened(self.thinking))

    def in_mode(self, thinking: Thinking) -> "ChatTokenizer":
        """For replies with thinking on or off; the template's own default becomes the same."""
        if thinking != "auto":
            self.raw.chat_template = set_default(self.raw.chat_template, thinking == "on")
        return dataclasses.replace(self, thinking=thinking)

    def switch(self, thinks: bool) -> "ChatTokenizer":
        """For the replies of one chat; the template stays as it is."""
        return dataclasses.replace(self, thinking="on" if thinks else "off")

    def describe(self) -> dict[str, Any]:
        """What run.json keeps."""
        return {
            "template_sha256": hash_text(self.raw.chat_template),
            "stop_ids": self.stop_ids,
            "stop_tokens": self.stops,
            "pad_token_id": self.raw.pad_token_id,
            "thinking": self.thinking if self.style.is_thinking else None,
        }


def drop_cut_character(text: str) -> str:
    """`text` without a last character of which not all bytes were generated: a Chinese one has three."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def load_chat_tokenizer(model_args: ModelArguments, data_args: DataArguments) -> ChatTokenizer:
    """That of a training. Without a template of its own it gets --template, else alpaca (oasst1: guanaco)."""
    default = "guanaco" if data_args.dataset_name == "oasst1" else "alpaca"
    raw = load_tokenizer(model_args, data_args.template, default)
    return ChatTokenizer(raw, load_stop_ids(model_args, raw), thinking=model_args.thinking)


def load_run_tokenizer(resolved: ResolvedModel) -> ChatTokenizer:
    """That of a run, with the stop tokens that it was trained with; of a model without a run its own."""
    raw = load_tokenizer(resolved.args, resolved.template)
    stop_ids = resolved.stop_ids or load_stop_ids(resolved.args, raw)
    return ChatTokenizer(raw, stop_ids, resolved.keeps_blank).in_mode(resolved.thinking)


def load_tokenizer(
    model_args: ModelArguments, template: str | None = None, default: str = "alpaca"
) -> PreTrainedTokenizerBase:
    """The tokenizer with a chat template and a pad token. A run's own tokenizer comes before the base's.

    `template` is set where it is named, `default` where the tokenizer has none.
    """
    name = model_args.base
    if model_args.checkpoint_dir and (model_args.adapter_dir / "tokenizer_config.json").is_file():
        name = model_args.checkpoint_dir
    with unknown_models_explained(model_args):
        tokenizer = load_own_tokenizer(name, model_args.trust_remote_code, **model_args.where)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model_args.base} has no eos token, so no reply could end")
    add_chat_template(tokenizer, template, default)
    add_bos(tokenizer)
    add_pad_token(tokenizer)
    return tokenizer


def add_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None, default: str) -> None:
    """Set the prompt format: the template of that name, else the tokenizer's own, else the default one."""
    if name is None and tokenizer.chat_template:
        tokenizer.chat_template = choose_named_template(tokenizer.chat_template)
        return
    if name is None:
        name = default
        notice(f"the tokenizer has no chat template: using {name} (--template chooses another)")
    if name == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in (None, tokenizer.unk_token_id):
        raise UserError(
            "--template chatml ends replies with <|im_end|>, which this tokenizer does not have: "
            "use another template"
        )
    tokenizer.chat_template = read_template(name)


def add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the template render the BOS that this tokenizer puts before any text: a server adds none itself."""
    rendered = render_chat(tokenizer, [{"role": "user", "content": "Question"}], add_generation_prompt=True)
    if find_own_bos(tokenizer) and not rendered.startswith(tokenizer.bos_token):
        if tokenizer.chat_template not in map(read_template, template_names()):
            notice(f"the chat template lacks the {tokenizer.bos_token} that its tokenizer puts first: added")
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template


def choose_named_template(template: str | dict[str, str]) -> str:
    """The template, or the one named default where a tokenizer has several (Command R: rag, tool_use)."""
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise UserError(
            f"the tokenizer has chat templates named {', '.join(sorted(template))} and none named default: "
            f"choose the prompt format with --template ({', '.join(template_names())})"
        )
    notice(f"of the tokenizer's chat templates ({', '.join(sorted(template))}) default is used")
    return template["default"]


def add_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """pad = unk or a reserved token; else eos. Masks go by length: an eos in an answer is still trained.

    Of several reserved ones that with the smallest id, then the shortest name: get_vocab() has another order
    at each call.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    reserved = sorted(
        (token_id, len(token), token)
        for token, token_id in tokenizer.get_vocab().items()
        if "pad" in token.lower() and token.startswith("<")
    )
    tokenizer.pad_token = tokenizer.unk_token or (reserved[0][-1] if reserved else tokenizer.eos_token)


def load_stop_ids(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a reply: the template's closing token, eos, and what the base's generation_config adds."""
    try:
        config = GenerationConfig.from_pretrained(model_args.base, **model_args.where)
    except OSError:  # many models ship none
        config = GenerationConfig()
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # An old LLaMA conversion names the BOS, 1, as its eos; in OPT and GPT-NeoX the two are one token.
    opens = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    return find_stop_tokens(tokenizer, [token for token in eos if token not in (None, opens)])
