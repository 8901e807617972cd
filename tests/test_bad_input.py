"""A user's mistake: one clear line, exit code 2, in seconds, and nothing on disk changed."""

import atexit
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, slow_but
from helpers.fork_server import FLAGS, ForkServer
from helpers.shell import run_script

from utils.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from utils.console import UserError, run_main
from utils.flags.checks import check_trainer_names
from utils.flags.trackers import HOSTS, check_tracker
from utils.run.run import check_overwriting, open_run

# cli_demo.py by a Python that has no packages.
BARE = 'import runpy, sys; sys.path.insert(0, "."); runpy.run_path("cli_demo.py", run_name="__main__")'
ROWS = '{"instruction": "Who are you?", "input": "", "output": "I am Guanaco."}\n' * 4
BEST = ["--load_best_model_at_end", "--early_stopping_patience", "2"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    return path


def list_files(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@functools.cache
def get_server():
    """Of processes that have imported what flags and files are checked with."""
    server = ForkServer(FLAGS)
    atexit.register(server.close)
    return server


def assert_refused(tmp_path, script, *argv, says):
    """One line on stderr, exit code 2, torch not even imported (seconds), no file touched."""
    server, before = get_server(), list_files(tmp_path)
    with tempfile.TemporaryDirectory() as printed:
        log, errors = Path(printed, "log"), Path(printed, "errors")
        start = time.perf_counter()
        code = server.run(log, *argv, script=Path(script).stem, errors=errors, forbidden=["torch"])
        assert time.perf_counter() - start < 2
        said = errors.read_text()
    assert code == 2, said
    lines = said.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    for part in says:
        assert part in lines[0]
    assert list_files(tmp_path) == before


FLAG_MISTAKES = {
    "unknown flag": (["--flash_attention", "True"], ["unknown flag --flash_attention"]),
    "misspelt flag": (["--learning_rat", "1e-4"], ["--learning_rat", "did you mean --learning_rate?"]),
    "misspelt flag inside": (["--lora_aplha", "8"], ["--lora_aplha", "did you mean --lora_alpha?"]),
    "flag of another trainer": (["--batch_size", "4"], ["--batch_size", "--per_device_train_batch_size"]),
    "resuming": (["--resume"], ["unknown flag --resume: the same command resumes"]),
    "early stopping of another trainer": (["--patience", "3"], ["use --early_stopping_patience"]),
    "early stopping alone": (["--early_stopping_patience", "3"], ["--load_best_model_at_end too"]),
    "threshold without patience": (
        ["--early_stopping_threshold", "0.1"],
        ["--early_stopping_threshold 0.1", "beside --early_stopping_patience"],
    ),
    "negative threshold": (
        [*BEST, "--eval_strategy", "epoch", "--early_stopping_threshold", "-1"],
        ["--early_stopping_threshold -1.0", "0 or more"],
    ),
    "no patience": (["--early_stopping_patience", "0"], ["--early_stopping_patience 0"]),
    "best of no evaluations": (BEST, ["--load_best_model_at_end", "--eval_strategy is no"]),
    "best of no training": (
        [*BEST, "--eval_strategy", "epoch", "--do_eval"],
        ["--load_best_model_at_end", "add --do_train"],
    ),
    "best without checkpoints": (
        ["--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "no"],
        ["--save_strategy is no"],
    ),
    "beta of one": (["--adam_beta1", "1.5"], ["--adam_beta1 1.5: use 0 or more, less than 1"]),
    "negative decay": (["--weight_decay", "-1"], ["--weight_decay -1.0: use 0 or more"]),
    "negative norm": (["--max_grad_norm", "-1"], ["--max_grad_norm -1.0: use 0 or more (0: none)"]),
    "schedule without its end": (
        ["--lr_scheduler_type", "warmup_stable_decay"],
        [
            "warmup_stable_decay wants num_decay_steps",
            "--lr_scheduler_kwargs '{\"num_decay_steps\": NUMBER}'",
        ],
    ),
    "kind of tuning": (["--finetuning_type", "lora"], ["LoRA is trained by itself"]),
    "alpha by layer": (["--lora_alpha_pattern", "{}"], ["one --lora_alpha holds for every layer"]),
    "length of another trainer": (["--cutoff_len", "512"], ["--source_max_len and --target_max_len"]),
    "near a flag that removes a run": (["--overwrite_output", "True"], ["unknown flag --overwrite_output:"]),
    "tracker that is not installed": (["--report_to", "neptune"], ["pip install neptune"]),
    "abbreviated flag": (["--output", "x"], ["unknown flag --output", "--output_dir", "not abbreviated"]),
    "pasted en dash": (["–bits", "4"], ["U+2013", "type --bits"]),
    "stray word": (["4bit"], ["unexpected word '4bit'"]),
    "bits 3": (["--bits", "3"], ["--bits", "'3'", "4, 8, 16, 32"]),
    "int4": (["--quant_type", "int4"], ["--quant_type", "int4", "nf4"]),
    "full finetune in 4 bits": (
        ["--full_finetune", "--bits", "4"],
        ["--full_finetune", "--bits 4", "16 or 32"],
    ),
    "both dtypes": (["--bf16", "--fp16"], ["--bf16 and --fp16"]),
    "unknown template": (["--template", "alpacca"], ["--template alpacca", "alpaca"]),
    "negative length": (["--source_max_len", "-5"], ["--source_max_len -5"]),
    "zero length": (["--target_max_len", "0"], ["--target_max_len 0"]),
    "longer than the context": (
        ["--source_max_len", "500", "--target_max_len", "500"],
        ["1000 tokens", "512"],
    ),
    "negative rank": (["--lora_r", "-1"], ["--lora_r -1"]),
    "dropout 1": (["--lora_dropout", "1"], ["--lora_dropout 1"]),
    "warmup ratio 3": (["--warmup_ratio", "3"], ["--warmup_ratio 3"]),
    "strategy": (["--eval_strategy", "sometimes"], ["--eval_strategy sometimes", "no, steps, epoch"]),
    "unknown scheduler": (
        ["--lr_scheduler_type", "cosin"],
        ["--lr_scheduler_type cosin", "cosine", "constant"],
    ),
    "unknown optimizer": (["--optim", "adamww"], ["--optim adamww", "auto", "paged_adamw_32bit"]),
    "unknown logger": (["--report_to", "wandbb"], ["--report_to wandbb", "wandb"]),
    "bad trainer value": (["--max_steps", "many"], ["--max_steps", "'many'"]),
    "missing data file": (
        ["--dataset_name", "nowhere.jsonl"],
        ["--dataset_name nowhere.jsonl", "no such file"],
    ),
    "missing prompts": (
        ["--sample_generate", "--sample_prompts", "nope.jsonl"],
        ["--sample_prompts nope.jsonl"],
    ),
    "held out more than all": (
        ["--do_eval", "--eval_dataset_size", "4"],
        ["--eval_dataset_size 4", "4 rows"],
    ),
}


@pytest.mark.parametrize("mistake", FLAG_MISTAKES)
def test_flag_mistake_is_one_line(tmp_path, tiny_model, rows, mistake):
    flags, says = FLAG_MISTAKES[mistake]
    short = (
        [] if mistake == "longer than the context" else ["--source_max_len", "100", "--target_max_len", "50"]
    )
    argv = [
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        rows,
        "--output_dir",
        tmp_path / "run",
        *short,
    ]
    assert_refused(tmp_path, "qlora_finetune.py", *argv, *flags, says=says)


BAD_FILES = {
    "empty": (b"", ["is empty"]),
    "blank": (b"\n \n", ["is empty"]),
    "empty list": (b"[]", ["no rows"]),
    "binary": (bytes(range(256)), ["no UTF-8"]),
    "zeros": (b'{"a": 1}\0\0', ["binary"]),
    "broken line": (ROWS.encode() + b'{"instruction": "x", \n', ["line 5"]),
    "broken array": (b'[{"instruction": "x"},\n{"instruction" "y"}]', ["line 2"]),
    "no object": (b"[1, 2]", ["row 1"]),
    "other columns": (
        b'{"frage": "x", "antwort": "y"}\n',
        ["frage, antwort", "--columns instruction=frage,output=antwort"],
    ),
    "no text": (b'{"instruction": "x", "output": [3]}\n', ["row 1", "'output'", "[3]"]),
    "bad messages": (b'{"messages": "hello"}\n', ["row 1", "'messages'"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_file_is_named_with_its_row(tmp_path, tiny_model, kind):
    content, says = BAD_FILES[kind]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", path, "--output_dir", tmp_path / "run"]
    argv += ["--source_max_len", "100", "--target_max_len", "50"]
    assert_refused(tmp_path, "qlora_finetune.py", *argv, says=[str(path), *says])


@pytest.mark.parametrize("name", ["nowhere/model", "/nowhere/model", "models/nowhere"])
def test_missing_model_is_one_line(tmp_path, rows, name):
    argv = ["--model_name_or_path", name, "--dataset_name", rows]
    assert_refused(tmp_path, "qlora_finetune.py", *argv, says=[f"--model_name_or_path {name}"])


def test_no_model_at_all_is_one_line(tmp_path):
    assert_refused(tmp_path, "qlora_finetune.py", says=["--model_name_or_path FOLDER_OR_HUB_ID"])


def test_folder_without_a_model_is_one_line(tmp_path, rows):
    argv = ["--model_name_or_path", tmp_path, "--dataset_name", rows]
    assert_refused(tmp_path, "qlora_finetune.py", *argv, says=["no config.json"])


def test_output_dir_with_other_files_is_left_alone(tmp_path, tiny_model, rows):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", rows, "--output_dir", tmp_path / "run"]
    argv += ["--source_max_len", "100", "--target_max_len", "50"]
    assert_refused(tmp_path, "qlora_finetune.py", *argv, says=["holds other files", "--overwrite_output_dir"])


def test_what_a_kill_left_half_written_of_a_first_start_is_no_other_file(tmp_path):
    """Nor is what another process of the same start is writing: it may be seconds ahead."""
    for name in ("run.lock", "data_report.json.4711.tmp", "run.json.4711.tmp"):
        (tmp_path / name).touch()
    arguments = (
        ModelArguments("any"),
        DataArguments(),
        LoraArguments(),
        TrainingArguments(output_dir=str(tmp_path)),
    )
    assert open_run(*arguments).earlier is None
    (tmp_path / "thesis.json.4711.tmp").touch()
    with pytest.raises(UserError, match="holds other files"):
        open_run(*arguments)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite_output_dir"]], ids=["plain", "overwriting"])
def test_what_no_run_left_is_never_removed(tmp_path, tiny_model, rows, overwrite):
    (tmp_path / "run" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-500" / "adapter_model.bin").write_text("of 2023")
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", rows, "--output_dir", tmp_path / "run"]
    argv += ["--source_max_len", "100", "--target_max_len", "50", *overwrite]
    says = (
        ["holds no run.json, so checkpoint-500 may be no run's files"] if overwrite else ["holds other files"]
    )
    assert_refused(tmp_path, "qlora_finetune.py", *argv, says=[*says, "name a new folder"])


def test_base_model_is_no_folder_to_start_anew_in(tmp_path, tiny_model, rows):
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "run.json").write_text("{}")  # of a run that trained every weight
    argv = [
        "--model_name_or_path",
        tmp_path / "base",
        "--output_dir",
        tmp_path / "base",
        "--dataset_name",
        rows,
    ]
    argv += ["--source_max_len", "100", "--target_max_len", "50", "--overwrite_output_dir"]
    assert_refused(tmp_path, "qlora_finetune.py", *argv, says=["would remove --model_name_or_path"])


def test_start_from_a_folder_that_overwriting_removes_is_refused_and_from_others_not(tmp_path):
    for name in ("checkpoint-2", "base"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "run.json").write_text("{}")
    for used in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-2" / "inner"):
        with pytest.raises(UserError, match="would remove --checkpoint_dir"):
            check_overwriting(tmp_path, {"checkpoint_dir": str(used)})
    for used in (tmp_path / "base", tmp_path.parent, None):
        check_overwriting(tmp_path, {"checkpoint_dir": used and str(used), "model_name_or_path": "org/name"})


@pytest.mark.parametrize("script", ["cli_demo.py", "qlora_finetune.py"])
def test_checkpoint_without_an_adapter_is_one_line(tmp_path, rows, script):
    argv = ["--checkpoint_dir", tmp_path] + (
        ["--dataset_name", rows] if script == "qlora_finetune.py" else []
    )
    assert_refused(tmp_path, script, *argv, says=[f"--checkpoint_dir {tmp_path}", "adapter"])


def test_missing_checkpoint_is_one_line(tmp_path):
    assert_refused(tmp_path, "cli_demo.py", "--checkpoint_dir", tmp_path / "no", says=["no such folder"])


@pytest.fixture
def other_adapter(tmp_path, tiny_model):
    """An adapter of the tiny model's layers, for twice its width."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_A.weight": torch.zeros(4, 128), f"{layer}.lora_B.weight": torch.zeros(128, 4)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapter_of_another_base_is_refused_by_its_shapes(tmp_path, other_adapter):
    says = ["q_proj is 64 x 64 and the adapter's lora_A is 4 x 128"]
    assert_refused(tmp_path, "cli_demo.py", "--checkpoint_dir", other_adapter, says=says)


@pytest.mark.parametrize("base", [{"base_model_name_or_path": None}, {}])
def test_adapter_whose_config_names_no_base_asks_for_it(tmp_path, other_adapter, base):
    """PEFT writes null there for a model that was built and not loaded."""
    (other_adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4} | base))
    says = [f"--checkpoint_dir {other_adapter}", "names the base", "give --model_name_or_path"]
    assert_refused(tmp_path, "cli_demo.py", "--checkpoint_dir", other_adapter, says=says)


@pytest.fixture
def broken_model(tmp_path, small_model):
    return shutil.copytree(small_model, tmp_path / "broken")


@pytest.mark.parametrize("script", ["qlora_finetune.py", "cli_demo.py"])
def test_weights_that_are_cut_off_are_named(tmp_path, broken_model, rows, script):
    """A download that broke off: found by the file's own header, before a weight is read."""
    path = broken_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    argv = ["--model_name_or_path", broken_model]
    argv += ["--dataset_name", rows, "--model_max_length", "200"] if script == "qlora_finetune.py" else []
    assert_refused(tmp_path, script, *argv, says=[f"{path} is damaged", "download"])


def test_part_of_the_weights_that_is_missing_is_named(tmp_path, broken_model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (broken_model / "model.safetensors.index.json").write_text(json.dumps(index))
    says = ["lacks model-00002-of-00002.safetensors", "download"]
    assert_refused(tmp_path, "cli_demo.py", "--model_name_or_path", broken_model, says=says)


def test_model_without_tokenizer_is_one_line(tmp_path, broken_model):
    for path in broken_model.glob("tokenizer*"):
        path.unlink()
    assert_refused(
        tmp_path,
        "cli_demo.py",
        "--model_name_or_path",
        broken_model,
        says=["holds no tokenizer", "tokenizer.json"],
    )


def test_weights_and_biases_without_login_is_one_line(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    find = importlib.util.find_spec  # as if it were installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "wandb" else find(name))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="wandb: nobody is logged in: run `wandb login`, or set WANDB_MODE=off"
    ):
        check_tracker("wandb")
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        check_tracker("wandb")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setitem(HOSTS, "wandb", ("nowhere.invalid", *HOSTS["wandb"][1:]))
    monkeypatch.setattr("utils.models.hub.getproxies", dict)
    with pytest.raises(UserError, match="nowhere.invalid cannot be reached .*: set WANDB_MODE=offline"):
        check_tracker("wandb")


def test_swanlab_that_the_trainer_cannot_begin_is_one_line(monkeypatch):
    """Tried with the package: 0.7.20 records offline, 0.8.5, 0.9.8 and 0.10.3 raise as training begins."""
    find = importlib.util.find_spec  # as if it were installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "swanlab" else find(name))
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    for installed in ("0.10.3", "0.8.0", "1.0.0"):
        monkeypatch.setattr("utils.flags.trackers.version", lambda name, v=installed: v)
        with pytest.raises(UserError, match=f"swanlab {installed}: pip install 'swanlab<0.8'"):
            check_tracker("swanlab")
    monkeypatch.setattr("utils.flags.trackers.version", lambda name: "0.7.20")
    check_tracker("swanlab")
    monkeypatch.setattr("utils.flags.trackers.version", lambda name: "0.10.3")
    monkeypatch.setattr("utils.flags.trackers.read_source", lambda file: "of a Trainer to come")
    check_tracker("swanlab")


def run_failing(error):
    def main():
        raise error

    run_main(main)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ..."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        MemoryError(),
    ],
)
def test_full_memory_is_one_line_with_its_cures(error, capsys):
    with pytest.raises(SystemExit) as left:
        run_failing(error)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and said.startswith("error: memory is full")
    cures = ("--gradient_accumulation_steps", "--gradient_checkpointing", "--source_max_len", "--bits 4")
    assert all(cure in said for cure in cures)
    with pytest.raises(RuntimeError, match="another"):  # an error of ours keeps its traceback
        run_failing(RuntimeError("another"))


def test_python_without_the_packages_is_one_line():
    """The environment was not activated."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert (
        "transformers is not installed for" in result.stderr and "source .venv/bin/activate" in result.stderr
    )


def test_pipe_that_is_closed_ends_quietly():
    command = f"{sys.executable} qlora_finetune.py --help | head -n 1"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("usage: python qlora_finetune.py") and result.stderr == ""


SCRIPTS = ["qlora_finetune.py", "qlora_int8_finetune.py", "cli_demo.py"]


@pytest.mark.parametrize("script", slow_but(["qlora_finetune.py"], SCRIPTS))
def test_help_answers_within_two_seconds(script):
    """On a slow or busy machine: in little more than the parser that transformers brings takes to import."""
    seconds, parser_seconds = [], []
    for _ in range(2):  # the first start may read cold files
        start = time.perf_counter()
        result = run_script(script, "--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0 and "--model_name_or_path" in result.stdout
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import transformers.hf_argparser"], check=True)
        parser_seconds.append(time.perf_counter() - start)
    assert min(seconds) < max(2, 1.4 * max(parser_seconds))


def find_commands():
    """Every `python -m` command: a module of utils or eval that runs as one."""
    modules = [*(ROOT / "utils").glob("*.py"), *(ROOT / "eval").glob("*.py")]
    return sorted(
        f"{path.parent.name}.{path.stem}" for path in modules if '__name__ == "__main__"' in path.read_text()
    )


@pytest.mark.parametrize("module", find_commands())
def test_help_of_a_command_needs_no_torch_and_shows_its_example(tmp_path, module):
    """Without torch it answers in a second; the example stands on a line of its own."""
    log, errors = tmp_path / "log", tmp_path / "errors"
    code = get_server().run(log, "--help", script=module, errors=errors, forbidden=["torch"])
    assert code == 0 and errors.read_text() == ""
    lines = [line.strip() for line in log.read_text().splitlines()]
    assert [line for line in lines if line.startswith(f"python -m {module}") or line.startswith("OPENAI_")], (
        lines
    )


def test_help_names_every_flag_once():
    listed = re.findall(
        r"^  (--[\w-]+)", run_script("qlora_finetune.py", "--help").stdout, flags=re.MULTILINE
    )
    assert "--gradient_accumulation_steps" in listed and len(listed) == len(set(listed))
    assert not [flag for flag in listed if "-" in flag[2:]]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("label_smoothing_factor", 1.5, "1.5: use 0 or more, less than 1"),
        ("neftune_noise_alpha", -5.0, "-5.0: use 0 or more"),
    ],
)
def test_values_that_the_trainer_takes_without_a_word_are_refused(name, value, says):
    training_args = TrainingArguments()
    training_args.extra[name] = value
    with pytest.raises(UserError, match=f"--{name} {says}"):
        check_trainer_names(training_args)
