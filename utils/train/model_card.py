"""A run for others: its model card, made from run.json, and its upload to the hub."""

import json
from pathlib import Path
from typing import Any

from utils.arguments import TrainingArguments
from utils.console import UserError, is_main_process, notice
from utils.run.record import RUN_FILE

CARD = "README.md"
# What makes the run usable and explains it; checkpoints, logs and samples stay at home.
SHARED_FILES = (
    CARD, "run.json", "metrics.json", "training_curve.png", "adapter_config.json", "config.json",
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
HERE = 'folder = "."  # this one'  # in the card; on the hub its id
SHOWN_METRICS = (
    "steps",
    "kept_step",
    "train_loss",
    "eval_loss",
    "train_tokens",
    "train_seconds",
    "peak_memory_gib",
)


def share_finished_run(run: Path, training_args: TrainingArguments) -> None:
    """What --push_to_hub asks for, after the last file of the run is written."""
    extra = training_args.extra
    if extra.get("push_to_hub") and is_main_process():
        hub_id = extra.get("hub_model_id") or run.name
        push_run(run, hub_id, bool(extra.get("hub_private_repo")), extra.get("hub_token"))


def push_run(run: Path, hub_id: str, private: bool = False, token: str | None = None) -> None:
    """Upload list_shared_files(run) in one commit. Raises UserError for a run that is not finished."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = list_shared_files(run)
    api = HfApi(token=token)
    repo = api.create_repo(hub_id, private=private, exist_ok=True)
    contents = {name: run / name for name in files} | {CARD: read_hub_card(run, repo.repo_id)}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api.create_commit(repo.repo_id, operations, commit_message="Run of Chinese-Guanaco")
    notice(f"{run} is at {repo}")


def read_hub_card(run: Path, repo_id: str) -> bytes:
    """The run's card, whose code loads the run from the hub and not from its own folder."""
    return (run / CARD).read_text(encoding="utf-8").replace(HERE, f'folder = "{repo_id}"').encode()


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
    """A command, and code that loads the folder and answers a question; it ends where training ended it."""
    arguments, prompt = record["arguments"], record["prompt"]
    full, base = arguments["full_finetune"], record["base_model"]["name"]
    quantized = {
        4: f"""BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{arguments["quant_type"]}",
    bnb_4bit_use_double_quant={arguments["double_quant"]},
    bnb_4bit_compute_dtype=torch.bfloat16,
)""",
        8: "BitsAndBytesConfig(load_in_8bit=True)",
    }.get(arguments["bits"])
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if quantized else [])]
    imports = ["import torch", *([] if full else ["from peft import PeftModel"])]
    imports.append(f"from transformers import {', '.join(names)}")
    options = [
        'dtype=torch.bfloat16, device_map="auto"',
        *(["quantization_config=quantization"] if quantized else []),
    ]
    name = "folder" if full else f'"{base}"'
    code = [
        *imports,
        "",
        HERE,
        *([f"quantization = {quantized}"] if quantized else []),
        "model = AutoModelForCausalLM.from_pretrained(",
        f"    {name}, {', '.join(reversed(options))}",
        ")",
        *([] if full else ["model = PeftModel.from_pretrained(model, folder)"]),
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "",
        'messages = [{"role": "user", "content": "Who are you?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens=200, eos_token_id={prompt['stop_ids']})",
        'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return (
        "```bash\npython cli_demo.py --checkpoint_dir THIS_FOLDER\n```\n\n"
        f"or, from within this folder (replies end at `{prompt['stop_tokens'][0]}`):\n\n"
        "```python\n" + "\n".join(code) + "\n```"
    )
