"""Pickled weights (pytorch_model*.bin) -> safetensors; what else a pickle may hold is refused, never run.

python -m utils.convert_weights FOLDER NEW_FOLDER

Baichuan-7B becomes a plain LLaMA folder, which PEFT, vLLM and llama.cpp read too.
"""

import json
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from utils.console import UserError, notice, run_main
from utils.models.baichuan import build_llama_config, is_baichuan, split_packed
from utils.models.weight_files import read_json, save_weights

KEPT_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        raise UserError(f"name both folders: {__doc__.splitlines()[2].strip()}")
    source, target = Path(sys.argv[1]).expanduser(), Path(sys.argv[2]).expanduser()
    if target.exists():
        raise UserError(f"{target} is there already: name a new folder")
    convert_folder(source, target)
    notice(f"{target} is ready: --model_name_or_path {target}")


def convert_folder(source: Path, target: Path) -> None:
    """Write `target` beside, then rename: it is whole or not there."""
    if not (source / "config.json").is_file():
        lacking = "holds no config.json, so no model" if source.is_dir() else "is no folder"
        raise UserError(f"{source} {lacking}: download one with `hf download HUB_ID --local-dir FOLDER`")
    files = sorted(source.glob("pytorch_model*.bin")) or sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(f"{source} holds neither pytorch_model*.bin nor *.safetensors: download it again")
    packed = is_baichuan(read_json(source / "config.json"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as beside:
        complete = Path(beside, "model")
        complete.mkdir()
        convert_files(files, complete)
        copy_other_files(source, complete)
        if packed:
            save_as_llama(source, complete)
        complete.rename(target)


def convert_files(files: list[Path], target: Path) -> None:
    owner: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        one = "model.safetensors"
        name = one if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = read_tensors(file)
        save_weights(tensors, target / name)
        owner |= dict.fromkeys(tensors, name)
        notice(f"{file.name} -> {name}, {len(tensors)} tensors")
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": owner}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def load_tensors(file: Path) -> Any:
    """What one file holds by name. Raises UserError where it is damaged or could run code."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        zipped = zipfile.is_zipfile(file)
        with open(file, "rb") as stream:
            if not zipped and stream.read(1) != pickle.PROTO:  # what torch wrote before 1.6 starts with it
                raise ValueError("it is no whole pickle")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors, and loading it would run its code: not converted "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, EOFError, KeyError, ValueError, RuntimeError, struct.error) as error:
        reason = str(error)[:80].partition("\n")[0] or "it ends early"
        raise UserError(f"{file} is damaged ({reason}): download it again") from error


def read_tensors(file: Path) -> dict[str, Any]:
    """Tensors of one file, W_pack cut, each with memory of its own; a tied pair is kept once."""
    import torch

    loaded, seen = load_tensors(file), set()
    tensors: dict[str, Any] = {}
    if not isinstance(loaded, dict):
        raise UserError(f"{file} holds a {type(loaded).__name__}, not tensors by name: not converted")
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor: not converted")
        memory = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and memory in seen:
            continue  # the output layer tied to the embedding
        seen.add(memory)
        parts = split_packed(name, tensor)
        tensors |= {part: cut.clone() if len(parts) > 1 else cut.contiguous() for part, cut in parts.items()}
    return tensors


def copy_other_files(source: Path, target: Path) -> None:
    for pattern in KEPT_FILES:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, target)


def save_as_llama(source: Path, target: Path) -> None:
    """LLaMA's config.json and a tokenizer.json in place of what Baichuan's own code reads."""
    from utils.models.tokenizer_files import load_own_tokenizer

    for path in [*target.glob("*.py"), target / "tokenizer.model"]:
        path.unlink(missing_ok=True)
    build_llama_config(read_json(source / "config.json")).save_pretrained(target)
    load_own_tokenizer(str(source), trust_remote_code=False).save_pretrained(target)


if __name__ == "__main__":
    run_main(main)
