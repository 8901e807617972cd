"""The keeper of a run's checkpoints: each is whole or not there, and the last good one is never lost."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from utils.console import UserError, notice
from utils.run.checkpoints import (
    WRITING,
    check_free_space,
    disk_errors_explained,
    find_damage,
    flush_to_disk,
    name_beside,
    remove_checkpoint,
    remove_old_checkpoints,
    rename_into_place,
    write_manifest,
)
from utils.run.record import ADAPTER_FILE, CHANGING_STARTS, INITIAL, fingerprint
from utils.run.resume import find_lasting_arguments

WriteFiles = Callable[[Path], None]


class Keeper:
    """Saves a model into its run's folder, so that a kill at any moment leaves only whole checkpoints.

        .checkpoint-40.tmp/   written, read back, held against memory, hashed, flushed to disk
        checkpoint-40/        the same folder, renamed: one step that happens or does not

    `fingerprints` are what the run is made of; they are sealed into each checkpoint, and a run goes on only
    from one that has the same. Where several processes save, each adds its own files; the one that
    `is_writer` makes the folder, the others `wait_for_everyone`.
    """

    def __init__(
        self,
        output_dir: Path,
        model: torch.nn.Module,
        fingerprints: dict[str, str],
        is_writer: bool,
        wait_for_everyone: Callable[[], None],
    ):
        self.output_dir, self.model, self.fingerprints = output_dir, model, fingerprints
        self.is_writer, self.wait_for_everyone = is_writer, wait_for_everyone
        self.last_checkpoint: Path | None = None
        self.initial: Path | None = None  # the adapter as it began, where it began with a part of the base

    def begin(self, checkpoint: Path | None, expected_bytes: int) -> None:
        """A training that goes on from `checkpoint`.

        Raises UserError where the disk is too full for saves.
        """
        check_free_space(self.output_dir, expected_bytes)
        self.last_checkpoint = checkpoint
        if isinstance(self.model, PeftModel):
            config = self.model.peft_config[self.model.active_adapter]
            if str(getattr(config, "init_lora_weights", True)).lower() in CHANGING_STARTS:
                self.keep_initial(self.model)

    def keep_initial(self, model: PeftModel) -> None:
        """The adapter as it begins, in INITIAL: what the finished one is to be without, to fit the base.

        Raises UserError where an earlier start of the run began with other numbers.
        """
        self.initial = self.output_dir / INITIAL
        if self.initial.is_dir():
            try:
                verify_adapter(model, self.initial)
            except UserError as error:
                raise UserError(
                    f"--init_lora_weights gives other numbers than those in {self.initial}, with which the "
                    "run began (another machine, or other libraries): go on where it began, or start anew"
                ) from error
        elif self.is_writer:
            staging = name_beside(self.initial, WRITING)
            with self.staged(self.initial, staging):
                model.save_pretrained(
                    str(staging), state_dict=copy_adapter(model), save_embedding_layers=False
                )
                self.verify(staging)
                rename_into_place(staging, self.initial)

    def name_checkpoint(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def save_checkpoint(self, step: int, write_files: WriteFiles) -> None:
        """checkpoint-`step`, with what `write_files` puts into the folder that it is given."""
        folder = self.name_checkpoint(step)
        self.check_weights(f"after step {step}, nothing is saved")
        staging = name_beside(folder, WRITING)
        with self.staged(folder, staging):
            self.wait_for_everyone()
            write_files(staging)
            self.wait_for_everyone()
            if self.is_writer:
                self.verify(staging)
                write_manifest(staging, step, self.fingerprints)
                rename_into_place(staging, folder)
            self.wait_for_everyone()
        self.last_checkpoint = folder

    def save_final(self, step: int, write_files: WriteFiles) -> None:
        """The finished adapter in the run's own folder, each file whole or not there."""
        if isinstance(self.model, PeftModel):
            check_adapter_learned(self.model, step)
        self.check_weights(f"after {step} steps")
        if not self.is_writer:
            return
        staging = self.output_dir / f".final.{WRITING}"
        with self.staged(self.output_dir, staging):
            write_files(staging)
            self.verify(staging, self.initial)
            for path in sorted(staging.iterdir()):
                flush_to_disk(path)
                os.replace(path, self.output_dir / path.name)
            flush_to_disk(self.output_dir)

    @contextmanager
    def staged(self, target: Path, staging: Path) -> Iterator[None]:
        """An empty folder `staging` to write into; a full disk becomes one line, and no rest is left."""
        with disk_errors_explained(target, self.last_checkpoint):
            try:
                if self.is_writer:
                    shutil.rmtree(staging, ignore_errors=True)
                    staging.mkdir(parents=True)
                yield
            finally:
                if self.is_writer:
                    shutil.rmtree(staging, ignore_errors=True)  # there only after a failure

    def verify(self, folder: Path, initial: Path | None = None) -> None:
        if isinstance(self.model, PeftModel):
            verify_adapter(self.model, folder, initial)

    def check_undamaged(self, folder: Path) -> None:
        """Raises UserError where the checkpoint is not as it was saved."""
        if damage := find_damage(folder):
            raise UserError(
                f"{folder} was to be kept and is damaged ({damage}): the same command again goes on from an "
                "earlier checkpoint"
            )

    def check_weights(self, when: str) -> None:
        """Raises UserError where a trained weight is not finite."""
        if not all_finite(self.model.parameters()):
            raise UserError(
                f"the weights are not finite {when}: lower --learning_rate; "
                f"{self.last_checkpoint or 'no checkpoint'} is the last good one"
            )

    def remove_old(self, limit: int | None, best: Path | None, keeps_first: bool) -> None:
        """Leave `limit` checkpoints, the last and the `best` among them.

        checkpoint-1 is saved early, to see that saving works; it goes unless `keeps_first` (--save_steps 1).
        """
        if not self.is_writer:
            return
        keep = {path for path in (self.last_checkpoint, best) if path}
        first = self.name_checkpoint(1)
        if first.is_dir() and first not in keep and not keeps_first:
            remove_checkpoint(first)
        remove_old_checkpoints(self.output_dir, limit, keep)


