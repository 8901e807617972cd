"""The report is true, and stops a run that would train on nothing worth it."""

import json
import re

import pytest
from helpers import ROOT
from helpers.rows import alpaca_rows, write_rows

from utils.console import UserError

pytestmark = pytest.mark.usefixtures("own_cache")

GOOD = alpaca_rows(12)


@pytest.fixture
def report(call_main, tiny_model, tmp_path):
    """Run --data_report over these rows; returns (what was printed, data_report.json)."""

    def make(rows, *flags):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        argv = ["--model_name_or_path", tiny_model, "--dataset_name", path, "--output_dir", tmp_path / "run"]
        argv += ["--source_max_len", 200, "--target_max_len", 100, "--data_report", *flags]
        printed = call_main("qlora_finetune", *argv)
        return printed, json.loads((tmp_path / "run" / "data_report.json").read_text())

    return make


def test_report_counts_what_is_trained_on(report, tmp_path):
    long = {"instruction": "Count.", "output": " ".join(map(str, range(300)))}
    rows = [
        *GOOD,
        GOOD[0],
        long,
        {"instruction": "Say it.", "output": "None"},
        {"instruction": "q", "output": ""},
    ]
    printed, found = report(rows, "--do_train", "--do_eval", "--eval_dataset_size", 2)
    train, held_out = found["parts"]["train"], found["parts"]["eval"]
    assert train["rows"] + held_out["rows"] == 15 and train["sequences"] == train["rows"]
    assert found["sources"][0]["left_out"] == {"column 'output' is empty": [1, [16]]}
    findings = train["findings"] | held_out["findings"]
    assert findings["answers that lost their end and stop token"] == 1
    assert findings["rows with the literal None as a text"] == 1
    assert found["duplicates"] == 1 and found["held_out_copies"] == 0 and found["red"] == []
    assert 0 < train["trained_tokens"] < train["tokens"] and train["longest"] <= 300
    assert f"where rows are packed into micro-batches of {found['packing']['capacity']:,}, " in printed
    assert found["packing"]["packed"] > 0 and found["suggested_model_max_length"] % 64 == 0
    assert f"{train['tokens']:,} tokens" in printed and "⟦" in printed and "█" in printed
    assert "Question" in printed and "⟦Answer" in printed
    assert (tmp_path / "run" / "data_report.png").stat().st_size > 1000
    assert not (tmp_path / "run" / "run.json").exists()


def test_bins_of_like_lengths_are_whole_tokens_and_no_two_meet(report):
    rows = [{"instruction": "Say it.", "output": " go" * (5 + i % 3)} for i in range(12)]
    printed, _ = report(rows, "--per_device_train_batch_size", 4)
    bins = re.findall(r"^ +(\d+)-(\d+) +█* +(\d+)$", printed, flags=re.MULTILINE)
    assert [int(count) for *_, count in bins] == [4, 4, 4]
    assert (
        [int(low) for low, *_ in bins]
        == [int(high) for _, high, _ in bins]
        == list(range(int(bins[0][0]), int(bins[0][0]) + 3))
    )


def test_share_of_a_finding_is_told_and_no_limit_is_advised_that_is_there(report):
    rows = [{"instruction": "Read it. " * 400, "output": "Yes."} for _ in range(10)] + GOOD[:10]
    printed, found = report(rows, "--model_max_length", 64)
    assert "  10 (50%) prompts that lost their beginning (row 1, 2, 3, ...)" in printed
    assert f"--model_max_length {found['suggested_model_max_length']} would hold" in printed
    printed, found = report(GOOD, "--model_max_length", 64)
    assert found["suggested_model_max_length"] == 64 and "would hold" not in printed


def test_rows_of_another_format_are_named_by_theirs(report):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    printed, found = report([*GOOD, {"messages": chat}])
    assert (
        "1 left out, row 13 first: is of format messages and not alpaca: a file, and --dataset_format, "
        "is for rows of one format" in printed
    )
    with pytest.raises(UserError, match="row 1: is of format alpaca and not messages: a file, and --data"):
        report(GOOD, "--dataset_format", "messages")


def test_report_folder_is_free_for_the_run_itself(report, call_main, tiny_model, tmp_path):
    report(GOOD)
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "rows.jsonl", "--max_steps", 1]
    argv += ["--source_max_len", 200, "--target_max_len", 100, "--lora_r", 4]
    assert "finished" in call_main("qlora_finetune", *argv, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "data_report.json").exists()


def test_copies_of_held_out_rows_are_counted_and_not_trained_on(report, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", GOOD[:3])
    printed, found = report(GOOD, "--do_train", "--do_eval", "--eval_dataset_name", held_out)
    assert found["held_out_copies"] == 3 and found["parts"]["train"]["rows"] == len(GOOD) - 3
    assert "3 rows are not trained on: a held-out row holds the same chat" in printed


RED = {
    "no row with labels": (
        [{"instruction": "word " * 90, "output": "x"}] * 3,
        ["--model_max_length", 40, "--truncation", "drop"],
        "not one of 3 rows",
    ),
    "a third lost": (GOOD[:4] + [{"instruction": "q", "output": None}] * 2, [], "2 of 6 rows are lost"),
    "no stop token": (
        [{"instruction": f"q{i}", "output": "word " * 200} for i in range(4)],
        ["--target_max_len", 20],
        "4 of 4 sequences have no stop token, so replies would not end: raise --target_max_len or --model",
    ),
    "prompts cut": (
        [{"instruction": "word " * 90 + str(i), "output": "x"} for i in range(19)] + GOOD[:1],
        ["--source_max_len", 40],
        "19 of 20 sequences lost the beginning of their prompts: raise --source_max_len or --model_max_length",
    ),
}


@pytest.mark.parametrize("case", RED)
def test_red_finding_stops_the_run(report, case):
    rows, flags, finding = RED[case]
    with pytest.raises(UserError, match=finding) as caught:
        report(rows, *flags)
    assert caught.value.exit_code == 3


def test_red_run_trains_when_told_to(report):
    rows, flags, finding = RED["a third lost"]
    printed, found = report(rows, *flags, "--ignore_data_report")
    assert f"RED: {finding}" in printed and found["red"] == [finding]


def test_token_ids_beyond_the_vocabulary_are_red(report, tiny_model, monkeypatch):
    from utils.data import report as data_report

    monkeypatch.setattr(data_report, "read_model_config", lambda model_args: {"vocab_size": 1000})
    with pytest.raises(UserError, match="reach beyond the model's 1,000"):
        report(GOOD)


def test_red_report_ends_with_code_3_before_weights_load(call_main, tiny_model, tmp_path):
    rows = [{"instruction": f"q{i}", "output": "word " * 200} for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", path, "--target_max_len", 20]
    argv += ["--source_max_len", 100, "--output_dir", tmp_path / "run"]
    with pytest.raises(UserError, match="^4 of 4 sequences have no stop token") as caught:
        call_main("qlora_finetune", *argv)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "data_report.json",
        "data_report.png",
    ]


def test_own_data_gives_a_green_report(call_main, tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", ROOT / "data" / "guanaco_identity.jsonl"]
    argv += ["--source_max_len", 200, "--target_max_len", 100, "--output_dir", tmp_path / "run"]
    printed = call_main("qlora_finetune", *argv, "--data_report")
    assert "train: 128 rows -> 128 sequences" in printed and "RED" not in printed
