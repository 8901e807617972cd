"""Where the files that a run was made from are now: a run is used from other folders, and things are moved.

A path that a run recorded is looked for as it was written, then from the folder in which the run was started,
from the run's own folder and from this repository, so that it is found when these were moved together.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.console import UserError, notice
from utils.run.repository import REPOSITORY
from utils.run.resume import fingerprint_folder


def describe_places(base: str, run_dir: Path) -> dict[str, str] | None:
    """For run.json: where the folder `base` lies, absolute and relative; None for a hub id."""
    if not Path(base).is_dir():
        return None
    path = Path(base).resolve()
    return {
        "absolute": str(path),
        "from_run": os.path.relpath(path, run_dir.resolve()),
        "from_repository": os.path.relpath(path, REPOSITORY),
    }


def list_places(record: dict[str, Any], run_dir: Path) -> Iterator[Path]:
    """Folders that may be the run's base, likeliest first; the same one may come twice."""
    name = Path(record["arguments"]["model_name_or_path"]).expanduser()
    yield name
    places = record.get("base_places") or {}  # runs of older versions have none
    if places:
        yield Path(places["absolute"])
        yield run_dir.resolve() / places["from_run"]
        yield REPOSITORY / places["from_repository"]
    yield REPOSITORY / name


def find_base(record: dict[str, Any], run_dir: Path) -> str:
    """The run's base: a folder that is there, of several the one with the run's fingerprint, or its hub id.

    Raises UserError where it was a folder and is not found.
    """
    name, wanted = record["arguments"]["model_name_or_path"], record["base_model"].get("fingerprint")
    found = [path for path in list_places(record, run_dir) if (path / "config.json").is_file()]
    if not found:
        if record.get("base_places") or wanted:
            places = dict.fromkeys(os.path.abspath(path) for path in list_places(record, run_dir))
            raise UserError(
                f"the base of the run {run_dir}, {name}, is not there any more (looked at "
                f"{', '.join(places)}): name its folder with --model_name_or_path"
            )
        return name
    same = [path for path in found if wanted in (None, fingerprint_folder(path))]
    chosen = (same or found)[0]
    if chosen != Path(name).expanduser():
        notice(f"the run's base {name} is found at {chosen}")
    return str(chosen)


def find_data(value: str, record: dict[str, Any]) -> str:
    """A recorded --dataset_name or --data_dir, its local paths where they are found now."""
    return ",".join(find_entry(entry, record) for entry in value.split(","))


def find_entry(entry: str, record: dict[str, Any]) -> str:
    path, mark, count = entry.partition("#")
    path = os.path.expanduser(path.strip())
    if not path or glob.glob(path):
        return entry
    for folder in (record.get("directory"), REPOSITORY):
        if folder and glob.glob(os.path.join(folder, path)):
            return os.path.join(folder, path) + mark + count
    return entry
