"""A run survives kills, damaged files, full disks and NaNs, and never goes on from what it did not save."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.rows import write_sums
from helpers.runs import CHECKPOINT_FILES, FLAGS, assert_equal_runs, check_kills
from safetensors.torch import load_file, save_file

from utils.console import UserError
from utils.run import checkpoints, keeper
from utils.run.lock import check_usable, run_locked


@pytest.mark.parametrize("optimizer", ["adamw_torch", pytest.param("adamw_bnb_8bit", marks=pytest.mark.slow)])
def test_run_killed_at_random_moments_ends_with_the_bits_of_the_uninterrupted_one(
    server, command, tmp_path, optimizer
):
    codes = check_kills(server, command, tmp_path, optimizer, kills=3)
    assert -signal.SIGKILL in codes


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit"])
def test_run_killed_twenty_times_ends_with_the_bits_of_the_uninterrupted_one(
    server, command, tmp_path, optimizer
):
    command = [*command, "--num_train_epochs", "30"]  # a fast machine must not be done before the last kill
    assert check_kills(server, command, tmp_path, optimizer, kills=20).count(-signal.SIGKILL) == 20


@pytest.fixture(scope="module")
def saved_run(server, small_model, tmp_path_factory):
    """A run of 6 steps with three checkpoints, its record set back to running."""
    folder = tmp_path_factory.mktemp("saved")
    argv = ["--model_name_or_path", small_model, "--dataset_name", write_sums(folder / "rows.jsonl"), *FLAGS]
    argv += ["--max_steps", "6", "--output_dir", folder / "run"]
    assert server.run(folder / "log", *argv) == 0, (folder / "log").read_text()
    record = json.loads((folder / "run" / "run.json").read_text()) | {"status": "running"}
    (folder / "run" / "run.json").write_text(json.dumps(record))
    return folder / "run", argv


def flip_bit(path, other):
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def take_from_other_step(path, other):
    shutil.copy(other / path.name, path)


DAMAGES = {
    "one bit flipped": flip_bit,
    "truncated": lambda path, other: os.truncate(path, path.stat().st_size - 1),
    "deleted": lambda path, other: path.unlink(),
    "zero length": lambda path, other: os.truncate(path, 0),
    "of another step": take_from_other_step,
}


def test_checkpoint_has_the_files_that_are_damaged_below(saved_run):
    run, _ = saved_run
    assert [folder.name for folder in checkpoints.list_checkpoints(run)] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert sorted(path.name for path in (run / "checkpoint-6").iterdir()) == CHECKPOINT_FILES


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_named_and_the_checkpoint_before_is_taken(
    saved_run, tmp_path, capsys, damage, file
):
    run = shutil.copytree(saved_run[0], tmp_path / "run")
    last, before = run / "checkpoint-6", run / "checkpoint-4"
    original = (last / file).read_bytes()
    DAMAGES[damage](last / file, before)
    if (last / file).is_file() and (last / file).read_bytes() == original:
        assert damage == "of another step"  # the tokenizer is the same at every step
        assert checkpoints.find_valid_checkpoint(run) == last
        return
    assert checkpoints.find_valid_checkpoint(run) == before
    printed = capsys.readouterr().out
    assert "checkpoint-6 is skipped" in printed and file in printed and printed.count("\n") == 1


def test_a_bit_of_any_byte_of_a_manifest_counts(saved_run, tmp_path):
    folder = shutil.copytree(saved_run[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    path = folder / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            checkpoints.read_manifest(folder)


def test_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_bits(
    server, saved_run, tmp_path
):
    run, argv = saved_run
    copy = shutil.copytree(run, tmp_path / "run")
    flip_bit(copy / "checkpoint-6" / "optimizer.safetensors", None)
    assert server.run(tmp_path / "log", *argv, "--output_dir", copy) == 0
    printed = (tmp_path / "log").read_text()
    assert "checkpoint-6 is skipped: optimizer.safetensors" in printed
    assert f"going on from {copy / 'checkpoint-4'}" in printed
    assert_equal_runs(copy, run)
    assert checkpoints.find_fault(copy / "checkpoint-6") is None


def test_run_without_any_valid_checkpoint_says_so_and_starts_over(server, saved_run, tmp_path):
    run, argv = saved_run
    copy = shutil.copytree(run, tmp_path / "run")
    for folder in checkpoints.list_checkpoints(copy):
        (folder / "trainer_state.json").unlink()
    assert server.run(tmp_path / "log", *argv, "--output_dir", copy) == 0
    printed = (tmp_path / "log").read_text()
    assert printed.count("trainer_state.json is missing") == 3 and "training starts at step 0" in printed
    assert_equal_runs(copy, run)


def test_weights_that_no_save_wrote_are_not_read(saved_run, tmp_path):
    folder = shutil.copytree(saved_run[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert checkpoints.find_fault(folder) == "pytorch_model.bin was not saved with it"


def test_damaged_checkpoint_asked_for_by_name_is_refused(server, saved_run, tmp_path):
    run, argv = saved_run
    copy = shutil.copytree(run, tmp_path / "run")
    os.truncate(copy / "checkpoint-4" / "rng_state_0.json", 10)
    argv = [*argv, "--output_dir", copy, "--resume_from_checkpoint", copy / "checkpoint-4"]
    assert server.run(tmp_path / "log", *argv) == 2
    assert "rng_state_0.json has 10 bytes" in (tmp_path / "log").read_text()


def test_what_killed_saves_leave_is_swept_and_a_replaced_checkpoint_put_back(saved_run, tmp_path):
    run = shutil.copytree(saved_run[0], tmp_path / "run")
    (run / "checkpoint-6").rename(run / ".checkpoint-6.old")
    shutil.copytree(run / "checkpoint-4", run / ".checkpoint-4.gone")
    shutil.copytree(run / "checkpoint-4", run / ".checkpoint-8.tmp")
    (run / "run.json.tmp").write_text("{")
    (run / "notes.txt").write_text("mine")
    before = {path.name for path in saved_run[0].iterdir()} | {"notes.txt"}
    checkpoints.sweep_leftovers(run)
    assert {path.name for path in run.iterdir()} == before
    assert checkpoints.find_valid_checkpoint(run) == run / "checkpoint-6"


def test_limit_of_one_keeps_the_checkpoint_just_verified(tmp_path):
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.remove_old_checkpoints(tmp_path, 1, {tmp_path / "checkpoint-4"})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("count", range(1, 8))
def test_limit_keeps_as_many_checkpoints_as_it_says(tmp_path, count):
    for step in range(1, count + 1):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.remove_old_checkpoints(tmp_path, 5, {tmp_path / f"checkpoint-{count}"})
    left = [checkpoints.read_step(folder) for folder in checkpoints.list_checkpoints(tmp_path)]
    assert left == list(range(max(1, count - 4), count + 1))


CHANGES = {
    "argument": (["--learning_rate", "2e-2"], "--learning_rate 0.01 -> 0.02"),
    "shorter run": (["--max_steps", "4"], "--max_steps 6 -> 4"),
    "held-out rows": (
        ["--do_train", "--do_eval", "--eval_dataset_size", "5"],
        "--eval_dataset_size None -> 5.0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_argument_is_named_and_refused_unless_forced(server, saved_run, tmp_path, change):
    run, argv = saved_run
    copy, log = shutil.copytree(run, tmp_path / "run"), tmp_path / "log"
    flags, named = CHANGES[change]
    argv = [*argv, "--output_dir", copy, *flags]
    assert server.run(log, *argv) == 2
    assert named in log.read_text() and "--force_resume" in log.read_text()
    log.unlink()
    assert server.run(log, *argv, "--force_resume") == 0, log.read_text()
    assert f"--force_resume: --output_dir {copy}" in log.read_text() and "going on from" in log.read_text()


def test_changed_data_is_named_and_refused_unless_forced(server, saved_run, tmp_path):
    run, argv = saved_run
    copy, log = shutil.copytree(run, tmp_path / "run"), tmp_path / "log"
    rows = Path(argv[3])
    original = rows.read_text()
    try:
        rows.write_text(original.replace("3 + 3?", "3 + 4?"))
        assert server.run(log, *argv, "--output_dir", copy) == 2
        assert f"{rows}: sha256" in log.read_text() and "model" not in log.read_text().split("sha256")[0]
        assert server.run(log, *argv, "--output_dir", copy, "--force_resume") == 0
        assert "other training rows than this run has" in log.read_text()
    finally:
        rows.write_text(original)


def test_changed_base_model_is_named_and_refused_unless_forced(server, saved_run, small_model, tmp_path):
    run, argv = saved_run
    copy, log = shutil.copytree(run, tmp_path / "run"), tmp_path / "log"
    weights = small_model / "model.safetensors"
    original = weights.read_bytes()
    try:
        tensors = load_file(weights)
        save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, weights, {"format": "pt"})
        assert server.run(log, *argv, "--output_dir", copy) == 2
        assert f"the files in --model_name_or_path {small_model} have changed" in log.read_text()
        assert server.run(log, *argv, "--output_dir", copy, "--force_resume") == 0
    finally:
        weights.write_bytes(original)


def test_finished_run_started_again_writes_nothing(server, command, tmp_path):
    argv = [*command, "--max_steps", "2", "--output_dir", tmp_path / "run"]
    assert server.run(tmp_path / "log", *argv) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert server.run(tmp_path / "log", *argv) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_nothing_in_a_checkpoint_is_a_pickle(saved_run):
    for path in (saved_run[0] / "checkpoint-6").iterdir():
        assert path.suffix in (".safetensors", ".json", ".jinja", ".md")
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_second_run_in_a_folder_is_refused_and_a_killed_one_holds_no_lock(server, command, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    pid = server.start(log, *command, "--output_dir", run)
    server.wait_for(pid, (run / "checkpoint-1").is_dir)
    assert server.run(tmp_path / "second", *command, "--output_dir", run) == 2
    assert f"{run} is in use by process {pid}" in (tmp_path / "second").read_text()
    os.kill(pid, signal.SIGKILL)
    server.wait(pid)
    assert (run / "run.lock").is_file()
    assert server.run(log, *command, "--output_dir", run) == 0
    assert not (run / "run.lock").exists()


LOCK_AND_FORK = """
import os, sys, time
from pathlib import Path
from utils.run.lock import run_locked

