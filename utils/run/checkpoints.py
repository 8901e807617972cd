"""Checkpoints that are whole or not there: written beside, read back, hashed, fsynced, renamed.

A process may be killed between any two bytes, and a disk may give back others than it got. So a save is

    .checkpoint-40.tmp/   every file is written here; a kill leaves this hidden folder, which is swept away
    manifest.json         last of all: the size and sha256 of each file, and what the run was made of
    checkpoint-40/        the same folder after one rename, which happens or does not

and nothing is resumed from that is not, byte for byte, what its manifest says: the next older checkpoint is
taken instead, with a line that names the file.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.console import UserError, notice
from utils.run.record import fingerprint, hash_file

MANIFEST_FILE = "manifest.json"
STATE_FILE = "trainer_state.json"
RESUME_FILES = (STATE_FILE, "training_state.json", "optimizer.safetensors")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt"}
# Hidden names beside checkpoint-N: being written, being replaced by a new N, being deleted.
WRITING, REPLACED, DELETING = "tmp", "old", "gone"
LEFTOVERS = re.compile(rf"\.(checkpoint-\d+|final)\.({WRITING}|{REPLACED}|{DELETING})|.+\.tmp")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N folders, by step."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=read_step)


def read_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def name_beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def write_manifest(folder: Path, step: int, fingerprints: dict[str, str]) -> None:
    """Hash and fsync every file of `folder`, then write its manifest."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        flush_to_disk(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    manifest = {"step": step, "fingerprints": fingerprints, "files": files}
    (folder / MANIFEST_FILE).write_bytes(render_manifest(manifest))
    flush_to_disk(folder / MANIFEST_FILE)
    flush_to_disk(folder)


def render_manifest(content: dict[str, Any]) -> bytes:
    """The manifest's bytes; `sha256` is that of the rest, so that the manifest is checked as well."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    return (json.dumps(content | {"sha256": fingerprint(content)}, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError, saying why, where the manifest is not the one that was written for this folder."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"it has no {MANIFEST_FILE} (an unfinished save, or another program's)")
    written = path.read_bytes()
    try:
        manifest = json.loads(written)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or render_manifest(manifest) != written:
        raise ValueError(f"{MANIFEST_FILE} is damaged")
    if manifest["step"] != read_step(folder):
        raise ValueError(f"{MANIFEST_FILE} is that of step {manifest['step']}")
    return manifest


def find_fault(folder: Path, needs_best: bool = False) -> str | None:
    """Why `folder` cannot be resumed from, naming the file; None where it can.

    `needs_best`: the checkpoint that was the best by then, by the log in `folder`, must be there too.
    """
    if damage := find_damage(folder):
        return damage
    files = read_manifest(folder)["files"]
    if absent := [name for name in RESUME_FILES if name not in files]:
        return f"it was saved without {absent[0]} (--save_only_model)"
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    best = state["best_global_step"] if needs_best else None
    damage = find_damage(folder.with_name(f"checkpoint-{best}")) if best else None
    return f"the best step before it was {best}, and of checkpoint-{best} {damage}" if damage else None


def find_damage(folder: Path) -> str | None:
    """How `folder` differs from what was saved, naming the file; None where it does not."""
    try:
        files = read_manifest(folder)["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes, {expected['size']:,} were saved"
            if hash_file(path) != expected["sha256"]:
                return f"{name} is not what was saved (its sha256 differs)"
    except (ValueError, OSError) as error:
        return str(error)
    foreign = (path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.name not in files)
    return next((f"{path.name} was not saved with it" for path in foreign), None)


def find_valid_checkpoint(output_dir: Path, needs_best: bool = False) -> Path | None:
    """The newest checkpoint without a fault; one line for each newer one that has one."""
    checkpoints = list_checkpoints(output_dir)
    for folder in reversed(checkpoints):
        fault = find_fault(folder, needs_best)
        if fault is None:
            return folder
        notice(f"{folder} is skipped: {fault}")
    if checkpoints:
        notice(f"{output_dir} holds no valid checkpoint: training starts at step 0")
    return None


def rename_into_place(staging: Path, folder: Path) -> None:
    """Rename a sealed folder to its name; an older one of that name goes only once the new one is there."""
    replaced = name_beside(folder, REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    staging.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Rename, then delete: a kill in between leaves no half checkpoint under its name."""
    deleting = name_beside(folder, DELETING)
    shutil.rmtree(deleting, ignore_errors=True)
    folder.rename(deleting)
    shutil.rmtree(deleting)


def remove_old_checkpoints(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Keep `limit` checkpoints: those in `keep` (the one just verified among them) and the newest others."""
    others = [folder for folder in list_checkpoints(output_dir) if folder not in keep]
    allowed = max(0, limit - len(keep)) if limit else len(others)
    for folder in others[: max(0, len(others) - allowed)]:
        remove_checkpoint(folder)


def sweep_leftovers(output_dir: Path) -> None:
    """Remove what a killed save left, after putting back a checkpoint that was about to be replaced."""
    for path in sorted(output_dir.glob("*")) if output_dir.is_dir() else []:
        if not LEFTOVERS.fullmatch(path.name):
            continue
        final = path.with_name(path.name.removeprefix(".").rpartition(".")[0])
        if path.suffix == f".{REPLACED}" and not final.exists():
            path.rename(final)
            continue
        notice(f"removing {path.name}, left by a save that was interrupted")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_free_space(output_dir: Path, checkpoint_bytes: int) -> None:
    """Raises UserError where the first checkpoint, and another written beside it, would not fit."""
    free = shutil.disk_usage(output_dir).free
    if free < 2 * checkpoint_bytes:
        raise UserError(
            f"--output_dir {output_dir} has {free / 2**30:.2f} GiB free and two checkpoints of this run need "
            f"{2 * checkpoint_bytes / 2**30:.2f} GiB: free some space or name a folder on another disk"
        )


@contextmanager
def disk_errors_explained(path: Path, kept: Path | None) -> Iterator[None]:
    """Turn a full disk, a quota or a read-only folder into one line that says what is still there."""
    try:
        yield
    except Exception as error:
        number = find_errno(error)
        if number is None:
            raise
        last = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved before"
        raise UserError(
            f"{path} cannot be written ({os.strerror(number)}); {last}: make room or the folder writable, "
            "then run the same command again (not with --overwrite_output_dir, which starts anew)"
        ) from error


def find_errno(error: BaseException | None) -> int | None:
    """The system's error number behind `error`: safetensors and tokenizers give it in their text only."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else find_errno(error.__cause__)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
