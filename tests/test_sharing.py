"""The card and the files of a shared run; everything up to the hub itself."""

import json
import subprocess
import sys

import pytest
import yaml
from helpers import IDENTITY

from utils.console import UserError
from utils.train.model_card import list_shared_files, push_run, render_model_card

FLAGS = [
    "--dataset_name",
    IDENTITY,
    "--max_train_samples",
    "8",
    "--source_max_len",
    "200",
    "--target_max_len",
    "100",
]
FLAGS += ["--lora_r", "4", "--do_train", "--do_eval", "--max_steps", "2", "--eval_dataset_size", "4"]
FLAGS += ["--gradient_accumulation_steps", "1", "--save_steps", "1"]


@pytest.fixture(scope="module")
def run(trained_run):
    return trained_run(*FLAGS, name="guanaco-tiny")


def read_card(text):
    """(front matter, body) as the hub reads them."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_of_a_finished_run_tells_base_data_settings_results_and_use(run, tiny_model):
    front, body = read_card((run / "README.md").read_text())
    assert front == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["qlora", "lora"]}
    record = json.loads((run / "run.json").read_text())
    assert body.startswith("\n# guanaco-tiny\n") and f"`{tiny_model}`" in body
    (source,) = record["data"]["sources"]
    assert f"- `{IDENTITY}` (128 rows, sha256 {source['sha256'][:12]})" in body
    assert "| learning_rate | 0.0002 |" in body and "| lora_r | 4 |" in body and "| bits | 4 |" in body
    assert f"| eval_loss | {record['metrics']['eval_loss']:.4g} |" in body and "| steps | 2 |" in body
    assert "![Training curve](training_curve.png)" in body and "`<|im_end|>`" in body


def test_card_names_hub_ids_and_never_a_local_path_to_the_hub(run):
    record = json.loads((run / "run.json").read_text())
    record["base_model"]["name"] = "huggyllama/llama-7b"
    record["data"]["sources"][0]["name"] = "tatsu-lab/alpaca"
    front, body = read_card(render_model_card(record))
    assert front["base_model"] == "huggyllama/llama-7b" and front["datasets"] == ["tatsu-lab/alpaca"]
    assert 'from_pretrained(\n    "huggyllama/llama-7b", quantization_config=quantization' in body


def test_code_in_the_card_runs_as_pasted_and_answers(run):
    """In the run's folder, nothing changed; the reply is what the chat of this repository says."""
    body = (run / "README.md").read_text()
    code = body.split("```python\n")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=run)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.strip()) > 20


def test_checkpoints_and_logs_stay_at_home(run_copy):
    (run_copy / "notes.txt").write_text("mine")
    assert list_shared_files(run_copy) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "metrics.json",
        "run.json", "tokenizer.json", "tokenizer_config.json", "training_curve.png",
    ]  # fmt: skip


def test_upload_is_one_commit_of_those_files_each_once_with_the_hubs_card(run, monkeypatch):
    import huggingface_hub

    sent = []

    class Hub(huggingface_hub.HfApi):
        """The library's own client; what it would send is read as it reads it."""

        def create_repo(self, repo_id, **options):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

        def create_commit(self, repo_id, operations, *, commit_message):
            assert repo_id == "someone/guanaco-tiny" and commit_message
            for operation in operations:
                with operation.as_file() as file:
                    sent.append((operation.path_in_repo, file.read()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert list(run.glob("checkpoint-*/*.safetensors"))
    push_run(run, "guanaco-tiny")
    assert sorted(name for name, _ in sent) == list_shared_files(run)
    contents = dict(sent)
    card = contents.pop("README.md").decode()  # whose code loads the run from the hub
    assert 'folder = "someone/guanaco-tiny"\n' in card and 'folder = "."' not in card
    assert all((run / name).read_bytes() == content for name, content in contents.items())


def test_card_of_a_checkpoint_claims_no_results(run):
    _, body = read_card((run / "checkpoint-1" / "README.md").read_text())
    assert "training_curve" not in body and "| steps |" not in body


def test_unfinished_run_is_not_shared(run_copy):
    record = json.loads((run_copy / "run.json").read_text())
    (run_copy / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(UserError, match="is running: only a finished run"):
        push_run(run_copy, "guanaco-tiny")


def test_push_without_the_hub_is_refused_before_anything_is_trained(call_main, tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", IDENTITY, "--model_max_length", "300"]
    with pytest.raises(UserError, match="^--push_to_hub.*HF_HUB_OFFLINE"):
        call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "run", "--push_to_hub")
    assert not (tmp_path / "run").exists()
