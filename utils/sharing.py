"""A run for others: its model card, made from run.json, and its way to the hub.

python -m utils.sharing RUN HUB_ID [--private]
"""

import argparse
from pathlib import Path

from utils.console import run_main
from utils.flags.strict_parser import OneNameFormatter
from utils.models.hub import check_login
from utils.train.model_card import push_run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m utils.sharing",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=OneNameFormatter,
    )
    parser.add_argument("run", help="Folder of a finished run.")
    parser.add_argument("hub_id", help="name or owner/name")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()
    check_login()
    push_run(Path(args.run), args.hub_id, args.private)


if __name__ == "__main__":
    run_main(main)
