"""Flags of the page, and whom it may be opened to."""

import ipaddress
import socket
from dataclasses import dataclass

from utils.arguments import flag, require_positive
from utils.console import UserError


@dataclass
class PageArguments:
    _argument_group_name = "page"
    server_name: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 for every network.")
    server_port: int = flag(7860, "Port to listen on.")
    share: bool = flag(False, "A public link through gradio's servers.")
    auth: list[str] | None = flag(None, "NAME:PASSWORD of each user who may come in.")
    system: str = flag("", "System message that the page starts with.")
    template: str | None = flag(None, "A name in utils/prompts/templates, instead of the run's own.")
    limit_prompt_tokens: int = flag(2048, "Longest conversation that is read.")
    limit_new_tokens: int = flag(1024, "Longest reply that may be asked for.")
    limit_seconds: float = flag(120.0, "Longest time for one reply.")
    limit_queue: int = flag(32, "Users waiting at most; the next one is asked to come back.")
    concurrent_replies: int = flag(8, "Replies written at once.")
    kept_conversations: int = flag(
        4, "Latest conversations whose keys and values stay in memory for the next turn."
    )

    def __post_init__(self) -> None:
        require_positive(
            self,
            "server_port",
            "limit_prompt_tokens",
            "limit_new_tokens",
            "limit_seconds",
            "limit_queue",
            "concurrent_replies",
        )
        if self.kept_conversations < 0:
            raise UserError(f"--kept_conversations {self.kept_conversations} is negative: use 0 to keep none")


def read_auth(page_args: PageArguments) -> list[tuple[str, str]] | None:
    """(name, password) of each user. Raises UserError where the page is opened to others without any."""
    users = []
    for entry in page_args.auth or []:
        name, colon, password = entry.partition(":")
        if not (name and colon and password):
            raise UserError("--auth takes NAME:PASSWORD, one for each user")
        users.append((name, password))
    if not users and (page_args.share or not is_loopback(page_args.server_name)):
        opened = "--share" if page_args.share else f"--server_name {page_args.server_name}"
        raise UserError(f"{opened} opens the page to others: give --auth NAME:PASSWORD too")
    return users or None


def check_port(page_args: PageArguments) -> None:
    """Raises UserError where the page cannot listen, before a model is loaded for it."""
    name, port = page_args.server_name, page_args.server_port
    if port > 65535:
        raise UserError(f"--server_port {port} is no port: use 1 to 65535")
    try:
        with socket.create_server((name, port), family=socket.AF_INET6 if ":" in name else socket.AF_INET):
            pass
    except OSError as error:
        raise UserError(
            f"--server_name {name} --server_port {port}: cannot listen there ({error.strerror}): "
            "choose another"
        ) from error


def is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
