"""Going on from an earlier start of a run: what must not have changed, which checkpoint is used.

The same command goes on where it was. Another one in the same folder would make a run that is neither: so
each argument either may change (--save_steps: what is learned stays the same) or may not (--learning_rate),
and base, rows and prompt may not. A change is a line that says what was and what is:

    --output_dir output/mine holds a run that differs (--learning_rate 0.0002 -> 0.0001): name a new ...
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from utils.arguments import TrainingArguments
from utils.console import UserError, notice
from utils.prompts.messages import TRAIN
from utils.run.checkpoints import find_fault, find_valid_checkpoint, read_manifest
from utils.run.record import read_run_record

# May differ between two starts of one run: they change what is printed or kept, not what is learned.
MAY_CHANGE_ON_RESUME = {
    "output_dir",
    "overwrite_output_dir",
    "do_eval",
    "do_predict",
    "predict_with_generate",
    "sample_generate",
    "sample_prompts",
    "per_device_eval_batch_size",
    "logging_strategy",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "report_to",
    "run_name",
    "do_mmlu_eval",
    "mmlu_dataset",
    "mmlu_split",
    "max_mmlu_samples",
    "mmlu_source_max_len",
    "max_eval_samples",
    "cache_dir",
    "max_memory_MB",
    "shard_layers",
    "num_gpus",
    "ddp_timeout",
    "gradient_checkpointing",
    "offload_checkpoints",
    "remove_unused_columns",
    "ddp_find_unused_parameters",
    "resume_from_checkpoint",
    "disable_tqdm",
    "force_resume",
    "allow_pickle",
    "data_report",
    "dry_run",
    "ignore_data_report",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
}
# How long a run is. One that is made longer goes on, and its checkpoints stay its own.
LENGTHS = ("num_train_epochs", "max_steps", "early_stopping_patience")
# With the number of processes they make the rows of a step, which must stay.
STEP_FLAGS = ("per_device_train_batch_size", "gradient_accumulation_steps")
BASE_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".py", ".safetensors", ".bin"}
SAMPLES, SAMPLE_BYTES = 64, 4096


def find_fixed_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what is learned. --thinking auto is what versions without the flag did."""
    fixed = {name: value for name, value in arguments.items() if name not in MAY_CHANGE_ON_RESUME}
    return {name: value for name, value in fixed.items() if (name, value) != ("thinking", "auto")}


def find_lasting_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of the fixed ones those that are set and that stay when a run is made longer."""
    fixed = find_fixed_arguments(arguments).items()
    return {name: value for name, value in fixed if name not in LENGTHS and value}


def find_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records (run.json) in the parts that `now` has: `what was -> now`."""
    changes: list[str] = []
    if "arguments" in now:
        old, new = find_fixed_arguments(was["arguments"]), find_fixed_arguments(now["arguments"])
        # False, 0 and None are one: not set, or of a later version.
        names = (name for name in sorted(old.keys() | new.keys()) if old.get(name) or new.get(name))
        changes += list_differences("--", old, new, (name for name in names if name not in STEP_FLAGS))
        changes += find_step_changes(was, now)
    if "base_model" in now:
        # With another name the flag says it all, and a folder under another name is compared by its files.
        changes += find_base_changes(was["base_model"], now["base_model"]) if not changes else []
    if "tokenization" in now and was.get("tokenization") != now["tokenization"]:
        changes.append(
            "an older version tokenized its prompts and answers apart, so its token ids are others"
        )
    if "data" in now:
        changes += find_data_changes(was["data"], now["data"])
    if "prompt" in now:
        changes += list_differences("prompt ", was["prompt"], now["prompt"], now["prompt"])
    parent = now.get("parent")
    if parent and was.get("parent", parent)["adapter_sha256"] != parent["adapter_sha256"]:
        changes.append(f"the adapter in {parent['folder']} has changed")
    return changes


def find_step_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The rows of a step in two records, where they differ, and the flags that would keep them."""
    (rows, _, before), (new_rows, batch, processes) = map(count_step_rows, (was, now))
    if rows == new_rows:
        return []
    share, rest = divmod(rows, processes)
    change = f"rows of a step {rows} -> {new_rows}"
    if before != processes:
        change += f", as processes are {before} -> {processes}"
    if rest:
        return [f"{change}, and {processes} cannot share {rows}"]
    batch = batch if share % batch == 0 else 1
    flags = zip(STEP_FLAGS, (batch, share // batch), strict=True)
    return [f"{change}; {' '.join(f'--{name} {value}' for name, value in flags)} keeps them"]


def count_step_rows(record: dict[str, Any]) -> tuple[int, int, int]:
    """(rows of a step, rows of a padded micro-batch, processes)"""
    batch, accumulation = (record["arguments"][name] for name in STEP_FLAGS)
    processes = record.get("processes", 1)
    return batch * accumulation * processes, batch, processes


def list_differences(what: str, was: dict[str, Any], now: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """`what key was -> now` for each of the `keys` that differs."""
    changed = (key for key in keys if was.get(key) != now.get(key))
    return [f"{what}{key} {was.get(key)} -> {now.get(key)}" for key in changed]


def find_extension(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the arguments `now` ask for a longer run than the record `was`; empty where they do not.

    Raises UserError where it has stopped early and would at once stop again.
    """
    then = was["arguments"]
    changed = [name for name in LENGTHS if then.get(name) != now.get(name)]
    patience, had = now.get("early_stopping_patience"), then.get("early_stopping_patience")
    is_patient = had is not None and (patience is None or patience > had)
    if "early_stopping_patience" in changed and not is_patient:
        return []
    if changed not in ([], ["early_stopping_patience"]) and not is_longer(was, now):
        return []
    stopped = was["metrics"].get("stopped_early")
    if changed and stopped and not is_patient:
        raise UserError(f"the run stopped {stopped}: to go on, raise that too")
    return [f"--{name} {then.get(name)} -> {now.get(name)}" for name in changed]


