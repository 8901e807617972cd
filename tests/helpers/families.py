"""A tiny random model and tokenizer of each family, in the file layout its publisher uses on the hub."""

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from helpers import ROOT

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def read_corpus() -> list[str]:
    lines = (ROOT / "data" / "guanaco_identity.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()  # English that nobody rewrites
    return [text for row in rows for text in (row["instruction"], row["output"])] + licence


@functools.cache
def train_sentencepiece(**options) -> bytes:
    """A BPE model with byte fallback and ids 0 unk, 1 bos, 2 eos, as LLaMA's, unless `options` say else."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9995,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(read_corpus()), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def write_json(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def write_sentencepiece(
    folder: Path, with_json: bool, added: tuple[str, ...] = (), adds_bos: bool = True, **options
) -> None:
    """tokenizer.model and, where the publisher ships it, the tokenizer.json made from it."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    from utils.models.tokenizer_files import build_fast_tokenizer, read_sentencepiece

    (folder / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    if not with_json:
        return
    model = read_sentencepiece(folder / "tokenizer.model")
    tokenizer = build_fast_tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    if adds_bos:
        bos, bos_id = model.pieces[model.trainer_spec.bos_id].piece, model.trainer_spec.bos_id
        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def train_byte_level(special: tuple[str, ...], split: str | None, special_first: bool, bos: str | None):
    """A byte-level BPE tokenizer; `split` is a regular expression, None GPT-2's own."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split:
        by_regex = pre_tokenizers.Split(Regex(split), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_regex, by_bytes])
    else:
        tokenizer.pre_tokenizer = by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special) if special_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer


def write_byte_level(
    folder: Path,
    *special: str,
    split: str | None = None,
    special_first: bool = False,
    bos: str | None = None,
    as_json: bool = True,
    as_vocab: bool = False,
) -> Callable[[str], int]:
    """tokenizer.json, or vocab.json and merges.txt, or all three; gives back token -> id."""
    tokenizer = train_byte_level(special, split, special_first, bos)
    if as_json:
        tokenizer.save(str(folder / "tokenizer.json"))
    if as_vocab:
        tokenizer.model.save(str(folder))
    return tokenizer.token_to_id


def write_model(folder: Path, model_type: str, published: dict | None = None, **fields) -> None:
    """config.json and model.safetensors; `published` is what the publisher's config.json says besides."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    # At the usual 0.02 so small a model says nothing; logits should differ from token to token.
    config = AutoConfig.for_model(model_type, **({"initializer_range": 0.1} | fields))
    # Rounded as publishers' 16-bit files are: whatever a CPU computes in, it quantizes the same weights.
    AutoModelForCausalLM.from_config(config).bfloat16().float().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder, "config.json", config | (published or {}))


def count_tokens(folder: Path) -> int:
    """Rows of an embedding that holds every id, rounded up as publishers do."""
    if (folder / "tokenizer.json").is_file():
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        highest = max(
            [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
        )
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        highest = model.vocab_size() - 1
    return -(-(highest + 1) // 32) * 32


def build_llama1(folder: Path) -> None:
    """huggyllama/llama-7b: sentencepiece alone, right special ids."""
    write_sentencepiece(folder, with_json=False)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    write_json(folder, "tokenizer_config.json", settings | {"tokenizer_class": "LlamaTokenizer"})
    write_model(folder, "llama", vocab_size=count_tokens(folder), **SIZES)
    write_json(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})


def build_decapoda(folder: Path) -> None:
    """The decapoda-research conversion: empty special tokens, bos 0 and eos 1, a class that no longer is."""
    build_llama1(folder)
    empty = {"bos_token": "", "eos_token": "", "unk_token": ""}
    settings = {"model_max_length": 10**30, "tokenizer_class": "LLaMATokenizer"}
    write_json(folder, "tokenizer_config.json", empty | settings)
    write_json(folder, "special_tokens_map.json", empty)
    config = json.loads((folder / "config.json").read_text())
    wrong = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    write_json(folder, "config.json", config | wrong | {"architectures": ["LLaMAForCausalLM"]})
    write_json(folder, "generation_config.json", wrong | {"pad_token_id": 0})


LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant') }}"
    "{% endif %}{% endfor %}"
)


def build_llama2(folder: Path) -> None:
    """meta-llama/Llama-2-7b-chat-hf: sentencepiece and its tokenizer.json, a template."""
    write_sentencepiece(folder, with_json=True)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": LLAMA2_TEMPLATE}
    write_json(folder, "tokenizer_config.json", settings)
    write_model(folder, "llama", vocab_size=count_tokens(folder), **SIZES)


def build_llama3(folder: Path) -> None:
    """meta-llama/Meta-Llama-3-8B-Instruct: a tiktoken-like tokenizer.json, two stop ids."""
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    find = write_byte_level(folder, *special, split=GPT4_SPLIT, bos=special[0])
    template = (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    settings = {"bos_token": special[0], "eos_token": "<|eot_id|>", "chat_template": template}
    write_json(folder, "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    ids = {"bos_token_id": find(special[0]), "eos_token_id": find("<|end_of_text|>")}
    rope = {"rope_theta": 500000.0}
    write_model(folder, "llama", rope, vocab_size=count_tokens(folder), **ids, **SIZES)
    write_json(
        folder,
        "generation_config.json",
        ids | {"eos_token_id": [find("<|end_of_text|>"), find("<|eot_id|>")]},
    )


def build_bloom(folder: Path, prefix: str = "") -> None:
    """bigscience/bloom-7b1: no transformer. before its weights' names; tokenizer.json alone."""
    find = write_byte_level(folder, "<unk>", "<s>", "</s>", "<pad>", special_first=True)
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(folder, "tokenizer_config.json", settings | {"tokenizer_class": "BloomTokenizerFast"})
    ids = {"bos_token_id": find("<s>"), "eos_token_id": find("</s>"), "pad_token_id": find("<pad>")}
    write_model(folder, "bloom", vocab_size=count_tokens(folder), hidden_size=64, n_layer=1, n_head=4, **ids)
    weights = load_file(folder / "model.safetensors")
    renamed = {prefix + name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def build_bloomz(folder: Path) -> None:
    """bigscience/bloomz-7b1: as BLOOM, with the names as transformers writes them."""
    build_bloom(folder, prefix="transformer.")


def build_baichuan(folder: Path) -> None:
    """baichuan-inc/Baichuan-7B: W_pack, remote code in auto_map, sentencepiece alone. With safetensors."""
    write_sentencepiece(folder, with_json=False)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    settings |= {"add_bos_token": False, "add_eos_token": False, "tokenizer_class": "BaiChuanTokenizer"}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]}}
    write_json(folder, "tokenizer_config.json", settings)
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    write_model(folder, "llama", vocab_size=count_tokens(folder), rms_norm_eps=1e-6, **sizes)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("q_proj.weight")]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        weights[name.replace("q_proj.weight", "rotary_emb.inv_freq")] = 10000 ** -(
            torch.arange(0, 16, 2) / 16
        )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    published = {
        "architectures": ["BaiChuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaiChuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
        },
        "model_type": "baichuan",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": count_tokens(folder),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    write_json(folder, "config.json", sizes | published)
    write_json(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})


