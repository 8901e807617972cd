"""Serve a run to programs that speak OpenAI's API.

    python -m utils.serve --checkpoint_dir RUN
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "RUN", "messages": [{"role": "user", "content": "Hi"}]}'

The run's name is the tuned model, the base's name the base alone; /v1/models lists them. The server is on
this machine only; --server_name opens it to others, who need the key: --api_key, or the one that is made and
printed. Replies are greedy, or as the flags say, where a request names no temperature.
"""

import secrets
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.arguments import GenerationArguments, ModelArguments, flag, require_positive
from utils.chat.page_arguments import check_port, is_loopback
from utils.console import UserError, notice, run_main
from utils.flags.parser import find_given_flags, parse_args
from utils.models.folder import ResolvedModel, find_context, resolve_model

GRACE_SECONDS = 30  # for the replies under way when the server is asked to end
LOOPBACK = ["localhost", "127.0.0.1"]


@dataclass
class ServeArguments:
    _argument_group_name = "server"
    server_name: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 for every network.")
    server_port: int = flag(8000, "Port to listen on.")
    api_key: str | None = flag(None, "Key that clients must send; one is made where others may come in.")
    template: str | None = flag(None, "A name in utils/prompts/templates, instead of the run's own.")
    slots: int = flag(8, "Replies written at once.")
    slot_tokens: int = flag(4096, "Longest prompt and reply together, tokens; at most the model's context.")
    limit_queue: int = flag(64, "Requests waiting at most; the next one is answered 429.")
    limit_seconds: float = flag(600.0, "Longest time for one reply, waiting included.")
    kept_conversations: int = flag(
        0, "Latest conversations whose next turn reads only what is new; in 16 bits it then rounds otherwise."
    )

    def __post_init__(self) -> None:
        require_positive(self, "server_port", "slots", "slot_tokens", "limit_seconds")
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("--api_key is empty: name a key, or leave the flag out")
        for name in ("limit_queue", "kept_conversations"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} is negative: use 0 for none")


def main() -> None:
    model_args, generation_args, serve_args = parse_args(
        sys.argv[1:],
        [ModelArguments, GenerationArguments, ServeArguments],
        __doc__,
        max_new_tokens=1024,
        top_k=0,
    )
    check_port(serve_args)
    api_key, hosts = choose_access(serve_args)
    resolved = resolve_model(model_args, find_given_flags(sys.argv[1:]), serve_args.template)

    import uvicorn

    from utils.chat.generation import load_run
    from utils.chat.server import Server, build_app

    chat, names = load_run(resolved), name_models(resolved)
    tokens = min(serve_args.slot_tokens, find_context(resolved.config) or serve_args.slot_tokens)
    chat.decoder.open_slots(serve_args.slots, tokens, serve_args.kept_conversations, for_many=True)
    limits = (serve_args.slots, tokens, serve_args.limit_queue, serve_args.limit_seconds)
    server = Server(chat, names, generation_args, *limits)
    app = build_app(server, api_key, hosts)
    config = uvicorn.Config(
        app,
        serve_args.server_name,
        serve_args.server_port,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    host = f"[{serve_args.server_name}]" if ":" in serve_args.server_name else serve_args.server_name
    address = f"http://{host}:{serve_args.server_port}/v1"
    notice(
        f"{address} serves {' and '.join(names)}: {serve_args.slots} replies at once, {tokens} tokens each"
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        uvicorn.Server(config).run()
    except KeyboardInterrupt:  # uvicorn raises the signal again when the replies under way have ended
        pass
    chat.decoder.end()
    notice("stopped")


def choose_access(serve_args: ServeArguments) -> tuple[str | None, list[str]]:
    """(the key that is wanted, names that the server answers to)"""
    name = serve_args.server_name
    if is_loopback(name):
        return serve_args.api_key, [*LOOPBACK, name, f"[{name}]"]  # in brackets where it is one of IPv6
    if serve_args.api_key is None:
        key = secrets.token_urlsafe(24)
        notice(f"--server_name {name} opens the server to others; their key: {key}")
        return key, ["*"]
    return serve_args.api_key, ["*"]


def name_models(resolved: ResolvedModel) -> dict[str, bool]:
    """{name: whether with the adapter}; of a run the tuned model, then its base."""
    args = resolved.args
    base = Path(args.base).name if Path(args.base).is_dir() else args.base
    if not resolved.has_adapter:
        return {base: True}
    tuned = Path(str(args.checkpoint_dir)).resolve().name
    return {tuned: True, base if base != tuned else f"{base}-base": False}


if __name__ == "__main__":
    run_main(main)
