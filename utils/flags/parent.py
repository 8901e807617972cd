"""A run that starts from an adapter: what it takes from it, and what must be as it was there.

The adapter brings its rank, alpha and layers, and the base that its numbers are added to. On another base
they would mean nothing, so that is refused. Other rows, learning rates and prompts are the point.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.arguments import LoraArguments, ModelArguments
from utils.console import UserError, notice
from utils.models.folder import has_adapter
from utils.models.weight_files import read_json
from utils.run.record import CHANGING_STARTS, find_run_record
from utils.run.resume import fingerprint_folder

PARENT = "--adapter_name_or_path"  # --checkpoint_dir, by the name that it has in training
ADAPTER_FIELDS = {  # flag -> its name in adapter_config.json
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


@contextmanager
def named_as_typed(argv: list[str]) -> Iterator[None]:
    """Let a UserError inside call the flag what the user did."""
    try:
        yield
    except UserError as error:
        is_typed = any(word.replace("-", "_").startswith("__adapter_name_or_path") for word in argv)
        raise UserError(str(error).replace("--checkpoint_dir", PARENT) if is_typed else error) from error


def resolve_adapter(lora_args: LoraArguments, model_args: ModelArguments, given: set[str]) -> LoraArguments:
    """The shape of the adapter in --checkpoint_dir, if one is named; UserError where flags `given` differ."""
    if model_args.checkpoint_dir is None or model_args.full_finetune:
        return lora_args
    path = Path(model_args.checkpoint_dir, "adapter_config.json")
    if not path.is_file():
        return lora_args
    adapter = read_json(path)
    own = {key: adapter[name] for key, name in ADAPTER_FIELDS.items() if name in adapter}
    layers = own.get("lora_target_modules") or []
    if isinstance(layers, str):  # a regular expression
        own["lora_target_modules"] = [layers]
    else:  # PEFT may list every layer by its path
        own["lora_target_modules"] = sorted({name.split(".")[-1] for name in layers})
    for name in sorted(own.keys() & given):
        mine = getattr(lora_args, name)
        is_same = set(mine) == set(own[name]) if isinstance(mine, list) else mine == own[name]
        if not is_same and mine != ["all-linear"]:
            raise UserError(
                f"--{name} {mine}: the adapter in {model_args.checkpoint_dir} has {own[name]}; leave the "
                f"flag out to go on with it, or leave {PARENT} out to start another"
            )
    return dataclasses.replace(lora_args, **own)


def check_parent(model_args: ModelArguments) -> None:
    """Raises UserError where the adapter in --checkpoint_dir cannot be trained on, or not on this base."""
    if model_args.checkpoint_dir is None:
        return
    folder = Path(model_args.checkpoint_dir)
    if model_args.full_finetune and has_adapter(folder):
        raise UserError(
            f"--full_finetune trains every weight and {PARENT} {folder} is an adapter: merge it into its "
            "base first (python -m utils.merge_adapter), or leave --full_finetune out"
        )
    if model_args.full_finetune:
        return
    adapter = read_json(folder / "adapter_config.json")
    if adapter.get("peft_type", "LORA") != "LORA":
        raise UserError(
            f"{PARENT} {folder} holds an adapter of the kind {adapter['peft_type']}: LoRA is trained here"
        )
    if adapter.get("init_lora_weights") in CHANGING_STARTS:
        raise UserError(
            f"{PARENT} {folder} belongs to a base that {adapter['init_lora_weights']} has changed: name the "
            "finished run, whose adapter fits the base as it is"
        )
    check_same_base(folder, model_args.base, adapter.get("base_model_name_or_path"))


def check_same_base(folder: Path, base: str, named: str | None) -> None:
    """Raises UserError where `base` is not the one of the adapter in `folder`, whose config says `named`."""
    record = find_run_record(folder)
    if record is None:
        if named and Path(named).name != Path(base).name:
            notice(f"the adapter in {folder} names {named} as its base: {base} is taken for the same model")
        return
    name, wanted = record["base_model"]["name"], record["base_model"].get("fingerprint")
    found = fingerprint_folder(Path(base))
    if (wanted and found and wanted != found) or (not (wanted or found) and name != base):
        changed = "whose files have changed since" if name == base else f"and {base} is another model"
        raise UserError(
            f"{PARENT} {folder} was trained on {name}, {changed}: name its base with --model_name_or_path, "
            f"or leave {PARENT} out"
        )
