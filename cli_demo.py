"""Chat with a fine-tuned model in the terminal, streaming.

    python cli_demo.py --checkpoint_dir RUN
    python cli_demo.py --checkpoint_dir RUN --compare
    echo "Who are you?" | python cli_demo.py --checkpoint_dir RUN

In the chat, /help lists the commands: a new conversation, a system message, another reply, a file to save to.
Ctrl-C interrupts the reply; exit, quit, stop or Ctrl-D leaves.
"""

import dataclasses
import io
import itertools
import json
import shutil
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from utils.arguments import GenerationArguments, ModelArguments, flag
from utils.chat.side_by_side import stream_side_by_side
from utils.console import UserError, run_main
from utils.flags.parser import find_given_flags, parse_args
from utils.models.folder import resolve_model
from utils.prompts.messages import Messages
from utils.prompts.rendering import CLOSE, OPEN

if TYPE_CHECKING:
    from utils.chat.generation import ChatModel
    from utils.decode.reply import Reply

COMMANDS = """\
/clear        start a new conversation
/system TEXT  start a new one with this system message; without TEXT, with none
/regenerate   answer the last question again, sampled
/think on|off a thought before each reply, shown dimmed, or none
/save FILE    append the conversation to FILE.jsonl, a row that --dataset_name reads
/help         this list
exit, quit, stop or Ctrl-D leaves; Ctrl-C interrupts the reply"""
DIM, PLAIN = "\033[2m", "\033[0m"
# Words that need no slash; as messages to a model they say little.
BARE_COMMANDS = {"clear", "exit", "quit", "stop"}


@dataclass
class ChatArguments:
    _argument_group_name = "chat"
    system: str | None = flag(None, "System message at the start of each conversation.")
    compare: bool = flag(False, "Each question to the base too: its reply on the left.")
    template: str | None = flag(None, "A name in utils/prompts/templates, instead of the run's own.")
    seed: int = flag(42, "Seed of --do_sample.")


@dataclass
class Side:
    """A model and its own course of the conversation; --compare has two, the model being one in memory."""

    tuned: bool
    messages: Messages = field(default_factory=list)


def main() -> None:
    model_args, generation_args, chat_args = parse_args(
        sys.argv[1:], [ModelArguments, GenerationArguments, ChatArguments], __doc__
    )
    resolved = resolve_model(model_args, find_given_flags(sys.argv[1:]), chat_args.template)
    if chat_args.compare and not resolved.has_adapter:
        raise UserError("--compare shows the base beside an adapter on it: name one with --checkpoint_dir")

    from transformers import set_seed

    from utils.chat.generation import load_run

    set_seed(chat_args.seed)
    chat = load_run(resolved)
    args = resolved.args
    print(f"{args.base}, {args.bits} bits, adapter {args.checkpoint_dir or 'none'}")
    if sys.stdin.isatty():
        print("/help lists the commands; Ctrl-C interrupts the reply, Ctrl-D leaves")
    sides = [Side(tuned) for tuned in ([False, True] if chat_args.compare else [True])]
    hold_conversation(chat, sides, generation_args, chat_args.system)


def hold_conversation(
    chat: "ChatModel", sides: list[Side], generation_args: GenerationArguments, system: str | None
) -> None:
    """Questions and commands from the terminal or a pipe, replies onto it, until the input ends."""
    start_anew(sides, system)
    for line in read_questions():
        command, _, rest = line.partition(" ")
        if line in BARE_COMMANDS:
            command = f"/{line}"
        try:
            if command in ("/exit", "/quit", "/stop"):
                return
            elif command == "/help":
                print(COMMANDS)
            elif command == "/clear":
                start_anew(sides, system)
                print("new conversation")
            elif command == "/system":
                system = rest.strip() or None
                start_anew(sides, system)
                print(f"new conversation{'' if system else ' without a system message'}")
            elif command == "/think":
                chat = switch_thinking(chat, rest.strip())
            elif command == "/save":
                save_conversation(sides, rest.strip())
            elif command == "/regenerate":
                regenerate(chat, sides, generation_args)
            elif command.startswith("/") and command[1:].isalpha():
                print(f"{command} is no command: /help lists them")
            else:
                ask(chat, sides, line, generation_args)
        except KeyboardInterrupt:  # before the first word of a reply, or after the last
            print(" [interrupted]")


def start_anew(sides: list[Side], system: str | None) -> None:
    for side in sides:
        side.messages = [{"role": "system", "content": system}] if system else []


def switch_thinking(chat: "ChatModel", word: str) -> "ChatModel":
    """The model with thinking on or off from here on; a line says what holds."""
    if not chat.tokenizer.style.has_switch:
        print("the chat template has no switch for thinking")
        return chat
    if word in ("on", "off"):
        chat = dataclasses.replace(chat, tokenizer=chat.tokenizer.switch(word == "on"))
    elif word:
        print(f"/think {word}: use on or off")
    print(f"thinking is {'on' if chat.tokenizer.thinks else 'off'}")
    return chat


