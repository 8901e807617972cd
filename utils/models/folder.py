"""A model or adapter named on the command line -> its folder, what its run recorded, its config.json."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from utils.arguments import ModelArguments
from utils.console import UserError, notice
from utils.models.baichuan import is_baichuan, split_shapes
from utils.models.hub import download_config
from utils.models.model_scope import download_model, is_on_modelscope
from utils.models.stored_quantized import follow_stored_bits
from utils.models.weight_files import check_tokenizer, find_misfit, read_base_shapes, read_json, read_shapes
from utils.prompts.answer_spans import read_template
from utils.prompts.messages import Thinking
from utils.run.places import find_base
from utils.run.record import ADAPTER_FILE, CHANGING_STARTS, TOKENIZATION, find_run_dir, find_run_record

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
# What a run fixes for inference; flags given beside --checkpoint_dir override it.
RECORDED_MODEL_FIELDS = (
    "model_name_or_path",
    "revision",
    "bits",
    "double_quant",
    "quant_type",
    "bf16",
    "fp16",
    "full_finetune",
)
# How to get weights that are only published pickled; a pickle can run code, so none is read silently.
CONVERT = "convert it once: python -m utils.convert_weights FOLDER NEW_FOLDER"
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
MOVED_MODELS = {"decapoda-research/llama-7b-hf": "huggyllama/llama-7b"}


@dataclass(frozen=True)
class ResolvedModel:
    """The model that a command names, as far as files can tell. No weights are read for it."""

    args: ModelArguments  # base, adapter and bits: the flags, and the run's where no flag says otherwise
    config: dict[str, Any]  # config.json of the base
    record: dict[str, Any] | None  # run.json behind --checkpoint_dir
    template: str | None  # --template, instead of the run's own or the tokenizer's

    @property
    def has_adapter(self) -> bool:
        return self.args.checkpoint_dir is not None and not self.args.full_finetune

    @property
    def stop_ids(self) -> list[int] | None:
        """Ids that ended the answers of the run; None without a run, and with another template."""
        return self.record["prompt"]["stop_ids"] if self.record and self.template is None else None

    @property
    def thinking(self) -> Thinking:
        """--thinking, or what the run recorded; auto: the template's own default."""
        return self.recorded_thinking if self.args.thinking == "auto" else self.args.thinking

    @property
    def recorded_thinking(self) -> Thinking:
        return ((self.record or {}).get("prompt") or {}).get("thinking") or "auto"

    @property
    def keeps_blank(self) -> bool:
        """Whether the run is of a version that tokenized prompts and answers apart."""
        return self.record is not None and self.record.get("tokenization") != TOKENIZATION


def resolve_model(model_args: ModelArguments, given: set[str], template: str | None = None) -> ResolvedModel:
    """What the flags name: a run, a checkpoint-N of it, a bare adapter, a merged model or a base.

    A run brings its base, bits and prompt along; each flag in `given` overrides them, with a line. Raises
    UserError where nothing is named, something is missing or damaged, or the adapter is another base's.
    """
    record = None
    if model_args.checkpoint_dir is not None:
        folder = Path(model_args.checkpoint_dir).expanduser()
        if not folder.is_dir():
            raise UserError(f"--checkpoint_dir {model_args.checkpoint_dir}: no such folder")
        check_pickle(folder, ADAPTER_FILE, model_args.allow_pickle)
        record = find_run_record(folder)
        model_args = fill_in_recorded(model_args, given, folder, record)
    model_args = dataclasses.replace(model_args, model_name_or_path=find_model(model_args))
    config = read_model_config(model_args)
    model_args = follow_stored_bits(model_args, config, given)
    check_adapter_fits(model_args, config)
    if template is not None:
        read_template(template)
    resolved = ResolvedModel(model_args, config, record, template)
    recorded = resolved.recorded_thinking
    if recorded != "auto" and resolved.thinking != recorded:
        notice(f"--thinking {resolved.thinking} overrides the run's {recorded}")
    return resolved


