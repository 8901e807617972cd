"""A run: the folder of --output_dir and run.json in it, which says what made it.

The same command started again finds the run and goes on with it. It must be the same run: other flags,
another base, other rows or another prompt would train something that no checkpoint's name tells of. So
whatever becomes known of a start is described to the Run at once, and held against what the earlier start
wrote down:

    open_run           flags and the base's files, before anything heavy is imported
    describe(data=...) the rows, before the tokenizer is loaded
    describe_model     base, template and stop tokens, before the first step
    begin              under the folder's lock: the checkpoint to go on from
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import UserError, is_main_process, notice
from utils.run.checkpoints import disk_errors_explained, sweep_leftovers
from utils.run.lock import LOCK_FILE, check_usable
from utils.run.places import describe_places
from utils.run.record import (
    RUN_FILE,
    TOKENIZATION,
    clear_run,
    collect_arguments,
    describe_parent,
    list_run_files,
    read_run_record,
    start_record,
    write_json,
)
from utils.run.resume import (
    LENGTHS,
    STEP_FLAGS,
    choose_checkpoint,
    find_changes,
    find_extension,
    find_other_versions,
    fingerprint_folder,
    raise_unless_forced,
)

REPORT_FILES = {LOCK_FILE, "data_report.json", "data_report.png"}  # may be there before a run is
# What a kill leaves of a first start, or what its other process writes just now (record.write_json).
HALF_WRITTEN = re.compile(r"(data_report|run)\.json\.\d+\.tmp")


class Run:
    """`folder`, the `record` that run.json is made of, and `earlier`: the record found there, if any.

    `known` is what is known before the model is loaded: arguments, and the base by name and fingerprint.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], base_fingerprint: str | None):
        self.folder, self.arguments = folder, arguments
        self.earlier: dict[str, Any] | None = None
        self.lengths: dict[str, Any] = {}  # the arguments that make it longer than its earlier start
        self.record = start_record(arguments)
        self.known = {
            "arguments": arguments,
            "base_model": {"name": arguments["model_name_or_path"], "fingerprint": base_fingerprint},
            "processes": self.record["processes"],
        }

    @property
    def force(self) -> bool:
        return self.arguments.get("force_resume", False)

    @property
    def overwrites(self) -> bool:
        return self.arguments["overwrite_output_dir"]

    @property
    def is_finished(self) -> bool:
        return self.earlier is not None and self.earlier["status"] == "finished"

    def find_earlier(self) -> None:
        """Take the run found in the folder for an earlier start of this one.

        Raises UserError for a file, for a folder that is no run or in use, and for a run with other flags or
        another base (--force_resume: a line instead).
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output_dir {self.folder} is a file: name a folder")
        check_usable(self.folder)
        if self.overwrites:
            check_overwriting(self.folder, self.arguments)
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        found = {name for name in names if not HALF_WRITTEN.fullmatch(name)}
        if self.overwrites or found <= REPORT_FILES:
            return
        record = read_run_record(self.folder)
        if record is None:
            stays = " (--overwrite_output_dir uses it all the same and leaves those files)"
            advice = "" if list_run_files(self.folder) else stays
            raise UserError(
                f"--output_dir {self.folder} holds other files and no {RUN_FILE}: name a new folder{advice}"
            )
        self.earlier = earlier = self.extend(record)
        began = {name: record["arguments"][name] for name in STEP_FLAGS}
        self.record["began_with"] = record.get("began_with", began)  # as its checkpoints know it
        tokenized = {} if self.is_finished else {"tokenization": TOKENIZATION}
        if self.check(self.known | tokenized):
            self.earlier = earlier | {"status": "running"}  # a finished one goes on, with what changed

    def extend(self, record: dict[str, Any]) -> dict[str, Any]:
        """The earlier start's `record`; where this one is longer, as if that had been as long."""
        extended = record.get("extended", [])
        if longer := find_extension(record, self.arguments):
            extended = [*extended, {"changes": longer, "after_step": record["metrics"].get("steps")}]
            notice(f"{self.folder} goes on and becomes longer ({'; '.join(longer)})")
            self.lengths = {name: self.arguments.get(name) for name in LENGTHS}
            record = self.lengthen(record) | {"status": "running"}
        if extended:
            self.record["extended"] = extended
        return record

    def lengthen(self, record: dict[str, Any]) -> dict[str, Any]:
        return record | {"arguments": record["arguments"] | self.lengths}

    def describe(self, **parts: Any) -> None:
        """Write down `parts` of run.json. Raises UserError where an earlier start had others."""
        self.record |= parts
        self.check(parts)

    def describe_model(self, config: Any, prompt: dict[str, Any]) -> None:
        """As describe: of the base, by its `config`, and of the `prompt` that it is given."""
        base = self.known["base_model"] | {
            "revision": getattr(config, "_commit_hash", None),
            "type": config.model_type,
        }
        parents = (self.record.get("parent") or {}).get("prompt") or prompt
        if parents["template_sha256"] != prompt["template_sha256"]:
            notice("the prompt format is not the one that the adapter was trained with before")
        self.describe(base_model=base, prompt=prompt)
        if places := describe_places(base["name"], self.folder):
            self.record["base_places"] = places

    def check(self, parts: dict[str, Any]) -> list[str]:
        """What differs from the earlier start in `parts`: said in a line, or a UserError unless forced."""
        changes = find_changes(self.earlier, parts) if self.earlier else []
        if changes:
            raise_unless_forced(
                f"--output_dir {self.folder} holds a run that differs ({'; '.join(changes)})", self.force
            )
        return changes

    def begin(
        self, asked: str | None, fingerprints: dict[str, str], wait_for_everyone: Callable[[], None]
    ) -> Path | None:
        """Write run.json of a training that begins now; returns the checkpoint to go on from, if any.

        To be called with the folder locked. `asked`: --resume_from_checkpoint.
        """
        if is_main_process():
            if self.overwrites and any(path.name != LOCK_FILE for path in self.folder.iterdir()):
                notice(f"--overwrite_output_dir: removing the earlier run's files from {self.folder}")
                clear_run(self.folder)
            sweep_leftovers(self.folder)
        wait_for_everyone()
        self.check_again()
        needs_best = self.arguments.get("load_best_model_at_end", False)
        checkpoint = choose_checkpoint(self.folder, asked, fingerprints, self.force, needs_best)
        if checkpoint:
            notice(f"going on from {checkpoint}")
        wait_for_everyone()
        if is_main_process():
            with disk_errors_explained(self.folder, checkpoint):
                self.save()
        return checkpoint

    def check_again(self) -> None:
        """What another process wrote before this one had the lock, and libraries of other versions."""
        found = read_run_record(self.folder)
        found = self.lengthen(found) if found else None
        if found and (self.earlier is None or self.earlier | {"status": found["status"]} != found):
            self.earlier = found
            self.check(self.record)
        if found and (others := find_other_versions(found, self.record)):
            notice(f"going on with other versions ({', '.join(others)}): results may differ in rounding")

    def save(self, **parts: Any) -> None:
        write_json(self.record | parts, self.folder / RUN_FILE)

    def print_finished(self) -> None:
        """Say that there is nothing left to train."""
        assert self.earlier is not None
        metrics = self.earlier["metrics"]
        notice(
            f"{self.folder} is finished: {metrics['steps']} steps, train loss {metrics['train_loss']:.3f}; "
            "a higher --num_train_epochs or --max_steps goes on, --overwrite_output_dir starts anew\n"
            f"to chat: python cli_demo.py --checkpoint_dir {self.folder}"
        )


def open_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: TrainingArguments,
) -> Run:
    """The run in --output_dir: a new one or, where training goes on, the one found there. Changes no file."""
    arguments = collect_arguments(model_args, data_args, lora_args, training_args)
    base = fingerprint_folder(Path(model_args.base))
    run = Run(training_args.run_dir, arguments, base)
    if training_args.do_train:
        run.find_earlier()
        if model_args.checkpoint_dir:
            run.describe(parent=describe_parent(Path(model_args.checkpoint_dir)))
    return run


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
