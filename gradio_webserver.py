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
from utils.models.folder import check_adapter_fits, read_model_config, resolve_model
from utils.prompts import read_template


def main() -> None:
    model_args, generation_args, page_args = parse_args(
        sys.argv[1:], [ModelArguments, GenerationArguments, PageArguments], __doc__
    )
    auth = read_auth(page_args)
    check_port(page_args)
    if generation_args.temperature != 1 and not generation_args.do_sample:
        notice(f"without --do_sample the page starts at temperature 0, not {generation_args.temperature}")
    model_args = resolve_model(model_args, find_given_flags(sys.argv[1:]))
    config = read_model_config(model_args)
    check_adapter_fits(model_args, config)
    if page_args.template:
        read_template(page_args.template)

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from utils.chat.generation import load_run
    from utils.chat.page import build_page, launch_page

    chat = load_run(model_args, config, page_args.template)
    adapter = f" + {model_args.checkpoint_dir}" if model_args.checkpoint_dir else ""
    about = f"{model_args.model_name_or_path}{adapter} · {model_args.bits}-bit"
    notice(about)
    launch_page(build_page(chat, generation_args, page_args, about), page_args, auth)


if __name__ == "__main__":
    run_main(main)
