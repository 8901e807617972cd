"""The Hugging Face hub: reached, logged in to, asked for a config; one clear line where that fails."""

import socket
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from utils.arguments import ModelArguments
from utils.console import UserError


def download_config(model_args: ModelArguments) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, where = model_args.base, model_args.where
    try:
        cached = try_to_load_from_cache(name, "config.json", **where)
        if isinstance(cached, str):
            return Path(cached)
        reach_hub(f"--model_name_or_path {name}: no such folder, and")
        return Path(hf_hub_download(name, "config.json", **where))
    except (HFValidationError, OSError) as error:  # the hub's other errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model_name_or_path {name}: no such folder, and the hub does not give it "
            f"({type(error).__name__}: {reason}); a gated model needs `hf auth login`"
        ) from error


def find_base_folder(model_args: ModelArguments) -> Path:
    """Folder of the base's safetensors, from the hub's cache where it is no folder."""
    if Path(model_args.base).is_dir():
        return Path(model_args.base)
    from huggingface_hub import snapshot_download  # which looks at what is cached where it is offline

    files = ["*.json", "*.safetensors", "*.py"]
    return Path(snapshot_download(model_args.base, allow_patterns=files, **model_args.where))


def reach_hub(what: str) -> None:
    """Raises UserError at once where the hub cannot be reached; its client would retry for half a minute."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise UserError(f"{what} HF_HUB_OFFLINE is set: name a local folder or file")
    check_host(what, constants.ENDPOINT, "download it elsewhere and name the local folder or file")


def check_host(what: str, url: str, cure: str) -> None:
    """Raises UserError where a server cannot be reached, unless a proxy stands between."""
    host = urlparse(url)
    if getproxies().get(host.scheme):
        return
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=3).close()
    except OSError as error:
        raise UserError(f"{what} {host.hostname} cannot be reached ({error}): {cure}") from error


def check_login(token: str | None = None) -> None:
    from huggingface_hub import HfApi

    reach_hub("--push_to_hub:")
    try:
        HfApi().whoami(token=token)
    except OSError as error:
        raise UserError(
            f"--push_to_hub: the hub knows no token of yours ({str(error).splitlines()[0]}): run "
            "`hf auth login` with a token that may write"
        ) from error
