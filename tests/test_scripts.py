"""Every shell script and every documented command: parsed by the real parser, or run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from helpers import ROOT, families
from helpers.documents import DOCUMENTS, list_bash_commands, read_commands
from helpers.shell import check_page, ignore_outputs, run_shell

from utils.flags.finetune import FLAGS
from utils.flags.parser import parse_args, prepend_flag

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
PYTHON_SCRIPTS = ["qlora_finetune", "qlora_int8_finetune", "cli_demo", "gradio_webserver"]
# Scripts without a FLAGS of their own: the last of the groups that each parses.
OWN_GROUPS = {
    "cli_demo": "ChatArguments",
    "gradio_webserver": "PageArguments",
    "eval.lm_tasks": "TaskArguments",
    "eval.generate_answers": "AnswerArguments",
    "eval.report": "ReportArguments",
    "eval.train_speed": "SpeedArguments",
    "eval.chat_speed": "ChatSpeedArguments",
    "eval.compare_runs": "CompareArguments",
    "utils.merge_adapter": "MergeArguments",
}


def find_flag_types(script):
    import importlib

    if script not in OWN_GROUPS:
        return FLAGS
    module = importlib.import_module(script)
    names = ["ModelArguments", "GenerationArguments", OWN_GROUPS[script]]
    return [getattr(module, name) for name in names if hasattr(module, name)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#") and "set -euo pipefail" in text


def read_variables(text):
    """{name: value} of a script's plain assignments; ${1:-default} is its default."""
    found = re.findall(r"^(\w+)=(?:\$\{1:-)?([\w./-]+)\}?$", text, flags=re.MULTILINE)
    return {f"${name}": value for name, value in found}


def read_script_commands(script):
    """(python script, words) of each command of a shell script, its args=( ... ) array filled in."""
    text = re.sub(r'"\$repo/([\w.]+)"', r"\1", script.read_text())
    block = re.search(r"^args=\(\n(.*?)^\)", text, flags=re.MULTILINE | re.DOTALL)
    lines = (
        [line for line in block.group(1).splitlines() if not line.strip().startswith("#")] if block else []
    )
    array = " ".join(lines)
    others = dict(re.findall(r"^(\w+)=\((.+)\)$", text, flags=re.MULTILINE))  # arrays of one line
    variables = read_variables(text)
    for name, rest in re.findall(r"^(?:[^#\n]*\| )?\s*python (\w+)\.py (.*)$", text, flags=re.MULTILINE):
        filled = rest.replace('"${args[@]}"', array).replace('"$@"', "").replace('"${@:2}"', "")
        for other, flags in others.items():
            filled = filled.replace(f'"${{{other}[@]}}"', flags)
        words = shlex.split(filled)
        yield name, [variables.get(word, word) for word in words]


def parse_command(name, words):
    return parse_args(words, find_flag_types(name), "")


RUN_SCRIPTS = [script for script in SCRIPTS if script.name not in ("install.sh", "test.sh", "usage.sh")]
FINETUNE_SCRIPTS = [script for script in SCRIPTS if script.name.startswith("finetune_")]


@pytest.mark.parametrize("script", RUN_SCRIPTS, ids=lambda path: path.name)
def test_flags_of_a_shell_script_pass_the_real_parser(script):
    commands = list(read_script_commands(script))
    assert commands
    for name, words in commands:
        parse_command(name, words)


@pytest.mark.parametrize("script", RUN_SCRIPTS, ids=lambda path: path.name)
def test_modules_that_a_shell_script_runs_are_there(script):
    for module in re.findall(r"python -m ([\w.]+)", script.read_text()):
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), module


def test_quality_compares_everything_off_with_everything_on():
    script = ROOT / "scripts" / "quality.sh"
    ((name, words),) = read_script_commands(script)
    arrays = dict(re.findall(r"^(plain|fast)=\((.+)\)$", script.read_text(), flags=re.MULTILINE))
    for setting, is_on in (("plain", False), ("fast", True)):
        _, _, _, training_args, _ = parse_command(name, [*words, *arrays[setting].split()])
        switches = (training_args.packing, training_args.fast_lora)
        assert switches == (is_on, is_on) and training_args.do_eval
        assert training_args.gradient_checkpointing == str(is_on)


