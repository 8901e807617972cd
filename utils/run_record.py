"""run.json: what made an adapter. Written when training starts, completed when it ends."""

import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from utils.console import UserError, notice

RUN_FILE = "run.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
# May differ between two starts of one run: they change what is printed or kept, not what is learned.
FREE_ARGUMENTS = {
    "output_dir",
    "overwrite_output_dir",
    "do_eval",
    "do_predict",
    "predict_with_generate",
    "sample_generate",
    "sample_prompts",
    "per_device_eval_batch_size",
    "logging_strategy",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "report_to",
    "run_name",
    "do_mmlu_eval",
    "mmlu_dataset",
    "mmlu_split",
    "max_mmlu_samples",
    "mmlu_source_max_len",
    "max_eval_samples",
    "cache_dir",
    "max_memory_MB",
    "remove_unused_columns",
    "ddp_find_unused_parameters",
    "resume_from_checkpoint",
    "disable_tqdm",
}
# What a run may leave in its folder; --overwrite_output_dir removes these and nothing else.
RUN_ARTIFACTS = (
    RUN_FILE,
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "metrics.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "lm_tasks*.json",
    "predictions.jsonl",
    "report.json",
    "report.md",
    "report.png",
    "samples.jsonl",
    "special_tokens_map.json",
    "tokenizer*",
    "training_curve.png",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "checkpoint-*",
    "runs",
    "wandb",
)


def collect_arguments(*arguments: Any) -> dict[str, Any]:
    """Every field of the argument dataclasses, without secrets."""
    merged: dict[str, Any] = {}
    for group in arguments:
        merged |= dataclasses.asdict(group)
    extra = merged.pop("extra", {})
    merged |= {name: value for name, value in extra.items() if not name.endswith("token")}
    return merged


def build_run_record(
    arguments: dict[str, Any], base: dict[str, Any], prompt: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """The record of a run that starts now."""
    return {
        "status": "running",
        "base_model": base,
        "prompt": prompt,
        "data": data,
        "arguments": arguments,
        "command": shlex.join(["python", *hide_secrets(sys.argv)]),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES},
        "git_commit": read_git_commit(),
        "metrics": {},
    }


def hide_secrets(argv: list[str]) -> list[str]:
    """`argv` with the value of every --...token and --...key as ***."""
    words, hidden = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("--") and name.replace("-", "_").endswith(("token", "key"))
        words.append("***" if hidden else f"{name}=***" if is_secret and equals else word)
        hidden = is_secret and not equals
    return words


def read_git_commit() -> str | None:
    """Commit of this checkout, with `+` when files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def save_run_record(record: dict[str, Any], run_dir: Path) -> None:
    write_json(record, run_dir / RUN_FILE)


def write_json(content: Any, path: Path) -> None:
    """Write beside and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def find_run_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a run, or of the run that a checkpoint-N belongs to; None for a bare adapter folder."""
    for path in (folder / RUN_FILE, folder.resolve().parent / RUN_FILE):
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path} is damaged ({error}): restore it or name the adapter folder alone"
                ) from error
    return None


def describe_finished(record: dict[str, Any], output_dir: Path) -> None:
    """Say that there is nothing left to train."""
    metrics = record["metrics"]
    notice(
        f"{output_dir} is finished: {metrics['steps']} steps, train loss {metrics['train_loss']:.3f}; "
        "--overwrite_output_dir starts anew\n"
        f"to chat: python cli_demo.py --checkpoint_dir {output_dir}"
    )


def find_last_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint-N of a run."""
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in output_dir.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    }
    return str(steps[max(steps)]) if steps else None


def clear_run(output_dir: Path) -> None:
    """Remove what an earlier run left (RUN_ARTIFACTS), and no other file."""
    for pattern in RUN_ARTIFACTS:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def next_free_path(path: Path) -> Path:
    """`path`, or with -2, -3, ... where it is taken: results are never overwritten."""
    names = (path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in itertools.count(1))
    return next(name for name in names if not name.exists())


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def find_changes(recorded: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    """Arguments that change what is learned and differ from the recorded run, each as `--name was -> now`."""
    names = sorted((recorded.keys() | arguments.keys()) - FREE_ARGUMENTS)
    return [
        f"--{name} {recorded.get(name)} -> {arguments.get(name)}"
        for name in names
        if recorded.get(name) != arguments.get(name)
    ]


def find_earlier_run(output_dir: Path, arguments: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The record of the same run found in `output_dir`, or None where a new run may start.

    Raises UserError for a file, for a folder that is no run, and for a run with other arguments.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    if overwrite or not output_dir.exists() or not any(output_dir.iterdir()):
        return None
    record = find_run_record(output_dir) if (output_dir / RUN_FILE).is_file() else None
    if record is None:
        raise UserError(
            f"--output_dir {output_dir} holds other files and no {RUN_FILE}: name a new folder "
            "(--overwrite_output_dir uses it all the same and leaves those files)"
        )
    changes = find_changes(record["arguments"], arguments)
    if changes:
        raise UserError(
            f"--output_dir {output_dir} holds a run with other arguments ({'; '.join(changes)}): "
            "name a new folder, or start anew there with --overwrite_output_dir"
        )
    return record


def render_model_card(record: dict[str, Any]) -> str:
    """README.md beside the adapter: what it is, how it was made, how to load it."""
    base, arguments = record["base_model"], record["arguments"]
    sources = "\n".join(
        f"- `{source['name']}` ({source['rows']:,} rows, sha256 {source['sha256'][:12]})"
        for source in record["data"]["sources"]
    )
    shown = (
        "learning_rate",
        "lr_scheduler_type",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "bits",
        "quant_type",
        "double_quant",
        "seed",
    )
    table = "\n".join(f"| {name} | {arguments[name]} |" for name in shown)
    kind = "All weights" if arguments["full_finetune"] else "A LoRA adapter"
    load = (
        ""
        if arguments["full_finetune"]
        else (
            "\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base["name"]}")\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n```\n'
        )
    )
    return (
        f"---\nbase_model: {base['name']}\nlibrary_name: peft\ntags: [qlora, lora]\n---\n\n"
        f"{kind} of `{base['name']}`, fine-tuned with QLoRA.\n\nData:\n{sources}\n\n"
        f"| setting | value |\n|---|---|\n{table}\n\nrun.json has every argument. To chat:\n\n"
        f"```bash\npython cli_demo.py --checkpoint_dir THIS_FOLDER\n```\n{load}"
    )