def fill_in_recorded(
    model_args: ModelArguments, given: set[str], folder: Path, record: dict[str, Any] | None
) -> ModelArguments:
    """`model_args` with what the run in `folder` recorded; a line for each flag in `given` that differs."""
    recorded = read_recorded_fields(folder, record, "model_name_or_path" in given)
    for name, value in recorded.items():
        mine = getattr(model_args, name)
        if name in given and mine != value:
            notice(f"--{name} {mine} overrides the run's {value}")
    chosen = {name: value for name, value in recorded.items() if name not in given}
    if {"bf16", "fp16"} & given:  # one dtype flag replaces the recorded pair
        chosen = {name: value for name, value in chosen.items() if name not in ("bf16", "fp16")}
    return dataclasses.replace(model_args, checkpoint_dir=str(folder), **chosen)


def has_adapter(folder: Path) -> bool:
    return any((folder / ADAPTER_FILE).with_suffix(suffix).is_file() for suffix in (".safetensors", ".bin"))


def check_pickle(folder: Path, wanted: str, allow_pickle: bool) -> None:
    """Raises UserError where `folder` has pickled files and none named like `wanted`, safetensors."""
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if any(folder.glob(wanted)) or not pickled:
        return
    if not allow_pickle:
        raise UserError(
            f"{folder} holds pickled weights ({pickled[0]}) and no safetensors, and a pickle can run code: "
            f"{CONVERT}, or trust their author with --allow_pickle"
        )
    notice(f"--allow_pickle: {folder}/{pickled[0]} is read by torch.load(weights_only=True)")


def check_remote_code(model_args: ModelArguments, config: dict[str, Any]) -> None:
    """Say that a model's own Python may run; UserError where the model needs it and it is not allowed."""
    name, kind = model_args.base, str(config.get("model_type"))
    if model_args.trust_remote_code:
        notice(f"--trust_remote_code: Python code shipped with {name} may run here, with all your rights")
    elif "auto_map" in config:
        known = Path(transformers.__file__).parent / "models"
        if not is_baichuan(config) and not (known / kind.replace("-", "_")).is_dir():
            raise UserError(
                f"{name} is of a kind that transformers does not know ({kind}) and ships its own Python: "
                "read that code, then allow it with --trust_remote_code"
            )


def read_recorded_fields(folder: Path, record: dict[str, Any] | None, names_base: bool) -> dict[str, Any]:
    """Base and quantization of the run that `folder` belongs to, from its run.json or adapter_config.json.

    `names_base`: a flag names the base, so the run's own need not be there.
    """
    is_trained_whole = record is not None and record["arguments"].get("full_finetune")
    if not is_trained_whole and not has_adapter(folder) and (folder / "config.json").is_file():
        raise UserError(
            f"--checkpoint_dir {folder} holds a whole model and no adapter: use --model_name_or_path {folder}"
        )
    if record is not None:
        fields = {name: record["arguments"].get(name) for name in RECORDED_MODEL_FIELDS}
        if is_trained_whole:
            fields["model_name_or_path"] = str(folder)  # the weights themselves were trained
        elif not has_adapter(folder):
            raise UserError(
                f"--checkpoint_dir {folder} holds no {ADAPTER_FILE}: "
                f"the run is {record['status']}; name one of its checkpoint-N folders"
            )
        elif not names_base:
            fields["model_name_or_path"] = find_base(record, find_run_dir(folder))
        return fields
    if not has_adapter(folder) or not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--checkpoint_dir {folder} holds no adapter (adapter_config.json and {ADAPTER_FILE}) "
            "and no run.json: name a run, a checkpoint-N of it, or a PEFT adapter folder"
        )
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base and not names_base:
        raise UserError(
            f"--checkpoint_dir {folder}: neither a run.json nor adapter_config.json names the base: "
            "give --model_name_or_path FOLDER_OR_HUB_ID"
        )
    named = f"the base {base} is read from adapter_config.json; " if base else ""
    notice(f"{folder} has no run.json: {named}quantization and prompt are the flags' and the tokenizer's")
    return {"model_name_or_path": base} if base else {}


