"""The Trainer: a loss weighted by tokens, an evaluation that no batch size changes, adapter-only saves."""

import contextlib
import dataclasses
import functools
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.callbacks import ProgressLine
from utils.console import UserError, notice
from utils.keyed_noise import add_embedding_noise, key_dropout
from utils.model import has_gpu
from utils.packing import PackingCollator, PaddingCollator, choose_capacity
from utils.prompts import IGNORE_INDEX
from utils.resumable_trainer import ResumableTrainer
from utils.resume import read_resolved
from utils.rope import find_shared_length
from utils.run_record import hide_secrets
from utils.run_summary import choose_logging_steps, describe_start
from utils.sharing import render_model_card
from utils.sources import EVAL, TEST, TRAIN
from utils.token_keys import TokenKeys
from utils.token_rows import TokenRows
from utils.trials import find_packing_obstacle

MAX_STATE_SHARE = 0.1  # of the free GPU memory: activations need the rest
# Our flags that the Trainer does not have.
OUR_FLAGS = {
    "overwrite_output_dir",
    "force_resume",
    "predict_with_generate",
    "sample_generate",
    "sample_prompts",
    "do_mmlu_eval",
    "mmlu_dataset",
    "mmlu_split",
    "max_mmlu_samples",
    "mmlu_source_max_len",
    "packing",
    "fast_lora",
    "offload_checkpoints",
    "extra",
}