def build_opt(folder: Path) -> None:
    """facebook/opt-6.7b: vocab.json and merges.txt, </s> as bos, eos and unk, post-norm-free decoder."""
    special = ("<s>", "<pad>", "</s>", "<unk>")
    find = write_byte_level(folder, *special, special_first=True, as_json=False, as_vocab=True)
    settings = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings |= {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer", "errors": "replace"}
    write_json(folder, "tokenizer_config.json", settings)
    ids = {"bos_token_id": find("</s>"), "eos_token_id": find("</s>"), "pad_token_id": find("<pad>")}
    vocab_size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    write_model(
        folder, "opt", vocab_size=vocab_size, word_embed_proj_dim=64, init_std=0.1, **sizes, **ids,
        max_position_embeddings=512, do_layer_norm_before=True,
    )  # fmt: skip


def build_neox(folder: Path) -> None:
    """EleutherAI/pythia-6.9b and gpt-neox-20b: one special token, mask buffers among the weights."""
    find = write_byte_level(folder, "<|endoftext|>", "<|padding|>", special_first=True)
    same = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write_json(folder, "tokenizer_config.json", same | {"tokenizer_class": "GPTNeoXTokenizer"})
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), find("<|endoftext|>"))
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    old = {"rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True}
    write_model(folder, "gpt_neox", old, vocab_size=count_tokens(folder), rotary_pct=0.25, **sizes, **ids)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 512, 512).tril().bool()
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def build_glm4(folder: Path, model_type: str = "glm4") -> None:
    """zai-org/GLM-4-9B-0414: nothing closes an answer but the next <|user|>; a prefix of two tokens."""
    special = (
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    )
    find = write_byte_level(folder, *special, split=GPT4_SPLIT)
    template = (
        "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": template}
    write_json(folder, "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    eos = [find("<|endoftext|>"), find("<|user|>"), find("<|observation|>")]
    ids = {"eos_token_id": eos, "pad_token_id": eos[0]}
    write_model(folder, model_type, vocab_size=count_tokens(folder), head_dim=16, **ids, **SIZES)
    write_json(folder, "generation_config.json", ids)


def build_glm(folder: Path) -> None:
    """THUDM/glm-4-9b-chat-hf: the first GLM-4 in its transformers layout."""
    build_glm4(folder, "glm")


def build_mistral(folder: Path) -> None:
    """mistralai/Mistral-7B-Instruct-v0.2: sentencepiece with its tokenizer.json, sliding window unset."""
    write_sentencepiece(folder, with_json=True)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": LLAMA2_TEMPLATE}
    write_json(folder, "tokenizer_config.json", settings)
    write_model(
        folder, "mistral", {"sliding_window": None}, vocab_size=count_tokens(folder), head_dim=16, **SIZES
    )


CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3 drops the thoughts of earlier answers and writes an empty one before the last.
QWEN3_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_qwen2(folder: Path, model_type: str = "qwen2", template: str = CHATML_TEMPLATE, **fields) -> None:
    """Qwen/Qwen2.5-7B-Instruct: vocab.json, merges.txt and tokenizer.json; no bos."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    find = write_byte_level(folder, *special, split=GPT4_SPLIT, as_vocab=True)
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "chat_template": template}
    settings["added_tokens_decoder"] = {
        str(find(token)): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                           "single_word": False, "special": True}
        for token in special
    }  # fmt: skip
    write_json(folder, "tokenizer_config.json", settings)
    ids = {"bos_token_id": find("<|endoftext|>"), "eos_token_id": find("<|im_end|>")}
    write_model(folder, model_type, vocab_size=count_tokens(folder), **ids, **SIZES, **fields)
    eos = [find("<|im_end|>"), find("<|endoftext|>")]
    write_json(folder, "generation_config.json", ids | {"eos_token_id": eos})


def build_qwen3(folder: Path) -> None:
    """Qwen/Qwen3-8B: norms on q and k, a template that rewrites earlier answers."""
    build_qwen2(folder, "qwen3", QWEN3_TEMPLATE, head_dim=16)


def build_yi(folder: Path) -> None:
    """01-ai/Yi-6B-Chat: LLaMA with its own sentencepiece (no dummy prefix) and ChatML."""
    names = {"unk_piece": "<unk>", "bos_piece": "<|startoftext|>", "eos_piece": "<|endoftext|>"}
    names["user_defined_symbols"] = "<|im_start|>,<|im_end|>"
    write_sentencepiece(folder, with_json=True, adds_bos=False, add_dummy_prefix=False, **names)
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    settings |= {
        "pad_token": "<unk>",
        "add_bos_token": False,
        "legacy": True,
        "chat_template": CHATML_TEMPLATE,
    }
    write_json(folder, "tokenizer_config.json", settings | {"tokenizer_class": "LlamaTokenizer"})
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_model(folder, "llama", vocab_size=count_tokens(folder), **ids, **SIZES)


def build_deepseek(folder: Path) -> None:
    """deepseek-ai/deepseek-llm-7b-chat: LLaMA with a byte-level tokenizer under LLaMA's class name."""
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    find = write_byte_level(folder, bos, eos, split=GPT4_SPLIT, bos=bos)
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
        "{{ 'Assistant: ' + message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    settings = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "add_bos_token": True}
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "chat_template": template}
    write_json(folder, "tokenizer_config.json", settings)
    ids = {"bos_token_id": find(bos), "eos_token_id": find(eos)}
    write_model(folder, "llama", vocab_size=count_tokens(folder), **ids, **SIZES)