def find_model(model_args: ModelArguments) -> str:
    """The base's folder or hub id; of one on ModelScope the folder that it is downloaded to."""
    name = model_args.base
    if is_on_modelscope(name):
        name = download_model(name, model_args)
    return check_model_path(name, model_args.allow_pickle)


def check_model_path(name: str, allow_pickle: bool) -> str:
    """`name` with ~ expanded. Raises UserError for a folder that is missing or holds no model."""
    if name in MOVED_MODELS:
        notice(f"{name} has left the hub: {MOVED_MODELS[name]} holds the same weights")
    path = Path(name).expanduser()
    if path.is_dir():
        if has_adapter(path) and not (path / "config.json").is_file():
            raise UserError(
                f"--model_name_or_path {name} holds an adapter and no model: use --checkpoint_dir {name}"
            )
        if not (path / "config.json").is_file():
            raise UserError(
                f"--model_name_or_path {name}: the folder has no config.json, so it holds no model"
            )
        check_pickle(path, "*.safetensors", allow_pickle)
        if not any(file.suffix in {".safetensors", *PICKLE_SUFFIXES} for file in path.iterdir()):
            raise UserError(
                f"--model_name_or_path {name}: the folder has no .safetensors file: download it again"
            )
        return str(path)
    if path.exists():
        raise UserError(f"--model_name_or_path {name} is a file: name the folder of the model")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).parts[0] in ("models", "output"):
        raise UserError(f"--model_name_or_path {name}: no such folder")
    return name


def read_model_config(model_args: ModelArguments) -> dict[str, Any]:
    """config.json of the base, from its folder or the hub."""
    folder = Path(model_args.base)
    config = read_json(folder / "config.json" if folder.is_dir() else download_config(model_args))
    check_remote_code(model_args, config)
    return config


def find_context(config: dict[str, Any]) -> int | None:
    """The longest row in tokens that the model can read, where its config.json says so."""
    text_config = config.get("text_config", config)
    return next((text_config[key] for key in CONTEXT_KEYS if isinstance(text_config.get(key), int)), None)


def check_start(model_args: ModelArguments) -> None:
    """Raises UserError for an adapter that belongs to a changed base, where the base is to be quantized."""
    path = model_args.checkpoint_dir and Path(model_args.checkpoint_dir, "adapter_config.json")
    if not path or not path.is_file() or model_args.bits not in (4, 8):
        return
    start = read_json(path).get("init_lora_weights", True)
    if start in CHANGING_STARTS:
        raise UserError(
            f"the adapter in {model_args.checkpoint_dir} belongs to a base that {start} has changed: use "
            "--bits 16, or name the finished run, whose adapter fits the base as it is"
        )


def check_adapter_fits(model_args: ModelArguments, config: dict[str, Any]) -> None:
    """Raises UserError where a file is missing or cut off, or the adapter's shapes are not the base's.

    Reads safetensors headers only. A base that is not on this disk as plain safetensors is checked by PEFT
    while it loads.
    """
    check_tokenizer(model_args)
    check_start(model_args)
    packed = is_baichuan(config)  # refuses its relatives
    base = read_base_shapes(Path(model_args.base))
    if model_args.checkpoint_dir is None or model_args.full_finetune or "quantization_config" in config:
        return
    adapter = read_shapes(list(model_args.adapter_dir.glob(ADAPTER_FILE)))
    path = model_args.adapter_dir / "adapter_config.json"
    settings = read_json(path) if path.is_file() else {}
    if settings.get("layer_replication"):
        return  # on layers that PEFT will make
    if packed:
        base = split_shapes(base)
    misfit = find_misfit(adapter, base, bool(settings.get("target_parameters"))) if base else None
    if misfit:
        raise UserError(
            f"the adapter {model_args.checkpoint_dir} does not fit the base "
            f"{model_args.base}: {misfit}; name the base it was trained on"
        )