def is_longer(was: dict[str, Any], now: dict[str, Any]) -> bool:
    """By steps or by epochs, as `now` counts; where the record did not, by how far the run has come."""
    then, by_steps = was["arguments"], now["max_steps"] > 0
    name, come = ("max_steps", "steps") if by_steps else ("num_train_epochs", "epochs")
    before = then[name] if (then["max_steps"] > 0) == by_steps else was["metrics"].get(come)
    return before is not None and now[name] > before


def find_base_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changes = list_differences("base_model ", was, now, sorted(now.keys() - {"fingerprint"}))
    if was.get("fingerprint") != now["fingerprint"]:
        changes.append(f"the files in --model_name_or_path {now['name']} have changed")
    return changes


def find_other_versions(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return list_differences("", was["versions"], now["versions"], now["versions"])


def read_resolved(training_args: TrainingArguments) -> dict[str, Any]:
    """What the run that goes on chose when it began: `optim`, and what its flags still ask for alike.

    `path` goes by --fast_lora; `capacity` and `recomputed_layers` by --gradient_checkpointing.
    """
    output_dir, asked = training_args.run_dir, training_args.extra.get("resume_from_checkpoint")
    run = Path(asked).parent if names_checkpoint(asked) else output_dir
    is_removed = training_args.overwrite_output_dir and run.resolve() == output_dir.resolve()
    record = read_run_record(run) if training_args.do_train and not is_removed else None
    if record is None:
        return {}
    decided_by = dict.fromkeys(("capacity", "recomputed_layers"), "gradient_checkpointing")
    decided_by["path"] = "fast_lora"
    return {
        name: value
        for name, value in record.get("resolved", {}).items()
        if name not in decided_by
        or record["arguments"].get(decided_by[name]) == getattr(training_args, decided_by[name])
    }


def find_data_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in the rows that are trained on."""
    old, new = (
        {source["name"]: source for source in data["sources"] if source["part"] == TRAIN}
        for data in (was, now)
    )
    changes = [f"{name} is {'gone' if name in old else 'new'}" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        keys = ("sha256", "format", "sample", "columns")
        changes += list_differences(f"{name}: ", old[name], new[name], keys)
    if was["rows"][TRAIN] != now["rows"][TRAIN]:
        changes.append(f"training rows {was['rows'][TRAIN]} -> {now['rows'][TRAIN]}")
    return changes


def choose_checkpoint(
    output_dir: Path, asked: str | None, fingerprints: dict[str, str], force: bool, needs_best: bool = False
) -> Path | None:
    """The checkpoint to go on from: the one `asked` for, else the newest valid one.

    `needs_best`: the run keeps its best step, so the best one before must be there too.

    Raises UserError where the one asked for is faulty, or where base, rows or arguments are not those it was
    made with (`force`: a line instead).
    """
    folder: Path | None
    if names_checkpoint(asked):
        folder = Path(asked)
        fault: str | None = "its name is not checkpoint-N"
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            is_foreign = folder.resolve().parent != output_dir.resolve()
            fault = find_fault(folder, needs_best and not is_foreign)
            if needs_best and is_foreign:
                fault = fault or "with --load_best_model_at_end it must be the run's own"
        if fault:
            raise UserError(
                f"--resume_from_checkpoint {asked}: {fault}; leave the flag out for the newest valid one"
            )
    else:
        folder = find_valid_checkpoint(output_dir, needs_best)
    if folder is None:
        return None
    recorded = read_manifest(folder)["fingerprints"]
    changed = [name for name in fingerprints if recorded.get(name) != fingerprints[name]]
    if changed:
        raise_unless_forced(f"{folder} was made with other {' and '.join(changed)} than this run has", force)
    return folder


def names_checkpoint(asked: str | None) -> TypeGuard[str]:
    """Whether --resume_from_checkpoint names one; `True` asks for the newest."""
    return asked is not None and asked.lower() not in ("", "true")


def raise_unless_forced(change: str, force: bool) -> None:
    if not force:
        raise UserError(
            f"{change}: name a new folder, start anew there with --overwrite_output_dir, or go on all the "
            "same with --force_resume"
        )
    notice(f"--force_resume: {change}")


def fingerprint_folder(folder: Path) -> str | None:
    """sha256 over a model folder's files: names, sizes, and 64 samples of 4 KiB of each; None for a hub id.

    Milliseconds for any size. Trained weights differ nearly everywhere; one flipped bit would go unseen.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in BASE_SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
