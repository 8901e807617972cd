"""Chats as token ids and labels: one alone, or a file of them."""

import numpy as np

from helpers.rows import load, write_rows
from utils.arguments import DataArguments
from utils.chat.streaming import open_reply, stream_text
from utils.data.tokenizing import ChatEncoder, tokenize_rows
from utils.models.encoding import encode_rows
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.answer_spans import find_stop_tokens, split_chat
from utils.prompts.messages import IGNORE_INDEX, TRAIN, Chat

TWO_TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
# Written small: only the last answer keeps its (empty) thinking, earlier ones are rewritten.
QWEN3_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stream_reply(chat, messages, generation_args, tuned=True):
    """Pieces of the reply to `messages`, where its figures are not asked for."""
    return stream_text(chat.tokenizer, open_reply(chat, messages, generation_args, tuned))


def build_chat_tokenizer(tokenizer, eos_ids=()):
    """`tokenizer` with the stop ids that follow from its template."""
    return ChatTokenizer(tokenizer, find_stop_tokens(tokenizer, list(eos_ids)))


def encode_prompt(tokenizer, asked, stop_ids):
    return ChatTokenizer(tokenizer, stop_ids).encode_prompt(asked)


def encode_row(tokenizer, row, **flags):
    """{input_ids, labels} of a rendered row, as training marks them."""
    ((pieces, _),) = encode_rows(tokenizer, [row])
    signed = ChatEncoder(ChatTokenizer(tokenizer, []), DataArguments(**flags)).mark_untrained(pieces)
    labels = np.where(signed >= 0, signed, IGNORE_INDEX)
    return {"input_ids": np.where(signed >= 0, signed, ~signed).tolist(), "labels": labels.tolist()}


def encode_chat(tokenizer, messages, eos_ids=()):
    """(stop ids, [(input_ids, labels) of each training row])"""
    stop_ids = find_stop_tokens(tokenizer, list(eos_ids))
    rendered = split_chat(tokenizer, Chat(messages), tokenizer.convert_ids_to_tokens(stop_ids))
    encoded = [encode_row(tokenizer, row) for row in rendered]
    return stop_ids, [(row["input_ids"], row["labels"]) for row in encoded]


def decode_labels(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def assert_prompts_agree(tokenizer, messages, stop_ids, rows):
    """What chat sends before each answer is, token for token, what a training row has before its labels."""
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = encode_prompt(tokenizer, messages[:turn], stop_ids)
        starts = [labels for ids, labels in rows if ids[: len(prompt)] == prompt]
        assert any(labels[len(prompt)] != IGNORE_INDEX for labels in starts), messages[turn]
        assert all(labels[len(prompt) - 1] == IGNORE_INDEX for labels in starts)


def tokenize(tokenizer, path, do_eval=False, do_predict=False, **flags):
    rows = load(path, do_eval=do_eval, do_predict=do_predict, **flags)
    datasets = tokenize_rows(rows, build_chat_tokenizer(tokenizer), DataArguments(str(path), **flags))
    return rows, datasets


def train_rows(tokenizer, tmp_path, rows, **flags):
    """(rows as lists, findings) of a file of these rows."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = tokenize(tokenizer, path, **flags)[1][TRAIN]
    kept = ("input_ids", "labels")
    return [{name: found[i][name].tolist() for name in kept} for i in range(len(found))], found.found[
        "counts"
    ]


def read_labels(tokenizer, row):
    return decode_labels(tokenizer, row["labels"])
