"""Flags that 2023 scripts pin and the libraries dropped or renamed: what each became, said in one line."""

from utils.arguments import FALSE_WORDS, TRUE_WORDS
from utils.console import UserError, notice

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "dataset": "dataset_name",
    "data_path": "dataset_name",
    "lora_model_name_or_path": "checkpoint_dir",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
SWITCHES = {"load_8bit": ["--bits", "8"], "adam8bit": ["--optim", "adamw_bnb_8bit"]}  # what they are when on
# Flags without effect today, and why that is right.
DROPPED = {
    "use_auth_token": "the token of `hf auth login` or HF_TOKEN is used by itself",
    "save_safetensors": "weights are always saved as safetensors",
    "tokenizer_type": "the tokenizer's kind is read from its files",
    "logging_dir": "TensorBoard writes to the run's folder; TENSORBOARD_LOGGING_DIR moves it",
}


def translate_legacy_flags(argv: list[str], known: list[str]) -> list[str]:
    """`argv` with each 2023 flag replaced by what it became; a notice tells each replacement.

    A flag that the running script knows (`known`) is never touched.
    """
    words, translated = list(argv), []
    while words:
        word = words.pop(0)
        flag, _, inline = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        values = [inline] if inline else []
        if not inline and words and not words[0].startswith("--"):
            values = [words[0]]
        is_today = not flag.startswith("--") or flag in known
        replacement = None if is_today else translate_flag(name, values)
        if replacement is None:
            translated.append(word)
            continue
        if values and not inline:
            words.pop(0)
        translated += replacement
    return translated


def translate_flag(name: str, values: list[str]) -> list[str] | None:
    """What `--name values` means today, or None when it is no legacy flag."""
    if name in RENAMED:
        return announce(name, values, [f"--{RENAMED[name]}", *values])
    if name in DROPPED:
        shown = "" if name == "use_auth_token" else " ".join(["", *values])  # a token is a secret
        notice(f"--{name}{shown} has no effect: {DROPPED[name]}")
        return []
    if name == "warmup_ratio":
        return announce(name, values, ["--warmup_steps", read_ratio(values)])
    if name == "group_by_length":
        sampling = "group_by_length" if read_switch(name, values) else "random"
        return announce(name, values, ["--train_sampling_strategy", sampling])
    if name in SWITCHES:
        return announce(name, values, SWITCHES[name] if read_switch(name, values) else [])
    if name == "no_gradient_checkpointing":
        return ["--gradient_checkpointing", "False"]
    if name == "lora_modules":
        modules = (
            ["all-linear"] if values in ([], ["all"]) else values[0].strip("[]").replace("'", "").split(",")
        )
        return announce(name, values, ["--lora_target_modules", *modules])
    return None


def announce(name: str, values: list[str], replacement: list[str]) -> list[str]:
    notice(f"{' '.join([f'--{name}', *values])} is now {' '.join(replacement) or 'the default'}")
    return replacement


def read_ratio(values: list[str]) -> str:
    try:
        ratio = float(values[0])
    except (IndexError, ValueError):
        raise UserError(
            f"--warmup_ratio {' '.join(values)}: use a share of the steps, such as 0.03"
        ) from None
    if not 0 <= ratio < 1:
        raise UserError(f"--warmup_ratio {values[0]}: use a share from 0 up to, not including, 1")
    return values[0]


def read_switch(name: str, values: list[str]) -> bool:
    word = values[0].lower() if values else "true"
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise UserError(f"--{name} {values[0]}: use True or False")
    return word in TRUE_WORDS
