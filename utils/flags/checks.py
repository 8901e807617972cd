"""Arguments completed and checked by what lies on disk, before any weight is read.

A 7B takes a minute to load, and a mistake should not take that long to show. config.json tells the context,
the headers of safetensors the shape of every matrix, run.json what a run was made with: kilobytes of some 14
GB, read in milliseconds, and without torch.
"""

import dataclasses
from pathlib import Path
from typing import Any

from utils.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    require_choice,
    require_range,
)
from utils.console import UserError, notice, read_rank_and_size
from utils.flags.trackers import check_tracker
from utils.flags.trainer_flags import list_optimizers, list_schedulers
from utils.models.baichuan import is_baichuan
from utils.models.folder import find_context, resolve_model
from utils.models.hub import check_login
from utils.run.places import find_data
from utils.run.record import RUN_FILE

TWO_RATES = ("adamw", "paged_adamw", "lion", "paged_lion", "sgd", "rmsprop", "ademamix", "paged_ademamix")
# What a schedule cannot do without; one of several is enough.
SCHEDULE_NEEDS = {
    "warmup_stable_decay": ("num_decay_steps",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
}
# Data flags that an evaluation does not take from the run: they choose what is printed, or are its own.
NOT_RECORDED = {"template", "max_train_samples", "max_eval_samples", "data_report", "ignore_data_report"}


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
    check_best(training_args)
    resolved = resolve_model(model_args, given, data_args.template)
    model_args = resolved.args
    if not training_args.do_train and resolved.record:
        recorded = read_recorded_data(resolved.record)
        data_args = dataclasses.replace(data_args, **{k: v for k, v in recorded.items() if k not in given})
        if "thinking" not in given:  # of the rows as they were trained; of replies as recorded
            asked = resolved.record["arguments"].get("thinking", "auto")
            model_args = dataclasses.replace(model_args, thinking=asked)
        if "data_seed" not in given:
            training_args = training_args.with_values(data_seed=resolved.record["arguments"]["data_seed"])
    check_lengths(data_args, resolved.config)
    check_shards(model_args, training_args, resolved.config)
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
    own = {field.name for field in dataclasses.fields(DataArguments)} - NOT_RECORDED
    recorded = {name: value for name, value in record["arguments"].items() if name in own}
    for name in ("dataset_name", "eval_dataset_name", "data_dir"):
        if recorded.get(name):
            recorded[name] = find_data(recorded[name], record)
    return recorded


def check_trainer_names(training_args: TrainingArguments) -> None:
    """Raises UserError for a scheduler, an optimizer or a logger that the Trainer does not know.

    And for what else it would refuse with the weights loaded.
    """
    extra, schedule = training_args.extra, training_args.lr_scheduler_type
    require_choice(training_args, "lr_scheduler_type", list_schedulers())
    wanted = SCHEDULE_NEEDS.get(schedule, ())
    if wanted and not any(name in str(extra.get("lr_scheduler_kwargs")) for name in wanted):
        raise UserError(
            f"--lr_scheduler_type {schedule} wants {' or '.join(wanted)}: give "
            f"--lr_scheduler_kwargs '{{\"{wanted[0]}\": NUMBER}}'"
        )
    require_range("label_smoothing_factor", float(extra.get("label_smoothing_factor") or 0), below=1)
    require_range("neftune_noise_alpha", float(extra.get("neftune_noise_alpha") or 0))
    require_choice(training_args, "optim", ["auto", *list_optimizers()])
    for name in training_args.report_to:
        if name not in ("none", "all"):
            check_tracker(name)


def check_lora(
    model_args: ModelArguments, lora_args: LoraArguments, training_args: TrainingArguments
) -> None:
    """Raises UserError where a way to begin or to learn A and B does not go with the other flags."""
    ratio, begin, optim = lora_args.loraplus_lr_ratio, lora_args.init_lora_weights, training_args.optim
    if ratio and (model_args.full_finetune or not optim.startswith(("auto", *TWO_RATES))):
        other = "--full_finetune" if model_args.full_finetune else f"--optim {optim}"
        raise UserError(f"--loraplus_lr_ratio {ratio:g} gives A and B two learning rates; {other} has one")
    if begin and model_args.checkpoint_dir:
        raise UserError(f"--init_lora_weights {begin} begins an adapter anew, and one is named to start from")
    if begin in ("pissa", "olora"):
        others = {
            f"--bits {model_args.bits}": model_args.bits in (4, 8),
            "--use_dora": lora_args.use_dora,
            f"--bias {lora_args.bias}": lora_args.bias != "none",
        }
        for other in (name for name, is_given in others.items() if is_given):
            raise UserError(
                f"--init_lora_weights {begin} takes a part of the base into the adapter and does not go with "
                f"{other}: it needs --bits 16 or 32, no DoRA and no trained biases"
            )


def check_shards(
    model_args: ModelArguments, training_args: TrainingArguments, config: dict[str, Any]
) -> None:
    """Raises UserError where --shard_layers does not go with the other flags, or has nobody to share with."""
    if training_args.num_gpus > 1 and not training_args.dry_run:
        raise UserError(
            f"--num_gpus {training_args.num_gpus} is what --dry_run plans for: to train on them, start "
            f"`accelerate launch --multi_gpu --num_processes {training_args.num_gpus} qlora_finetune.py ...`"
        )
    if not model_args.shard_layers or training_args.dry_run:
        return
    if read_rank_and_size()[1] == 1:
        raise UserError(
            "--shard_layers shares the base out between processes and this is one: start several with "
            "`accelerate launch --num_processes N qlora_finetune.py ...`, or leave it out"
        )
    if model_args.bits != 4:
        raise UserError(f"--shard_layers shares out 4-bit layers, and --bits is {model_args.bits}")
    if is_baichuan(config) or "auto_map" in config:
        raise UserError(f"--shard_layers does not read weights of {config.get('model_type')}: leave it out")
    names = ("sample_generate", "do_predict", "predict_with_generate", "do_mmlu_eval")
    asked = [f"--{name}" for name in names if getattr(training_args, name)]
    if training_args.do_train and not training_args.fast_lora:
        asked.append("--fast_lora False")
    if asked:
        raise UserError(f"--shard_layers trains and measures losses only: leave {asked[0]} out")


def check_best(training_args: TrainingArguments) -> None:
    """Raises UserError where --load_best_model_at_end or early stopping has nothing to go by."""
    patience, threshold = training_args.early_stopping_patience, training_args.early_stopping_threshold
    wants_best = training_args.load_best_model_at_end
    if patience and not wants_best:
        raise UserError(
            f"--early_stopping_patience {patience} counts evaluations that are no better than the best: give "
            "--load_best_model_at_end too, which keeps that one"
        )
    if threshold < 0 or (threshold and not patience):
        raise UserError(
            f"--early_stopping_threshold {threshold}: use 0 or more, beside --early_stopping_patience"
        )
    if wants_best and not training_args.do_train:
        raise UserError(
            "--load_best_model_at_end is of a training, and --do_eval or --do_predict alone trains nothing: "
            "leave them out, or add --do_train"
        )
    if wants_best and training_args.eval_strategy == "no":
        raise UserError(
            "--load_best_model_at_end compares evaluations and --eval_strategy is no: give --eval_strategy "
            "steps with --eval_steps, or --eval_strategy epoch"
        )
    if wants_best and training_args.save_strategy == "no":
        raise UserError(
            "--load_best_model_at_end keeps a checkpoint and --save_strategy is no: use steps, epoch or best"
        )
    metric = training_args.extra.get("metric_for_best_model", "loss").removeprefix("eval_")
    scored = [f"rouge-{kind}" for kind in "12l"] + ["bleu-4"]
    if metric not in ["loss"] + scored * training_args.predict_with_generate:
        raise UserError(
            f"--metric_for_best_model {metric}: use loss or, with --predict_with_generate, "
            f"{', '.join(scored)}"
        )


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