def copy_adapter(model: Any) -> dict[str, torch.Tensor]:
    """An adapter's weights in host memory, for save_pretrained.

    They are views of one buffer, and PEFT clones what shares its memory where it lies: 0.6 GiB of a GPU that
    a plan has filled, for LLaMA-7B with rank 64.
    """
    return {
        name: weight.detach().cpu()
        for name, weight in model.named_parameters()
        if weight.requires_grad or ".lora_" in name
    }


def verify_adapter(model: Any, folder: Path, initial: Path | None = None) -> None:
    """Hold the adapter read back from `folder` against the one in memory; UserError where it differs.

    `initial`: folder of the adapter that is subtracted in it, B A - B0 A0 being [B, -B0] [A; A0].
    """
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, began in load_file(initial / ADAPTER_FILE).items() if initial else ():
        is_a = ".lora_A." in name
        expected[name] = torch.cat([expected[name].cpu(), began if is_a else -began], dim=0 if is_a else 1)
    with safe_open(folder / ADAPTER_FILE, framework="pt") as saved:
        names = set(saved.keys())
        wrong = sorted(names ^ expected.keys()) or [
            name
            for name, tensor in expected.items()
            if not torch.equal(saved.get_tensor(name), tensor.detach().cpu())
        ]
    if wrong:
        raise UserError(
            f"the adapter read back from {folder} differs from the one in memory ({wrong[0]}, {len(wrong)} "
            f"of {len(expected)} tensors): the disk or the memory is faulty, this save is not used"
        )


def check_adapter_learned(model: Any, steps: int) -> None:
    """Raises UserError where every lora_B is still zero; names the layers whose own is."""
    weights = {name: weight for name, weight in model.named_parameters() if ".lora_B." in name}
    unchanged = [name.partition(".lora_B.")[0] for name, weight in weights.items() if not weight.any()]
    if weights and len(unchanged) == len(weights):
        raise UserError(
            f"every lora_B is still zero after {steps} steps, so the adapter does nothing: the learning rate "
            "was 0 throughout, or every step was skipped"
        )
    if unchanged:
        notice(f"lora_B is still zero in {len(unchanged)} of {len(weights)} layers: {unchanged[0]}, ...")


def estimate_checkpoint_bytes(model: torch.nn.Module, vocabulary: int, moment_bytes: int) -> int:
    """Trained weights, two moments of each, and the tokenizer (its json has 75 bytes a token)."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    weights = sum(weight.numel() * (weight.element_size() + 2 * moment_bytes) for weight in trained)
    return 2**20 + 100 * vocabulary + weights


def fingerprint_run(record: dict[str, Any], rows: Any) -> dict[str, str]:
    """sha256 of what decides the result: equal where a checkpoint may be gone on from.

    `rows`: the training set (utils/data/token_rows.py), or None.
    """
    digest = hashlib.sha256()
    if rows is not None:
        digest.update(rows.offsets.tobytes())
        for piece in rows.read_tokens():
            digest.update(np.ascontiguousarray(piece).data)
    arguments = record["arguments"] | record.get("began_with", {})
    return {
        "base model": fingerprint(record["base_model"]),
        "training rows": digest.hexdigest(),
        "arguments": fingerprint(find_lasting_arguments(arguments)),
    }


def all_finite(parameters: Iterator[torch.nn.Parameter]) -> bool:
    """Whether every weight that is trained is finite; one host read."""
    flags = [parameter.detach().isfinite().all() for parameter in parameters if parameter.requires_grad]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all().item())
