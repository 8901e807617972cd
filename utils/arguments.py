"""Every flag of the scripts: a dataclass for each concern, in it a field for each flag.

    --lora_r 16 --max_steps 100    becomes    LoraArguments(lora_r=16), TrainingArguments(max_steps=100)

A script names the dataclasses that it takes, and HfArgumentParser fills them (utils/flags/parser.py). So a
flag, its default and its line in --help are written once. What is wrong with a value by itself is said here,
as the dataclass is made; what only files can show (is this folder a model?) is said in utils/flags/checks.py.
Once checked, arguments are not changed: who needs another value makes a copy.
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.console import UserError
from utils.prompts.messages import Thinking

TRUE_WORDS = {"true", "t", "yes", "y", "1"}
FALSE_WORDS = {"false", "f", "no", "n", "0"}
DatasetFormat = Literal[
    "alpaca", "belle", "chip2", "dolly", "evol_instruct", "guanaco", "hh-rlhf", "input-output", "longform",
    "messages", "oasst1", "olcc", "preference", "question-answer", "seed-task", "self-instruct", "sharegpt",
    "text", "vicuna",
]  # fmt: skip


def flag(default: Any, help: str, bare: str | None = None, aliases: tuple[str, ...] = ()) -> Any:
    """A dataclass's field that is a flag: its default, and its line in --help.

    `bare`: what the flag means without a value. `aliases`: its other names.
    """
    metadata = {"help": help, "aliases": list(aliases)}
    metadata |= {} if bare is None else {"nargs": "?", "const": bare}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    _argument_group_name = "model"
    model_name_or_path: str | None = flag(None, "Folder or hub id of the base, or modelscope:ORG/NAME.")
    revision: str | None = flag(None, "Branch, tag or commit of the base on the hub.")
    checkpoint_dir: str | None = flag(
        None,
        "A run, a checkpoint-N of it, or an adapter folder to start from (also --adapter_name_or_path).",
        aliases=("--adapter_name_or_path",),
    )
    bits: Literal[4, 8, 16, 32] = flag(4, "Bits of the base model's weights.")
    double_quant: bool = flag(True, "Quantize the 4-bit scales too (QLoRA, section 3).")
    quant_type: Literal["nf4", "fp4"] = flag("nf4", "4-bit data type.")
    bf16: bool = flag(False, "Compute in bfloat16. Neither: the best the hardware has.")
    fp16: bool = flag(False, "Compute in float16, with a loss scale.")
    full_finetune: bool = flag(False, "Train every weight; needs bits 16 or 32.")
    use_cpu: bool = flag(False, "Stay on the CPU although a GPU is there.")
    max_memory_MB: int | None = flag(None, "Cap on each GPU's memory, MB; all that this process holds.")
    shard_layers: bool = flag(False, "Several GPUs hold one base together, each a share of every layer.")
    trust_remote_code: bool = flag(False, "Run Python code shipped in the model folder.")
    thinking: Thinking = flag("auto", "A thought before replies; auto: as the rows, then the run, have it.")
    allow_pickle: bool = flag(False, "Read .bin weights too (torch.load, weights only).")
    cache_dir: str | None = flag(None, "Where downloads from the hub are kept.")

    def __post_init__(self) -> None:
        if self.full_finetune and self.bits not in (16, 32):
            raise UserError(
                f"--full_finetune trains the weights themselves and --bits {self.bits} freezes them: "
                "use --bits 16 or 32, or leave --full_finetune out"
            )
        if self.bf16 and self.fp16:
            raise UserError(
                "--bf16 and --fp16 are both set: choose one, or neither for the best the hardware has"
            )
        require_positive(self, "max_memory_MB")

    @property
    def base(self) -> str:
        """Folder or hub id of the base, from --model_name_or_path or the run behind --checkpoint_dir."""
        if self.model_name_or_path is None:
            raise UserError(
                "no model is named: give --model_name_or_path FOLDER_OR_HUB_ID, or --checkpoint_dir RUN"
            )
        return self.model_name_or_path

    @property
    def where(self) -> dict[str, Any]:
        """At which revision the base is taken from the hub, and where it is kept: from_pretrained's words."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    @property
    def adapter_dir(self) -> Path:
        """--checkpoint_dir, for commands that have made sure that it is given."""
        assert self.checkpoint_dir is not None
        return Path(self.checkpoint_dir)


