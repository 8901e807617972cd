"""LoRA on every linear layer: a fresh adapter, or the one of an earlier run.

Beside each frozen W  # [out, in] lie a trained A  # [rank, in] and B  # [out, rank], and the layer computes

    W x + (lora_alpha / rank) B A x

A starts random and B at zero, so training starts at the base model exactly. QLoRA adapts all linear layers
and not query and value alone: by its section 4 that is what makes 4 bits as good as 16.
"""

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from utils.arguments import LoraArguments, ModelArguments, TrainingArguments
from utils.console import UserError, read_rank_and_size
from utils.models.base import build_without_weights, choose_compute_dtype, load_base
from utils.models.folder import ADAPTER_FILE, has_adapter, read_model_config
from utils.models.trained_biases import keep_biases_in_float32

TIMEOUT_SECONDS = 1800  # that processes wait for one another; --ddp_timeout
ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, Conv1D)  # of what PEFT adapts


def load_model(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    training_args: TrainingArguments,
    streams: bool = False,
) -> tuple[PeftModel | PreTrainedModel, torch.dtype]:
    """What is trained or evaluated: the frozen base with its adapter, and the dtype that it computes in.

    `streams`: the layers of the base wait in host memory.
    """
    dtype = choose_compute_dtype(model_args)
    if read_rank_and_size()[1] > 1:  # the Trainer would set no timeout on CPUs
        timeout = timedelta(seconds=training_args.extra.get("ddp_timeout") or TIMEOUT_SECONDS)
        PartialState(cpu=model_args.use_cpu, timeout=timeout)
    if model_args.shard_layers:
        from utils.models.sharded import load_sharded

        base = load_sharded(model_args, dtype)
    else:
        base = load_base(model_args, dtype, streams=streams)
    set_seed(training_args.seed)  # the adapter's first weights follow from it, whatever loading drew
    return add_adapter(base, model_args, lora_args, trainable=training_args.do_train), dtype


def add_adapter(
    model: PreTrainedModel, model_args: ModelArguments, lora_args: LoraArguments, trainable: bool
) -> PeftModel | PreTrainedModel:
    """The adapter of --checkpoint_dir, a fresh one, or none where every weight is trained or none is."""
    if model_args.full_finetune:
        return model
    if model_args.checkpoint_dir:
        return load_adapter(model, model_args.checkpoint_dir, trainable)
    # The Trainer takes no quantized model without an adapter; a fresh one, B being zero, changes nothing.
    return add_lora(model, lora_args) if trainable or model_args.bits in (4, 8) else model


def add_lora(model: PreTrainedModel, lora_args: LoraArguments) -> PeftModel:
    """A fresh adapter, float32 whatever the base is: B is zero, so training starts at the base model.

    --init_lora_weights pissa (arXiv 2404.02948) takes the largest singular vectors of W for A and B, olora
    (2406.01775) the first of its QR; what they take is subtracted from W, so training starts there as well.
    """
    targets = lora_args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,  # type: ignore[arg-type]  # PEFT takes a float too
        lora_dropout=lora_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        bias=lora_args.bias,
        use_rslora=lora_args.use_rslora,
        use_dora=lora_args.use_dora,
        init_lora_weights=lora_args.init_lora_weights or True,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        named = " ".join(targets)
        raise UserError(f"PEFT refuses an adapter for --lora_target_modules {named}: {error}") from error
    keep_biases_in_float32(adapted)
    return adapted


def check_target_modules(model_args: ModelArguments, lora_args: LoraArguments) -> None:
    """Raises UserError for a name in --lora_target_modules that no layer has. Loads no weights.

    A model with code of its own is left to PEFT: building it here would run that code at another revision.
    """
    targets = lora_args.lora_target_modules
    if targets == ["all-linear"] or model_args.checkpoint_dir or model_args.full_finetune:
        return
    if "auto_map" in read_model_config(model_args) and model_args.trust_remote_code:
        return
    modules = build_without_weights(model_args).named_modules()
    names = [name for name, module in modules if isinstance(module, ADAPTABLE)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:
        has = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise UserError(
            f"--lora_target_modules {' '.join(unknown)}: the model has no such layers; it has {has}, and "
            "all-linear stands for the linear ones but the output layer"
        )


def load_adapter(model: PreTrainedModel, checkpoint_dir: str, trainable: bool = False) -> PeftModel:
    """The adapter of a run on its base, from safetensors; from a .bin where check_pickle has let it pass."""
    if not has_adapter(Path(checkpoint_dir)):
        raise UserError(f"--checkpoint_dir {checkpoint_dir} holds no {ADAPTER_FILE}")
    try:
        adapted = PeftModel.from_pretrained(model, checkpoint_dir, is_trainable=trainable)
        if keep_biases_in_float32(adapted):  # PEFT has rounded them to what was there
            set_peft_model_state_dict(adapted, load_peft_weights(checkpoint_dir, device="cpu"))
        return adapted
    except RuntimeError as error:
        if "size mismatch" in str(error):
            raise UserError(
                f"the adapter {checkpoint_dir} does not fit this base: {str(error).splitlines()[1].strip()}"
            ) from error
        raise
