"""Chat with a fine-tuned model on a web page, several users at once.

    python gradio_webserver.py --checkpoint_dir RUN
    python gradio_webserver.py --model_name_or_path BASE --lora_model_name_or_path ADAPTER

The page is on this machine only; --share and --server_name open it to others and demand --auth.
"""

import os
import sys

from utils.arguments import GenerationArguments, ModelArguments
from utils.chat.page_arguments import PageArguments, check_port, read_auth
from utils.console import notice, run_main
from utils.flags.parser import find_given_flags, parse_args
from utils.models.folder import resolve_model


def main() -> None:
    model_args, generation_args, page_args = parse_args(
        sys.argv[1:], [ModelArguments, GenerationArguments, PageArguments], __doc__
    )
    auth = read_auth(page_args)
    check_port(page_args)
    if generation_args.temperature != 1 and not generation_args.do_sample:
        notice(f"without --do_sample the page starts at temperature 0, not {generation_args.temperature}")
    resolved = resolve_model(model_args, find_given_flags(sys.argv[1:]), page_args.template)

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from utils.chat.generation import load_run
    from utils.chat.page import build_page, launch_page
    from utils.merge.held_out import find_examples

    chat, args = load_run(resolved), resolved.args
    examples = find_examples(resolved, chat.tokenizer.raw)
    adapter = f" + {args.checkpoint_dir}" if args.checkpoint_dir else ""
    about = f"{args.base}{adapter} · {args.bits}-bit"
    notice(about)
    launch_page(build_page(chat, generation_args, page_args, about, examples), page_args, auth)


if __name__ == "__main__":
    run_main(main)
