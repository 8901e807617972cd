"""Two settings are told apart by more than what seeds differ by."""

import json

import pytest

from eval.compare_runs import compare_losses, main
from utils.console import UserError


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    def compare(losses, *seeds):
        for run, loss in losses.items():
            (tmp_path / run).mkdir()
            (tmp_path / run / "metrics.json").write_text(json.dumps({"eval_loss": loss, "log": []}))
        monkeypatch.setattr("sys.argv", ["compare_runs", str(tmp_path), "--seeds", *seeds])
        main()
        return capsys.readouterr().out

    return compare


def test_differences_are_paired_by_seed_and_held_against_the_range_of_seeds():
    # 0.02, -0.01 and 0.02 have the mean 0.01; plain ranges over 0.05
    table, is_equal = compare_losses([0, 1, 2], [1.50, 1.55, 1.52], [1.52, 1.54, 1.54])
    assert is_equal and "equal within the spread of seeds (0.0100 against 0.0500)" in table
    assert "| 1 | 1.5500 | 1.5400 | -0.0100 |" in table and "| mean | 1.5233 | 1.5333 | +0.0100 |" in table
    table, is_as_good = compare_losses([0, 1, 2], [1.50, 1.55, 1.52], [1.44, 1.49, 1.46])
    assert is_as_good and "fast is BETTER by more than the spread of seeds (0.0600 against 0.0500)" in table
    table, is_as_good = compare_losses([0, 1, 2], [1.50, 1.55, 1.52], [1.56, 1.61, 1.58])
    assert (
        not is_as_good and "fast is WORSE by more than the spread of seeds (0.0600 against 0.0500)" in table
    )


def test_exit_code_is_1_where_the_fast_setting_is_worse(compare):
    with pytest.raises(SystemExit) as left:
        compare({"plain-3": 1.5, "fast-3": 1.7, "plain-4": 1.6, "fast-4": 1.8}, "3", "4")
    assert left.value.code == 1


def test_table_is_printed_where_they_agree(compare):
    printed = compare({"plain-3": 1.5, "fast-3": 1.52, "plain-4": 1.6, "fast-4": 1.58}, "3", "4")
    assert printed.startswith("| seed | plain | fast |") and "equal within" in printed


def test_other_settings_are_held_against_the_first_one(tmp_path, monkeypatch, capsys):
    # Means: bf16 2.0 before, 1.5 after; nf4 2.2 and 1.8, so 10% and 20% more.
    for run, (before, after) in {
        "bf16-0": (2.0, 1.4), "bf16-1": (2.0, 1.6), "nf4-0": (2.1, 1.8), "nf4-1": (2.3, 1.8)
    }.items():  # fmt: skip
        (tmp_path / run).mkdir()
        log = [{"loss": 3.0}, {"eval_loss": before}, {"eval_loss": after}]
        (tmp_path / run / "metrics.json").write_text(json.dumps({"eval_loss": after, "log": log}))
    words = [str(tmp_path), "--settings", "bf16", "nf4", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", ["compare_runs", *words])
    main()
    assert capsys.readouterr().out.splitlines() == [
        "| setting | before | against bf16 | after | ± over seeds | against bf16 |",
        "|---|---:|---:|---:|---:|---:|",
        "| bf16 | 2.0000 | +0.0% | 1.5000 | 0.1414 | +0.0% |",
        "| nf4 | 2.2000 | +10.0% | 1.8000 | 0.0000 | +20.0% |",
    ]


def test_missing_run_and_single_seed_are_one_line(compare):
    with pytest.raises(UserError, match="fast-4.*holds no eval_loss"):
        compare({"plain-3": 1.5, "fast-3": 1.52, "plain-4": 1.6}, "3", "4")
    with pytest.raises(UserError, match="--seeds 3: a spread needs two"):
        compare({}, "3")


def test_a_loss_that_is_no_number_is_no_agreement():
    assert not compare_losses([0, 1], [1.5, 1.6], [float("nan"), 1.6])[1]
