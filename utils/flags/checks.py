"""Arguments completed and checked by what lies on disk, before any weight is read.

A 7B takes a minute to load, and a mistake should not take that long to show. config.json tells the context,
the headers of safetensors the shape of every matrix, run.json what a run was made with: kilobytes of some 14
GB, read in milliseconds, and without torch.
"""

import dataclasses
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments, require_choice
from utils.console import UserError, notice
from utils.flags.trackers import check_tracker
from utils.flags.trainer_names import list_optimizers, list_schedulers
from utils.models.folder import find_context, resolve_model
from utils.models.hub import check_login
from utils.models.weight_files import read_json
from utils.run.places import find_data
from utils.run.record import RUN_FILE

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


def resolve_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, given: set[str]
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments with what they leave open filled in: from the run they name, and the default output_dir.

    Raises UserError for all that is wrong about model, adapter, lengths and the Trainer's names.
    """
    if not training_args.do_train and model_args.checkpoint_dir is None and training_args.output_dir:
        if Path(training_args.output_dir, RUN_FILE).is_file():
            notice(f"evaluating the run in {training_args.output_dir}")
            model_args = dataclasses.replace(model_args, checkpoint_dir=training_args.output_dir)
    check_push(training_args)
    check_trainer_names(training_args)
    resolved = resolve_model(model_args, given, data_args.template)
    model_args = resolved.args
    if not training_args.do_train and resolved.record:
        recorded = read_recorded_data(resolved.record)
        data_args = dataclasses.replace(data_args, **{k: v for k, v in recorded.items() if k not in given})
        if "data_seed" not in given:
            training_args = training_args.with_values(data_seed=resolved.record["arguments"]["data_seed"])
    check_lengths(data_args, resolved.config)
    if training_args.output_dir is None:
        data, model = Path(data_args.dataset_name).stem, Path(model_args.base).name
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
    require_choice(training_args, "lr_scheduler_type", list_schedulers())
    require_choice(training_args, "optim", ["auto", *list_optimizers()])
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


def check_push(training_args: TrainingArguments) -> None:
    """Raises UserError where --push_to_hub could not work, before anything is trained."""
    if training_args.extra.get("push_to_hub"):
        check_login(training_args.extra.get("hub_token"))


def check_lengths(data_args: DataArguments, config: dict[str, Any]) -> None:
    """Raises UserError where a row could be longer than the model's context."""
    context = find_context(config)
    if context is not None and data_args.max_len > context:
        flag = "--model_max_length" if data_args.model_max_length else "--source_max_len + --target_max_len"
        raise UserError(
            f"{flag} is {data_args.max_len} tokens and the model's context is {context}: lower it"
        )