class QLoraTrainer(ResumableTrainer):
    """Trainer whose loss is the mean over the label tokens of the whole optimizer step.

    So (batch 4, accumulation 1) and (batch 1, accumulation 4) give the same gradients for rows of any length.
    """

    path = "plain"  # PEFT's and the model's own forward

    def __init__(self, *args: Any, record: dict[str, Any], keys: TokenKeys | None = None, **kwargs: Any):
        """`keys`: of dropout, where key_dropout has seen to it already."""
        super().__init__(*args, **kwargs)
        self.record, self.keys = record, keys or key_dropout(self.model)
        if self.neftune_noise_alpha:
            add_embedding_noise(self.model.get_input_embeddings(), self.keys, self.neftune_noise_alpha)
        self.neftune_noise_alpha = None  # the Trainer's noise goes by the length of the batch
        self.padding_collator = PaddingCollator(
            self.data_collator.pad_token_id,
            1 if self.args.device.type == "cpu" else 8,
            self.data_collator.limit,
        )
        # compute_loss below divides by num_items_in_batch, whatever the model's own forward accepts.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = self._loss_shifts_labels = True
        # An adapted head sees all tokens, as their keys are those of its dropout.
        is_adapted = isinstance(self.model.get_output_embeddings(), LoraLayer)
        self.keeps_logits = not is_adapted and "logits_to_keep" in find_forward_parameters(self.model)
        self.tokens_since_log = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.tokens_seen, self.last_log_time = 0, None  # the clock starts with the first step
        self.last_evaluation: tuple[int, dict[str, float]] | None = None  # step, metrics

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.keys.read(inputs)
        losses = self.compute_token_losses(model, inputs)
        loss = losses.sum() / num_items_in_batch
        # Several processes average their gradients; the mean wanted is over the tokens of all of them.
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def compute_token_losses(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy at the positions with labels; zero where a row has none there  # [rows, positions]"""
        # In NumPy: as a tensor they would go with the rows to the first GPU, and where the layers are spread
        # over several, the hidden state that they index lies on the last.
        positions: np.ndarray = inputs["label_positions"]
        names = ("input_ids", "attention_mask", "position_ids")
        forward = {name: inputs[name] for name in names if name in inputs}
        forward["use_cache"] = False
        if self.keeps_logits:
            logits = model(**forward, logits_to_keep=positions).logits  # [rows, positions, vocabulary]
        else:
            logits = model(**forward).logits[:, positions]
        targets = inputs["labels"][:, positions + 1]
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            reduction="none",
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.args.label_smoothing_factor,
        )
        return losses.view_as(targets)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, or all those that the rows of an optimizer step were packed into."""
        *earlier, last = find_micro_batches(inputs)
        self.count_tokens([*earlier, last])
        self.keys.choose_step(self.args.seed, self.state.global_step)
        with self.accelerator.no_sync(model) if earlier else contextlib.nullcontext():
            losses = [
                super(QLoraTrainer, self).training_step(model, part, num_items_in_batch) for part in earlier
            ]
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def count_tokens(self, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        if self.last_log_time is None:
            self.last_log_time = time.perf_counter()
        for part in micro_batches:
            self.tokens_since_log += part["num_tokens"].to(self.tokens_since_log.device)

    def _get_num_items_in_batch(self, batch_samples, device):
        parts = [part for inputs in batch_samples for part in find_micro_batches(inputs)]
        return super()._get_num_items_in_batch(parts, device)

    def floating_point_ops(self, inputs):
        return sum(super(QLoraTrainer, self).floating_point_ops(part) for part in find_micro_batches(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens = self.accelerator.reduce(self.tokens_since_log).item()
            now = time.perf_counter()
            logs["tokens_per_second"] = round(tokens / (now - self.last_log_time), 1)
            self.tokens_seen += tokens
            self.tokens_since_log.zero_()
            self.last_log_time = now
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None):
        """Padded batches: each row's loss is read apart."""
        packing, self.data_collator = self.data_collator, self.padding_collator
        dataloader = super().get_eval_dataloader(eval_dataset)
        self.data_collator = packing
        return dataloader

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Mean loss over all label tokens: the same for every batch size and number of processes."""
        start, was_training = time.perf_counter(), self.model.training
        dataloader = self.get_eval_dataloader(eval_dataset)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        loss_sum, token_count, row_count = 0.0, 0, 0
        for batch in dataloader:
            parts = find_micro_batches(self._prepare_inputs(batch))
            losses = torch.cat([self.compute_token_losses(model, part).sum(1) for part in parts])  # [rows]
            counts = torch.cat([(part["labels"][:, 1:] != IGNORE_INDEX).sum(1) for part in parts])  # [rows]
            losses, counts = self.accelerator.gather_for_metrics((losses, counts))
            loss_sum, token_count = loss_sum + losses.double().sum().item(), token_count + counts.sum().item()
            row_count += len(counts)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        seconds = time.perf_counter() - start
        metrics = {
            "loss": loss_sum / token_count,
            "tokens": token_count,
            "rows": row_count,
            "seconds": round(seconds, 2),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        losses = set(metrics)  # callbacks measure too (MMLU, ROUGE), some for minutes, and add to `metrics`
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if added := {name: value for name, value in metrics.items() if name not in losses}:
            self.log(added)
        if self.last_log_time is not None:
            self.last_log_time += time.perf_counter() - start  # evaluation is no training time
        self.last_evaluation = (self.state.global_step, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapter and tokenizer, nothing pickled."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # No token is ever added, so embeddings need no saving (and no look-up of the base on the hub).
        is_adapter = isinstance(self.model, PeftModel)
        self.model.save_pretrained(
            folder, state_dict=state_dict, **({"save_embedding_layers": False} if is_adapter else {})
        )
        self.processing_class.save_pretrained(folder)
        (folder / "README.md").write_text(render_model_card(self.record), encoding="utf-8")


def find_micro_batches(inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    return inputs["micro_batches"] if "micro_batches" in inputs else [inputs]


def find_forward_parameters(model: torch.nn.Module) -> set[str]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(base.forward).parameters)


def build_trainer(
    model: torch.nn.Module,
    tokenizer: Any,
    datasets: dict[str, TokenRows],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    dtype: torch.dtype,
    record: dict[str, Any],
    callbacks: list[Any],
) -> QLoraTrainer:
    """The Trainer with this run's model, rows and callbacks."""
    lengths = datasets[TRAIN].lengths
    collator = choose_collator(model, tokenizer, lengths, model_args, data_args, training_args)
    earlier = read_resolved(training_args)
    training_args = choose_optimizer(model, training_args, earlier.get("optim"))
    logging_steps = choose_logging_steps(len(lengths), training_args)
    build = choose_path(model, training_args, dtype, earlier.get("path"))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    trainer = build(
        model=model,
        processing_class=tokenizer,
        args=build_trainer_args(
            training_args.with_values(logging_steps=logging_steps),
            model_args,
            dtype,
            isinstance(collator, PackingCollator),
        ),
        train_dataset=datasets[TRAIN] if training_args.do_train else None,
        eval_dataset=next((datasets[part] for part in (EVAL, TEST) if len(datasets[part])), None),
        data_collator=collator,
        callbacks=callbacks,
        record=record,
    )
    record["resolved"] = {"optim": training_args.optim, "path": trainer.path}
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressLine)
    if training_args.do_train:
        notice(describe_start(trainer.model, len(lengths), training_args))
    return trainer


