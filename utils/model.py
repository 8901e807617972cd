"""Tokenizer, quantized base, adapter: a frozen 4-bit base and LoRA on every linear layer make QLoRA."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from utils.arguments import DataArguments, LoraArguments, ModelArguments
from utils.baichuan import build_llama_config, is_baichuan, load_baichuan
from utils.checks import ADAPTER_FILE, CONVERT, has_adapter, read_model_config
from utils.console import UserError, notice
from utils.cpu import choose_cpu_dtype, keep_weights_unpacked, repacks_weights
from utils.encoding import find_own_bos
from utils.frozen_weights import replace_by_dense, unpack_8bit_layers
from utils.prompts import find_stop_tokens, read_template, render_chat, template_names
from utils.rope import follow_each_batch
from utils.tokenizer_files import load_own_tokenizer
from utils.trained_biases import keep_biases_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, Conv1D)  # of what PEFT adapts

# PEFT's use of an old name, and what we say ourselves in a line.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
if not sys.stderr.isatty():
    logging.disable_progress_bar()


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer with a chat template and a pad token. A run's own tokenizer comes before the base's."""
    folder = model_args.checkpoint_dir
    from_run = folder is not None and Path(folder, "tokenizer_config.json").is_file()
    with unknown_models_explained(model_args):
        tokenizer = load_own_tokenizer(
            folder if from_run else model_args.model_name_or_path,
            model_args.trust_remote_code,
            revision=None if from_run else model_args.revision,
            cache_dir=model_args.cache_dir,
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model_args.model_name_or_path} has no eos token, so no reply could end"
        )
    add_chat_template(tokenizer, data_args)
    add_bos(tokenizer)
    add_pad_token(tokenizer)
    return tokenizer


def add_chat_template(tokenizer: "PreTrainedTokenizerBase", data_args: DataArguments | None) -> None:
    """Set the prompt format: --template, else the tokenizer's own, else alpaca (guanaco for oasst1)."""
    name = data_args.template if data_args else None
    if name is None and tokenizer.chat_template:
        tokenizer.chat_template = choose_named_template(tokenizer.chat_template)
        return
    if name is None:
        name = "guanaco" if data_args and data_args.dataset_name == "oasst1" else "alpaca"
        notice(f"the tokenizer has no chat template: using {name} (--template chooses another)")
    if name == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in (None, tokenizer.unk_token_id):
        raise UserError(
            "--template chatml ends replies with <|im_end|>, which this tokenizer does not have: "
            "use another template"
        )
    tokenizer.chat_template = read_template(name)


