"""Inside the Trainer the fast path learns what the plain one does, accumulates, evaluates and resumes."""

import pytest
import torch
import transformers
from tiny_models import DEVICE, build_batch, build_model, relative_difference, run_plain
from torch.nn import functional as F

from utils.fast_model import prepare_fast_model
from utils.fast_training import install_fast_path, run_micro_batches

OPTIMIZERS = ["adamw_torch_fused", "paged_adamw_32bit", "adamw_bnb_8bit"]


class SmallTrainer(transformers.Trainer):
    """An example is one packed micro-batch; a batch of the dataloader is a list of them."""

    step = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        batches = inputs["micro_batches"]
        items = sum(len(batch["label_positions"]) for batch in batches)
        if self.step is not None:
            return run_micro_batches(self, self.step, batches, items)
        return torch.stack([run_plain(model, batch, 1 / items) for batch in batches]).sum() / items

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None

    @torch.no_grad()
    def evaluate(self, *args, **kwargs):
        self.model.eval()
        batch = build_batch(packed=False, seed=50)
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
        self.log({"eval_loss": loss.item()})
        self.model.train()
        return {"eval_loss": loss.item()}


def train(tmp_path, is_fast, optim="adamw_torch_fused", steps=6, resume=None, dropout=0.0):
    model = build_model("llama", dropout)
    flags = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.3,
    }
    flags |= {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3, "optim": optim}
    flags |= {"remove_unused_columns": False, "adam_epsilon": 1e-4, "report_to": "none", "weight_decay": 0.1}
    trainer = SmallTrainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path), use_cpu=DEVICE == "cpu", disable_tqdm=True, seed=0, **flags
        ),
        train_dataset=list(range(12)),
        eval_dataset=[0],
        data_collator=lambda seeds: {"micro_batches": [build_batch(packed=True, seed=s) for s in seeds]},
    )
    if is_fast:
        trainer.step = install_fast_path(trainer, prepare_fast_model(model, torch.float32))
    trainer.train(resume_from_checkpoint=resume)
    weights = {
        name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad
    }
    logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return weights, logs


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_trainer_learns_the_same(tmp_path, optim):
    plain, plain_logs = train(tmp_path / "plain", False, optim)
    fast, fast_logs = train(tmp_path / "fast", True, optim)
    # 8-bit states are rounded in blocks, and the blocks of one flat tensor lie elsewhere.
    tolerance = 2e-2 if "8bit" in optim else 1e-3
    assert relative_difference(fast, plain) < tolerance / 10
    for first, second in zip(fast_logs, plain_logs, strict=True):
        assert first.keys() == second.keys()
        for name in {"loss", "grad_norm", "eval_loss", "learning_rate"} & first.keys():
            assert first[name] == pytest.approx(second[name], rel=tolerance)
    losses = [entry["loss"] for entry in fast_logs if "loss" in entry]
    assert losses[-1] != losses[0] and len(losses) == 6


def test_a_resumed_run_with_dropout_equals_an_unbroken_one(tmp_path):
    whole, _ = train(tmp_path, True, dropout=0.2)
    resumed, _ = train(tmp_path, True, dropout=0.2, resume=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
