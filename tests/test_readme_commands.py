"""Every command of README, docs/ and eval/ runs as written, one after another, with small models and data.

README_zh.md holds the same commands (test_readmes.py), so that its reader, too, gets from an empty folder to a
chat with a tuned model. Not run here: what has a test of its own, and what needs the network or another program.
"""

import json
import re
import shutil

import pytest
from helpers import ROOT, families
from helpers.documents import RUN_IN_ORDER, list_shell_lines
from helpers.models import save_random_model
from helpers.shell import check_page, ignore_outputs, run_shell

SMALL = (
    "--max_steps 2 --max_train_samples 16 --max_eval_samples 4 --max_new_tokens 4 --source_max_len 200 "
    "--target_max_len 200 --model_max_length 400"
).split()
# Words of a command, and why it is not run by this test.
ELSEWHERE = {
    "bash scripts/finetune": "test_scripts.py",
    "bash scripts/quantization.sh": "test_scripts.py",
    "bash scripts/test.sh": "it runs this",
    "bash scripts/quality.sh": "test_scripts.py",
    "grep ": "test_architecture.py",
    "python -m eval.judge": "test_judge.py",
    "python -m eval.elo": "test_elo.py",
    "python3 -m venv": "scripts/install.sh",
    "export ": "the network",
    "ollama ": "another program",
    "llama-server ": "another program",
    "source ": "scripts/install.sh",
    "pip install": "scripts/install.sh",
    "hf download": "the network",
    "transformers serve": "test_merge.py",
    "vllm serve": "another program",
    "python -m utils.serve": "test_serve.py",
    "python -m eval.serve_load": "test_serve.py",
    "curl ": "test_serve.py",
}
SMALLER = {  # words of a command -> what takes their place
    "bash scripts/quickstart.sh": "python qlora_finetune.py --model_name_or_path models/small "
    "--dataset_name data/guanaco_identity.jsonl --output_dir output/quickstart",
    "PATH_OR_NAME": "models/small",
    "huggyllama/llama-7b": "models/small",
    "huggyllama/llama-65b": "models/small",
    "tatsu-lab/alpaca": "YOUR.jsonl",
    "MORE.jsonl": "YOUR.jsonl",
    "train_speed --model llama-7b": "train_speed --model tiny --workloads 2x32 --steps 1 --dtypes fp32",
    "chat_speed --model llama-7b": "chat_speed --model tiny",
    "--tasks quiz_en,quiz_zh": "--tasks quiz_en,quiz_zh --limit 4",
    "path/to/your/model_dir": "output/mine",
    "0.0.0.0": "127.0.0.1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout with the models and files that the commands name, beside a home of its own."""
    home = tmp_path_factory.mktemp("home")
    checkout = home / "checkout"
    shutil.copytree(ROOT, checkout, ignore=ignore_outputs())
    (checkout / "models" / "baichuan-7b-downloaded").mkdir(parents=True)
    save_random_model(checkout / "models" / "small", seed=0)
    families.build_baichuan(checkout / "models" / "baichuan-7b-downloaded")
    rows = (ROOT / "data" / "guanaco_identity.jsonl").read_text(encoding="utf-8").splitlines()
    (checkout / "YOUR.jsonl").write_text("\n".join(rows), encoding="utf-8")
    alpaca = home / "prompt_datasets" / "alpaca"
    alpaca.mkdir(parents=True)
    shutil.copy(checkout / "YOUR.jsonl", alpaca / "train.jsonl")
    oasst = home / "prompt_datasets" / "openassistant-guanaco"
    for path, part in (("train", rows[:96]), ("eval", rows[96:])):
        texts = [turn_into_oasst(json.loads(row)) for row in part]
        oasst.mkdir(parents=True, exist_ok=True)
        (oasst / f"openassistant_best_replies_{path}.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return checkout


def turn_into_oasst(row):
    return json.dumps({"text": f"### Human: {row['instruction']}### Assistant: {row['output']}"})


def write_your_dataset(checkout, command):
    """path/to/your/dataset, in the format that the command forces or that its columns tell."""
    path = checkout / "path" / "to" / "your" / "dataset"
    path.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (checkout / "YOUR.jsonl").read_text(encoding="utf-8").splitlines()]
    if "self-instruct" in command:
        rows = [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def list_commands():
    """The documents' commands as shell lines, each once."""
    return list(dict.fromkeys(line for document in RUN_IN_ORDER for line in list_shell_lines(document)))


def launch_on_cpus(command):
    """What `accelerate launch --multi_gpu` starts, with two processes on CPUs; of two nodes both."""
    _, _, script = command.partition("qlora_finetune.py")
    if "--num_machines" not in command:
        return f"torchrun --nproc_per_node 2 qlora_finetune.py {script}"
    port = re.search(r"--main_process_port (\d+)", command)[1]
    launches = [
        f"torchrun --nnodes 2 --node_rank {rank} --master_addr 127.0.0.1 --master_port {port} "
        f"qlora_finetune.py {script}"
        for rank in (1, 0)
    ]
    other, first = launches
    return f"{other} & other=$!; {first} && wait $other"  # its status is kept, also where it ends earlier


def make_small(command):
    for words, smaller in SMALLER.items():
        command = command.replace(words, smaller)
    if "finetune.py" in command:
        kept = " ".join(SMALL)
        if "--checkpoint_dir" in command:  # the run's own lengths and rows
            kept = "--max_eval_samples 4 --max_new_tokens 4"
        if "--do_eval" in command and "--eval_steps" in command:
            kept += " --eval_steps 1 --save_steps 1"
        command += " " + kept
        if "--dataset_name" not in command and "--checkpoint_dir" not in command:  # Alpaca, from the hub
            command += " --load_from_local --data_dir ~/prompt_datasets"
    if command.startswith("accelerate launch"):
        command = launch_on_cpus(command)
    if re.search(r"cli_demo|generate_answers|eval\.report", command):
        command += " --max_new_tokens 4"
    if "generate_answers" in command:
        command += " --max_questions 2"
    if "eval.report" in command:
        command += " --max_questions 2 --limit 4"
    return command


def test_every_command_is_run_here_or_said_why_not():
    run = [command for command in list_commands() if not command.startswith(tuple(ELSEWHERE))]
    assert len(run) > 20
    assert {make_small(command).split()[0] for command in run} == {"python", "echo", "torchrun"}
    text = "\n".join(list_commands())
    assert [words for words in (*ELSEWHERE, *SMALLER) if words not in text] == []


@pytest.mark.slow
def test_every_command_runs_in_the_documents_order(folder):
    for command in list_commands():
        if command.startswith(tuple(ELSEWHERE)):
            continue
        if "path/to/your/dataset" in command:
            write_your_dataset(folder, command)
        if "qlora_finetune.py" in command and "--output_dir output/mine" in command:
            shutil.rmtree(folder / "output" / "mine", ignore_errors=True)  # several runs share its name
        process = run_shell(make_small(command), folder)
        if "gradio_webserver" in command:
            check_page(process)
            continue
        printed, _ = process.communicate("你是谁？\nstop\n", timeout=600)
        assert process.returncode == 0, f"{make_small(command)}\n{printed[-3000:]}"
        if "cli_demo" in command:
            assert "> " in printed or "echo" in command
