"""A run for others: its model card, made from run.json, and its upload to the hub."""

from pathlib import Path
from typing import Any

import jinja2

from utils.arguments import TrainingArguments
from utils.console import UserError, is_main_process, notice
from utils.run.record import RUN_FILE, read_run_record

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# What makes the run usable and explains it; checkpoints, logs and samples stay at home.
SHARED_FILES = (
    CARD, "run.json", "metrics.json", "training_curve.png", "adapter_config.json", "config.json",
    "generation_config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*",
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
HERE = 'folder = "."  # this one'  # in the card; on the hub its id


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
    record = read_run_record(run)
    if record is None:
        raise UserError(f"{run} holds no {RUN_FILE}: name the folder of a run")
    if record["status"] != "finished":
        raise UserError(f"{run} is {record['status']}: only a finished run is shared")
    return sorted({path.name for pattern in SHARED_FILES for path in run.glob(pattern) if path.is_file()})


def render_model_card(record: dict[str, Any]) -> str:
    """README.md beside the adapter (model_card.md.jinja): what it is, how it was made, how to load it."""
    base, arguments = record["base_model"]["name"], record["arguments"]
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return template.render(
        record,
        base=base,
        title=Path(arguments.get("output_dir") or base).name,
        full=arguments["full_finetune"],
        quantized=arguments["bits"] in (4, 8),
        datasets=[source["name"] for source in record["data"]["sources"] if is_hub_id(source["name"])],
        is_hub_id=is_hub_id,
        show=lambda value: f"{value:.4g}" if isinstance(value, float) else value,
        here=HERE,
    )


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