def build_gemma(folder: Path, model_type: str = "gemma", **fields) -> None:
    """google/gemma-7b-it: pad 0, eos 1, bos 2, unk 3; no system role; model is the assistant's name."""
    names = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>"}
    names |= {"bos_piece": "<bos>", "user_defined_symbols": "<start_of_turn>,<end_of_turn>"}
    write_sentencepiece(folder, with_json=True, add_dummy_prefix=False, **names)
    template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
        "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "chat_template": template}
    write_json(folder, "tokenizer_config.json", settings)
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    write_model(folder, model_type, vocab_size=count_tokens(folder), head_dim=16, **ids, **SIZES, **fields)
    write_json(folder, "generation_config.json", ids)


def build_gemma3(folder: Path) -> None:
    """google/gemma-3-1b-it: a sliding window in five layers of six."""
    build_gemma(folder, "gemma3_text", sliding_window=64)


def build_phi3(folder: Path) -> None:
    """microsoft/Phi-3-mini-4k-instruct: fused qkv and gate_up; remote code in auto_map, not needed."""
    special = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>")
    write_sentencepiece(folder, with_json=True, added=special, adds_bos=False)
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    tokens = {
        token["content"]: token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    settings = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
    }
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "chat_template": template}
    write_json(folder, "tokenizer_config.json", settings)
    remote = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    ids = {
        "bos_token_id": 1,
        "eos_token_id": tokens["<|endoftext|>"],
        "pad_token_id": tokens["<|endoftext|>"],
    }
    sizes = SIZES | {"vocab_size": count_tokens(folder), "sliding_window": 2047}
    write_model(folder, "phi3", {"auto_map": remote}, **ids, **sizes)
    eos = [tokens["<|endoftext|>"], tokens["<|assistant|>"], tokens["<|end|>"]]
    write_json(folder, "generation_config.json", ids | {"eos_token_id": eos})


