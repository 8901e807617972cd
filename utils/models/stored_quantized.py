"""A base that lies on disk in 4 bits, in the layout that bitsandbytes writes and the hub is full of.

config.json has a quantization_config, and each quantized weight is five or six tensors:

    q_proj.weight                                  uint8 [n / 2, 1]  codes, two a byte
    q_proj.weight.absmax                           a scale for each block of 64
    q_proj.weight.quant_map                        NF4's 16 values
    q_proj.weight.nested_absmax, .nested_quant_map  of double quantization, where absmax is codes itself
    q_proj.weight.quant_state.bitsandbytes__nf4    the rest as JSON: shape, block size, dtype, offset

A 65B is 33 GB this way, and 131 GB in 16 bits. utils/quantize_base.py writes it.
"""

import dataclasses
from typing import Any

from utils.arguments import ModelArguments
from utils.console import UserError, notice

CODES_STATE = ".quant_state.bitsandbytes__"  # in the name of the tensor that holds the JSON
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", CODES_STATE)


def follow_stored_bits(model_args: ModelArguments, config: dict[str, Any], given: set[str]) -> ModelArguments:
    """`model_args` with the bits that the base is stored in. Raises UserError where a flag says otherwise."""
    stored = config.get("quantization_config")
    if stored is None:
        return model_args
    if stored.get("quant_method") != "bitsandbytes":
        raise UserError(
            f"--model_name_or_path {model_args.base} is stored quantized by {stored.get('quant_method')}: "
            "name the 16-bit model, or one that bitsandbytes quantized"
        )
    fields: dict[str, Any] = {"bits": 8}
    if stored.get("load_in_4bit"):
        fields = {"bits": 4, "quant_type": stored.get("bnb_4bit_quant_type", "fp4")}
        fields["double_quant"] = stored.get("bnb_4bit_use_double_quant", False)
    for name, value in fields.items():
        mine = getattr(model_args, name)
        if mine != value and name in given:
            raise UserError(
                f"--{name} {mine}: {model_args.base} is stored with {name} {value}: leave the flag out, or "
                "name the 16-bit model"
            )
    if any(getattr(model_args, name) != value for name, value in fields.items()):
        how = ", ".join(f"{name} {value}" for name, value in fields.items())
        notice(f"{model_args.base} is stored quantized and taken as it is: {how}")
    return dataclasses.replace(model_args, **fields)


def find_codes(names: list[str]) -> list[str]:
    """Those of `names` whose tensors are codes of a 4-bit weight."""
    return sorted({name.partition(CODES_STATE)[0] for name in names if CODES_STATE in name})


def is_part(name: str) -> bool:
    """Whether the tensor `name` belongs to the codes of another."""
    return any(f".weight{part}" in name for part in PARTS)
