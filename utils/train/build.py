"""What a run trains with: optimizer, path, batches, transformers' own arguments, and the Trainer of them."""

import dataclasses
import sys
from typing import Any

import torch
import transformers
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import UserError, notice
from utils.data.packing import PackingCollator, PaddingCollator
from utils.data.token_rows import TokenRows
from utils.fast.host_embedding import move_embedding
from utils.fast.model import prepare_fast_evaluation, prepare_fast_model
from utils.fast.rope import find_shared_length
from utils.fast.streamed_layers import find_store
from utils.fast.trials import find_packing_obstacle
from utils.models.base import has_gpu
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.messages import EVAL, TEST, TRAIN
from utils.run.keeper import Keeper, fingerprint_run
from utils.run.record import hide_secrets
from utils.run.resume import read_resolved
from utils.run.run import Run
from utils.train.callbacks import ProgressLine
from utils.train.dry_run import describe_plan
from utils.train.engine import Engine, FastEngine, PlainEngine, find_flag_obstacle
from utils.train.plan import Plan, choose_optim, find_machine, make_plan
from utils.train.savings import COPY, EMBEDDING, OPTIMIZER
from utils.train.summary import choose_logging_steps, describe_start
from utils.train.trainer import QLoraTrainer


def build_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatTokenizer,
    datasets: dict[str, TokenRows],
    run: Run,
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: TrainingArguments,
    dtype: torch.dtype,
) -> QLoraTrainer:
    """The Trainer with this run's model and rows, and what it chose for them in the run's record."""
    lengths = datasets[TRAIN].lengths
    earlier = read_resolved(training_args)
    packs = find_packing(model, training_args)
    arguments = (model_args, data_args, lora_args, training_args)
    machine, streams = find_machine(model_args, dtype), find_store(model) is not None
    plan = make_plan(model.config, arguments, machine, lengths, packs, earlier, streams)
    if plan.needs and training_args.do_train:
        notice("\n".join([describe_plan(plan), *plan.saving_lines]))
    collator = choose_collator(model, tokenizer.raw, packs, plan, model_args, training_args)
    training_args = choose_optimizer(model, training_args, plan, earlier.get("optim"))
    logging_steps = choose_logging_steps(len(lengths), training_args)
    engine = choose_engine(model, training_args, dtype, plan, earlier.get("path"))
    check_sharded(model_args, training_args, engine)
    run.record["resolved"] = {"optim": training_args.optim, "path": engine.name} | plan.choices
    run.record["memory"] = plan.describe()
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.raw.pad_token_id
    args = build_trainer_args(training_args.with_values(logging_steps=logging_steps), model_args, dtype, plan)
    train_rows = datasets[TRAIN] if training_args.do_train else None
    trainer = QLoraTrainer(
        model=model,
        processing_class=tokenizer.raw,
        args=args,
        train_dataset=train_rows,
        eval_dataset=next((datasets[part] for part in (EVAL, TEST) if len(datasets[part])), None),
        data_collator=collator,
        engine=engine,
        keeper=build_keeper(model, run, train_rows, args.should_save),
        record=run.record,
    )
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressLine)
    if training_args.do_train:
        notice(describe_start(trainer.model, len(lengths), training_args))
    return trainer


def choose_optimizer(
    model: PreTrainedModel | PeftModel, training_args: TrainingArguments, plan: Plan, earlier: str | None
) -> TrainingArguments:
    """--optim auto is what the plan says.

    A run that goes on takes what its `earlier` start took, however much memory is free now.
    """
    if training_args.optim != "auto":
        if earlier not in (None, training_args.optim):
            notice(f"--optim {training_args.optim} takes the place of {earlier}, which this run began with")
        return training_args
    optim = earlier or plan.optim
    if optim == "auto":  # nothing was planned
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else None
        optim = choose_optim(trained, free)
    notice(f"--optim auto is {optim}" + (", which this run began with" if earlier else ""))
    return training_args.with_values(optim=optim)


def choose_engine(
    model: torch.nn.Module,
    training_args: TrainingArguments,
    dtype: torch.dtype,
    plan: Plan,
    earlier: str | None,
) -> Engine:
    """The fused path (--fast_lora) where it covers model and optimizer, else the plain one, with a line why.

    A run whose `earlier` start was on the plain path stays on it; one from the fused path goes on here as it
    can, its optimizer's state put into the order of the path taken.
    """
    if not training_args.fast_lora:
        return PlainEngine(model)
    if training_args.do_train and earlier == "plain":
        notice("--fast_lora: the plain path is used (this run began on it)")
        return PlainEngine(model)
    if not training_args.do_train:
        prepare_fast_evaluation(model, dtype)
        return PlainEngine(model)
    if EMBEDDING in plan.savings:
        move_embedding(model)
    fast = find_flag_obstacle(training_args) or prepare_fast_model(
        model, dtype, training_args.offload_checkpoints, plan.recomputed_layers, COPY not in plan.savings
    )
    if isinstance(fast, str):
        began = ", and this run began on the fused one" if earlier == "fused" else ""
        notice(f"--fast_lora: the plain path is used ({fast}){began}")
        return PlainEngine(model)
    return FastEngine(fast, keeps_state_on_host=OPTIMIZER in plan.savings)


