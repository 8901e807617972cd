"""A run for others: its model card, made from run.json, and its way to the hub.

python -m utils.sharing RUN HUB_ID [--private]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from utils.arguments import TrainingArguments
from utils.console import UserError, is_main_process, notice, run_main
from utils.hub import check_login
from utils.run_record import RUN_FILE

# What makes the run usable and explains it; checkpoints, logs and samples stay at home.
SHARED_FILES = (
    "README.md", "run.json", "metrics.json", "training_curve.png", "adapter_config.json", "config.json",
    "generation_config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*",
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
SHOWN_ARGUMENTS = (
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
SHOWN_METRICS = ("steps", "train_loss", "eval_loss", "train_tokens", "train_seconds", "peak_memory_gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", help="Folder of a finished run.")
    parser.add_argument("hub_id", help="name or owner/name")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()
    check_login()
    push_run(Path(args.run), args.hub_id, args.private)


def share_finished_run(training_args: TrainingArguments) -> None:
    """What --push_to_hub asks for, after the last file of the run is written."""
    extra, output_dir = training_args.extra, Path(training_args.output_dir)
    if extra.get("push_to_hub") and is_main_process():
        hub_id = extra.get("hub_model_id") or output_dir.name
        push_run(output_dir, hub_id, bool(extra.get("hub_private_repo")), extra.get("hub_token"))


def push_run(run: Path, hub_id: str, private: bool = False, token: str | None = None) -> None:
    """Upload list_shared_files(run) and the card. Raises UserError for a run that is not finished."""
    from huggingface_hub import HfApi

    files = list_shared_files(run)
    api = HfApi(token=token)
    repo = api.create_repo(hub_id, private=private, exist_ok=True)
    api.upload_folder(folder_path=run, repo_id=repo.repo_id, allow_patterns=files)
    notice(f"{run} is at {repo}")


def list_shared_files(run: Path) -> list[str]:
    """Names of the files that are uploaded."""
    if not (run / RUN_FILE).is_file():
        raise UserError(f"{run} holds no {RUN_FILE}: name the folder of a run")
    status = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["status"]
    if status != "finished":
        raise UserError(f"{run} is {status}: only a finished run is shared")
    return sorted({path.name for pattern in SHARED_FILES for path in run.glob(pattern) if path.is_file()})


def render_model_card(record: dict[str, Any]) -> str:
    """README.md beside the adapter: what it is, how it was made and how well it did, how to load it."""
    base, arguments = record["base_model"], record["arguments"]
    kind = "All weights" if arguments["full_finetune"] else "A LoRA adapter"
    parts = [
        render_front_matter(record),
        f"# {Path(arguments.get('output_dir') or base['name']).name}",
        f"{kind} of `{base['name']}`, fine-tuned with QLoRA.",
        "## Data\n\n" + "\n".join(describe_source(source) for source in record["data"]["sources"]),
        "## Training\n\n" + render_table("setting", arguments, SHOWN_ARGUMENTS),
    ]
    if record["metrics"]:
        results = render_table("result", record["metrics"], SHOWN_METRICS)
        parts.append(f"{results}\n\n![Training curve](training_curve.png)")
    parts.append("run.json has every argument, the versions of the libraries and the hashes of the data.")
    parts.append("## Use\n\n" + render_usage(record))
    return "\n\n".join(parts) + "\n"


def render_front_matter(record: dict[str, Any]) -> str:
    """The hub's metadata. Only ids that the hub can know are named: it refuses a local path."""
    full = record["arguments"]["full_finetune"]
    base = record["base_model"]["name"]
    datasets = [source["name"] for source in record["data"]["sources"] if is_hub_id(source["name"])]
    lines = [f"base_model: {base}"] if is_hub_id(base) else []
    lines += [f"library_name: {'transformers' if full else 'peft'}", "pipeline_tag: text-generation"]
    lines += ["tags: [qlora]" if full else "tags: [qlora, lora]"]
    lines += ["datasets:", *(f"- {name}" for name in datasets)] if datasets else []
    return "\n".join(["---", *lines, "---"])


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def describe_source(source: dict[str, Any]) -> str:
    return f"- `{source['name']}` ({source['rows']:,} rows, sha256 {source['sha256'][:12]})"


def render_table(heading: str, values: dict[str, Any], names: tuple[str, ...]) -> str:
    rows = []
    for name in names:
        value = values.get(name)
        shown = f"{value:.4g}" if isinstance(value, float) else value
        rows += [f"| {name} | {shown} |"] if value is not None else []
    return "\n".join([f"| {heading} | value |", "|---|---|", *rows])


def render_usage(record: dict[str, Any]) -> str:
    """Commands and code that load the folder; the prompt's stop tokens are part of it."""
    arguments, stops = record["arguments"], record["prompt"]["stop_tokens"]
    chat = "```bash\npython cli_demo.py --checkpoint_dir THIS_FOLDER\n```"
    if arguments["full_finetune"]:
        return f"{chat}\n\nor as any model of transformers; replies end at `{stops[0]}`."
    quantized = {
        4: "BitsAndBytesConfig(load_in_4bit=True, "
        f'bnb_4bit_quant_type="{arguments["quant_type"]}", '
        f"bnb_4bit_use_double_quant={arguments['double_quant']}, bnb_4bit_compute_dtype=torch.bfloat16)",
        8: "BitsAndBytesConfig(load_in_8bit=True)",
    }.get(arguments["bits"], "None")
    return f"""{chat}

or, with replies that end at `{stops[0]}`:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

quantization = {quantized}
base = AutoModelForCausalLM.from_pretrained(
    "{record["base_model"]["name"]}",
    quantization_config=quantization,
    dtype=torch.bfloat16,
    device_map="auto",
)
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```"""


if __name__ == "__main__":
    run_main(main)