def add_bos(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let the template render the BOS that this tokenizer puts before any text: a server adds none itself."""
    rendered = render_chat(tokenizer, [{"role": "user", "content": "Question"}], add_generation_prompt=True)
    if find_own_bos(tokenizer) and not rendered.startswith(tokenizer.bos_token):
        if tokenizer.chat_template not in map(read_template, template_names()):
            notice(f"the chat template lacks the {tokenizer.bos_token} that its tokenizer puts first: added")
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template


def choose_named_template(template: str | dict[str, str]) -> str:
    """The template, or the one named default where a tokenizer has several (Command R: rag, tool_use)."""
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise UserError(
            f"the tokenizer has chat templates named {', '.join(sorted(template))} and none named default: "
            f"choose the prompt format with --template ({', '.join(template_names())})"
        )
    notice(f"of the tokenizer's chat templates ({', '.join(sorted(template))}) default is used")
    return template["default"]


def add_pad_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """pad = unk or a reserved token; else eos. Masks go by length: an eos in an answer is still trained.

    Of several reserved ones that with the smallest id, then the shortest name: get_vocab() has another order
    at each call.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    reserved = sorted(
        (token_id, len(token), token)
        for token, token_id in tokenizer.get_vocab().items()
        if "pad" in token.lower() and token.startswith("<")
    )
    for token in (tokenizer.unk_token, *(token for *_, token in reserved), tokenizer.eos_token):
        if token is not None:
            tokenizer.pad_token = token
            return


def load_stop_ids(model_args: ModelArguments, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that end a reply: the template's closing token, eos, and what the base's generation_config adds."""
    try:
        config = GenerationConfig.from_pretrained(
            model_args.model_name_or_path, revision=model_args.revision, cache_dir=model_args.cache_dir
        )
    except OSError:  # many models ship none
        config = GenerationConfig()
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # An old LLaMA conversion names the BOS, 1, as its eos; in OPT and GPT-NeoX the two are one token.
    opens = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    return find_stop_tokens(tokenizer, [token for token in eos if token not in (None, opens)])


def choose_compute_dtype(model_args: ModelArguments) -> torch.dtype:
    """The dtype of activations and matrix products; prints what replaces a dtype that the hardware lacks."""
    asked = torch.bfloat16 if model_args.bf16 else torch.float16 if model_args.fp16 else None
    if asked is None and model_args.bits == 32:
        return torch.float32
    if has_gpu(model_args):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if model_args.bf16 and not has_bf16:
            notice("this GPU has no bfloat16: computing in float16 with a loss scale")
        return torch.bfloat16 if has_bf16 and asked != torch.float16 else torch.float16
    if choose_cpu_dtype() == torch.bfloat16 and asked != torch.float16:
        return torch.bfloat16
    if asked is not None or model_args.bits == 16:
        wanted = f"--{'bf16' if model_args.bf16 else 'fp16'}" if asked else "--bits 16"
        lacking = "float16" if model_args.fp16 else "bfloat16"
        notice(f"{wanted}: this CPU has no fast {lacking}, float32 is used instead")
    return torch.float32


def has_gpu(model_args: ModelArguments) -> bool:
    return torch.cuda.is_available() and not model_args.use_cpu


def load_base(model_args: ModelArguments, dtype: torch.dtype, trainable: bool = True) -> "PreTrainedModel":
    """The base model in 4, 8, 16 or 32 bits, frozen unless all of it is trained.

    `trainable`: gradients will flow through it; a process that only chats has faster ways on a CPU.
    """
    config = read_model_config(model_args)
    options = {
        "revision": model_args.revision,
        "cache_dir": model_args.cache_dir,
        "dtype": choose_weight_dtype(model_args, dtype),
        "quantization_config": build_quantization(model_args, dtype),
        "use_safetensors": None if model_args.allow_pickle else True,
    } | choose_placement(model_args)
    name = model_args.model_name_or_path
    with unknown_models_explained(model_args):
        if is_baichuan(config):
            model = load_baichuan(name, config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=model_args.trust_remote_code, **options
            )
    if model_args.bits == 8:
        unpack_8bit_layers(model)
    if trainable or not repacks_weights(model, dtype):
        keep_weights_unpacked(model)
        if not trainable and not has_gpu(model_args):
            replace_by_dense(model, dtype)
    follow_each_batch(model)
    model.requires_grad_(model_args.full_finetune)
    return model


@contextmanager
def unknown_models_explained(model_args: ModelArguments) -> Iterator[None]:
    """One line where the publisher's code is needed, the kind is unknown, or there are no safetensors."""
    what = f"--model_name_or_path {model_args.model_name_or_path}"
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            advice = "runs Python code of its publisher: read it there, then add --trust_remote_code"
        elif "does not recognize this architecture" in str(error):
            advice = "is of a kind that transformers does not know: a newer version may"
        elif isinstance(error, OSError) and "safetensors" in str(error):
            advice = f"has no safetensors on the hub: {CONVERT}"
        else:
            raise
        raise UserError(f"{what} {advice}") from error


def choose_weight_dtype(model_args: ModelArguments, dtype: torch.dtype) -> torch.dtype:
    """Of the weights that are not quantized. float16 itself cannot be trained: a loss scale needs float32."""
    if model_args.bits == 32 or (model_args.full_finetune and dtype == torch.float16):
        return torch.float32
    return dtype


def build_quantization(model_args: ModelArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantization is QLoRA's (sections 2 and 3); int8 LLM.int8()'s (arXiv 2208.07339)."""
    if model_args.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model_args.quant_type,
            bnb_4bit_use_double_quant=model_args.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.bits == 8 else None


def choose_placement(model_args: ModelArguments) -> dict[str, Any]:
    """device_map and max_memory: this process's GPU; several GPUs under plain python share the layers."""
    if not has_gpu(model_args):
        return {"device_map": {"": "cpu"}}
    if "LOCAL_RANK" in os.environ:
        placement = {"device_map": {"": int(os.environ["LOCAL_RANK"])}}
    elif torch.cuda.device_count() > 1:
        notice(
            f"one process, {torch.cuda.device_count()} GPUs: the layers are spread over them and the batch "
            "flags are global; `accelerate launch` trains one copy on each instead"
        )
        limit = f"{model_args.max_memory_MB}MB"
        caps = {"max_memory": dict.fromkeys(range(torch.cuda.device_count()), limit)}
        return {"device_map": "auto"} | (caps if model_args.max_memory_MB else {})
    else:
        placement = {"device_map": {"": 0}}
    if model_args.max_memory_MB:
        notice(f"--max_memory_MB {model_args.max_memory_MB} has no effect: one GPU holds the whole model")
    return placement


def add_adapter(
    model: "PreTrainedModel", model_args: ModelArguments, lora_args: LoraArguments, trainable: bool
) -> "PeftModel | PreTrainedModel":
    """The adapter of --checkpoint_dir, a fresh one, or none where every weight is trained or none is."""
    if model_args.full_finetune:
        return model
    if model_args.checkpoint_dir:
        return load_adapter(model, model_args.checkpoint_dir, trainable)
    # The Trainer takes no quantized model without an adapter; a fresh one, B being zero, changes nothing.
    return add_lora(model, lora_args) if trainable or model_args.bits in (4, 8) else model


def add_lora(model: "PreTrainedModel", lora_args: LoraArguments) -> PeftModel:
    """A fresh adapter, float32 whatever the base is: B is zero, so training starts at the base model."""
    targets: list[str] | str = lora_args.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=targets,
        bias=lora_args.bias,
        use_rslora=lora_args.use_rslora,
        use_dora=lora_args.use_dora,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        targets = " ".join(lora_args.lora_target_modules)
        raise UserError(f"PEFT refuses an adapter for --lora_target_modules {targets}: {error}") from error
    keep_biases_in_float32(model)
    return model


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


def build_without_weights(model_args: ModelArguments) -> "PreTrainedModel":
    """The model's modules on the meta device."""
    config, name = read_model_config(model_args), model_args.model_name_or_path
    with unknown_models_explained(model_args), torch.device("meta"):
        if is_baichuan(config):
            return AutoModelForCausalLM.from_config(build_llama_config(config))
        places = {"revision": model_args.revision, "cache_dir": model_args.cache_dir}
        trusted = {"trust_remote_code": model_args.trust_remote_code}
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(name, **places, **trusted), **trusted
        )


def load_adapter(model: "PreTrainedModel", checkpoint_dir: str, trainable: bool = False) -> PeftModel:
    """The adapter of a run on its base, from safetensors; from a .bin where check_pickle has let it pass."""
    if not has_adapter(Path(checkpoint_dir)):
        raise UserError(f"--checkpoint_dir {checkpoint_dir} holds no {ADAPTER_FILE}")
    try:
        model = PeftModel.from_pretrained(model, checkpoint_dir, is_trainable=trainable)
        if keep_biases_in_float32(model):  # PEFT has rounded them to what was there
            set_peft_model_state_dict(model, load_peft_weights(checkpoint_dir, device="cpu"))
        return model
    except RuntimeError as error:
        if "size mismatch" in str(error):
            raise UserError(
                f"the adapter {checkpoint_dir} does not fit this base: {str(error).splitlines()[1].strip()}"
            ) from error
        raise
