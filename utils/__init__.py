"""What the scripts are made of. Two lines of other packages, about what nobody needs, are kept quiet.

Done here, before anything else is imported: they come from the import of bitsandbytes and of liger-kernel.
"""

import logging

NOISE = {  # logger -> how the line begins
    # On CPUs with AVX512-BF16, where the package `kernels` would fetch a product from the hub.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # On a GPU, for each back end of other hardware.
    "liger_kernel.backends.registry": "Backend impl '%s' for op '%s' could not be imported",
}
for _name, _start in NOISE.items():
    logging.getLogger(_name).addFilter(lambda record, start=_start: not str(record.msg).startswith(start))
