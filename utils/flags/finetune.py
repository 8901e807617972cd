"""The command line of a fine-tune script: parsed, filled in and checked, without torch."""

from typing import Any

from utils.arguments import (
    DataArguments,
    GenerationArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
)
from utils.flags.checks import check_lora, resolve_arguments
from utils.flags.parent import check_parent, named_as_typed, resolve_adapter
from utils.flags.parser import find_given_flags, parse_args

FLAGS = [ModelArguments, DataArguments, LoraArguments, TrainingArguments, GenerationArguments]


def parse_finetune_flags(
    argv: list[str], usage: str, **defaults: Any
) -> tuple[ModelArguments, DataArguments, LoraArguments, TrainingArguments, GenerationArguments]:
    """The arguments in `argv`, what they leave open taken from `defaults` and from the run that they name.

    Raises UserError for every mistake that config.json, safetensors headers and run.json can show.
    """
    model_args, data_args, lora_args, training_args, generation_args = parse_args(
        argv, FLAGS, usage, **defaults
    )
    given = find_given_flags(argv)
    with named_as_typed(argv):
        model_args, data_args, training_args = resolve_arguments(model_args, data_args, training_args, given)
        lora_args = resolve_adapter(lora_args, model_args, given)
        if training_args.do_train:
            check_lora(model_args, lora_args, training_args)
            check_parent(model_args)
    return model_args, data_args, lora_args, training_args, generation_args