with run_locked(Path(sys.argv[1])):
    if worker := os.fork():
        print(worker, flush=True)
    time.sleep(60)
"""


def test_forked_worker_does_not_keep_the_folder_of_a_killed_run(tmp_path):
    words = [sys.executable, "-c", LOCK_AND_FORK, tmp_path]
    holder = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {holder.pid} on "):
            check_usable(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it is alive
        check_usable(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK], ids=errno.errorcode.get)
def test_folder_without_file_locks_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_locked(tmp_path):
        assert "has no file locks" in capsys.readouterr().out and (tmp_path / "run.lock").is_file()
    assert not list(tmp_path.iterdir())


def test_two_runs_started_at_once_leave_one(server, command, tmp_path):
    pids = [server.start(tmp_path / name, *command, "--output_dir", tmp_path / "run") for name in "ab"]
    assert sorted(server.wait(pid) for pid in pids) == [0, 2]


def test_write_limit_leaves_the_last_checkpoint_valid_and_one_line(server, command, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert server.run(log, *command, "--output_dir", run, "--max_steps", "2") == 0
    record = json.loads((run / "run.json").read_text())
    record["status"], record["arguments"]["max_steps"] = "running", -1
    (run / "run.json").write_text(json.dumps(record))
    size = (run / "adapter_model.safetensors").stat().st_size
    argv = [*command, "--output_dir", run, "--force_resume"]
    log.unlink()
    assert server.run(log, *argv, max_file_bytes=size // 2) == 2
    assert checkpoints.find_valid_checkpoint(run) == run / "checkpoint-2"
    error = next(line for line in log.read_text().splitlines() if line.startswith("error: "))
    assert "File too large" in error and f"last good checkpoint is {run / 'checkpoint-2'}" in error
    assert "Traceback" not in log.read_text() and not list(run.glob(".checkpoint-*"))
    assert server.run(log, *argv) == 0


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_the_last_checkpoint_valid_and_one_line(server, command, small_disk, tmp_path):
    run, log = small_disk / "run", tmp_path / "log"
    argv = [*command, "--output_dir", run, "--optim", "adamw_bnb_8bit"]
    pid = server.start(log, *argv)
    server.wait_for(pid, (run / "checkpoint-2").is_dir)
    filler = small_disk / "filler"
    with open(filler, "wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    assert server.wait(pid) == 2
    text = log.read_text()
    assert "No space left on device" in text and "Traceback" not in text
    last = checkpoints.find_valid_checkpoint(run)
    assert f"last good checkpoint is {last}" in text and not list(run.glob(".checkpoint-*"))
    log.unlink()
    assert server.run(log, *argv) == 2 and re.search("GiB free|cannot be written", log.read_text())
    filler.unlink()
    assert server.run(log, *argv) == 0


def test_space_for_two_checkpoints_is_asked_for_before_training(tmp_path):
    checkpoints.check_free_space(tmp_path, 1000)
    with pytest.raises(UserError, match="two checkpoints of this run need 2048.00 GiB"):
        checkpoints.check_free_space(tmp_path, 2**40)


def test_folder_that_cannot_be_written_is_named_before_the_model_loads(server, command, tmp_path):
    (tmp_path / "file").touch()
    assert server.run(tmp_path / "log", *command, "--output_dir", tmp_path / "file" / "run") == 2
    assert "cannot be written" in (tmp_path / "log").read_text()


@pytest.fixture
def small_adapter(small_model, tmp_path):
    """(model with an adapter that is not zero, folder it was saved in)"""
    from utils.arguments import LoraArguments, ModelArguments
    from utils.models.adapter import add_lora
    from utils.models.base import load_base

    model = add_lora(
        load_base(ModelArguments(str(small_model), bits=32), torch.float32), LoraArguments(lora_r=4)
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_saved_adapter_is_held_against_the_one_in_memory(small_adapter):
    model, folder = small_adapter
    keeper.verify_adapter(model, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(
        {other: tensors[other] for other in tensors if other != name}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=re.escape(name)):
        keeper.verify_adapter(model, folder)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(name)}, 1 of 28"):
        keeper.verify_adapter(model, folder)


def test_adapter_that_learned_nothing_is_an_error(small_adapter, capsys):
    model, _ = small_adapter
    weights = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    keeper.check_adapter_learned(model, 4)
    torch.nn.init.zeros_(weights[0])
    keeper.check_adapter_learned(model, 4)
    assert "still zero in 1 of 14 layers" in capsys.readouterr().out
    for weight in weights:
        torch.nn.init.zeros_(weight)
    with pytest.raises(UserError, match="every lora_B is still zero after 4 steps"):
        keeper.check_adapter_learned(model, 4)


@pytest.fixture
def pickled_model(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_base_is_refused_unless_allowed_and_then_trains_the_same(
    server, command, pickled_model, tmp_path
):
    log, command = tmp_path / "log", [*command, "--max_steps", "2"]
    assert server.run(log, *command, "--output_dir", tmp_path / "expected") == 0
    command[1] = pickled_model
    assert server.run(log, *command, "--output_dir", tmp_path / "run") == 2
    assert "holds pickled weights (pytorch_model.bin)" in log.read_text()
    assert server.run(log, *command, "--output_dir", tmp_path / "run", "--allow_pickle") == 0
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("expected", "run"))
    assert first.read_bytes() == second.read_bytes()


def test_pickle_that_would_run_code_does_not_even_when_allowed(server, command, pickled_model, tmp_path):
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"model.norm.weight": Harm()}, pickled_model / "pytorch_model.bin")
    command[1] = pickled_model
    argv = [*command, "--output_dir", tmp_path / "run", "--allow_pickle"]
    assert server.run(tmp_path / "log", *argv) != 0
    assert not (tmp_path / "harm").exists()


def test_pickled_adapter_is_refused_unless_allowed(server, command, small_adapter, tmp_path):
    _, folder = small_adapter
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    log = tmp_path / "log"
    flags = [flag for flag in command if flag not in ("--lora_r", "64", "--lora_dropout", "0.1")]
    argv = [*flags, "--checkpoint_dir", folder, "--do_train", "--max_steps", "1"]
    argv += ["--output_dir", tmp_path / "run"]
    assert server.run(log, *argv) == 2
    assert "adapter_model.bin" in log.read_text() and "--allow_pickle" in log.read_text()
    assert server.run(log, *argv, "--allow_pickle") == 0, log.read_text()


def test_code_shipped_with_a_model_is_refused_unless_allowed_and_loud_then(
    server, command, small_model, tmp_path
):
    folder, log = shutil.copytree(small_model, tmp_path / "own-code"), tmp_path / "log"
    config = json.loads((folder / "config.json").read_text())
    own = {
        "model_type": "brand_new",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'brand_new'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    command[1] = folder
    argv = [*command, "--max_steps", "1", "--output_dir", tmp_path / "run"]
    assert server.run(log, *argv) == 2
    assert "brand_new" in log.read_text() and "Traceback" not in log.read_text()
    log.unlink()
    assert server.run(log, *argv, "--trust_remote_code") == 0, log.read_text()
    assert log.read_text().startswith(f"--trust_remote_code: Python code shipped with {folder} may run here")


@pytest.mark.slow
def test_two_thousand_steps_with_saves_evaluations_and_kills_leak_nothing(server, command, tmp_path):
    """Resident memory below 1 MB per 100 steps, open files and disk constant, with a kill every minute."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*command, "--output_dir", run, "--max_steps", "2000", "--save_steps", "20", "--do_train"]
    argv += ["--eval_strategy", "steps", "--eval_steps", "50", "--eval_dataset_size", "8", "--do_eval"]
    slopes, code = [], None
    while code != 0:
        pid, samples, end = server.start(log, *argv), [], time.monotonic() + 60
        # A minute, or on a busy machine the 400 steps that tell a slope from allocators filling their pools.
        while not server.has_ended(pid) and not (
            time.monotonic() > end and samples and samples[-1][0] - samples[0][0] >= 400
        ):
            time.sleep(0.5)
            if not server.has_ended(pid) and checkpoints.list_checkpoints(run):
                step = checkpoints.read_step(checkpoints.list_checkpoints(run)[-1])
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                disk = sum(path.stat().st_size for path in run.glob("checkpoint-*/*.safetensors"))
                samples.append((step, resident, files, disk))
        if not server.has_ended(pid):
            os.kill(pid, signal.SIGKILL)
        code = server.wait(pid)
        assert code in (0, -signal.SIGKILL), log.read_text()[-2000:]
        settled = [sample for sample in samples if sample[0] - samples[0][0] >= 150]
        if settled and settled[-1][0] - settled[0][0] >= 200:
            steps = torch.tensor([float(sample[0]) for sample in settled])
            memory = torch.tensor([sample[1] / 1e6 for sample in settled])
            centred = steps - steps.mean()
            slopes.append((centred @ (memory - memory.mean()) / centred.square().sum() * 100).item())
            assert max(sample[2] for sample in settled) <= settled[0][2] + 3
            assert max(sample[3] for sample in settled) < 8e6
    assert slopes and max(slopes) < 1, slopes
    print("MB per 100 steps:", slopes)