@pytest.mark.parametrize("script", FINETUNE_SCRIPTS, ids=lambda path: path.name)
def test_finetune_script_is_a_lab_notebook(script):
    """Header, array in groups, one order of flags, the user's flags last; nothing sourced, no 2023 flags."""
    text = script.read_text()
    header = re.findall(r"^#   (\w+) ", text, flags=re.MULTILINE)
    assert header == ["model", "data", "gpu", "memory", "time"]
    assert re.findall(r"^  # (\w+)", text, flags=re.MULTILINE) == [
        "model",
        "data",
        "adapter",
        "training",
        "output",
    ]
    assert re.search(
        r'^python "\$repo/qlora_(int8_)?finetune\.py" "\$\{args\[@\]\}" "\$@"$', text, flags=re.MULTILINE
    )
    assert "source " not in text.replace("source_max_len ", "")


@pytest.mark.parametrize("script", FINETUNE_SCRIPTS, ids=lambda path: path.name)
def test_finetune_script_pins_no_legacy_flag(script, capsys):
    for name, words in read_script_commands(script):
        parse_command(name, words)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "size, model, learning_rate, dropout",
    [
        ("7b", "7b", 2e-4, 0.1),
        ("13b", "13b", 2e-4, 0.1),
        ("33b", "30b", 1e-4, 0.05),
        ("65b", "65b", 1e-4, 0.05),
    ],
)
def test_guanaco_scripts_hold_the_papers_values(size, model, learning_rate, dropout):
    ((name, words),) = read_script_commands(ROOT / "scripts" / f"finetune_llama_guanaco{size}.sh")
    model_args, data_args, lora_args, training_args, _ = parse_command(name, words)
    assert (model_args.model_name_or_path, model_args.bits, model_args.quant_type, model_args.double_quant) == (
        f"huggyllama/llama-{model}", 4, "nf4", True,
    )  # fmt: skip
    assert (data_args.dataset_name, data_args.source_max_len, data_args.target_max_len) == ("oasst1", 16, 512)
    assert (lora_args.lora_r, lora_args.lora_alpha, lora_args.lora_dropout) == (64, 16, dropout)
    rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    assert (training_args.max_steps, rows, training_args.learning_rate) == (1875, 16, learning_rate)
    assert (training_args.lr_scheduler_type, training_args.adam_beta2) == ("constant", 0.999)
    assert training_args.max_grad_norm == 0.3 and training_args.optim == "auto"


def test_every_row_of_the_model_zoo_has_its_script():
    runs = {}
    for script in FINETUNE_SCRIPTS:
        ((name, words),) = read_script_commands(script)
        model_args, data_args, *_ = parse_command(name, words)
        runs[script.name] = (model_args.model_name_or_path, data_args.dataset_name, model_args.bits)
    zoo = [
        ("huggyllama/llama-7b", "oasst1"),
        ("huggyllama/llama-7b", "olcc"),
        ("models/baichuan-7b", "oasst1"),
        ("models/baichuan-7b", "olcc"),
    ]
    assert all((*row, 4) in runs.values() for row in zoo)
    assert {"finetune_llama_guanaco7b.sh", "finetune_baichuan_7b.sh"} <= set(runs)


def test_scripts_have_a_table_with_a_row_each():
    table = (ROOT / "scripts" / "README.md").read_text()
    assert [script.name for script in SCRIPTS if f"`{script.name}`" not in table] == []


# The first of these words in a script's name says which small model takes the place of its own.
SMALL_MODELS = {
    "baichuan": families.build_baichuan,
    "opt": families.build_opt,
    "bloomz": families.build_bloomz,
    "pythia": families.build_neox,
    "qwen2.5": families.build_qwen2,
    "sharegpt": families.build_qwen2,
    "llama3": families.build_llama3,
    "llama": families.build_llama1,
}
SMALL_FLAGS = (
    "--max_steps 2 --max_train_samples 16 --max_eval_samples 4 --eval_dataset_size 8 --max_new_tokens 4 "
    "--source_max_len 200 --target_max_len 200 --model_max_length 400 --eval_steps 1 --save_steps 1"
).split()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This working tree without its models, where scripts leave their runs."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT, folder, ignore=ignore_outputs("tests"), dirs_exist_ok=True)
    shutil.copy(ROOT / "data" / "guanaco_identity.jsonl", folder / "data" / "olcc.jsonl")
    return folder


