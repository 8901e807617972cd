"""Mistakes found from config.json, safetensors headers and run.json alone, before any weight is read."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments, require_choice
from utils.baichuan import is_baichuan, split_shapes
from utils.console import UserError, notice
from utils.hub import check_login, download_config
from utils.places import find_base, find_data
from utils.prompts import read_template
from utils.run_record import RUN_FILE, find_run_dir, find_run_record
from utils.trackers import check_tracker
from utils.trainer_names import OPTIMIZERS, SCHEDULERS
from utils.weight_files import check_tokenizer, find_misfit, read_base_shapes, read_json, read_shapes

ADAPTER_FILE = "adapter_model.safetensors"
NATIVE_KINDS = {"baichuan"}  # read without its own Python (utils/baichuan.py)
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
# What a run fixes for inference; flags given beside --checkpoint_dir override it.
RECORDED_MODEL_FIELDS = (
    "model_name_or_path",
    "revision",
    "bits",
    "double_quant",
    "quant_type",
    "bf16",
    "fp16",
    "full_finetune",
)
# How to get weights that are only published pickled; a pickle can run code, so none is read silently.
CONVERT = "convert it once: python -m utils.convert_weights FOLDER NEW_FOLDER"
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
MOVED_MODELS = {"decapoda-research/llama-7b-hf": "huggyllama/llama-7b"}
ADAPTER_FIELDS = {  # flag -> its name in adapter_config.json
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
RECORDED_DATA_FIELDS = (
    "dataset_name",
    "eval_dataset_name",
    "dataset_format",
    "columns",
    "data_dir",
    "load_from_local",
    "source_max_len",
    "target_max_len",
    "model_max_length",
    "eval_dataset_size",
    "truncation",
    "train_on_source",
    "train_last_turn_only",
)


def check_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, given: set[str]
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments with what they leave open filled in: from the run they name, and the default output_dir.

    Raises UserError for everything about model, adapter and lengths that is wrong before weights load.
    """
    if not training_args.do_train and model_args.checkpoint_dir is None and training_args.output_dir:
        if Path(training_args.output_dir, RUN_FILE).is_file():
            notice(f"evaluating the run in {training_args.output_dir}")
            model_args = dataclasses.replace(model_args, checkpoint_dir=training_args.output_dir)
    if not training_args.do_train and model_args.checkpoint_dir:
        record = find_run_record(Path(model_args.checkpoint_dir)) or {"arguments": {}}
        recorded = read_recorded_data(record)
        data_args = dataclasses.replace(data_args, **{k: v for k, v in recorded.items() if k not in given})
        if "data_seed" in record["arguments"] and "data_seed" not in given:
            training_args = training_args.with_values(data_seed=record["arguments"]["data_seed"])
    model_args = resolve_model(model_args, given)
    check_template(data_args)
    check_push(training_args)
    check_trainer_names(training_args)
    config = read_model_config(model_args)
    check_lengths(data_args, config)
    check_adapter_fits(model_args, config)
    if training_args.output_dir is None:
        data, model = Path(data_args.dataset_name).stem, Path(model_args.model_name_or_path).name
        output_dir = f"output/{data}-{model}"
        if model_args.checkpoint_dir and not training_args.do_train:
            output_dir = model_args.checkpoint_dir
        notice(f"--output_dir is {output_dir}")
        training_args = training_args.with_values(output_dir=output_dir)
    return model_args, data_args, training_args


def read_recorded_data(record: dict[str, Any]) -> dict[str, Any]:
    """The run's data flags, its files where they are found now."""
    recorded = {
        name: record["arguments"][name] for name in RECORDED_DATA_FIELDS if name in record["arguments"]
    }
    for name in ("dataset_name", "eval_dataset_name", "data_dir"):
        if recorded.get(name):
            recorded[name] = find_data(recorded[name], record)
    return recorded


def check_trainer_names(training_args: TrainingArguments) -> None:
    """Raises UserError for a scheduler, an optimizer or a logger that the Trainer does not know."""
    require_choice(training_args, "lr_scheduler_type", list(SCHEDULERS))
    require_choice(training_args, "optim", ["auto", *OPTIMIZERS])
    for name in training_args.report_to:
        if name not in ("none", "all"):
            check_tracker(name)


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
                "flag out to go on with it, or leave --checkpoint_dir out to start another"
            )
    return dataclasses.replace(lora_args, **own)


