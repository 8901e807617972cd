"""Optimizer, schedule, loss scale and random numbers as safetensors and JSON: nothing pickled."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

TENSORS_FILE, TREE_FILE = "optimizer.safetensors", "training_state.json"
TENSOR_KEY = "__tensor__"


def save_training_state(state: dict[str, Any], folder: Path) -> None:
    """Write `state`, dicts and lists of numbers, text and tensors, bit for bit."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged states are read by the host while kernels may still write them
    tensors: dict[str, torch.Tensor] = {}
    tree = pack_tree(state, "", tensors, {})
    save_file(tensors, folder / TENSORS_FILE)
    (folder / TREE_FILE).write_text(json.dumps(tree) + "\n", encoding="utf-8")


def load_training_state(folder: Path) -> dict[str, Any]:
    tensors = load_file(folder / TENSORS_FILE)
    state = unpack_tree(json.loads((folder / TREE_FILE).read_text(encoding="utf-8")), tensors)
    by_parameter = state["optimizer"]["state"]  # JSON turned its numbers into text
    state["optimizer"]["state"] = {int(number): values for number, values in by_parameter.items()}
    return state


def pack_tree(tree: Any, path: str, tensors: dict[str, torch.Tensor], seen: dict[tuple, str]) -> Any:
    """`tree` with each tensor moved into `tensors` under its path; one that appears twice is kept once."""
    if isinstance(tree, torch.Tensor):
        key = (tree.data_ptr(), tree.shape, tree.dtype, tree.stride(), tree.device)
        if key not in seen:
            seen[key] = path
            tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {TENSOR_KEY: seen[key]}
    if isinstance(tree, dict):
        return {
            str(name): pack_tree(value, f"{path}.{name}" if path else str(name), tensors, seen)
            for name, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return [pack_tree(value, f"{path}.{i}", tensors, seen) for i, value in enumerate(tree)]
    return tree


def unpack_tree(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, dict):
        if TENSOR_KEY in tree:
            return tensors[tree[TENSOR_KEY]]
        return {name: unpack_tree(value, tensors) for name, value in tree.items()}
    return [unpack_tree(value, tensors) for value in tree] if isinstance(tree, list) else tree


def read_rng() -> dict[str, Any]:
    """The state of every generator that training may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


@contextmanager
def rng_kept() -> Iterator[None]:
    """What is drawn inside does not change what is drawn after: evaluations leave training as it is."""
    before = read_rng()
    try:
        yield
    finally:
        restore_rng(before)


def name_rng_file(process: int) -> str:
    return f"rng_state_{process}.json"


def save_rng(state: dict[str, Any], path: Path) -> None:
    text = json.dumps(state, default=lambda array: array.tolist())  # NumPy's and torch's
    path.write_text(text + "\n", encoding="utf-8")


def load_rng(folder: Path, process: int) -> dict[str, Any]:
    """That of `process`; the first one's where fewer processes saved the checkpoint."""
    paths = [folder / name_rng_file(number) for number in (process, 0)]
    content = json.loads(next(path for path in paths if path.is_file()).read_text(encoding="utf-8"))
    version, keys, gauss = content["python"]
    return {
        "python": (version, tuple(keys), gauss),
        "numpy": tuple(content["numpy"]),
        "torch": torch.tensor(content["torch"], dtype=torch.uint8),
        "cuda": [torch.tensor(device, dtype=torch.uint8) for device in content["cuda"]],
    }
