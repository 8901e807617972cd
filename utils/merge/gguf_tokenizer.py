"""The tokenizer's fields of a GGUF file, from what the chat itself tokenizes with.

llama.cpp has two tokenizers for these models. "llama" merges as SentencePiece does, the piece with the best
score first; "gpt2" is byte-level BPE, with merges and one of llama.cpp's own rules of splitting text into
words, chosen by name (`tokenizer.ggml.pre`). A wrong name is not refused by llama.cpp, it gives other
tokens. So the name follows from the tokenizer's own rule, and a rule that is not known here is refused.
"""

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType

from utils.console import UserError
from utils.models.encoding import find_own_bos
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.answer_spans import render_chat

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# (rule of splitting, whether a word that is a token skips the merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    (WORDS % "{1,3}", True): "llama-bpe",
    (WORDS % "{1,3}", False): "smaug-bpe",
    (WORDS % "", False): "qwen2",
    ("digits", False): "smollm",
    ("gpt-2", False): "gpt-2",
}
BYTE = re.compile("<0x[0-9A-F]{2}>")


def add_tokenizer(writer: GGUFWriter, tokenizer: ChatTokenizer, rows: int) -> None:
    """`rows`: of the model's embedding. Raises UserError for a tokenizer that llama.cpp has not."""
    content = read_content(tokenizer.raw)
    if find_split(content["pre_tokenizer"]) is None:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(has_space_prefix(tokenizer.raw, content))
        writer.add_token_scores(find_scores(content["model"], rows))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(find_pre_tokenizer(content))
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    tokens, kinds = list_tokens(content, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    add_special_tokens(writer, tokenizer)


def read_content(raw: Any) -> dict[str, Any]:
    """tokenizer.json as the tokenizer has it. Raises UserError for one that is no BPE."""
    content = json.loads(raw.backend_tokenizer.to_str()) if raw.is_fast else {"model": {"type": "slow"}}
    kind = content["model"]["type"]
    if kind == "BPE" and find_split(content["pre_tokenizer"]) is None:
        rules = json.dumps([content["normalizer"], content["pre_tokenizer"]], ensure_ascii=False)
        kind = "BPE" if "▁" in rules else "word-level BPE"
    if kind != "BPE":
        raise UserError(
            f"the tokenizer ({kind}) is neither byte-level BPE nor SentencePiece's: llama.cpp's converter "
            "may read it"
        )
    return content


def find_split(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """How a byte-level tokenizer splits text into words; None where it is no byte-level one."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    *before, last = steps
    if not before and last.get("use_regex", True):
        return "gpt-2"
    if len(before) != 1:
        return json.dumps(before)
    if before[0]["type"] == "Digits" and before[0]["individual_digits"] and last.get("use_regex", True):
        return "digits"
    return before[0].get("pattern", {}).get("Regex", json.dumps(before))


def find_pre_tokenizer(content: dict[str, Any]) -> str:
    split = find_split(content["pre_tokenizer"])
    name = PRE_TOKENIZERS.get((str(split), bool(content["model"].get("ignore_merges"))))
    if name is None:
        raise UserError(
            f"the tokenizer splits text by a rule that has no name here ({str(split)[:60]}...): llama.cpp's "
            "converter may know it"
        )
    return name


def has_space_prefix(raw: Any, content: dict[str, Any]) -> bool:
    """Whether "▁" is put before a text: where the prompt's own begins, behind a special token or not.

    llama.cpp puts it in both places or in none.
    """
    rendered = render_chat(raw, [{"role": "user", "content": "Question"}], add_generation_prompt=True)
    opening = next((t["content"] for t in content["added_tokens"] if rendered.startswith(t["content"])), "")
    ids = raw(opening + "a", add_special_tokens=False).input_ids
    first = raw.convert_ids_to_tokens(ids)[1 if opening else 0]
    return first.startswith("▁")


def find_scores(model: dict[str, Any], rows: int) -> list[float]:
    """Of each piece minus the place of its first merge: the order in which the tokenizer itself merges."""
    places: dict[str, int] = {}
    for place, pair in enumerate(model["merges"]):
        places.setdefault("".join(pair), place)
    scores = [0.0] * rows
    for piece, i in model["vocab"].items():
        scores[i] = -float(places.get(piece, 0))
    return scores


def list_tokens(content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and llama.cpp's types of all ids; rows of the embedding without a token are unused ones."""
    model = content["model"]
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [int(TokenType.UNUSED)] * rows
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    highest = max([*model["vocab"].values(), *added.values()])
    if highest >= rows:
        raise UserError(f"the tokenizer has an id {highest} and the model's embedding {rows} rows")
    for token, i in model["vocab"].items():
        is_byte = model.get("byte_fallback") and BYTE.fullmatch(token)
        tokens[i], kinds[i] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in content["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]], kinds[token["id"]] = token["content"], kind
    if model.get("byte_fallback") and model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in kinds]


def add_special_tokens(writer: GGUFWriter, tokenizer: ChatTokenizer) -> None:
    """BOS, padding and all that ends a reply: eos, then what else the template closes answers with."""
    raw = tokenizer.raw
    if raw.bos_token_id is not None:
        writer.add_bos_token_id(raw.bos_token_id)
    writer.add_eos_token_id(raw.eos_token_id)
    others = [token for token in tokenizer.stop_ids if token != raw.eos_token_id]
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(token)
    if raw.unk_token_id is not None:
        writer.add_unk_token_id(raw.unk_token_id)
    if raw.pad_token_id is not None:
        writer.add_pad_token_id(raw.pad_token_id)
    writer.add_add_bos_token(bool(find_own_bos(raw)))
    writer.add_add_eos_token(False)
    writer.add_chat_template(raw.chat_template)