def resolve_model(model_args: ModelArguments, given: set[str]) -> ModelArguments:
    """`model_args` with what the run behind --checkpoint_dir recorded; each flag in `given` overrides it.

    Raises UserError where no base model is named, a folder is missing, or the checkpoint holds no adapter.
    """
    if model_args.checkpoint_dir is None:
        if model_args.model_name_or_path is None:
            raise UserError(
                "no model is named: give --model_name_or_path FOLDER_OR_HUB_ID, or --checkpoint_dir RUN"
            )
        return dataclasses.replace(
            model_args,
            model_name_or_path=check_model_path(model_args.model_name_or_path, model_args.allow_pickle),
        )
    folder = Path(model_args.checkpoint_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"--checkpoint_dir {model_args.checkpoint_dir}: no such folder")
    check_pickle(folder, ADAPTER_FILE, model_args.allow_pickle)
    recorded = read_recorded_fields(folder, "model_name_or_path" in given)
    for name, value in recorded.items():
        mine = getattr(model_args, name)
        if name in given and mine != value:
            notice(f"--{name} {mine} overrides the run's {value}")
    chosen = {name: value for name, value in recorded.items() if name not in given}
    if {"bf16", "fp16"} & given:  # one dtype flag replaces the recorded pair
        chosen = {name: value for name, value in chosen.items() if name not in ("bf16", "fp16")}
    resolved = dataclasses.replace(model_args, checkpoint_dir=str(folder), **chosen)
    base = check_model_path(resolved.model_name_or_path, model_args.allow_pickle)
    return dataclasses.replace(resolved, model_name_or_path=base)


def has_adapter(folder: Path) -> bool:
    return any((folder / ADAPTER_FILE).with_suffix(suffix).is_file() for suffix in (".safetensors", ".bin"))


def check_pickle(folder: Path, wanted: str, allow_pickle: bool) -> None:
    """Raises UserError where `folder` has pickled files and none named like `wanted`, safetensors."""
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if any(folder.glob(wanted)) or not pickled:
        return
    if not allow_pickle:
        raise UserError(
            f"{folder} holds pickled weights ({pickled[0]}) and no safetensors, and a pickle can run code: "
            f"{CONVERT}, or trust their author with --allow_pickle"
        )
    notice(f"--allow_pickle: {folder}/{pickled[0]} is read by torch.load(weights_only=True)")


def check_remote_code(model_args: ModelArguments, config: dict[str, Any]) -> None:
    """Say that a model's own Python may run; UserError where the model needs it and it is not allowed."""
    name, kind = model_args.model_name_or_path, str(config.get("model_type"))
    if model_args.trust_remote_code:
        notice(f"--trust_remote_code: Python code shipped with {name} may run here, with all your rights")
    elif "auto_map" in config:
        package = importlib.util.find_spec("transformers").submodule_search_locations[0]
        if kind not in NATIVE_KINDS and not Path(package, "models", kind.replace("-", "_")).is_dir():
            raise UserError(
                f"{name} is of a kind that transformers does not know ({kind}) and ships its own Python: "
                "read that code, then allow it with --trust_remote_code"
            )


def read_recorded_fields(folder: Path, names_base: bool) -> dict[str, Any]:
    """Base and quantization of the run that `folder` belongs to, from run.json or adapter_config.json.

    `names_base`: a flag names the base, so the run's own need not be there.
    """
    record = find_run_record(folder)
    is_trained_whole = record is not None and record["arguments"].get("full_finetune")
    if not is_trained_whole and not has_adapter(folder) and (folder / "config.json").is_file():
        raise UserError(
            f"--checkpoint_dir {folder} holds a whole model and no adapter: use --model_name_or_path {folder}"
        )
    if record is not None:
        fields = {name: record["arguments"].get(name) for name in RECORDED_MODEL_FIELDS}
        if is_trained_whole:
            fields["model_name_or_path"] = str(folder)  # the weights themselves were trained
        elif not has_adapter(folder):
            raise UserError(
                f"--checkpoint_dir {folder} holds no {ADAPTER_FILE}: "
                f"the run is {record['status']}; name one of its checkpoint-N folders"
            )
        elif not names_base:
            fields["model_name_or_path"] = find_base(record, find_run_dir(folder))
        return fields
    if not has_adapter(folder) or not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--checkpoint_dir {folder} holds no adapter (adapter_config.json and {ADAPTER_FILE}) "
            "and no run.json: name a run, a checkpoint-N of it, or a PEFT adapter folder"
        )
    adapter = read_json(folder / "adapter_config.json")
    notice(
        f"{folder} has no run.json: the base {adapter['base_model_name_or_path']} is read from "
        "adapter_config.json; quantization and prompt are the flags' and the tokenizer's"
    )
    return {"model_name_or_path": adapter["base_model_name_or_path"]}


