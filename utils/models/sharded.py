"""The frozen base over several processes, none of which ever holds it whole: --shard_layers.

The modules are made without weights. Then layer after layer is read from its safetensors file, quantized and
cut (utils/fast/sharded_layers.py), and of embedding and output layer each process reads its own rows. What
is left, norms and biases, is a thousandth of a model and whole everywhere.

    65B, eight GPUs    4.1 GB of codes and scales each, 0.8 GB for two layers, 0.2 GB of embedding and head
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, init_empty_weights
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationMethod

from utils.arguments import ModelArguments
from utils.console import UserError, notice
from utils.fast.rope import find_shared_length, follow_each_batch
from utils.fast.sharded_layers import Quantization, ShardedLayers
from utils.fast.sharded_vocabulary import ShardedVocabulary
from utils.models.base import cap_memory, choose_weight_dtype, has_gpu, load_config, quantize_linears
from utils.models.cpu import keep_weights_unpacked, return_freed_memory
from utils.models.weight_files import find_weight_files

GIB = 2**30
MOST_WHOLE = 1.15  # what a process may hold, as a multiple of its share and two layers


def load_sharded(model_args: ModelArguments, dtype: torch.dtype) -> Any:
    """As base.load_base, of which this process holds a share. Raises UserError for what is not covered."""
    config, state = load_config(model_args), PartialState()
    weight_dtype = choose_weight_dtype(model_args, dtype)
    cap_memory(model_args, state.device.index if has_gpu(model_args) else "cpu")
    if not has_gpu(model_args):
        return_freed_memory()
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=weight_dtype)
        quantize_linears(model, model_args, dtype)
    model.tie_weights()
    check_covered(model)
    others = count_others(model)
    with state.local_main_process_first():  # one download a machine
        read = WeightReader(find_weight_files(model_args), model, weight_dtype, state.device)
    quantization = Quantization(model_args.quant_type, model_args.double_quant, weight_dtype, state.device)
    load_vocabulary(model, read)
    model.shards = ShardedLayers([layer for _, layer in list_layers(model)], quantization)
    for name, _ in list_layers(model):
        model.shards.fill(lambda linear, rows, layer=name: read(f"{layer}.{linear}.weight", rows))
    load_others(model, read)
    model.is_loaded_in_4bit, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    keep_weights_unpacked(model)
    follow_each_batch(model)
    model.eval().requires_grad_(False)
    check_memory(model, others)
    return model


class WeightReader:
    """Reads weights of a model by their names in it; `files` knows them by those that they are saved by."""

    def __init__(self, files: dict[str, Path], model: Any, dtype: torch.dtype, device: torch.device):
        self.files, self.prefix, self.dtype, self.device = files, f"{model.base_model_prefix}.", dtype, device

    def __call__(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """In the model's dtype on its device; only those `rows`, if given."""
        found = next((each for each in (name, name.removeprefix(self.prefix)) if each in self.files), None)
        if found is None:
            raise UserError(
                f"--shard_layers: no file of the base has {name}, as this kind of model is saved by other "
                "names: leave the flag out"
            )
        with safe_open(self.files[found], framework="pt") as file:
            weight = file.get_slice(found)[rows] if rows else file.get_tensor(found)
            return weight.to(self.device, self.dtype, copy=True)


def list_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """The model's layers, by name."""
    return [
        (name, each) for name, each in model.named_modules() if isinstance(each, GradientCheckpointingLayer)
    ]


def check_covered(model: Any) -> None:
    """Raises UserError for a model with parts that cannot be shared out."""
    layers = dict(list_layers(model))
    linears: dict[str, Any] = {
        name: each for name, each in model.named_modules() if isinstance(each, Linear4bit)
    }
    outside = [name for name in linears if not any(name.startswith(f"{layer}.") for layer in layers)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    reasons = {
        "it has no layers to share out": not layers,
        f"{outside[0] if outside else ''} is in no layer": bool(outside),
        "its matrices are [in, out]": any(each.source_cls is Conv1D for each in linears.values()),
        f"its embedding is a {type(embedding).__name__}": type(embedding) is not nn.Embedding,
        f"its output layer is a {type(head).__name__}": type(head) is not nn.Linear,
        "its rotary frequencies change with the longest row": find_shared_length(model.config) is not None,
    }
    if reason := next((reason for reason, is_so in reasons.items() if is_so), None):
        raise UserError(f"--shard_layers does not cover {model.config.model_type}: {reason}")


def load_vocabulary(model: Any, read: Callable[..., torch.Tensor]) -> None:
    """This process's rows of the embedding and of the output layer, which may be one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied, names = head.weight is embedding.weight, {each: name for name, each in model.named_modules()}
    vocabulary = ShardedVocabulary(head.out_features)
    rows = slice(vocabulary.first, vocabulary.end)
    embedding.weight = freeze(read(f"{names[embedding]}.weight", rows))
    head.weight = embedding.weight if is_tied else freeze(read(f"{names[head]}.weight", rows))
    if head.bias is not None:
        head.bias = freeze(read(f"{names[head]}.bias", rows))
    vocabulary.install(embedding, head)


def load_others(model: Any, read: Callable[..., torch.Tensor]) -> None:
    """All that is still on the meta device, whole; buffers where the weights are."""
    for name, module in model.named_modules():
        for own, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                setattr(module, own, freeze(read(f"{name}.{own}")))
        for own, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[own] = buffer.to(read.device)  # type: ignore[attr-defined]


freeze = partial(nn.Parameter, requires_grad=False)


def count_others(model: Any) -> int:
    """Bytes of the model without its quantized layers, were it whole."""
    quantized = {id(each.weight) for each in model.modules() if isinstance(each, Linear4bit)}
    return sum(weight.nbytes for weight in model.parameters() if id(weight) not in quantized)


def measure_held(model: Any) -> int:
    """Bytes of the base that this process holds, each storage counted once."""
    tensors = [*model.shards.slots, *model.shards.shards, *model.parameters()]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def check_memory(model: Any, others: int) -> None:
    """Raises UserError where this process holds much more than its share; says what it holds.

    `others`: bytes of embeddings, output layer, norms and biases of the whole model.
    """
    shards: ShardedLayers = model.shards
    processes, slots = shards.processes, sum(slot.nbytes for slot in shards.slots)
    whole = sum(shards.shard_bytes) * processes + others
    held, allowed = measure_held(model), MOST_WHOLE * (whole / processes + slots)
    sizes = f"{held / GIB:.2f} of {whole / GIB:.2f} GiB of the base"
    if held > allowed:
        views = {slot.untyped_storage().data_ptr() for slot in shards.slots}
        own = [pair for pair in model.named_parameters() if pair[1].untyped_storage().data_ptr() not in views]
        name, weight = max(own, key=lambda pair: pair[1].nbytes)
        raise UserError(
            f"--shard_layers: each of {processes} processes would hold {sizes}, as {name} "
            f"({weight.nbytes / GIB:.2f} GiB) and the like stay whole: leave the flag out"
        )
    notice(
        f"--shard_layers: each of {processes} processes holds {sizes}, {slots / GIB:.2f} of it for two layers"
    )
