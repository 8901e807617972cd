"""Merge a run's adapter into its base: a standard model folder for servers, with a parity certificate.

    python -m utils.merge_adapter --checkpoint_dir RUN --output_dir FOLDER

The adapter was trained on the dequantized 4-bit weights, so by default it is merged into those;
--merge_base original takes the 16-bit weights, and the model changes by the quantization error. Runs on the
CPU, one shard (2 GB) in memory at a time. parity.json compares the folder with the adapter on its quantized
base on held-out rows, one model after the other, on the GPU where there is one; past its limits the command
ends with exit code 1.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.arguments import ModelArguments, flag, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import find_given_flags, parse_args
from utils.models.baichuan import build_llama_config, is_baichuan
from utils.models.folder import ADAPTER_FILE, ResolvedModel, resolve_model
from utils.models.hub import find_base_folder
from utils.models.weight_files import read_json
from utils.run.record import write_json

# Fields of adapter_config.json that the arithmetic of merge/weights.py follows, or that do not change what an
# adapter computes. Any other that is set, also one of a PEFT to come, is refused.
MERGEABLE_FIELDS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# init_lora_weights that leave the base as it is; PiSSA, OLoRA and others change it before training.
KEEPING_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass
class MergeArguments:
    _argument_group_name = "merge"
    output_dir: str | None = flag(None, "New folder of the merged model.")
    merge_base: Literal["dequantized", "original"] = flag(
        "dequantized", "Add the adapter to the weights it was trained on, or the 16-bit ones."
    )
    parity: bool = flag(True, "Compare the result with the adapter on its base: parity.json.")
    eval_dataset_name: str | None = flag(None, "Rows to compare on; default: the run's own held-out rows.")
    max_eval_samples: int = flag(32, "Compare on this many rows at most.")

    def __post_init__(self) -> None:
        require_positive(self, "max_eval_samples")


def main() -> None:
    model_args, merge_args = parse_args(sys.argv[1:], [ModelArguments, MergeArguments], __doc__)
    output_dir = check_output_dir(model_args, merge_args)
    resolved = resolve_model(model_args, find_given_flags(sys.argv[1:]))
    check_mergeable(resolved.args, resolved.config, merge_args.merge_base)

    from utils.merge.held_out import load_held_out_rows
    from utils.merge.parity import certify

    rows = None
    if merge_args.parity:
        rows = load_held_out_rows(resolved, merge_args.eval_dataset_name, merge_args.max_eval_samples)
    merge(resolved, merge_args.merge_base, output_dir)
    print_serving_commands(output_dir)
    if rows and not certify(resolved, rows, output_dir):
        raise SystemExit(1)


def check_output_dir(model_args: ModelArguments, merge_args: MergeArguments) -> Path:
    if model_args.checkpoint_dir is None:
        raise UserError("no adapter is named: give --checkpoint_dir RUN")
    if merge_args.output_dir is None:
        raise UserError("no place for the result is named: give --output_dir FOLDER")
    output_dir = Path(merge_args.output_dir).expanduser()
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir} exists: name a new folder")
    return output_dir


def check_mergeable(model_args: ModelArguments, config: dict[str, Any], merge_base: str) -> None:
    """Raises UserError for what cannot be merged, before any weight is read."""
    if model_args.full_finetune:
        raise UserError(f"--checkpoint_dir {model_args.checkpoint_dir} holds a whole model: nothing to merge")
    if "quantization_config" in config:
        name = model_args.model_name_or_path
        if merge_base == "original" or model_args.bits == 8:
            how = f"--merge_base {merge_base}" if model_args.bits == 4 else "in 8 bits"
            raise UserError(
                f"{name} is stored quantized, {how}: name the 16-bit model (--model_name_or_path)"
            )
        notice(
            f"{name} is stored in 4 bits: its weights are unpacked, exactly, and the adapter is added to them"
        )
    if not (model_args.adapter_dir / ADAPTER_FILE).is_file():
        raise UserError(
            f"{model_args.checkpoint_dir} holds no {ADAPTER_FILE}: a pickled adapter cannot be merged"
        )
    check_adapter_kind(model_args)


def check_adapter_kind(model_args: ModelArguments) -> None:
    """Raises UserError for an adapter that is no sum of weights."""
    adapter = read_adapter_config(model_args)
    if adapter["peft_type"] != "LORA" or adapter.get("fan_in_fan_out"):
        raise UserError(
            f"the adapter {model_args.checkpoint_dir} is {adapter['peft_type']} on "
            f"{'transposed' if adapter.get('fan_in_fan_out') else 'linear'} layers: only LoRA and DoRA on "
            "linear layers can be merged"
        )
    if parameters := adapter.get("target_parameters"):
        raise UserError(
            f"the adapter {model_args.checkpoint_dir} has target_parameters {parameters}: a mixture's "
            "experts are not merged here, chat and evaluation take base and adapter"
        )
    foreign = {name: value for name, value in adapter.items() if value and name not in MERGEABLE_FIELDS}
    if adapter.get("init_lora_weights", True) not in KEEPING_STARTS:
        foreign = {"init_lora_weights": adapter["init_lora_weights"]} | foreign
    if foreign:
        name, value = next(iter(foreign.items()))
        raise UserError(
            f"the adapter {model_args.checkpoint_dir} has {name} {value}: no sum of the base's weights and "
            "its own says that, so it cannot be merged"
        )


def read_adapter_config(model_args: ModelArguments) -> dict[str, Any]:
    return read_json(model_args.adapter_dir / "adapter_config.json")


def merge(resolved: ResolvedModel, merge_base: str, output_dir: Path) -> None:
    """Write the merged model. `output_dir` appears complete, by a rename, or not at all."""
    from utils.merge.weights import merge_weights

    model_args, config = resolved.args, resolved.config
    beside = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        base = find_base_folder(model_args)
        changes = merge_weights(model_args, base, read_adapter_config(model_args), merge_base, beside)
        if is_baichuan(config):
            config = build_llama_config(config).to_dict()
        save_companions(resolved, base, config | changes, beside)
        beside.rename(output_dir)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # there only after a failure
    notice(f"merged into the {merge_base} base: {output_dir}, {changes['dtype']}")


def save_companions(resolved: ResolvedModel, base: Path, config: dict[str, Any], folder: Path) -> None:
    """config.json, tokenizer with its template, generation_config.json with every stop token, model code."""
    from utils.models.tokenizer import load_run_tokenizer

    tokenizer = load_run_tokenizer(resolved)
    kept = {k: value for k, value in config.items() if k not in ("torch_dtype", "quantization_config")}
    write_json(kept, folder / "config.json")
    tokenizer.raw.save_pretrained(folder)
    path = base / "generation_config.json"
    generation = read_json(path) if path.is_file() else {"bos_token_id": tokenizer.raw.bos_token_id}
    generation.pop("_from_model_config", None)  # transformers would read config.json's ids in place of these
    stops = {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.raw.pad_token_id}
    write_json(generation | stops, folder / path.name)
    for code in base.glob("*.py") if "auto_map" in config else []:
        shutil.copyfile(code, folder / code.name)


def print_serving_commands(folder: Path) -> None:
    """Each server finds template and stop tokens in the folder: they need no further flags."""
    name = folder.resolve().name
    trust = " --trust-remote-code" if "auto_map" in read_json(folder / "config.json") else ""
    print(
        "to serve it to many users, by OpenAI's API:\n"
        f"  transformers serve {folder}{trust}\n"
        f"  vllm serve {folder} --served-model-name {name}{trust}\n"
        f"  python convert_hf_to_gguf.py {folder} --outfile {name}.gguf; llama-server -m {name}.gguf --jinja"
    )


if __name__ == "__main__":
    run_main(main)
