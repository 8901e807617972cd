"""Real parts, small: a tiny random LLaMA for mechanics, SmolLM2-135M where a real model is the point."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


def pytest_sessionstart(session):
    """The CPU's kind at the head, which pytest's own header, quiet under -q, would not show."""
    from utils.models.cpu import describe_cpu

    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(session.config, "workerinput"):
        reporter.write_line(describe_cpu())


# Files of many seconds come first, so that no worker is left with one at the end.
LONG = (
    "processes page training generation bad_input models checkpoints cli_demo merge signals eval run".split()
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture
def float32_cpu(monkeypatch):
    """A CPU that computes in float32, whichever this is: where runs are compared to 1e-4."""
    monkeypatch.setenv("QLORA_CPU_DTYPE", "float32")


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
    return save_random_model(tmp_path_factory.mktemp("tiny-llama"), seed=0)


def save_random_model(folder: Path, seed: int) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ignore_outputs(*patterns: str):
    """For shutil.copytree of this repository: without models/ (utils/models/ stays), runs and hidden files."""
    left_out = shutil.ignore_patterns(".*", "output", "wandb", "__pycache__", *patterns)

    def ignore(path: str, names: list[str]) -> set[str]:
        return left_out(path, names) | ({"models"} & set(names) if path == str(ROOT) else set())

    return ignore


def run_script(
    script: str, *argv: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script as a user starts it, in its own process."""
    return subprocess.run(
        [sys.executable, script, *map(str, argv)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
    )


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Run a script's main() in this process: no seconds lost on imports. Returns what it printed."""

    def call(script: str, *argv: str) -> str:
        import gc
        import importlib

        if not gc.get_freeze_count():  # a Trainer collects garbage: 0.7 s over all that tests have imported
            importlib.import_module("utils.train.training")
            gc.freeze()  # once: what is frozen is never freed
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        importlib.import_module(script).main()
        captured = capsys.readouterr()
        return captured.out + captured.err

    return call


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
    from small_runs import FLAGS, write_rows

    return [
        "--model_name_or_path",
        small_model,
        "--dataset_name",
        write_rows(tmp_path / "rows.jsonl"),
        *FLAGS,
    ]


@pytest.fixture(scope="session")
def server():
    """Starts runs without the seconds that imports take (fork_server.py)."""
    from fork_server import ForkServer

    server = ForkServer()
    yield server
    server.close()
