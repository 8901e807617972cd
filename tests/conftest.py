"""Real parts, small: a tiny random LLaMA for mechanics, SmolLM2-135M where a real model is the point."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
from helpers import ROOT, SMOLLM2


def pytest_sessionstart(session):
    """The CPU's kind at the head, which pytest's own header, quiet under -q, would not show."""
    from utils.models.cpu import choose_cpu_dtype, has_bfloat16_instructions

    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(session.config, "workerinput"):
        has = "with" if has_bfloat16_instructions() else "without"
        forced = ", as QLORA_CPU_DTYPE says" if "QLORA_CPU_DTYPE" in os.environ else ""
        reporter.write_line(f"CPU {has} bfloat16 instructions: computes in {choose_cpu_dtype()}{forced}")


# Files of many seconds come first, so that no worker is left with one at the end.
LONG = (
    "scripts processes page training generation bad_input models checkpoints cli_demo merge signals eval run"
).split()
# Their commands take the ports that the documents name: one after another, whoever runs beside them.
SAME_PORTS = {"scripts", "readme_commands", "distributed_scripts", "examples"}


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
    for item in items:
        name = item.path.stem.removeprefix("test_")
        item.add_marker(pytest.mark.xdist_group("ports" if name in SAME_PORTS else name))


@pytest.fixture
def float32_cpu(monkeypatch):
    """A CPU that computes in float32, whichever this is: where runs are compared to 1e-4."""
    monkeypatch.setenv("QLORA_CPU_DTYPE", "float32")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Rows are tokenized anew, whatever other tests have left."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The starter model's folder, made once and kept."""
    subprocess.run(
        [sys.executable, "-m", "utils.starter_model", str(SMOLLM2)],
        cwd=ROOT,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
    )
    return SMOLLM2


@pytest.fixture
def smol_tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, smollm2) -> Path:
    """A random LLaMA of two layers with SmolLM2's tokenizer: every script runs on it in seconds."""
    from helpers.models import save_random_model

    return save_random_model(tmp_path_factory.mktemp("tiny-llama"), seed=0)


@pytest.fixture
def call_main(capsys):
    """Run a script's main() in this process. Returns what it printed."""
    from helpers.runs import run_in_process

    def call(script: str, *argv: str) -> str:
        run_in_process(script, *argv)
        captured = capsys.readouterr()
        return captured.out + captured.err

    return call


@pytest.fixture(scope="session")
def trained_run(tiny_model, tmp_path_factory):
    """Trains the tiny model by these flags, once for all who ask: the folder is to be read, run_copy to be written."""
    from helpers.runs import run_in_process

    made, left = {}, {}

    def train(*flags, name: str = "run") -> Path:
        settings = (name, *map(str, flags))
        if settings not in made:
            folder = tmp_path_factory.mktemp("trained") / name
            run_in_process(
                "qlora_finetune", "--model_name_or_path", tiny_model, *flags, "--output_dir", folder
            )
            made[settings], left[settings] = folder, list_files(folder)
        return made[settings]

    yield train
    assert {settings: list_files(folder) for settings, folder in made.items()} == left, "one was written into"


def list_files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def run_copy(run, tmp_path) -> Path:
    """A copy of the module's `run`, for a test that writes into it."""
    return shutil.copytree(run, tmp_path / run.name)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A random LLaMA that reads bytes: where hundreds of steps and many starts are needed."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("small") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Folder of each family's model, made when first asked for."""
    made = {}

    def make(family):
        if family.id not in made:
            made[family.id] = tmp_path_factory.mktemp(family.id)
            family.build(made[family.id])
        return made[family.id]

    return make


@pytest.fixture
def command(small_model, tmp_path):
    """The arguments of a run but its --output_dir."""
    from helpers.rows import write_sums
    from helpers.runs import FLAGS

    return [
        "--model_name_or_path",
        small_model,
        "--dataset_name",
        write_sums(tmp_path / "rows.jsonl"),
        *FLAGS,
    ]


@pytest.fixture(scope="session")
def server():
    """Starts runs without the seconds that imports take (fork_server.py)."""
    from helpers.fork_server import ForkServer

    server = ForkServer()
    yield server
    server.close()