def regenerate(chat: "ChatModel", sides: list[Side], generation_args: GenerationArguments) -> None:
    if not sides[-1].messages or sides[-1].messages[-1]["role"] != "assistant":
        print("there is no reply yet")
        return
    if not generation_args.do_sample:
        print("[sampled: the likeliest reply would be the same again]")
        generation_args = dataclasses.replace(generation_args, do_sample=True, num_beams=1)
    question = sides[-1].messages[-2]["content"]
    before = [(side, side.messages) for side in sides]
    for side in sides:
        side.messages = side.messages[:-2]
    try:
        ask(chat, sides, question, generation_args)
    finally:
        for side, messages in before:
            if len(side.messages) < len(messages):  # refused, or ended before its first word
                side.messages = messages


def ask(chat: "ChatModel", sides: list[Side], question: str, generation_args: GenerationArguments) -> None:
    """Print the reply, or both, as they come; the conversation grows by it, unless it is refused."""
    from utils.chat.generation import trim_history
    from utils.chat.streaming import open_reply, stream_text

    try:
        asked = []
        for side in sides:
            messages = [*side.messages, {"role": "user", "content": question}]
            messages, dropped = trim_history(chat, messages, generation_args.max_new_tokens)
            asked.append(messages)
        if dropped:
            print(
                f"[the conversation is longer than the context: the oldest {dropped} messages are forgotten]"
            )
    except UserError as error:
        print(error)
        return
    replies: list[Reply] = []
    try:
        for side, messages in zip(sides, asked, strict=True):
            replies.append(open_reply(chat, messages, generation_args, side.tuned))
        texts = print_replies([stream_text(chat.tokenizer, reply) for reply in replies])
    finally:  # Ctrl-C may come before any of them is read
        for reply in replies:
            reply.cancel()
    for side, messages, text in zip(sides, asked, texts, strict=True):
        if text.strip():  # a turn that was ended before its first word is no part of the conversation
            side.messages = [*messages, {"role": "assistant", "content": text.strip()}]
    figures = [describe_reply(reply, generation_args) for reply in replies]
    print(f"[{'; '.join(figures)}]", file=sys.stderr, flush=True)


def describe_reply(reply: "Reply", generation_args: GenerationArguments) -> str:
    is_cut = reply.finish_reason == "length"
    return f"{reply.describe()}{f', cut by --max_new_tokens {generation_args.max_new_tokens}' * is_cut}"


def print_replies(streams: list[Generator[str]]) -> list[str]:
    """One reply as it comes, or two in columns. Ctrl-C keeps what was said so far."""
    replies, interrupted = [""] * len(streams), False

    def read_pieces() -> Iterator[list[str]]:
        """The next piece of each reply, until all have ended. Ctrl-C ends them too: what has come is kept."""
        nonlocal interrupted
        running = set(range(len(streams)))
        while running and not interrupted:
            row = [""] * len(streams)
            try:
                for i in sorted(running):
                    piece = next(streams[i], None)
                    running -= {i} if piece is None else set()
                    row[i] = piece or ""
                    replies[i] += row[i]
            except KeyboardInterrupt:
                interrupted = True
            yield row

    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(closing(stream))
        if len(streams) == 1:
            shown = dim_thought(piece for (piece,) in read_pieces())
        else:
            width = shutil.get_terminal_size().columns
            pieces = itertools.chain([["base\n", "tuned\n"]], read_pieces())
            shown = (f"{row}\n" for row in stream_side_by_side(pieces, width))
        while True:
            try:
                for text in shown:
                    print(text, end="", flush=True)
                break
            except KeyboardInterrupt:  # it came while a piece was printed
                interrupted = True
    if len(streams) == 1 or interrupted:
        print(" [interrupted]" if interrupted else "")
    return replies


def dim_thought(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a reply; in a terminal its thought is dimmed in place of its tags, which come whole."""
    marks = [(OPEN, DIM), (CLOSE, PLAIN)] if sys.stdout.isatty() else []
    for number, piece in enumerate(pieces):
        if number == 0 and not piece.startswith(OPEN):
            marks = []
        for tag, colour in marks[:]:
            if tag in piece:
                piece = piece.replace(tag, colour, 1)
                marks.remove((tag, colour))
        yield piece
    if marks == [(CLOSE, PLAIN)]:  # cut within the thought
        yield PLAIN


def save_conversation(sides: list[Side], name: str) -> None:
    """Append the conversation to a file of rows {messages}, which the fine-tuning scripts read."""
    if not name:
        print("name the file: /save FILE.jsonl")
        return
    if not any(message["role"] == "assistant" for side in sides for message in side.messages):
        print("there is no reply yet")
        return
    try:
        with open(name, "a", encoding="utf-8") as file:
            for side in sides:
                file.write(json.dumps({"messages": side.messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"not saved: {error}")
    else:
        print(f"saved in {name}, {len(sides[-1].messages)} messages")


def read_questions() -> Iterator[str]:
    """Lines of a pipe, or what is typed; a paste of several lines is one question."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        for number, line in enumerate(sys.stdin, 1):
            if not line.strip():
                continue
            if any("\udc80" <= letter <= "\udcff" for letter in line):  # bytes that are no UTF-8
                raise UserError(f"line {number} is not UTF-8: convert the questions (iconv -f GBK -t UTF-8)")
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
