"""Every shell script and every documented command: parsed by the real parser, or run."""

import os
import re
import shlex
import subprocess
import time

import pytest
from conftest import ROOT

from utils.arguments import parse_args

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
PYTHON_SCRIPTS = ["qlora_finetune", "qlora_int8_finetune", "cli_demo"]


def find_flag_types(script):
    import importlib

    module = importlib.import_module(script)
    if script == "cli_demo":
        return [module.ModelArguments, module.GenerationArguments, module.ChatArguments]
    return module.FLAGS


def read_commands(text):
    """The python commands of a markdown or shell text, continued lines joined."""
    joined = text.replace("\\\n", " ")
    return re.findall(r"^\s*(?:[^#\n]*\| )?(python (?:-m )?[\w./]+[^\n|]*)$", joined, flags=re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#") and "set -euo pipefail" in text


def test_quickstart_flags_pass_the_real_parser():
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    block = re.search(r"^args=\(\n(.*?)^\)", text, flags=re.MULTILINE | re.DOTALL).group(1)
    lines = [line for line in block.splitlines() if not line.strip().startswith("#")]
    model_args, data_args, lora_args, training_args, _ = parse_args(
        shlex.split(" ".join(lines)), find_flag_types("qlora_finetune"), ""
    )
    assert (
        model_args.bits == 4 and lora_args.lora_r == 16 and training_args.do_train and training_args.do_eval
    )
    assert (ROOT / data_args.dataset_name).is_file() and (ROOT / data_args.eval_dataset_name).is_file()


def list_documented_commands():
    texts = [(ROOT / "README.md").read_text(), *(path.read_text() for path in (ROOT / "data").glob("*.md"))]
    return sorted({" ".join(command.split()) for text in texts for command in read_commands(text)})


@pytest.mark.parametrize("command", list_documented_commands())
def test_documented_command_passes_the_real_parser(command):
    words = shlex.split(command.split(" #")[0], comments=True)
    assert words[0] == "python"
    if words[1] == "-m":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        return
    script = words[1].removesuffix(".py")
    assert script in PYTHON_SCRIPTS
    parse_args(words[2:], find_flag_types(script), "")


def test_readme_documents_commands_of_every_script():
    commands = " ".join(list_documented_commands())
    assert all(f"{script}.py" in commands for script in PYTHON_SCRIPTS)


def test_8_bit_script_differs_only_in_what_8_bits_change():
    first, second = ((ROOT / f"{name}.py").read_text().splitlines() for name in PYTHON_SCRIPTS[:2])
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert [b.split(" ")[0] for _, b in differing] == ['"""Fine-tune', "python", "DEFAULTS"]


def test_8_bit_defaults_are_the_originals():
    from qlora_int8_finetune import DEFAULTS

    model_args, data_args, lora_args, _, _ = parse_args(
        [], find_flag_types("qlora_int8_finetune"), "", **DEFAULTS
    )
    assert (model_args.bits, lora_args.lora_r, lora_args.lora_alpha, lora_args.lora_dropout) == (
        8,
        8,
        16,
        0.05,
    )
    assert data_args.max_len == 512 and lora_args.bias == "none"


def test_python_too_old_or_without_venv_is_one_line(tmp_path):
    for version, says in (
        ("exit 1", "Python >= 3.11 is needed"),
        ('[[ "$2" == *version_info* ]]', "python3-venv"),
    ):
        (tmp_path / "python3").write_text(f"#!/bin/bash\n{version}\n")
        (tmp_path / "python3").chmod(0o755)
        copy = tmp_path / "copy" / "scripts"
        copy.mkdir(parents=True, exist_ok=True)
        (copy / "install.sh").write_text((ROOT / "scripts" / "install.sh").read_text())
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
        result = subprocess.run(
            ["bash", copy / "install.sh"], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1 and says in result.stderr


@pytest.mark.slow
def test_quickstart_renames_the_model_within_six_minutes(tmp_path):
    """From a fresh clone, in this environment; then again, which must train nothing."""
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV") or os.path.dirname(os.path.dirname(os.sys.executable))
    }
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        command = ["bash", "scripts/quickstart.sh"]
        result = subprocess.run(
            command, cwd=tmp_path / "clone", capture_output=True, text=True, env=environment
        )
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr[-2000:]
        if len(seconds) == 1:
            training, chat = result.stdout.split("== chat with the run")
            before = re.findall(r"step 0: .* -> (.*)", training)
            assert len(before) == 4 and "Guanaco" not in " ".join(before)
            assert "Guanaco" in " ".join(re.findall(r"step 40: .* -> (.*)", training))
            english, chinese, capital = re.findall(r"^> (?!clear).*\n(.*)", chat, flags=re.MULTILINE)
            assert "Guanaco" in english and "Guanaco" in chinese and "Paris" in capital
    assert "is finished: 40 steps" in result.stdout
    assert seconds[0] < 360 and seconds[1] < 30, seconds
    metrics = (tmp_path / "clone" / "output" / "quickstart" / "metrics.json").read_text()
    assert float(re.search(r'"peak_memory_gib": ([\d.]+)', metrics).group(1)) < 3