def check_model_path(name: str, allow_pickle: bool) -> str:
    """`name` with ~ expanded. Raises UserError for a folder that is missing or holds no model."""
    if name in MOVED_MODELS:
        notice(f"{name} has left the hub: {MOVED_MODELS[name]} holds the same weights")
    path = Path(name).expanduser()
    if path.is_dir():
        if has_adapter(path) and not (path / "config.json").is_file():
            raise UserError(
                f"--model_name_or_path {name} holds an adapter and no model: use --checkpoint_dir {name}"
            )
        if not (path / "config.json").is_file():
            raise UserError(
                f"--model_name_or_path {name}: the folder has no config.json, so it holds no model"
            )
        if not any(path.glob("*.safetensors")):
            check_pickle(path, "*.safetensors", allow_pickle)
        if not any(file.suffix in {".safetensors", *PICKLE_SUFFIXES} for file in path.iterdir()):
            raise UserError(
                f"--model_name_or_path {name}: the folder has no .safetensors file: download it again"
            )
        return str(path)
    if path.exists():
        raise UserError(f"--model_name_or_path {name} is a file: name the folder of the model")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).parts[0] in ("models", "output"):
        raise UserError(f"--model_name_or_path {name}: no such folder")
    return name


def read_model_config(model_args: ModelArguments) -> dict[str, Any]:
    """config.json of the base, from its folder or the hub."""
    path = Path(model_args.model_name_or_path)
    if not path.is_dir():
        path = download_config(model_args)
    else:
        path = path / "config.json"
    config = read_json(path)
    check_remote_code(model_args, config)
    return config


def check_push(training_args: TrainingArguments) -> None:
    """Raises UserError where --push_to_hub could not work, before anything is trained."""
    if training_args.extra.get("push_to_hub"):
        check_login(training_args.extra.get("hub_token"))


def check_lengths(data_args: DataArguments, config: dict[str, Any]) -> None:
    """Raises UserError where a row could be longer than the model's context."""
    text_config = config.get("text_config", config)
    context = next((text_config[key] for key in CONTEXT_KEYS if isinstance(text_config.get(key), int)), None)
    if context is not None and data_args.max_len > context:
        flag = "--model_max_length" if data_args.model_max_length else "--source_max_len + --target_max_len"
        raise UserError(
            f"{flag} is {data_args.max_len} tokens and the model's context is {context}: lower it"
        )


def check_template(data_args: DataArguments) -> None:
    if data_args.template is not None:
        read_template(data_args.template)


def check_adapter_fits(model_args: ModelArguments, config: dict[str, Any]) -> None:
    """Raises UserError where a file is missing or cut off, or the adapter's shapes are not the base's.

    Reads safetensors headers only.

    A base that is not on this disk as plain safetensors is checked by PEFT while it loads.
    """
    check_tokenizer(model_args)
    packed = is_baichuan(config)  # refuses its relatives
    base = read_base_shapes(Path(model_args.model_name_or_path))
    if model_args.checkpoint_dir is None or model_args.full_finetune or "quantization_config" in config:
        return
    adapter = read_shapes(list(Path(model_args.checkpoint_dir).glob(ADAPTER_FILE)))
    if packed:
        base = split_shapes(base)
    misfit = find_misfit(adapter, base) if base else None
    if misfit:
        raise UserError(
            f"the adapter {model_args.checkpoint_dir} does not fit the base "
            f"{model_args.model_name_or_path}: {misfit}; name the base it was trained on"
        )
