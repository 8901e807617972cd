"""A model's tokenizer as its files have it: sentencepiece's ids, tokenizer.json unaltered, right special ids.

transformers 5 rebuilds every tokenizer of LLaMA's class in one way: one without a dummy prefix (Yi) gets one,
a leading blank is lost, and old conversions with empty special tokens do not load at all.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from utils.console import notice
from utils.models.weight_files import read_json

# Classes whose tokenizer.model is a sentencepiece BPE model and nothing else.
SENTENCEPIECE_CLASSES = {"LlamaTokenizer", "LLaMATokenizer", "BaiChuanTokenizer"}
LLAMA_SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2


def load_own_tokenizer(name: str, trust_remote_code: bool, **where: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; `where`: revision and cache_dir."""
    settings = read_settings(name, "tokenizer_config.json", where)
    if str(settings.get("tokenizer_class")).removesuffix("Fast") in SENTENCEPIECE_CLASSES:
        settings = read_settings(name, "special_tokens_map.json", where) | settings
        content = read_settings(name, "tokenizer.json", where)
        model_file = find_file(name, "tokenizer.model", where)
        if content:
            specials: dict[str, Any] = choose_specials(content, settings)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **where, **specials)
            return drop_dummy_prefix(tokenizer, model_file) if model_file else tokenizer
        if model_file and not find_file(name, "added_tokens.json", where):
            template = find_file(name, "chat_template.jinja", where)
            if template:
                settings["chat_template"] = Path(template).read_text(encoding="utf-8")
            return load_sentencepiece(model_file, settings)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **where)


def find_file(name: str, file: str, where: dict[str, Any]) -> str | None:
    return cached_file(
        name, file, **where, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip


def read_settings(name: str, file: str, where: dict[str, Any]) -> dict[str, Any]:
    path = find_file(name, file, where)
    return read_json(Path(path)) if path else {}


def choose_specials(content: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens to override in a tokenizer.json (`content`): none, unless its vocabulary is LLaMA's."""
    vocabulary = content["model"]["vocab"]
    is_llama = all(vocabulary.get(token) == i for i, token in enumerate(LLAMA_SPECIALS.values()))
    return correct_specials(LLAMA_SPECIALS, settings) if is_llama else {}


def correct_specials(by_id: dict[str, str], settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens: those of `settings`, but those at the vocabulary's own ids (`by_id`) where the settings
    have none, an empty one, or one in another's place. Reports a correction."""
    named = {kind: settings.get(kind) for kind in by_id}
    named = {kind: token["content"] if isinstance(token, dict) else token for kind, token in named.items()}
    wrong = {"", *by_id.values()}
    if any(named[kind] in wrong - {by_id[kind]} for kind in ("bos_token", "eos_token")):
        notice(
            "the tokenizer's special tokens are wrong (an old LLaMA conversion): corrected to bos 1, eos 2"
        )
        return dict(by_id)
    return by_id | {kind: token for kind, token in named.items() if token is not None}


def drop_dummy_prefix(tokenizer: PreTrainedTokenizerFast, model_file: str) -> PreTrainedTokenizerFast:
    """Yi-1.5's tokenizer.json puts a blank before each text; the sentencepiece file beside it does not."""
    spec = read_sentencepiece(Path(model_file)).normalizer_spec
    if not spec.add_dummy_prefix:
        tokenizer.backend_tokenizer.normalizer = build_normalizer(spec)
        tokenizer.backend_tokenizer.decoder = build_decoder(spec)
    return tokenizer


def load_sentencepiece(model_file: str, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """tokenizer.model as a fast tokenizer with the template and special tokens of tokenizer_config.json."""
    model = read_sentencepiece(Path(model_file))
    spec = model.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id}
    by_id = {kind: model.pieces[i].piece for kind, i in ids.items()}
    kept = {name: settings[name] for name in ("chat_template", "add_eos_token") if settings.get(name)}
    return PreTrainedTokenizerFast(
        tokenizer_object=build_fast_tokenizer(model),
        add_bos_token=settings.get("add_bos_token", True),
        **correct_specials(by_id, settings),
        **kept,
    )


def read_sentencepiece(model_file: Path) -> Any:
    """sentencepiece's ModelProto."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made as it is imported
    model.ParseFromString(model_file.read_bytes())
    return model


def build_fast_tokenizer(model: Any) -> Any:
    """tokenizers.Tokenizer of a sentencepiece BPE model: same normalization, same merges, same ids."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    spec = model.normalizer_spec
    bpe = BPE(
        vocab={piece.piece: i for i, piece in enumerate(model.pieces)},
        merges=find_merges(
            {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
        ),
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = build_normalizer(spec)
    tokenizer.decoder = build_decoder(spec)
    for piece in model.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.USER_DEFINED):
            special = piece.type != piece.USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    return tokenizer


def build_normalizer(spec: Any) -> Any:
    """What sentencepiece does to text before it merges, in its order."""
    from tokenizers import Regex, normalizers

    charsmap = spec.precompiled_charsmap
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def build_decoder(spec: Any) -> Any:
    from tokenizers import decoders

    strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    return decoders.Sequence(steps)


def find_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best scored first: sentencepiece's order of merging."""
    pairs = (
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    return sorted(pairs, key=lambda pair: -scores["".join(pair)])