@dataclass
class DataArguments:
    _argument_group_name = "data"
    dataset_name: str = flag(
        "alpaca",
        "Named sets, hub ids (org/name:config[split]), modelscope:ORG/NAME, files, folders or globs, "
        "by commas; #500 draws 500 rows.",
    )
    eval_dataset_name: str | None = flag(
        None, "Rows to evaluate on. Without it the set's own, or a part of the rows."
    )
    dataset_format: DatasetFormat | None = flag(None, "Column layout; found from the columns when left out.")
    columns: str | None = flag(
        None,
        "Own names of columns: instruction=QUESTION,output=ANSWER; also input, system, history, "
        "messages, role, content, tools, text.",
    )
    data_dir: str | None = flag(None, "Folder of local copies of the named sets.")
    load_from_local: bool = flag(False, "Read the named set from --data_dir.")
    template: str | None = flag(None, "A file name of utils/prompts/templates; default: the tokenizer's own.")
    source_max_len: int = flag(1024, "Longest prompt, tokens.")
    target_max_len: int = flag(256, "Longest answer, tokens.")
    model_max_length: int | None = flag(
        None, "Longest prompt and answer together, tokens; replaces the two limits above."
    )
    truncation: Literal["prompt", "oldest_turns", "drop"] = flag(
        "prompt",
        "Of a row that is too long: cut a chat between its turns and a prompt's beginning, keep the "
        "newest turns only, or drop it.",
    )
    train_on_source: bool = flag(False, "Train on the prompt's tokens too.")
    train_last_turn_only: bool = flag(False, "Train on each chat's last answer only.")
    eval_dataset_size: float | None = flag(
        None, "Held-out rows: a share below 1, or a count. Default: 1024, 10% at most."
    )
    max_train_samples: int | None = flag(None, "Train on this many rows at most.")
    max_eval_samples: int | None = flag(None, "Evaluate on this many rows at most.")
    data_report: bool = flag(False, "Only report on the data; train nothing.")
    ignore_data_report: bool = flag(False, "Train although the report is red.")

    def __post_init__(self) -> None:
        positive = """
            source_max_len target_max_len model_max_length
            eval_dataset_size max_train_samples max_eval_samples
        """
        require_positive(self, *positive.split())

    @property
    def max_len(self) -> int:
        """Longest row, tokens."""
        return self.model_max_length or self.source_max_len + self.target_max_len


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"
    lora_r: int = flag(64, "Rank of the adapter.")
    lora_alpha: float = flag(16.0, "The update is scaled by alpha / r.")
    lora_dropout: float = flag(0.0, "Dropout on the adapter's input.")
    lora_target_modules: list[str] = flag(["all-linear"], "Names of the adapted layers, or all-linear.")
    bias: Literal["none", "all", "lora_only"] = flag("none", "Which biases are trained.")
    use_rslora: bool = flag(False, "Scale by alpha / sqrt(r) (arXiv 2312.03732).")
    use_dora: bool = flag(False, "Train magnitude apart from direction (2402.09353).")
    loraplus_lr_ratio: float | None = flag(None, "B learns so much faster than A (2402.12354).")
    init_lora_weights: Literal["gaussian", "pissa", "olora"] | None = flag(
        None, "How A and B begin, if not as LoRA's (PiSSA and OLoRA: 16 bits)."
    )

    def __post_init__(self) -> None:
        require_positive(self, "lora_r", "lora_alpha", "loraplus_lr_ratio")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"--lora_dropout {self.lora_dropout} is no probability: use 0 up to, not including, 1"
            )