@dataclass(frozen=True)
class Family:
    """A model of the README's list, and how the tests build a small one."""

    name: str
    example: str  # hub id
    build: Callable[[Path], None]

    @property
    def id(self) -> str:
        return self.build.__name__.removeprefix("build_")


FAMILIES = [
    Family("LLaMA 1", "huggyllama/llama-7b", build_llama1),
    Family(
        "LLaMA 1, old conversions with wrong special ids", "decapoda-research/llama-7b-hf", build_decapoda
    ),
    Family("LLaMA 2", "meta-llama/Llama-2-7b-chat-hf", build_llama2),
    Family("LLaMA 3", "meta-llama/Meta-Llama-3-8B-Instruct", build_llama3),
    Family("BLOOM", "bigscience/bloom-7b1", build_bloom),
    Family("BLOOMZ", "bigscience/bloomz-7b1", build_bloomz),
    Family("Baichuan-7B", "baichuan-inc/Baichuan-7B", build_baichuan),
    Family("OPT", "facebook/opt-6.7b", build_opt),
    Family("Pythia, GPT-NeoX", "EleutherAI/pythia-6.9b", build_neox),
    Family("GLM-4 (2024)", "THUDM/glm-4-9b-chat-hf", build_glm),
    Family("GLM-4-0414", "zai-org/GLM-4-9B-0414", build_glm4),
    Family("Mistral", "mistralai/Mistral-7B-Instruct-v0.2", build_mistral),
    Family("Qwen2, Qwen2.5", "Qwen/Qwen2.5-7B-Instruct", build_qwen2),
    Family("Qwen3", "Qwen/Qwen3-8B", build_qwen3),
    Family("Yi", "01-ai/Yi-6B-Chat", build_yi),
    Family("DeepSeek LLM (dense)", "deepseek-ai/deepseek-llm-7b-chat", build_deepseek),
    Family("Gemma", "google/gemma-7b-it", build_gemma),
    Family("Gemma 3 (text)", "google/gemma-3-1b-it", build_gemma3),
    Family("Phi-3", "microsoft/Phi-3-mini-4k-instruct", build_phi3),
]
