"""Quantize a base once, to 4 bits, and save it as bitsandbytes does: transformers loads the folder as it is.

    python -m utils.quantize_base MODEL NEW_FOLDER --bits 4
    python qlora_finetune.py --model_name_or_path NEW_FOLDER

MODEL is a folder or a hub id. A 7B of 13.5 GB becomes 3.9 GB, a 65B of 131 GB becomes 36. Codes and scales
are those that loading MODEL on a GPU would make, so a run on NEW_FOLDER is the same run, and reads less. One
weight at a time is read in 16 bits, and one shard (2 GB) is in memory: a 65B needs no more than a 7B.
"""

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.arguments import ModelArguments, flag
from utils.console import UserError, notice, run_main
from utils.convert_weights import copy_other_files, save_as_llama
from utils.flags.parser import parse_args, prepend_flag
from utils.models.baichuan import is_baichuan
from utils.models.folder import find_model, read_model_config
from utils.models.hub import find_base_folder
from utils.models.weight_files import read_json
from utils.run.record import write_json

if TYPE_CHECKING:
    import torch


@dataclass
class QuantizeArguments:
    _argument_group_name = "quantize"
    output_dir: str | None = flag(None, "New folder of the quantized model: the second word.")


def main() -> None:
    argv = prepend_flag(sys.argv[1:], "--model_name_or_path")
    argv = argv[:2] + prepend_flag(argv[2:], "--output_dir")
    model_args, own_args = parse_args(argv, [ModelArguments, QuantizeArguments], __doc__)
    if model_args.model_name_or_path is None or own_args.output_dir is None:
        raise UserError(
            "name a model and a new folder: python -m utils.quantize_base MODEL NEW_FOLDER --bits 4"
        )
    target = Path(own_args.output_dir).expanduser()
    if target.exists():
        raise UserError(f"{target} is there already: name a new folder")
    if model_args.bits != 4:
        raise UserError(
            f"--bits {model_args.bits}: only 4 bits are worth a folder of their own: use --bits 4"
        )
    model_args.model_name_or_path = find_model(model_args)
    if "quantization_config" in read_model_config(model_args):
        raise UserError(f"{model_args.base} is stored quantized already: name the 16-bit model")
    quantize_folder(model_args, find_base_folder(model_args), target)
    notice(f"{target} is ready: --model_name_or_path {target}")


def quantize_folder(model_args: ModelArguments, source: Path, target: Path) -> None:
    """Write `target` beside, then rename: it is whole or not there."""
    import torch

    from utils.models.base import build_quantization

    dtype = torch.float16 if model_args.fp16 else torch.bfloat16
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantizing-") as beside:
        complete = Path(beside, "model")
        complete.mkdir()
        copy_other_files(source, complete)
        quantize_weights(model_args, source, complete, dtype)
        if is_baichuan(read_json(source / "config.json")):
            save_as_llama(source, complete)
        quantization = build_quantization(model_args, dtype)
        assert quantization is not None
        config = read_json(complete / "config.json") | {"quantization_config": quantization.to_dict()}
        write_json(config | {"dtype": str(dtype).removeprefix("torch.")}, complete / "config.json")
        complete.rename(target)


def quantize_weights(model_args: ModelArguments, source: Path, folder: Path, dtype: "torch.dtype") -> None:
    """The weights of `source` into `folder`: quantized where loading would do it, else as they are."""
    import torch

    from utils.merge.base_tensors import find_names_on_disk, open_tensors
    from utils.merge.shards import save_sharded
    from utils.merge.weights import find_quantized_weights
    from utils.models.base import build_without_weights, has_gpu

    model = build_without_weights(model_args)
    device = "cuda" if has_gpu(model_args) else "cpu"
    with ExitStack() as stack:
        stored = open_tensors(source, is_baichuan(read_json(source / "config.json")), stack)
        names = find_names_on_disk(model, list(stored))
        codes = {names[name] for name in find_quantized_weights(model, model_args, dtype) if name in names}
        if not codes:
            raise UserError(f"{source} has no linear layer that 4 bits are for")
        last: dict[str, dict[str, torch.Tensor]] = {}  # the weight that was quantized last, all its tensors

        def build(name: str) -> torch.Tensor:
            whole = owners.get(name)
            if whole is None:
                return stored[name].read()
            if whole not in last:
                last.clear()
                last[whole] = quantize(stored[whole].read().to(device, dtype), whole, model_args)
            return last[whole][name]

        planned, owners = plan_tensors(stored, codes, model_args)
        save_sharded(planned, build, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    notice(f"{len(codes)} of {len(stored)} weights are in 4 bits: {size / 1e9:.2f} GB")


def quantize(weight: "torch.Tensor", name: str, model_args: ModelArguments) -> dict[str, "torch.Tensor"]:
    """{name on disk: tensor} of the codes of `weight`  # [out, in] and of all that unpacks them."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight, compress_statistics=model_args.double_quant, quant_type=model_args.quant_type
    )
    parts = state.as_dict(packed=True)
    return {name: codes.cpu()} | {f"{name}.{end}": part.cpu() for end, part in parts.items()}


def plan_tensors(
    stored: Any, codes: set[str], model_args: ModelArguments
) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """(what is written, on the meta device; {name of a part: name of the weight that it is of})"""
    import torch

    sample = quantize(torch.ones(64, 64), "", model_args)  # 4,096 weights, by the ends of the parts' names
    planned: dict[str, torch.Tensor] = {}
    owners: dict[str, str] = {}
    for name, tensor in stored.items():
        if name not in codes:
            planned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            continue
        for end, part in sample.items():
            grows = torch.Size(tensor.shape).numel() / 4096 if end in ("", ".absmax") else 1
            planned[name + end] = torch.empty(round(part.nbytes * grows), dtype=torch.uint8, device="meta")
            owners[name + end] = name
    return planned, owners


if __name__ == "__main__":
    run_main(main)
