"""Trackers of --report_to: whether they are installed, reachable and logged in to, before weights load."""

import importlib.util
import netrc
import os
from importlib.metadata import version
from pathlib import Path

from utils.console import UserError
from utils.flags.trainer_flags import list_loggers, read_source
from utils.models.hub import check_host

PACKAGES = {"azure_ml": "azureml", "dagshub": "dagshub", "flyte": "flytekit", "kubeflow": "kubeflow"}
# Those that talk to a host as they start; the variable that keeps them offline, and its words for it.
HOSTS = {
    "wandb": ("api.wandb.ai", "WANDB_MODE", ("offline", "disabled", "dryrun")),
    "swanlab": ("api.swanlab.cn", "SWANLAB_MODE", ("offline", "local", "disabled")),
    "comet_ml": ("www.comet.com", "COMET_START_MODE", ("offline", "disabled")),
    "neptune": ("app.neptune.ai", "NEPTUNE_MODE", ("offline", "debug")),
    "clearml": ("api.clear.ml", "CLEARML_OFFLINE_MODE", ("1", "true")),
}


def check_tracker(name: str) -> None:
    """Raises UserError for a --report_to that is unknown or would fail when training starts."""
    if name not in (loggers := list_loggers()):
        raise UserError(f"--report_to {name}: use none or one of {', '.join(loggers)}")
    package = PACKAGES.get(name, name)
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--report_to {name}: its package is missing (pip install {package})")
    if name == "swanlab":
        check_swanlab_version(version(package))
    if name not in HOSTS:
        return
    host, variable, offline = HOSTS[name]
    if os.environ.get(variable, "").lower() in offline:
        return
    if name == "wandb":
        if is_wandb_offline():
            return
        check_wandb_login()
    if not has_own_server(name):
        cure = f"set {variable}={offline[0]} to record here, or --report_to none"
        check_host(f"--report_to {name}:", f"https://{host}", cure)


def check_swanlab_version(installed: str) -> None:
    """From 0.8 on get_run() raises where there is no run yet, and the Trainer asks whether it is None."""
    if int(installed.split(".")[1]) < 8 and installed.startswith("0."):
        return
    if "_swanlab.get_run() is None" in read_source("integrations/integration_utils.py"):
        raise UserError(
            f"--report_to swanlab: this Trainer cannot begin a run of swanlab {installed}: pip install "
            "'swanlab<0.8'"
        )


def has_own_server(name: str) -> bool:
    """A server of one's own: where it is is the tracker's to know."""
    return any(key.startswith(name.split("_")[0].upper()) and "URL" in key for key in os.environ)


def is_wandb_offline() -> bool:
    """What `wandb offline` leaves, in this folder or for the user."""
    files = (Path("wandb/settings"), Path("~/.config/wandb/settings").expanduser())
    return any("offline" in file.read_text(encoding="utf-8") for file in files if file.is_file())


def check_wandb_login() -> None:
    """wandb asks for a key when training starts, or fails where nobody can type one."""
    if os.environ.get("WANDB_API_KEY"):
        return
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        known = netrc.netrc(path).hosts if path.is_file() else {}
    except netrc.NetrcParseError as error:
        raise UserError(f"--report_to wandb: {path} cannot be read ({error}): run `wandb login`") from error
    if host.split(":")[0] not in known:
        raise UserError(
            "--report_to wandb: nobody is logged in: run `wandb login`, or set WANDB_MODE=offline to record "
            "here and `wandb sync` later"
        )
