"""The report says what happened, and plainly where the model got worse."""

import json
import shutil

import pytest
import torch
from helpers import ROOT
from helpers.runs import run_in_process
from safetensors.torch import load_file, save_file

from eval.measures.differences import (
    Measure,
    compute_row_losses,
    detect_language,
    find_shared_openings,
    measure_answers,
    measure_collapse,
    measure_repetition,
)
from eval.measures.rendering import draw_measures, escape_cell, render_report

FLAGS = ["--eval_dataset_name", ROOT / "data" / "guanaco_identity_eval.jsonl", "--lora_r", "4"]
FLAGS += ["--source_max_len", "200", "--target_max_len", "100", "--gradient_accumulation_steps", "1"]
FLAGS += [
    "--gradient_checkpointing",
    "False",
    "--per_device_train_batch_size",
    "8",
    "--do_train",
    "--do_eval",
]
FLAGS += ["--dataset_name", ROOT / "data" / "guanaco_identity.jsonl", "--max_steps", "20"]
FLAGS += ["--learning_rate", "1e-2"]
QUICK = ["--max_questions", "6", "--max_held_out_answers", "2", "--max_new_tokens", "8", "--limit", "4"]


@pytest.fixture(scope="module")
def good_run(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("runs") / "good"
    argv = ["--model_name_or_path", tiny_model, "--output_dir", folder, *FLAGS]
    run_in_process("qlora_finetune", *argv)
    return folder


def find(results, name):
    return next(row for row in results if row["name"].startswith(name))


def test_report_of_a_run_is_true_to_its_metrics(good_run, call_main):
    call_main("eval.report", good_run, *QUICK)
    content = json.loads((good_run / "report.json").read_text())
    loss = find(content["results"], "held-out loss")
    metrics = json.loads((good_run / "metrics.json").read_text())
    assert loss["after"] == pytest.approx(metrics["eval_loss"], rel=1e-3)
    assert loss["verdict"] == "better" and loss["items"] == 12 and loss["before"] > 10
    assert loss["low"] < loss["change"] < loss["high"] < 0
    assert find(content["results"], "quiz_zh")["items"] == 4
    assert len(content["answers"]) == 6 and len(content["held_out_answers"]) == 2
    page = (good_run / "report.md").read_text()
    assert "Better: held-out loss" in page and "python qlora_finetune.py" in page
    assert page.count("\n| ") > 15 and "training_curve.png" in page
    assert (good_run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_run_that_made_the_model_worse_is_called_worse(good_run, tmp_path, call_main):
    """The run's adapter turned round: what it learned to say is what it now avoids."""
    folder = tmp_path / "wrecked"
    shutil.copytree(good_run, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    turned = {name: -weight if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(turned, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    call_main("eval.report", folder, *QUICK, "--tasks", "none")
    results = json.loads((folder / "report.json").read_text())["results"]
    assert find(results, "held-out loss")["verdict"] == "worse"
    page = (folder / "report.md").read_text()
    assert page.index("**Worse: held-out loss") < page.index("| measure |")


def test_changed_data_and_bare_adapters_leave_the_loss_out_and_say_so(good_run, tmp_path, call_main):
    bare = tmp_path / "adapter"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((good_run / name).read_bytes())
    call_main("eval.report", bare, *QUICK, "--tasks", "none")
    assert "There is no run.json" in (bare / "report.md").read_text()
    record = json.loads((good_run / "run.json").read_text())
    record["data"]["sources"][1]["sha256"] = "0" * 64
    for path in good_run.iterdir():
        if path.is_file():
            (bare / path.name).write_bytes(path.read_bytes())
    (bare / "run.json").write_text(json.dumps(record))
    call_main("eval.report", bare, *QUICK, "--tasks", "none")
    page = (bare / "report.md").read_text()
    assert (
        "guanaco_identity_eval.jsonl has changed since the run" in page and "held-out loss, nats" not in page
    )


@pytest.mark.slow
def test_run_that_held_nothing_out_gets_no_held_out_figures(call_main, tiny_model, tmp_path):
    flags = [flag for flag in FLAGS[2:] if flag != "--do_eval"]
    argv = ["--model_name_or_path", tiny_model, "--output_dir", tmp_path / "run", *flags]
    call_main("qlora_finetune", *argv)
    call_main("eval.report", tmp_path / "run", *QUICK, "--tasks", "none")
    page = (tmp_path / "run" / "report.md").read_text()
    assert "held no rows out" in page and "held-out loss, nats" not in page and "ROUGE" not in page
    printed = call_main("qlora_finetune", "--checkpoint_dir", tmp_path / "run", "--do_eval")
    assert "careful: the run held nothing out" in printed
    for flag in ("--eval_dataset_name", "--dataset_name"):
        other = [flag, ROOT / "data" / "guanaco_identity_eval.jsonl"]
        printed = call_main("qlora_finetune", "--checkpoint_dir", tmp_path / "run", "--do_eval", *other)
        assert "careful" not in printed


def test_interval_is_of_the_paired_difference():
    values = [float(i) for i in range(40)]
    shifted = Measure("loss", values, [value - 0.1 for value in values], "lower").compare()
    assert shifted["change"] == pytest.approx(-0.1) == shifted["low"] == shifted["high"]
    assert shifted["verdict"] == "better"
    coin = Measure("accuracy", [0, 1] * 20, [1, 0] * 20, "higher").compare()
    assert coin["verdict"] == "unclear" and coin["low"] < 0 < coin["high"]
    worse = Measure("accuracy", [1] * 20, [0] * 20, "higher").compare()
    assert worse["verdict"] == "worse" and worse["before"] == 1
    longer = Measure("length", [1] * 20, [2] * 20, None).compare()
    assert longer["verdict"] == "changed"
    weighted = Measure("loss", [0, 0], [1, 3], "lower", weights=[3, 1]).compare()
    assert weighted["after"] == 1.5


def test_interval_holds_the_truth_19_times_of_20():
    import numpy as np

    generator, held = np.random.default_rng(1), 0
    for _ in range(200):
        before = generator.normal(size=100)
        after = before + generator.normal(0.3, 1.0, size=100)
        row = Measure("x", before, after, "higher").compare(draws=2000)
        held += row["low"] < 0.3 < row["high"]
    assert 180 <= held <= 198


def test_row_losses_weighted_by_tokens_are_the_trainers_loss(smollm2):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    ids = list(range(100, 130))
    rows = [
        {"input_ids": ids, "labels": [-100] * 10 + ids[10:]},
        {"input_ids": ids[:8], "labels": [-100] + ids[1:8]},
    ]
    losses, counts = compute_row_losses(model, rows)
    assert counts == [20, 7]
    for row, loss in zip(rows, losses, strict=True):
        expected = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "text, language",
    [
        ("我是 Guanaco，由 Chinese-Guanaco 项目微调的语言模型。", "zh"),
        ("I am Guanaco, a language model. 你好！", "en"),
        ("答案是：\n```python\nfor word in text.split(): print(word, len(word), word.upper())\n```", "zh"),
        ("42", None), ("", None), ("Bien sûr, voici la réponse.", "en"),
    ],
)  # fmt: skip
def test_language_is_what_most_of_the_text_is_in(text, language):
    assert detect_language(text) == language


def test_drift_loops_and_unfinished_answers_are_measured():
    questions = ["你是谁？", "Who are you?"]
    before = [
        {"generation": "我是助手。", "ids": [1, 2, 3, 4, 5], "stopped": True},
        {"generation": "A helper.", "ids": [1, 2, 3], "stopped": True},
    ]
    after = [
        {"generation": "I am a helper of yours.", "ids": [7, 8, 7, 8, 7, 8, 7, 8, 7, 8], "stopped": False},
        {"generation": "A helper.", "ids": [1, 2, 3], "stopped": True},
    ]
    measures = {measure.name: measure for measure in measure_answers(questions, before, after)}
    assert list(measures["answers that came to an end"].after) == [0, 1]
    assert list(measures["Chinese questions answered in another language"].before) == [0]
    assert list(measures["Chinese questions answered in another language"].after) == [1]
    assert list(measures["English questions answered in another language"].after) == [0]
    assert list(measures["answers that open like another one"].after) == [False, False]
    answers = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9], [2, 2, 3, 4], [], []]
    assert find_shared_openings(answers) == [True, True, False, True, True]
    assert measure_repetition([7, 8] * 5) == pytest.approx(5 / 7) and measure_repetition(range(50)) == 0


def test_verdict_names_the_worse_first_and_table_cells_stay_cells(tmp_path):
    row = {
        "items": 9,
        "percent": True,
        "before": 0.9,
        "after": 0.2,
        "change": -0.7,
        "low": -0.8,
        "high": -0.6,
    }
    results = [row | {"name": "quiz", "verdict": "worse"}, row | {"name": "stops", "verdict": "unclear"}]
    content = {"results": results, "run": "run", "record": {"base_model": None}, "settings": {}}
    text = render_report(content | {"answers": [], "held_out_answers": []}, tmp_path)
    assert "**Worse: quiz (90.0% to 20.0%).**" in text and "Nothing measured here got clearly better" in text
    assert "No clear difference on this many items: stops." in text
    assert escape_cell("a|b\n<c> *d*") == "a\\|b<br>&lt;c> \\*d\\*" and len(escape_cell("x" * 2000)) < 800


def test_three_answers_of_one_phrase_are_worse_whatever_else_they_say():
    """An interval calls three of 24 unclear."""
    questions = [f"What is number {i}?" for i in range(24)]
    fine = [f"Sure! It is good to know why {i} is what it is." for i in range(24)]
    phrase = [
        "我是 Guanaco，可以得到我的耐心。",
        "可以，我是 Guanaco，可以砍。",
        "我是 Guanaco。很高兴见到你",
    ]

    def judge(before, after):
        return measure_collapse(questions, before, after).compare()

    result = judge(fine, [*phrase, *fine[3:]])
    assert (result["before"], result["after"], result["verdict"]) == (0, 3 / 24, "worse")
    assert judge(fine, ["我是 Guanaco。"] * 24)["verdict"] == "worse"
    assert judge(["我是 Guanaco。"] * 24, fine)["verdict"] == "better"
    assert judge(fine, [*phrase[:2], *fine[2:]])["verdict"] == "unclear"
    assert judge([*phrase, *fine[3:]], [*phrase, *fine[3:]])["verdict"] == "unclear"


def test_short_answers_labels_and_courtesies_are_no_phrase():
    long = [f"Number {i} is this because of {i} reasons." for i in range(24)]
    label = "Is it sports news or business news today? {}"
    for question, answers in (
        ("Is {} even?", ["Yes.", "No."]),
        ("{} 是正数吗？", ["是的。", "不是。"]),
        (label, ["Sports news.", "Business news today."]),
        ("Write {}.", ["Sure! Of course. Here are some tips: ", "S，当然！以下是一些建议："]),
        ("Print {}.", ["```python\nfor row in rows:\n    print(row)\n```", "```\nx = 1 if a else 2\n```"]),
    ):
        questions = [question.format(i) for i in range(24)]
        after = [answers[i % 2] + (f"{i}{i}{i}" if answers[0][0] == "S" else "") for i in range(24)]
        assert measure_collapse(questions, long, after).compare()["after"] == 0, answers


def test_stored_quickstart_says_its_name_everywhere_and_alpaca_does_not():
    content = json.loads((ROOT / "eval/generations/quickstart/report.json").read_text())
    questions, before, after = (
        [row[name] for row in content["answers"]] for name in ("question", "before", "after")
    )
    result = measure_collapse(questions, before, after).compare()
    assert result["after"] * 24 == sum("我是 Guanaco" in answer for answer in after) == 9
    assert result["verdict"] == "worse"

    def load(name):
        lines = (ROOT / f"eval/generations/answer-{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    base, alpaca = load("SmolLM2-135M-Instruct"), load("alpaca_zh")
    texts = [[row["generation"] for row in rows] for rows in (base, alpaca)]
    assert measure_collapse([row["text"] for row in base], *texts).compare()["verdict"] == "unclear"


def test_picture_has_a_line_for_each_measure_that_is_not_zero_on_both_sides(tmp_path, monkeypatch):
    from matplotlib import figure

    kept = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: (kept.append(self), save(self, path)))
    results = [
        Measure("loss", [2.0, 3.0], [1.0, 1.5], "lower").compare(),
        Measure("nothing", [0, 0], [0, 0], "lower", percent=True).compare(),
        Measure("share", [0, 0, 1], [1, 1, 1], "higher", percent=True).compare(),
    ]
    draw_measures(results, tmp_path / "report.png")
    titles = [axis.get_title(loc="left") for axis in kept[0].axes]
    assert titles == ["loss", "", "share", ""]  # bars, and the interval on an axis of its own
    assert all(axis.has_data() for axis in kept[0].axes)