def run_bash(checkout, script, *flags, stdin=""):
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", f"scripts/{script}", *map(str, flags)]
    environment = os.environ | {"PATH": path}
    result = subprocess.run(
        command, cwd=checkout, input=stdin, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", FINETUNE_SCRIPTS, ids=lambda path: path.name)
def test_finetune_script_trains_a_small_model_in_its_models_place(script, checkout, tmp_path):
    """As written but for model, data and size; a script that converts its model finds it converted."""
    text = script.read_text()
    converted = re.search(r"^model=(models/\S+)$", text, flags=re.MULTILINE)
    folder = checkout / converted.group(1) if converted else tmp_path / "small"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        next(build for word, build in SMALL_MODELS.items() if word in script.name)(folder)
    flags = [] if converted else ["--model_name_or_path", folder]
    flags += [] if "olcc" in script.name else ["--dataset_name", "data/guanaco_identity.jsonl"]
    printed = run_bash(checkout, script.name, *flags, *SMALL_FLAGS)
    run = checkout / re.search(r"--output_dir (\S+)", text).group(1)
    assert "finished" in printed and (run / "adapter_model.safetensors").is_file()


@pytest.fixture
def guanaco_run(checkout, tmp_path):
    """output/guanaco-7b, where the scripts that use a run look for it."""
    run = checkout / "output" / "guanaco-7b"
    if not run.is_dir():
        families.build_llama1(tmp_path)
        flags = ["--model_name_or_path", tmp_path, "--dataset_name", "data/guanaco_identity.jsonl"]
        run_bash(checkout, "finetune_llama_guanaco7b.sh", *flags, *SMALL_FLAGS)
    return run


@pytest.mark.slow
def test_generate_and_chat_scripts_use_the_guanaco_scripts_run(checkout, guanaco_run):
    run_bash(checkout, "generate.sh", "--max_new_tokens", "4", "--max_eval_samples", "4")
    predictions = (guanaco_run / "predictions.jsonl").read_text()
    assert len(predictions.splitlines()) == 4
    assert "> 你是谁？\n" in run_bash(checkout, "chat.sh", "--max_new_tokens", "4", stdin="你是谁？\n")


@pytest.mark.slow
def test_webserver_script_opens_the_page_of_the_guanaco_scripts_run(checkout, guanaco_run):
    check_page(run_shell("bash scripts/webserver.sh --max_new_tokens 4", checkout))


@pytest.mark.slow
def test_quality_script_trains_both_settings_and_judges_them(checkout, tmp_path):
    families.build_llama1(tmp_path)
    flags = ["--seeds", "0 1", "--data", "data/guanaco_identity.jsonl", "--model_name_or_path", tmp_path]
    model = checkout / "models" / "SmolLM2-135M-Instruct"  # the script looks for it, the flag takes its place
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    printed = run_bash(checkout, "quality.sh", *flags, *SMALL_FLAGS)
    assert re.search(r"\| mean \| \d\.\d{4} \| \d\.\d{4} \|", printed) and "the spread of seeds" in printed
    assert (checkout / "output" / "quality" / "fast-1" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_quantization_script_trains_every_base_and_holds_it_against_16_bits(checkout, tmp_path):
    families.build_llama1(tmp_path)
    flags = ["--seeds", "0 1", "--data", "data/guanaco_identity.jsonl", "--model_name_or_path", tmp_path]
    printed = run_bash(checkout, "quantization.sh", *flags, *SMALL_FLAGS)
    row = r"^\| (\w+) \| \d+\.\d{4} \| ([+-]\S+)% \| \d+\.\d{4} \| 0\.\d{4} \| ([+-]\S+)% \|$"
    table = re.findall(row, printed, flags=re.MULTILINE)
    assert [setting for setting, *_ in table] == ["bf16", "int8", "nf4", "fp4", "full"]
    assert table[0][1:] == ("+0.0", "+0.0")
    again = run_bash(checkout, "quantization.sh", *flags, *SMALL_FLAGS)
    assert again.count("is finished") == 10 and again.endswith(printed[printed.index("| setting") :])


SMALLER_EVALUATION = {
    "--tasks mmlu,cmmlu,ceval-valid": "--tasks quiz_en,quiz_zh --limit 4",
    "--max_eval_samples 200 --max_new_tokens 256": "--max_eval_samples 4 --max_new_tokens 4",
    '--questions "$repo"/eval/prompts/*.jsonl': "--questions eval/prompts/*.jsonl --max_questions 2 --max_new_tokens 4",
    'eval.report "$run"': 'eval.report "$run" --max_questions 2 --limit 4 --max_new_tokens 4',
}


@pytest.mark.slow
def test_evaluate_script_measures_the_guanaco_scripts_run(checkout, guanaco_run):
    """As written but for its benchmarks, which are on the hub, and for how much it measures."""
    script = checkout / "scripts" / "evaluate.sh"
    text = script.read_text()
    for words, smaller in SMALLER_EVALUATION.items():
        assert words in text
        text = text.replace(words, smaller)
    script.write_text(text)
    printed = run_bash(checkout, "evaluate.sh")
    assert "quiz_zh" in printed
    answers = (checkout / "output" / "answers" / "answer-guanaco-7b.jsonl").read_text()
    assert len(answers.splitlines()) == 2 and (guanaco_run / "report.md").is_file()


def list_documented_commands():
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    return sorted({command for text in texts for command in read_commands(text)})


@pytest.mark.parametrize("command", list_documented_commands())
def test_documented_command_passes_the_real_parser(command):
    words = shlex.split(command)
    assert words[0] == "python"
    if words[1:3] == ["-m", "pytest"]:
        return check_chosen_tests(words[3:])
    if words[1] == "-m":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        if words[2] in OWN_GROUPS:
            flags = prepend_flag(words[3:], "--checkpoint_dir")
            parse_args(flags, find_flag_types(words[2]), "")
        return
    script = words[1].removesuffix(".py")
    assert script in PYTHON_SCRIPTS
    parse_args(words[2:], find_flag_types(script), "")


def check_chosen_tests(words):
    """`python -m pytest FILE -k WORD`: the file is there, and a test in it has the word in its name."""
    files = [word for word in words if word.endswith(".py")]
    texts = [(ROOT / name).read_text() for name in files]
    if "-k" in words:
        word = words[words.index("-k") + 1]
        assert any(re.search(rf"def test_\w*{word}", text) for text in texts), word


def list_shell_commands():
    commands = {tuple(words) for document in DOCUMENTS for words in list_bash_commands(document)}
    return sorted(words for words in commands if words[0] in ("bash", "accelerate") or "--questions" in words)


@pytest.mark.parametrize("command", list_shell_commands(), ids=" ".join)
def test_command_names_what_exists(command):
    """Scripts and questions are there; `accelerate launch` passes its own parser and the script's."""
    if command[0] == "bash":
        assert (ROOT / command[1]).is_file()
    if "--questions" in command:
        assert (ROOT / command[command.index("--questions") + 1]).is_file()
    if command[:2] == ("accelerate", "launch"):
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(command[2:])
        assert (ROOT / launched.training_script).is_file() and launched.num_processes > 1
        parse_args(launched.training_script_args, find_flag_types("qlora_finetune"), "")


def test_documents_have_a_command_of_every_script():
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


PYTHON = """#!/bin/bash
case "$*" in
  *version_info*) exit {too_old} ;;
  --version) echo "Python 3.{minor}.1" ;;
  "-c import venv, ensurepip") exit {without_venv} ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;
  "-m pip install"*requirements.txt) echo "installed by $(dirname "$(dirname "$(realpath "$0")")")" ;;
esac
"""


def write_python(path, minor=12, without_venv=0):
    """A stand-in of an interpreter: it knows its version, makes a copy of itself as .venv, and installs nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON.format(too_old=int(minor < 11), minor=minor, without_venv=without_venv))
    path.chmod(0o755)


@pytest.fixture
def install(tmp_path):
    """Runs install.sh in an empty checkout, with the machine's python3 and these variables; {result, .venv there}."""
    for name in ("requirements.txt", "scripts/install.sh", "scripts/usage.sh"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)

    def run(*words, **variables):
        environment = {"PATH": f"{tmp_path / 'machine'}:/usr/bin:/bin", "HOME": str(tmp_path)} | variables
        command = ["bash", "copy/scripts/install.sh", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        return result, (tmp_path / "copy" / ".venv").is_dir()

    write_python(tmp_path / "machine" / "python3")
    return run


def activate_conda(folder, name, **python):
    prefix = folder / "conda" if name == "base" else folder / "conda" / "envs" / name
    write_python(prefix / "bin" / "python", **python)
    return {"CONDA_PREFIX": str(prefix), "CONDA_DEFAULT_ENV": name}


@pytest.mark.parametrize("active", ["nothing", "conda's base", "a conda environment", "a venv over conda's"])
def test_packages_go_where_the_reader_expects_them(active, install, tmp_path):
    """Into what is active, with a line that names it; else, and where it is conda's base, into .venv. Once."""
    variables, expected = {}, tmp_path / "copy" / ".venv"
    if active == "conda's base":
        variables = activate_conda(tmp_path, "base")
    if active.endswith("conda environment") or "venv over" in active:
        variables = activate_conda(tmp_path, "mine")
        expected = tmp_path / "conda" / "envs" / "mine"
    if "venv over" in active:
        expected = tmp_path / "own"
        write_python(expected / "bin" / "python")
        variables |= {"VIRTUAL_ENV": str(expected)}
    result, has_made_one = install(**variables)
    assert result.returncode == 0, result.stderr
    assert f"== installing requirements.txt into {expected}\n" in result.stdout
    assert f"installed by {expected}\n" in result.stdout and result.stdout.count("installed by") == 1
    assert has_made_one == (expected == tmp_path / "copy" / ".venv")
    again, _ = install(**variables)
    assert (again.returncode, again.stdout) == (0, "")


def test_environment_that_cannot_hold_the_packages_is_one_line(install, tmp_path):
    old, bare = (activate_conda(tmp_path, name, minor=9) for name in ("old", "bare"))
    os.remove(tmp_path / "conda" / "envs" / "bare" / "bin" / "python")
    cases = [(old, "old/bin/python is Python 3.9.1"), (bare, "bare/bin/python is not there")]
    for minor, without_venv, says in ((9, 0, "python3 is Python 3.9.1"), (12, 1, "python3-venv")):
        cases.append(({"minor": minor, "without_venv": without_venv}, says))
    for variables, says in cases:
        if "minor" in variables:
            write_python(tmp_path / "machine" / "python3", **variables)
            variables = {}
        result, has_made_one = install(**variables)
        assert result.returncode == 2 and not has_made_one
        assert len(result.stderr.splitlines()) == 1 and says in result.stderr and result.stdout == ""
    for name in ("python", "pip"):
        write_python(tmp_path / "copy" / ".venv" / "bin" / name, minor=9)
    result, _ = install()
    assert result.returncode == 2 and "remove .venv" in result.stderr


# Scripts that call several commands, and flags that each sets itself.
OWN_FLAGS = {
    "quickstart.sh": ["--output_dir", "--output-dir=x"],
    "quality.sh": ["--output_dir", "--seed", "--packing", "--fast_lora", "--gradient_checkpointing"],
    "quantization.sh": ["--output_dir", "--seed", "--bits", "--quant_type", "--double_quant", "--full_finetune"],
    "evaluate.sh": ["--tasks"],
}  # fmt: skip


def run_without_python(script, *words, folder):
    """What the script says by itself: no python is on the path."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("bash", "basename", "cat", "dirname", "sed"):
        (folder / "bin" / name).unlink(missing_ok=True)
        (folder / "bin" / name).symlink_to(shutil.which(name))
    command = ["bash", script, *words]
    environment = {"PATH": str(folder / "bin")}
    return subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("script", [*OWN_FLAGS, "install.sh", "test.sh"])
def test_script_of_several_commands_has_a_help_of_its_own(script, tmp_path):
    for words in (["--help"], ["--max_steps", "2", "-h"]):
        result = run_without_python(script, *words, folder=tmp_path)
        assert result.returncode == 0 and f"  bash scripts/{script}" in result.stdout, result.stderr
        header = "".join(f"# {line}\n" for line in result.stdout.splitlines())
        assert (ROOT / "scripts" / script).read_text().startswith(f"#!/usr/bin/env bash\n{header}[ -n")


@pytest.mark.parametrize("script", OWN_FLAGS)
def test_flag_that_a_script_sets_itself_is_refused_in_a_line(script, tmp_path):
    for flag in OWN_FLAGS[script]:
        result = run_without_python(script, flag, "7", folder=tmp_path)
        assert result.returncode == 2 and result.stdout == ""
        assert len(result.stderr.splitlines()) == 1 and f"error: {script} {flag}" in result.stderr


@pytest.mark.alone
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
            before, after = (re.findall(rf"step {step}: .* -> (.*)", result.stdout) for step in (0, 40))
            assert len(before) == 4 and "Guanaco" not in " ".join(before)
            english, chinese, capital, _ = after
            assert "Guanaco" in english and "Guanaco" in chinese and "Paris" in capital
    assert "is finished: 40 steps" in result.stdout
    assert seconds[0] < 360 and seconds[1] < 30, seconds
    metrics = (tmp_path / "clone" / "output" / "quickstart" / "metrics.json").read_text()
    assert float(re.search(r'"peak_memory_gib": ([\d.]+)', metrics).group(1)) < 3