@dataclass
class TrainingArguments:
    """The Trainer's flags that the scripts pin. Any other flag of the Trainer is taken too, into `extra`."""

    _argument_group_name = "training"
    output_dir: str | None = flag(None, "The run's folder; output/<data>-<model>.")
    overwrite_output_dir: bool = flag(False, "Start anew over the run found there.")
    force_resume: bool = flag(False, "Go on although base, data or arguments changed.")
    do_train: bool = flag(False, "Train. On when none of the three is given.")
    do_eval: bool = flag(False, "Measure the loss on held-out rows.")
    do_predict: bool = flag(False, "Answer the held-out rows into predictions.jsonl.")
    predict_with_generate: bool = flag(False, "Evaluations score answers to the held-out rows (ROUGE, BLEU).")
    sample_generate: bool = flag(False, "Answer --sample_prompts at each evaluation.")
    sample_prompts: str = flag("data/sample_prompts.jsonl", "Rows {prompt} or {messages}.")
    num_train_epochs: float = flag(3.0, "Passes over the training rows.")
    max_steps: int = flag(-1, "Optimizer steps; above 0 it replaces the epochs.")
    per_device_train_batch_size: int = flag(1, "Rows in a padded micro-batch.")
    per_device_eval_batch_size: int = flag(8, "Rows in an evaluation batch.")
    gradient_accumulation_steps: int = flag(16, "A step holds this many times those rows.")
    gradient_checkpointing: str = flag(
        "auto",
        "Recompute activations to save memory: True, False, or auto, as few layers as memory demands.",
        bare="True",
    )
    dry_run: bool = flag(False, "Only say what memory the run would take; train nothing.")
    num_gpus: int = flag(1, "GPUs that --dry_run plans for.")
    offload_checkpoints: bool = flag(
        True, "Recomputed layers' inputs wait in host memory (fast path, wide models)."
    )
    packing: bool = flag(True, "Lay a step's rows end to end in micro-batches instead of padding them.")
    fast_lora: bool = flag(True, "The fused path where it covers the model; else PEFT's own.")
    learning_rate: float = flag(2e-4, "Peak learning rate.")
    lr_scheduler_type: str = flag("constant", "constant, cosine, linear, ...")
    warmup_steps: float = flag(0.0, "Warm-up steps, or their share when below 1.")
    weight_decay: float = flag(0.0, "Decoupled weight decay.")
    adam_beta1: float = flag(0.9, "Adam's first-moment decay.")
    adam_beta2: float = flag(0.999, "Adam's second-moment decay.")
    adam_epsilon: float = flag(1e-8, "Adam's denominator floor.")
    max_grad_norm: float = flag(0.3, "Gradient norm is clipped to this.")
    optim: str = flag("auto", "Optimizer, by its name in the Trainer; auto: fused 32-bit AdamW.")
    seed: int = flag(42, "Seed of weights, dropout and samples.")
    data_seed: int = flag(42, "Seed of the split and of the order of the rows.")
    logging_strategy: str = flag("steps", "no, steps or epoch.")
    logging_steps: float | None = flag(None, "Steps between log lines; 10, or a tenth of a run below 100.")
    eval_strategy: str = flag("no", "no, steps or epoch.")
    eval_steps: float | None = flag(None, "Steps between evaluations.")
    save_strategy: str = flag("steps", "no, steps or epoch.")
    save_steps: float = flag(250, "Steps between checkpoints.")
    save_total_limit: int | None = flag(40, "Checkpoints kept.")
    load_best_model_at_end: bool = flag(False, "Keep the step whose evaluation was best.")
    early_stopping_patience: int | None = flag(None, "Stop after so many evaluations without a better one.")
    early_stopping_threshold: float = flag(0.0, "Better means better by more than this.")
    train_sampling_strategy: str = flag(
        "random", "random, sequential, or group_by_length to batch equal lengths."
    )
    dataloader_num_workers: int = flag(0, "Processes that prepare batches.")
    remove_unused_columns: bool = flag(False, "Kept for old scripts; rows hold no others.")
    ddp_find_unused_parameters: bool = flag(False, "For several GPUs: leave it off.")
    report_to: list[str] = flag(["none"], "wandb, tensorboard, none.")
    run_name: str | None = flag(None, "The run's name in wandb.")
    do_mmlu_eval: bool = flag(False, "Measure MMLU at each evaluation.")
    mmlu_dataset: str = flag("mmlu-zs", "mmlu-zs, mmlu-fs, or a json/jsonl file.")
    mmlu_split: Literal["eval", "test"] = flag("eval", "Which questions.")
    max_mmlu_samples: int | None = flag(None, "This many questions at most.")
    mmlu_source_max_len: int = flag(2048, "Longest question, tokens.")
    extra: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def run_dir(self) -> Path:
        """--output_dir, which utils/flags/checks.py chooses where it is left out."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def with_values(self, **values: Any) -> "TrainingArguments":
        """A copy with some values replaced. (dataclasses.replace would empty `extra`.)"""
        changed = copy.copy(self)
        vars(changed).update(values)
        return changed

    def __post_init__(self) -> None:
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = True
        self.do_eval |= self.do_train and self.eval_strategy != "no"
        if self.output_dir is not None:
            self.output_dir = os.path.expanduser(self.output_dir)  # as the Trainer does
        positive = """
            num_gpus num_train_epochs per_device_train_batch_size per_device_eval_batch_size
            gradient_accumulation_steps learning_rate eval_steps logging_steps save_steps
            save_total_limit early_stopping_patience max_mmlu_samples mmlu_source_max_len
            adam_epsilon
        """
        require_positive(self, *positive.split())
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps {self.max_steps}: use a positive number, or -1 to train by epochs")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            require_range(name, getattr(self, name))
        for name in ("adam_beta1", "adam_beta2"):
            require_range(name, getattr(self, name), below=1)
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            require_choice(
                self, name, ["no", "steps", "epoch"] + (["best"] if name == "save_strategy" else [])
            )
        require_choice(self, "train_sampling_strategy", ["random", "sequential", "group_by_length"])
        word = str(self.gradient_checkpointing).lower()
        known = {"auto": "auto"} | dict.fromkeys(TRUE_WORDS, "True") | dict.fromkeys(FALSE_WORDS, "False")
        if word not in known:
            raise UserError(
                f"--gradient_checkpointing {self.gradient_checkpointing}: use auto, True or False"
            )
        self.gradient_checkpointing = known[word]


@dataclass
class GenerationArguments:
    _argument_group_name = "generation"
    max_new_tokens: int = flag(256, "Longest reply, tokens.")
    min_new_tokens: int | None = flag(None, "Shortest reply, tokens.")
    do_sample: bool = flag(False, "Sample; otherwise the likeliest token is taken.")
    num_beams: int = flag(1, "Beams of a beam search.")
    temperature: float = flag(1.0, "Below 1 sharper, above 1 flatter (do_sample).")
    top_k: int = flag(50, "Sample from the k likeliest tokens (do_sample).")
    top_p: float = flag(1.0, "Sample from this share of probability (do_sample).")
    typical_p: float = flag(1.0, "Locally typical sampling (do_sample).")
    repetition_penalty: float = flag(1.0, "Above 1 discourages repetition.")
    length_penalty: float = flag(1.0, "Above 0 favours longer beams.")
    no_repeat_ngram_size: int = flag(0, "No n-gram of this size appears twice; 0: off.")
    prompt_lookup: int = flag(0, "Guess so many tokens (up to 7) from the prompt; same reply.")

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_lookup <= 7:
            raise UserError(f"--prompt_lookup {self.prompt_lookup}: use 1 to 7 tokens, or 0 for none")
        require_positive(self, "max_new_tokens", "min_new_tokens", "num_beams")
        require_positive(self, "temperature", "top_p", "typical_p", "repetition_penalty")


def require_positive(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: use a number above 0")


def require_range(name: str, value: float, below: float = float("inf")) -> None:
    if not 0 <= value < below:
        most = f", less than {below:g}" if below < float("inf") else " (0: none)"
        raise UserError(f"--{name} {value}: use 0 or more{most}")


def require_folder(arguments: Any, name: str) -> None:
    value = getattr(arguments, name)
    if value is not None and Path(value).is_file():
        raise UserError(f"--{name} {value} is a file: name a folder")


def require_choice(arguments: Any, name: str, choices: list[str]) -> None:
    value = getattr(arguments, name)
    if value not in choices:
        raise UserError(f"--{name} {value}: use one of {', '.join(choices)}")
