"""Chat with a fine-tuned model in the terminal, streaming.

    python cli_demo.py --checkpoint_dir RUN
    echo "Who are you?" | python cli_demo.py --checkpoint_dir RUN

clear starts a new conversation, stop or Ctrl-D leaves, Ctrl-C interrupts the reply.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from utils.arguments import GenerationArguments, ModelArguments, find_given_flags, parse_args
from utils.checks import check_adapter_fits, read_model_config, resolve_model
from utils.console import UserError, run_main
from utils.formats import Messages
from utils.prompts import read_template


@dataclass
class ChatArguments:
    _argument_group_name = "chat"
    system: str | None = HfArg(default=None, help="System message at the start of each conversation.")
    template: str | None = HfArg(default=None, help="A name in utils/templates, instead of the run's own.")
    seed: int = HfArg(default=42, help="Seed of --do_sample.")


def main() -> None:
    model_args, generation_args, chat_args = parse_args(
        sys.argv[1:], [ModelArguments, GenerationArguments, ChatArguments], __doc__
    )
    model_args = resolve_model(model_args, find_given_flags(sys.argv[1:]))
    config = read_model_config(model_args)
    check_adapter_fits(model_args, config)
    if chat_args.template:
        read_template(chat_args.template)

    from transformers import set_seed

    from utils.generation import load_run

    set_seed(chat_args.seed)
    chat = load_run(model_args, config, chat_args.template)
    adapter = model_args.checkpoint_dir or "none"
    print(f"{model_args.model_name_or_path}, {model_args.bits} bits, adapter {adapter}")
    if sys.stdin.isatty():
        print("clear: new conversation; stop or Ctrl-D: leave; Ctrl-C: interrupt the reply")
    hold_conversation(chat, generation_args, chat_args.system)


def hold_conversation(chat, generation_args: GenerationArguments, system: str | None) -> None:
    """Questions from the terminal or a pipe, replies onto it, until the input ends."""
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for question in read_questions():
        if question == "stop":
            return
        if question == "clear":
            messages = list(start)
            print("new conversation")
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            messages = answer(chat, asked, generation_args)
        except UserError as error:
            print(error)


def answer(chat, messages: Messages, generation_args: GenerationArguments) -> Messages:
    """Print the reply as it comes; returns the conversation with it. Ctrl-C keeps what was said so far."""
    from utils.generation import stream_reply, trim_history

    messages, dropped = trim_history(chat, messages, generation_args.max_new_tokens)
    if dropped:
        print(f"[the conversation is longer than the context: the oldest {dropped} messages are forgotten]")
    reply, pieces = "", stream_reply(chat, messages, generation_args)
    try:
        for piece in pieces:
            reply += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [interrupted]", end="")
    finally:
        pieces.close()
    print()
    return [*messages, {"role": "assistant", "content": reply.strip()}]


def read_questions() -> Iterator[str]:
    """Lines of a pipe, or what is typed; a paste of several lines is one question."""
    if not sys.stdin.isatty():
        for line in filter(str.strip, sys.stdin):
            print(f"> {line.strip()}", flush=True)
            yield line.strip()
        return
    import readline

    readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            question = input("\n> ").strip()
        except KeyboardInterrupt:
            print("\nCtrl-D leaves")
        except EOFError:
            print()
            return
        else:
            if question:
                yield question


if __name__ == "__main__":
    run_main(main)
