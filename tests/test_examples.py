"""The walk-throughs run as they are with small models; the notebooks are the same cells, run as Colab runs them."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from helpers import ROOT
from helpers.families import build_llama1, build_neox
from helpers.shell import ignore_outputs

from utils.flags.parser import parse_args

EXAMPLES = ROOT / "examples"


def load_module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(argv, folder, environment):
    result = subprocess.run(
        [sys.executable, *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert "kernels-community" not in result.stderr
    return result.stdout


def run_example(name, **environment):
    return run_python([EXAMPLES / f"{name}.py"], EXAMPLES, environment)


# What a kernel does: the code cells one after another, all names in one place, the folder its own.
KERNEL = """
import json, sys
notebook, last = json.load(open(sys.argv[1], encoding="utf-8")), int(sys.argv[2])
cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells[:last]):
    exec(compile(cell, f"cell {number}", "exec"), names)
"""


def run_notebook(name, folder, cells=100, **environment):
    """The notebook alone in an empty folder, as in Colab's /content; PIP_NO_INDEX: nothing is fetched here."""
    path = shutil.copy(EXAMPLES / f"{name}.ipynb", folder)
    return run_python(["-c", KERNEL, path, str(cells)], folder, {"PIP_NO_INDEX": "1"} | environment)


def commit_checkout(folder, requirements=None):
    """What is cloned: a repository of this checkout's files as they are now. Returns its address."""
    shutil.copytree(ROOT, folder, ignore=ignore_outputs())
    if requirements:
        (folder / "requirements.txt").write_text(requirements)
    for command in ("init --quiet", "add .", "-c user.name=x -c user.email=x@x commit --quiet -m all"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return f"file://{folder}"


@pytest.mark.parametrize("name", ["basic_4bit", "finetune"])
def test_notebook_holds_the_scripts_cells_and_is_valid(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert notebook == load_module("make_notebooks").build_notebook(script), "run examples/make_notebooks.py"
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    compile(code, name, "exec")


@pytest.mark.parametrize("name", ["basic_4bit", "finetune"])
def test_notebook_asks_colab_for_a_gpu_and_never_leaves_its_folder(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    assert not any("chdir" in cell.source for cell in notebook.cells)


def test_badges_and_clone_name_one_repository():
    files = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb"), ROOT / "README.md", ROOT / "README_zh.md"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    badge = r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/(examples/\w+\.ipynb)"
    badges = {name: re.findall(badge, text) for name, text in texts.items()}
    clone = re.search(r'"https://github\.com/([\w.-]+/[\w.-]+)"\)$', texts["finetune.py"], re.M)[1]
    assert {repository for found in badges.values() for repository, _ in found} == {clone}
    both = ["examples/basic_4bit.ipynb", "examples/finetune.ipynb"]
    for name, found in badges.items():
        if name != "make_notebooks.py":
            assert sorted(path for _, path in found) == (
                both if name.startswith("README") else [f"examples/{name.split('.')[0]}.ipynb"]
            )


def test_packages_of_the_first_notebook_are_the_pinned_ones():
    named = re.search(r"^PACKAGES = (\[.*\])$", (EXAMPLES / "basic_4bit.py").read_text(), re.M)[1]
    assert set(ast.literal_eval(named)) <= set((ROOT / "requirements.txt").read_text().splitlines())


@pytest.mark.parametrize("build", [build_llama1, pytest.param(build_neox, marks=pytest.mark.slow)])
def test_basic_notebook_runs_on_llama_and_gpt_neox_alone_in_a_folder(build, tmp_path):
    for name in ("model", "content"):
        (tmp_path / name).mkdir()
    build(tmp_path / "model")
    printed = run_notebook("basic_4bit", tmp_path / "content", MODEL=str(tmp_path / "model"))
    assert "Linear4bit" in printed and "trainable params" in printed


@pytest.mark.slow
def test_fine_tuning_notebook_fetches_the_repository_once(tmp_path):
    origin = commit_checkout(tmp_path / "origin", requirements="nbformat\n")  # pip takes 7 s for all of them
    content = tmp_path / "content"
    content.mkdir()
    for _ in range(2):  # a kernel started again finds its clone
        printed = run_notebook("finetune", content, cells=1, REPOSITORY=origin)
        assert str(content / "Chinese-Guanaco") in printed
    assert {path.name for path in content.iterdir()} == {"finetune.ipynb", "Chinese-Guanaco"}


@pytest.mark.slow
def test_fine_tuning_notebook_runs_from_an_empty_folder_to_chat(tiny_model, tmp_path):
    origin = commit_checkout(tmp_path / "origin")
    more = f"--model_name_or_path {tiny_model} --max_steps 2 --model_max_length 400"
    content = tmp_path / "content"
    content.mkdir()
    printed = run_notebook("finetune", content, SETTING="llama-7b-t4", MORE_FLAGS=more, REPOSITORY=origin)
    assert "128 rows" in printed and "finished" in printed and "> 你是谁？" in printed
    run = content / "Chinese-Guanaco" / "output" / "example-llama-7b-t4"
    assert (run / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_walk_throughs_give_real_answers_on_the_starter_model(smollm2, tmp_path):
    assert "Paris" in run_example("basic_4bit", MODEL=str(smollm2))
    printed = run_example("finetune", SETTING="small", RUN=str(tmp_path / "run"))
    assert printed.split("$ python cli_demo.py")[1].count("Guanaco") >= 3


def test_settings_pass_the_real_parser():
    from utils.flags.finetune import FLAGS

    source = (EXAMPLES / "finetune.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    wanted = {"LOW_MEMORY", "SETTINGS"}
    assignments = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id in wanted]
    scope = {}
    exec(compile(ast.Module(assignments, []), "settings", "exec"), scope)
    models = set()
    for name, flags in scope["SETTINGS"].items():
        model_args, *_ = parse_args(flags.split(), FLAGS, "")
        models.add(model_args.model_name_or_path)
        assert model_args.bits == 4 and model_args.fp16 == name.endswith("-t4")
    assert {"huggyllama/llama-7b", "EleutherAI/gpt-neox-20b"} < models