def choose_optimizer(
    model: torch.nn.Module, training_args: TrainingArguments, earlier: str | None
) -> TrainingArguments:
    """--optim auto: paged where the optimizer's state would crowd the GPU, fused where it is small.

    A run that goes on takes what its `earlier` start took, however much memory is free now.
    """
    if training_args.optim != "auto":
        if earlier not in (None, training_args.optim):
            notice(f"--optim {training_args.optim} takes the place of {earlier}, which this run began with")
        return training_args
    optim = earlier or "adamw_torch"
    if model.device.type == "cuda" and not earlier:
        state_bytes = 8 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
        optim = "paged_adamw_32bit" if state_bytes > MAX_STATE_SHARE * free_bytes else "adamw_torch_fused"
    notice(f"--optim auto is {optim}" + (", which this run began with" if earlier else ""))
    return training_args.with_values(optim=optim)


def choose_path(
    model: torch.nn.Module, training_args: TrainingArguments, dtype: torch.dtype, earlier: str | None
) -> Callable[..., QLoraTrainer]:
    """The trainer of the fused path (--fast_lora) where it covers model and optimizer, else the plain one.

    A run whose `earlier` start was on the plain path stays on it; one from the fused path goes on here as it
    can, its optimizer's state put into the order of the path taken.
    """
    if not training_args.fast_lora:
        return QLoraTrainer
    if training_args.do_train and earlier == "plain":
        notice("--fast_lora: the plain path is used (this run began on it)")
        return QLoraTrainer
    from utils.fast_model import prepare_fast_evaluation, prepare_fast_model
    from utils.fast_trainer import FastQLoraTrainer, find_flag_obstacle

    if not training_args.do_train:
        prepare_fast_evaluation(model, dtype)
        return QLoraTrainer
    fast = find_flag_obstacle(training_args)
    fast = fast or prepare_fast_model(model, dtype, training_args.offload_checkpoints)
    if isinstance(fast, str):
        began = ", and this run began on the fused one" if earlier == "fused" else ""
        notice(f"--fast_lora: the plain path is used ({fast}){began}")
        return QLoraTrainer
    return functools.partial(FastQLoraTrainer, fast=fast)


def choose_collator(
    model: torch.nn.Module,
    tokenizer: Any,
    lengths: np.ndarray,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> PackingCollator | PaddingCollator:
    """Packed where the model keeps rows apart; `lengths` of the training rows  # int64 [rows]"""
    on_gpu, batch = has_gpu(model_args), training_args.per_device_train_batch_size
    limit = find_shared_length(model.config)
    obstacle = find_packing_obstacle(model) if training_args.packing else None
    if training_args.packing and not obstacle:
        rows_per_step = batch * training_args.gradient_accumulation_steps
        capacity = choose_capacity(lengths, batch, rows_per_step, data_args.max_len, on_gpu)
        return PackingCollator(tokenizer.pad_token_id, capacity, on_gpu, limit)
    if obstacle:
        notice(f"--packing: {model.config.model_type} gets padded batches instead ({obstacle})")
    multiple = 8 if on_gpu else 1  # tensor cores want whole tiles
    return PaddingCollator(tokenizer.pad_token_id, multiple, limit)


def build_trainer_args(
    training_args: TrainingArguments, model_args: ModelArguments, dtype: torch.dtype, packed: bool
) -> transformers.TrainingArguments:
    """transformers' TrainingArguments from ours; `dtype` is what autocast computes in.

    `packed`: a batch of the dataloader is a whole optimizer step, which training_step accumulates itself.
    """
    flags = {field.name: getattr(training_args, field.name) for field in dataclasses.fields(training_args)}
    flags = {name: value for name, value in flags.items() if name not in OUR_FLAGS} | training_args.extra
    if packed:
        flags["per_device_train_batch_size"] *= flags["gradient_accumulation_steps"]
        flags["gradient_accumulation_steps"] = 1
    flags.pop("push_to_hub", None)  # the finished run is pushed by utils/sharing.py, with our own card
    flags["use_cpu"] = not has_gpu(model_args)
    flags["bf16"], flags["fp16"] = dtype == torch.bfloat16, dtype == torch.float16
    if flags.pop("gradient_checkpointing"):
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
    sys.argv = hide_secrets(sys.argv)  # wandb keeps the command line
    try:
        args = transformers.TrainingArguments(**flags)
    except ValueError as error:
        raise UserError(f"the Trainer refuses its flags: {error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # never DataParallel: layers are spread, or processes are launched
    return args
