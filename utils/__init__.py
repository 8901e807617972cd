"""What the scripts are made of. Here, before anything else is imported: are the packages there at all?

And what other packages say that nobody needs is kept quiet: a line that comes from the import of
bitsandbytes, and that PEFT and the speed benchmarks use old names of transformers.
"""

import importlib.util
import logging
import sys
import warnings
from functools import partial

if importlib.util.find_spec("transformers") is None:  # most often: the environment was not activated
    print(
        f"error: transformers is not installed for {sys.executable}: activate the environment "
        "(source .venv/bin/activate), or install with bash scripts/install.sh",
        file=sys.stderr,
    )
    raise SystemExit(2)

NOISE = {  # logger -> how the line begins
    # On CPUs with AVX512-BF16, where the package `kernels` would fetch a product from the hub.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


def _is_no_noise(start: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(start)


for _name, _start in NOISE.items():
    logging.getLogger(_name).addFilter(partial(_is_no_noise, _start))
warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing(_enable)?` is deprecated")