def check_sharded(model_args: ModelArguments, training_args: TrainingArguments, engine: Engine) -> None:
    """Raises UserError where a layer of a shared model would be read by other than the fused path."""
    if not model_args.shard_layers or not training_args.do_train:
        return
    if not isinstance(engine, FastEngine):
        raise UserError("--shard_layers needs the fused path, which does not cover this run (see above)")
    obstacle = ", ".join(engine.fast.uncovered) or engine.fast.loss_obstacle
    if obstacle:
        raise UserError(f"--shard_layers needs the fused path for every layer, and there is {obstacle}")


def build_keeper(model: torch.nn.Module, run: Run, rows: TokenRows | None, is_writer: bool) -> Keeper:
    """Keeper of the `run`, whose training `rows` are None where it only evaluates."""
    fingerprints = fingerprint_run(run.record, rows)
    return Keeper(run.folder, model, fingerprints, is_writer, PartialState().wait_for_everyone)


def find_packing(model: PreTrainedModel | PeftModel, training_args: TrainingArguments) -> bool:
    """Whether rows are packed: --packing, where the model keeps them apart."""
    obstacle = find_packing_obstacle(model) if training_args.packing else None
    if obstacle:
        notice(f"--packing: {model.config.model_type} gets padded batches instead ({obstacle})")
    return training_args.packing and not obstacle


def choose_collator(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    packs: bool,
    plan: Plan,
    model_args: ModelArguments,
    training_args: TrainingArguments,
) -> PackingCollator | PaddingCollator:
    """What makes the micro-batches of a step's rows."""
    on_gpu, limit = has_gpu(model_args), find_shared_length(model.config)
    if packs:
        return PackingCollator(tokenizer.pad_token_id, plan.capacity, on_gpu, limit)
    multiple = 8 if on_gpu else 1  # tensor cores want whole tiles
    return PaddingCollator(tokenizer.pad_token_id, multiple, limit, training_args.per_device_train_batch_size)


class TrainerArguments(transformers.TrainingArguments):
    """A model lies where it was loaded: moved ("cpu" to "cpu:0" copies) it would leave its flat adapter."""

    place_model_on_device = False


def build_trainer_args(
    training_args: TrainingArguments, model_args: ModelArguments, dtype: torch.dtype, plan: Plan
) -> transformers.TrainingArguments:
    """transformers' TrainingArguments from ours; `dtype` is what autocast computes in.

    A batch of the dataloader is a whole optimizer step, which training_step accumulates itself.
    """
    trainers = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    flags = {name: value for name, value in vars(training_args).items() if name in trainers}
    flags |= training_args.extra
    flags["per_device_train_batch_size"] *= flags["gradient_accumulation_steps"]
    flags["gradient_accumulation_steps"] = 1
    flags.pop("push_to_hub", None)  # the finished run is pushed by model_card.py, with our own card
    flags["use_cpu"] = not has_gpu(model_args)
    flags["bf16"], flags["fp16"] = dtype == torch.bfloat16, dtype == torch.float16
    del flags["gradient_checkpointing"]
    if plan.recomputed_layers != 0:
        flags |= {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        }
    if "constant" == training_args.lr_scheduler_type and training_args.warmup_steps:
        notice(
            f"--lr_scheduler_type constant has no warm-up: --warmup_steps {training_args.warmup_steps:g} is "
            "ignored (constant_with_warmup has one)"
        )
    if flags["use_cpu"] and training_args.optim.startswith("paged_"):
        notice(
            f"--optim {training_args.optim}: there is no GPU memory to page from, it runs as its plain form"
        )
    flags.setdefault("logging_nan_inf_filter", False)  # a NaN loss must be seen
    if keeps_best := flags.pop("load_best_model_at_end"):
        flags.setdefault("metric_for_best_model", "loss")
    sys.argv = hide_secrets(sys.argv)  # wandb keeps the command line
    try:
        args = TrainerArguments(**flags)
    except ValueError as error:
        raise UserError(f"the Trainer refuses its flags: {error}") from error
    args.load_best_model_at_end = (
        keeps_best  # its own check wants --save_steps that fit, ours saves each best
    )
    args._n_gpu = min(args.n_gpu, 1)  # never DataParallel: layers are spread, or processes are launched
    return args
