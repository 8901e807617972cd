"""The Trainer: a loss weighted by tokens, an evaluation that no batch size changes, adapter-only saves."""

import dataclasses
import inspect
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch.nn import functional as F

from utils.arguments import ModelArguments, TrainingArguments
from utils.callbacks import ProgressLine
from utils.console import notice
from utils.model import has_gpu
from utils.packing import Example, PackingCollator, PaddingCollator, keeps_rows_apart
from utils.prompts import IGNORE_INDEX
from utils.run_record import hide_secrets, render_model_card

# Our flags that the Trainer does not have.
OUR_FLAGS = {
    "overwrite_output_dir",
    "predict_with_generate",
    "sample_generate",
    "sample_prompts",
    "do_mmlu_eval",
    "mmlu_dataset",
    "mmlu_split",
    "max_mmlu_samples",
    "mmlu_source_max_len",
    "packing",
    "extra",
}


class QLoraTrainer(transformers.Trainer):
    """Trainer whose loss is the mean over the label tokens of the whole optimizer step.

    So (batch 4, accumulation 1) and (batch 1, accumulation 4) give the same gradients for rows of any length.
    """

    def __init__(self, *args: Any, record: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.record = record
        self.padding_collator = PaddingCollator(self.data_collator.pad_token_id, self.data_collator.multiple)
        # compute_loss below divides by num_items_in_batch, whatever the model's own forward accepts.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = self._loss_shifts_labels = True
        self.keeps_logits = "logits_to_keep" in find_forward_parameters(self.model)
        self.tokens_since_log = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.tokens_seen, self.last_log_time = 0, None  # the clock starts with the first step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = self.compute_token_losses(model, inputs)
        loss = losses.sum() / num_items_in_batch
        # Several processes average their gradients; the mean wanted is over the tokens of all of them.
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def compute_token_losses(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy at the positions with labels; zero where a row has none there  # [rows, positions]"""
        positions = inputs["label_positions"]
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
        if self.last_log_time is None:
            self.last_log_time = time.perf_counter()
        self.tokens_since_log += inputs["num_tokens"].to(self.tokens_since_log.device)
        return super().training_step(model, inputs, num_items_in_batch)

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
            batch = self._prepare_inputs(batch)
            losses = self.compute_token_losses(model, batch).sum(1)  # [rows]
            counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)  # [rows]
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
        # Callbacks measure too (MMLU, ROUGE) and add to `metrics`, so they come before the log.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.log(metrics)
        if self.last_log_time is not None:
            self.last_log_time += time.perf_counter() - start  # evaluation is no training time
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


def find_forward_parameters(model: torch.nn.Module) -> set[str]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(base.forward).parameters)


def build_trainer(
    model: torch.nn.Module,
    tokenizer: Any,
    train_dataset: list[Example],
    eval_dataset: list[Example],
    model_args: ModelArguments,
    training_args: TrainingArguments,
    dtype: torch.dtype,
    record: dict[str, Any],
    callbacks: list[Any],
) -> QLoraTrainer:
    """The Trainer with this run's model, rows and callbacks."""
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    trainer = QLoraTrainer(
        model=model,
        processing_class=tokenizer,
        args=build_trainer_args(training_args, model_args, dtype),
        train_dataset=train_dataset or None,
        eval_dataset=eval_dataset or None,
        data_collator=choose_collator(model, tokenizer, model_args, training_args),
        callbacks=callbacks,
        record=record,
    )
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressLine)
    return trainer


def choose_collator(
    model: torch.nn.Module, tokenizer: Any, model_args: ModelArguments, training_args: TrainingArguments
) -> PackingCollator | PaddingCollator:
    multiple = 8 if has_gpu(model_args) else 1  # tensor cores want whole tiles
    if training_args.packing and keeps_rows_apart(model):
        return PackingCollator(tokenizer.pad_token_id, multiple)
    if training_args.packing:
        notice(f"--packing: {model.config.model_type} mixes packed rows, so batches are padded instead")
    return PaddingCollator(tokenizer.pad_token_id, multiple)


def build_trainer_args(
    training_args: TrainingArguments, model_args: ModelArguments, dtype: torch.dtype
) -> transformers.TrainingArguments:
    """transformers' TrainingArguments from ours; `dtype` is what autocast computes in."""
    flags = {field.name: getattr(training_args, field.name) for field in dataclasses.fields(training_args)}
    flags = {name: value for name, value in flags.items() if name not in OUR_FLAGS} | training_args.extra
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
    args = transformers.TrainingArguments(**flags)
    args._n_gpu = min(args.n_gpu, 1)  # never DataParallel: layers are spread, or processes are launched
    return args
