"""The command line -> the argument dataclasses, strictly: nothing is swallowed, abbreviated or guessed.

The original took any flag: five of its scripts pin --lora_modules, which nothing read. Here a word goes

    1. through legacy.py       --evaluation_strategy no  ->  --eval_strategy no, with a line
    2. to our dataclasses      HfArgumentParser, without abbreviations (strict_parser.py)
    3. to the Trainer's flags  any that we do not list, looked up in transformers (trainer_flags.py)
    4. to hints.py             --lr 1e-4  ->  error: unknown flag --lr: use --learning_rate
"""

from typing import Any

from utils.arguments import FALSE_WORDS, GenerationArguments
from utils.console import UserError
from utils.flags.hints import describe_unknown
from utils.flags.legacy import RENAMED, SWITCHES, translate_legacy_flags
from utils.flags.strict_parser import StrictParser
from utils.flags.trainer_flags import parse_trainer_flags


def split_commas(names: list[str]) -> list[str]:
    """`q_proj,v_proj`, `q_proj, v_proj` and `q_proj v_proj` are the same."""
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def parse_args(
    argv: list[str], dataclass_types: list[type], description: str, **defaults: Any
) -> tuple[Any, ...]:
    """Fill one instance of each dataclass from `argv`, 2023 names included; `defaults` are the script's own.

    Raises UserError for an unknown, misspelt or abbreviated flag, a bad value, or a dash that is no hyphen.
    """
    for word in argv:
        if word[:1] in "–—−" and word:
            raise UserError(
                f"{word} starts with {word[0]!r} (U+{ord(word[0]):04X}), a pasted dash: "
                f"type --{word.lstrip('–—−-')}"
            )
    parser = StrictParser(dataclass_types, description)
    parser.set_defaults(**defaults)
    flags = parser.flag_names()
    rest: list[str]
    *parsed, rest = parser.parse_args_into_dataclasses(
        translate_legacy_flags(argv, flags), return_remaining_strings=True, look_for_args_file=False
    )
    training = next((arguments for arguments in parsed if hasattr(arguments, "extra")), None)
    if rest and training is not None:
        training.extra, rest = parse_trainer_flags(rest)
    if rest:
        raise UserError(describe_unknown(rest[0], flags))
    for arguments in parsed:
        for name in ("lora_target_modules", "report_to"):
            if hasattr(arguments, name):
                setattr(arguments, name, split_commas(getattr(arguments, name)))
    return tuple(parsed)


def prepend_flag(argv: list[str], flag: str) -> list[str]:
    """`argv` with the words before its first flag given to `flag`: `RUN --bits 4` names a checkpoint_dir."""
    return [flag, *argv] if argv and not argv[0].startswith("-") else argv


def find_given_flags(argv: list[str]) -> set[str]:
    """Names of the fields set on the command line, 2023 names included; a switch that is off sets nothing."""
    today = RENAMED | {"lora_modules": "lora_target_modules", "adapter_name_or_path": "checkpoint_dir"}
    given = set()
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        name, _, inline = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or (name in SWITCHES and (inline or following).lower() in FALSE_WORDS):
            continue
        if name in SWITCHES:
            name = SWITCHES[name][0].removeprefix("--")
        is_switch = name.startswith("no_") and not hasattr(GenerationArguments, name)
        given.add(today.get(name, name.removeprefix("no_") if is_switch else name))
    return given
