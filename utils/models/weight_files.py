"""What a model's folder must hold, seen from file names and safetensors headers alone."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.models.hub import find_base_folder

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

TOKENIZER_FILE = re.compile(r"tokenizer|vocab|spiece|.*\.(model|tiktoken)$")
OUTPUT_LAYERS = {"lm_head", "embed_out"}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error}): download the model again") from error


def read_base_shapes(folder: Path) -> dict[str, list[int]]:
    """{name: shape} of the base's weights; {} where they are not safetensors in a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in wanted if not (folder / name).is_file())
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which its index names: download the model again")
    return read_shapes(sorted(folder.glob("*.safetensors")))


def find_weight_files(model_args: ModelArguments) -> dict[str, Path]:
    """{name: safetensors file} of the base's weights, downloaded where it is a hub id."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(find_base_folder(model_args).glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def check_tokenizer(model_args: ModelArguments) -> None:
    """Raises UserError where neither the base's folder nor that of --checkpoint_dir holds a tokenizer."""
    folders = [Path(path) for path in (model_args.model_name_or_path, model_args.checkpoint_dir) if path]
    if not folders[0].is_dir():
        return
    if not any(path for folder in folders for path in folder.iterdir() if TOKENIZER_FILE.match(path.name)):
        raise UserError(
            f"--model_name_or_path {folders[0]} holds no tokenizer (tokenizer.json, tokenizer.model, ...): "
            "copy its files from where the model was published"
        )


def find_misfit(
    adapter: dict[str, list[int]], base: dict[str, list[int]], has_parameters: bool = False
) -> str | None:
    """The first LoRA matrix (lora_A [r, in], lora_B [out, r]) that does not fit its layer [out, in].

    `has_parameters`: some are of parameters and not of layers (PEFT's `target_parameters`, which all experts
    of a mixture are). Theirs have names that no file has, and PEFT checks them.
    """
    for name, shape in adapter.items():
        layer, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        if not matrix.startswith(("A.", "B.")):
            continue
        # Some publish the decoder alone (BLOOM): its layers' names lack the first word.
        expected = base.get(f"{layer}.weight") or base.get(f"{layer.partition('.')[2]}.weight")
        if expected is None and layer in OUTPUT_LAYERS:
            continue  # tied: its weight is stored as the embedding's, and PEFT checks it
        if expected is None and has_parameters:
            continue
        if expected is None:
            return f"the base has no layer {layer}"
        side = 1 if matrix.startswith("A.") else 0
        if shape[side] not in expected:  # GPT-2 stores [in, out]
            kind, (rows, columns) = f"lora_{matrix[0]}", expected
            return f"{layer} is {rows} x {columns} and the adapter's {kind} is {shape[0]} x {shape[1]}"
    return None


def save_weights(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    """A new safetensors file with the rights of any new file: save_file's own only its owner can read."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # what the umask leaves
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def open_weights(file: Path, framework: str) -> "safe_open":
    """A context manager, to read what `file` holds by name."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): download or train it again") from error


def read_shapes(files: list[Path]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        with open_weights(file, "numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    return shapes
