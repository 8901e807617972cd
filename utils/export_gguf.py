"""A run as a GGUF file for llama.cpp and Ollama, with a Modelfile and a parity certificate.

    python -m utils.export_gguf RUN OUT [--outtype q8_0]

RUN is a run, a checkpoint of it, a bare adapter, or the folder of a whole model; OUT is a new folder:

    OUT-f16.gguf   weights with the adapter merged in, tokenizer, chat template, stop tokens
    Modelfile      Ollama's, where the template is one of ours or ChatML
    parity.json    llama.cpp's replies beside this chat's, where llama-cpp-python is installed

The adapter is merged on the way, tensor by tensor (see utils/merge_adapter.py): no 16-bit model is written in
between. Layouts of LLaMA (Mistral, Yi, Baichuan-7B) and Qwen2, Qwen3; for others llama.cpp's command.
"""

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.arguments import ModelArguments, flag, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import find_given_flags, parse_args
from utils.merge_adapter import check_mergeable, find_base_folder, read_adapter_config
from utils.models.folder import ResolvedModel, has_adapter, resolve_model
from utils.run.record import find_run_record

USAGE = "name the run and a new folder: python -m utils.export_gguf RUN OUT"


@dataclass
class ExportArguments:
    _argument_group_name = "export"
    output_dir: str | None = flag(None, "New folder of the GGUF file.")
    outtype: Literal["f16", "q8_0"] = flag("f16", "Type of the matrices.")
    merge_base: Literal["dequantized", "original"] = flag(
        "dequantized", "Add the adapter to the weights it was trained on, or the 16-bit ones."
    )
    parity: bool = flag(True, "Compare with llama-cpp-python, where it is installed: parity.json.")
    eval_dataset_name: str | None = flag(None, "Prompts to compare on; default: the run's own held-out rows.")
    max_eval_samples: int = flag(50, "Compare the first token of this many prompts at most.")
    replies: int = flag(8, "Compare the whole replies to the first of them.")

    def __post_init__(self) -> None:
        require_positive(self, "max_eval_samples", "replies")


def main() -> None:
    argv = name_folders(sys.argv[1:])
    model_args, export_args = parse_args(argv, [ModelArguments, ExportArguments], __doc__)
    if export_args.output_dir is None:
        raise UserError(USAGE)
    output_dir = Path(export_args.output_dir).expanduser()
    if output_dir.exists():
        raise UserError(f"{output_dir} exists: name a new folder")
    resolved = resolve_model(model_args, find_given_flags(argv))

    from utils.merge.gguf_file import check_layout

    check_layout(resolved.config)
    if resolved.has_adapter:
        check_mergeable(resolved.args, resolved.config, export_args.merge_base)
    elif "quantization_config" in resolved.config:
        raise UserError(f"{resolved.args.base} is stored quantized: name the 16-bit model")
    rows = find_prompts(resolved, export_args)
    file = export(resolved, export_args, output_dir)
    if rows is not None:
        from utils.merge.gguf_parity import certify

        if not certify(resolved, rows, output_dir / file, export_args.replies):
            raise SystemExit(1)


def name_folders(argv: list[str]) -> list[str]:
    """`RUN OUT flags` as flags: a folder with an adapter or a run.json is a run, another a model."""
    if not argv or argv[0].startswith("-"):
        return argv
    if len(argv) < 2 or argv[1].startswith("-"):
        raise UserError(USAGE)
    folder = Path(argv[0]).expanduser()
    is_run = not folder.is_dir() or has_adapter(folder) or find_run_record(folder) is not None
    name = "--checkpoint_dir" if is_run else "--model_name_or_path"
    return [name, argv[0], "--output_dir", argv[1], *argv[2:]]


def find_prompts(resolved: ResolvedModel, export_args: ExportArguments) -> Any:
    """Rows to compare on; None, with a line, where nothing is compared."""
    if not export_args.parity:
        return None
    if importlib.util.find_spec("llama_cpp") is None:
        notice(
            "llama-cpp-python is not installed: the file will not be compared (pip install llama-cpp-python)"
        )
        return None
    if resolved.record is None and export_args.eval_dataset_name is None:
        notice("no run.json, so no held-out rows to compare on: --eval_dataset_name FILE names some")
        return None
    from utils.merge.held_out import load_held_out_rows

    return load_held_out_rows(resolved, export_args.eval_dataset_name, export_args.max_eval_samples)


def export(resolved: ResolvedModel, export_args: ExportArguments, output_dir: Path) -> str:
    """Write `output_dir` whole, by a rename, or not at all; the GGUF file's name."""
    from utils.merge.gguf_file import save_gguf
    from utils.merge.modelfile import render_modelfile
    from utils.merge.weights import open_merged
    from utils.models.base import load_config
    from utils.models.tokenizer import load_run_tokenizer

    tokenizer, config = load_run_tokenizer(resolved), load_config(resolved.args)
    adapter = read_adapter_config(resolved.args) if resolved.has_adapter else None
    name = output_dir.name
    file = f"{name}-{export_args.outtype}.gguf"
    beside = output_dir.with_name(name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        import torch

        base = find_base_folder(resolved.args)
        with open_merged(resolved.args, base, adapter, export_args.merge_base, torch.float32) as merged:
            config.update(merged.changes)
            save_gguf(merged, config, tokenizer, name, export_args.outtype, beside / file)
        try:
            (beside / "Modelfile").write_text(render_modelfile(tokenizer, file), encoding="utf-8")
        except UserError as error:
            notice(str(error))
        beside.rename(output_dir)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # there only after a failure
    notice(f"{output_dir / file} is ready: llama-server -m {output_dir / file} --jinja")
    return file


if __name__ == "__main__":
    run_main(main)
