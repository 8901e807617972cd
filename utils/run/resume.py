"""Going on from an earlier start of a run: what must not have changed, which checkpoint is used."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from utils.arguments import TrainingArguments
from utils.console import UserError, notice
from utils.messages import TRAIN
from utils.run.checkpoints import find_fault, find_valid_checkpoint, read_manifest
from utils.run.lock import LOCK_FILE, check_usable
from utils.run.record import RUN_FILE, TOKENIZATION, find_run_record, list_run_files

# May differ between two starts of one run: they change what is printed or kept, not what is learned.
FREE_ARGUMENTS = {
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
    "remove_unused_columns",
    "ddp_find_unused_parameters",
    "resume_from_checkpoint",
    "disable_tqdm",
    "force_resume",
    "allow_pickle",
    "data_report",
    "ignore_data_report",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
}
OTHER_FILES_STAY = " (--overwrite_output_dir uses it all the same and leaves those files)"
BASE_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".py", ".safetensors", ".bin"}
SAMPLES, SAMPLE_BYTES = 64, 4096


def find_fixed_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what is learned."""
    return {name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS}


def find_changes(recorded: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    """Arguments that change what is learned and differ from the recorded run, each as `--name was -> now`."""
    was, now = find_fixed_arguments(recorded), find_fixed_arguments(arguments)
    return [
        f"--{name} {was.get(name)} -> {now.get(name)}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]


def find_earlier_run(output_dir: Path, arguments: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The record of the same run found in `output_dir`, or None where a new run may start.

    Raises UserError for a file, for a folder that is no run or in use, and for a run with other arguments or
    another base model (--force_resume: a line instead).
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    check_usable(output_dir)
    if overwrite:
        check_overwriting(output_dir, arguments)
    found = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    if overwrite or found <= {LOCK_FILE, "data_report.json", "data_report.png"}:
        return None
    record = find_run_record(output_dir) if (output_dir / RUN_FILE).is_file() else None
    if record is None:
        advice = "" if list_run_files(output_dir) else OTHER_FILES_STAY
        raise UserError(
            f"--output_dir {output_dir} holds other files and no {RUN_FILE}: name a new folder{advice}"
        )
    changes = find_changes(record["arguments"], arguments)
    base = arguments["model_name_or_path"]
    if not changes and record["base_model"].get("fingerprint") != fingerprint_folder(Path(base)):
        changes = [f"the files in --model_name_or_path {base} have changed"]
    if record["status"] != "finished" and record.get("tokenization") != TOKENIZATION:
        changes.append(
            "an older version tokenized its prompts and answers apart, so its token ids are others"
        )
    if changes:
        refuse_or_say(
            f"--output_dir {output_dir} holds a run that differs ({'; '.join(changes)})",
            arguments.get("force_resume", False),
        )
        record |= {"status": "running"}  # a finished run goes on, with what has changed
    return record


def check_overwriting(output_dir: Path, arguments: dict[str, Any]) -> None:
    """Raises UserError if overwriting would remove what no run left there, or what this one starts from."""
    files = list_run_files(output_dir)
    if files and not (output_dir / RUN_FILE).is_file():
        names = ", ".join(path.name for path in files[:3]) + (", ..." if len(files) > 3 else "")
        raise UserError(
            f"--output_dir {output_dir} holds no {RUN_FILE}, so {names} may be no run's files, and "
            "--overwrite_output_dir would remove them: name a new folder"
        )
    removed, folder = {path.resolve() for path in files}, output_dir.resolve()
    for name in ("model_name_or_path", "checkpoint_dir"):
        used = Path(arguments.get(name) or "").resolve()
        is_removed = used == folder or removed & {used, *used.parents}
        if arguments.get(name) and files and is_removed:
            raise UserError(
                f"--overwrite_output_dir would remove --{name} {arguments[name]}: name another --output_dir"
            )


def read_resolved(training_args: TrainingArguments) -> dict[str, str]:
    """What the run that goes on chose when it began: `optim`, and `path` where --fast_lora is the same."""
    output_dir, asked = Path(training_args.output_dir), training_args.extra.get("resume_from_checkpoint")
    run = Path(asked).parent if names_checkpoint(asked) else output_dir
    is_removed = training_args.overwrite_output_dir and run.resolve() == output_dir.resolve()
    if not training_args.do_train or is_removed or not (run / RUN_FILE).is_file():
        return {}
    record = find_run_record(run)
    is_asked_alike = record["arguments"].get("fast_lora") == training_args.fast_lora
    return {
        name: value for name, value in record.get("resolved", {}).items() if name != "path" or is_asked_alike
    }


def check_same_run(output_dir: Path, record: dict[str, Any], force: bool) -> None:
    """Raises UserError, naming it, where base, data, prompt or processes differ from the run found there."""
    earlier = find_run_record(output_dir) if (output_dir / RUN_FILE).is_file() else None
    if earlier is None:
        return
    changes = find_data_changes(earlier["data"], record["data"])
    for part in ("base_model", "prompt"):
        was, now = earlier[part], record[part]
        changes += [f"{part} {key} {was.get(key)} -> {now[key]}" for key in now if was.get(key) != now[key]]
    if earlier.get("processes", 1) != record["processes"]:
        changes.append(f"processes {earlier.get('processes', 1)} -> {record['processes']}")
    if changes:
        refuse_or_say(
            f"--output_dir {output_dir} holds a run of which other things differ ({'; '.join(changes)})",
            force,
        )
    versions = [
        f"{name} {earlier['versions'].get(name)} -> {now}"
        for name, now in record["versions"].items()
        if earlier["versions"].get(name) != now
    ]
    if versions:
        notice(f"going on with other versions ({', '.join(versions)}): results may differ in rounding")


def find_data_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in the rows that are trained on."""
    old, new = (
        {source["name"]: source for source in data["sources"] if source["part"] == TRAIN}
        for data in (was, now)
    )
    changes = [f"{name} is {'gone' if name in old else 'new'}" for name in sorted(old.keys() ^ new.keys())]
    changes += [
        f"{name}: {key} {old[name].get(key)} -> {new[name].get(key)}"
        for name in sorted(old.keys() & new.keys())
        for key in ("sha256", "format", "sample", "columns")
        if old[name].get(key) != new[name].get(key)
    ]
    if was["rows"][TRAIN] != now["rows"][TRAIN]:
        changes.append(f"training rows {was['rows'][TRAIN]} -> {now['rows'][TRAIN]}")
    return changes


def check_same_data(earlier: dict[str, Any] | None, data: dict[str, Any], force: bool) -> None:
    """As check_same_run, of the data alone and before the model is loaded."""
    changes = find_data_changes(earlier["data"], data) if earlier else []
    if changes and not force:
        refuse_or_say(f"the earlier start of this run had other data ({'; '.join(changes)})", force)


def choose_checkpoint(
    output_dir: Path, asked: str | None, fingerprints: dict[str, str], force: bool
) -> Path | None:
    """The checkpoint to go on from: the one `asked` for, else the newest valid one.

    Raises UserError where the one asked for is faulty, or where base, rows or arguments are not those it was
    made with (`force`: a line instead).
    """
    if names_checkpoint(asked):
        folder = Path(asked)
        is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name)
        fault = find_fault(folder) if is_checkpoint else "its name is not checkpoint-N"
        if fault:
            raise UserError(
                f"--resume_from_checkpoint {asked}: {fault}; leave the flag out for the newest valid one"
            )
    else:
        folder = find_valid_checkpoint(output_dir)
    if folder is None:
        return None
    recorded = read_manifest(folder)["fingerprints"]
    changed = [name for name in fingerprints if recorded.get(name) != fingerprints[name]]
    if changed:
        refuse_or_say(f"{folder} was made with other {' and '.join(changed)} than this run has", force)
    return folder


def names_checkpoint(asked: str | None) -> bool:
    """Whether --resume_from_checkpoint names one; `True` asks for the newest."""
    return bool(asked) and asked.lower() != "true"


def refuse_or_say(change: str, force: bool) -> None:
    if not force:
        raise UserError(
            f"{change}: name a new folder, start anew there with --overwrite_output_dir, or go on all the "
            "same with --force_resume"
        )
    notice(f"--force_resume: {change}")


def fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
