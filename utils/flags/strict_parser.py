"""HfArgumentParser made strict: no abbreviations, one line for an error, each flag once in --help."""

import argparse
import os
import re
import sys
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser

from utils.console import UserError

# argparse takes -1e-5 for a flag; 3.14 no longer does.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


class OneNameFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows each flag once, not in its hyphened spelling too, and each example on its own line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(
            paragraph.rstrip()
            if re.match(r"\s*(python|bash|echo) |\s{4}", paragraph)
            else super(OneNameFormatter, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if f"--no_{action.dest}" in action.option_strings:
            return f"Turns --{action.dest} off."
        text = super()._get_help_string(action)
        # argparse fills in what follows a per cent sign.
        return re.sub(r"%(?!\(default\)s)", "%%", text) if text else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.option_strings[0] != "-h":
            return " ".join(
                [action.option_strings[0], self._format_args(action, action.dest.upper())]
            ).strip()
        return super()._format_action_invocation(action)


def find_program() -> str:
    """What the user typed: `python -m eval.report`, or `python cli_demo.py`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {os.path.basename(sys.argv[0])}"


class StrictParser(HfArgumentParser):
    """HfArgumentParser without abbreviations, whose errors are UserErrors."""

    def __init__(self, dataclass_types: list[Any], description: str):
        super().__init__(
            dataclass_types,
            prog=find_program(),
            usage="%(prog)s [--flag VALUE ...]",
            description=description,
            allow_abbrev=False,
            formatter_class=OneNameFormatter,
        )
        self._negative_number_matcher = NEGATIVE_NUMBER

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r"argument (--\w+)(/--[\w-]+)*", r"\1", message))

    def flag_names(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]
