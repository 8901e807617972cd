"""The walk-throughs run as they are with small models; the notebooks are the same cells."""

import ast
import importlib.util
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from tiny_models import build_llama1, build_neox

from utils.arguments import parse_args

EXAMPLES = ROOT / "examples"


def load_module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name, **environment):
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=EXAMPLES,  # as a notebook starts
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert "kernels-community" not in result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["basic_4bit", "finetune"])
def test_notebook_holds_the_scripts_cells_and_is_valid(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert notebook == load_module("make_notebooks").build_notebook(script), "run examples/make_notebooks.py"
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    compile(code, name, "exec")


@pytest.mark.parametrize("build", [build_llama1, pytest.param(build_neox, marks=pytest.mark.slow)])
def test_basic_walk_through_runs_on_llama_and_gpt_neox(build, tmp_path):
    build(tmp_path)
    printed = run_example("basic_4bit", MODEL=str(tmp_path))
    assert "Linear4bit" in printed and "trainable params" in printed


@pytest.mark.slow
def test_fine_tuning_walk_through_runs_from_data_to_chat(tiny_model, tmp_path):
    more = f"--model_name_or_path {tiny_model} --max_steps 2 --model_max_length 400"
    printed = run_example("finetune", SETTING="llama-7b-t4", MORE_FLAGS=more, RUN=str(tmp_path / "run"))
    assert "128 rows" in printed and "finished" in printed and "> 你是谁？" in printed
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_walk_throughs_give_real_answers_on_the_starter_model(smollm2, tmp_path):
    assert "Paris" in run_example("basic_4bit", MODEL=str(smollm2))
    printed = run_example("finetune", SETTING="small", RUN=str(tmp_path / "run"))
    assert printed.split("$ python cli_demo.py")[1].count("Guanaco") >= 3


def test_settings_pass_the_real_parser():
    from qlora_finetune import FLAGS

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
