"""The Trainer: a loss weighted by tokens, an evaluation that no batch size changes, adapter-only saves."""

import contextlib
import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from utils.data.packing import PaddingCollator
from utils.fast.keyed_noise import add_embedding_noise, key_dropout
from utils.fast.token_keys import TokenKeys
from utils.messages import IGNORE_INDEX
from utils.train.model_card import render_model_card
from utils.train.resumable_trainer import ResumableTrainer


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
