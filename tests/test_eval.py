"""Answers and benchmarks of a run: the paper's row format, the adapter really off, local task files offline."""

import json
from collections import Counter

import pytest
import torch
from helpers import ROOT

from eval.answers.questions import load_answers, load_questions
from eval.lm_tasks import render_scores
from eval.measures.harness import load_task_manager, read_scores, run_tasks
from utils.arguments import ModelArguments
from utils.console import UserError
from utils.models.folder import resolve_model

PROMPTS = ROOT / "eval" / "prompts"
TASK = """task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} ="
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """An adapter whose weights are far from zero, saved as a run: what it answers differs from its base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("runs") / "loud"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def open_model(**flags):
    from utils.chat.generation import load_run

    return load_run(resolve_model(ModelArguments(bits=16, **flags), {"bits"}))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_own_questions_are_80_of_nine_kinds_in_both_languages():
    english, chinese = (load_questions([str(PROMPTS / f"questions_{code}.jsonl")]) for code in ("en", "zh"))
    assert len(english) == len(chinese) == 80
    assert [one.category for one in english] == [one.category for one in chinese]
    counts = Counter(one.category for one in english)
    assert len(counts) == 9 and min(counts.values()) >= 8
    assert len({one.text for one in [*english, *chinese]}) == 160
    both = load_questions([str(PROMPTS / f"questions_{code}.jsonl") for code in ("en", "zh")])
    assert len(both) == 160


def test_answers_have_the_papers_columns_and_the_base_is_without_adapter(
    run, tiny_model, tmp_path, call_main
):
    argv = [run, "--bits", "16", "--questions", PROMPTS / "questions_zh.jsonl", "--max_questions", "5"]
    argv += ["--max_new_tokens", "6", "--batch_size", "2", "--base_too", "--output_dir", tmp_path]
    call_main("eval.generate_answers", *argv)
    files = sorted(tmp_path.iterdir())
    assert {file.name for file in files} == {"answer-loud.jsonl", f"answer-{tiny_model.name}.jsonl"}
    tuned, base = (read_lines(tmp_path / f"answer-{name}.jsonl") for name in ("loud", tiny_model.name))
    assert [row["question_id"] for row in tuned] == [f"zh-0{i}" for i in range(1, 6)]
    assert {"question_id", "text", "category", "prompt", "generation", "seed"} <= tuned[0].keys()
    assert tuned[0]["text"] in tuned[0]["prompt"] and 0 < tuned[0]["tokens"] <= 6
    assert [row["generation"] for row in tuned] != [row["generation"] for row in base]
    assert load_answers(str(files[0])).keys() == {row["question_id"] for row in tuned}
    argv = ["--model_name_or_path", tiny_model, *argv[1:-3], "--output_dir", tmp_path / "alone"]
    call_main("eval.generate_answers", *argv)
    alone = read_lines(tmp_path / "alone" / f"answer-{tiny_model.name}.jsonl")
    assert [row["generation"] for row in alone] == [row["generation"] for row in base]


def test_vicuna_and_oasst_questions_are_answered(run, tmp_path, call_main):
    rows = [
        {"question_id": 1, "text": "How can I sleep better?", "category": "generic"},
        {
            "question_id": "c4",
            "text": "### Human: Hi### Assistant: Hello.### Human: Who are you?### Assistant:",
        },
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [run, "--bits", "16", "--questions", tmp_path / "questions.jsonl", "--max_new_tokens", "4"]
    call_main("eval.generate_answers", *argv, "--output_dir", tmp_path)
    plain, chat = read_lines(tmp_path / "answer-loud.jsonl")
    assert (plain["question_id"], chat["question_id"]) == (1, "c4")
    assert "assistant\nHello.<|im_end|>" in chat["prompt"] and "### Human" not in chat["prompt"]


def test_local_task_file_works_offline_and_the_base_is_the_base(run, tiny_model, tmp_path, call_main):
    rows = [{"question": f"{i} + 1", "choices": [str(i + 1), str(i + 2)], "answer": i % 2} for i in range(12)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(TASK.format(file=tmp_path / "sums.jsonl"))
    argv = [run, "--bits", "16", "--tasks", "sums", "--include_path", tmp_path, "--base_too"]
    printed = call_main("eval.lm_tasks", *argv, "--output_dir", tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "lm_tasks.json").read_text())
    assert saved["run"][0]["task"] == "sums" and saved["run"][0]["stderr"] > 0
    assert "| sums | acc |" in printed and " ± " in printed
    manager = load_task_manager(["sums"], str(tmp_path))
    chat = open_model(checkpoint_dir=str(run))
    with_adapter = run_tasks(chat, ["sums"], manager, 4)
    with chat.model.disable_adapter():
        off = run_tasks(chat, ["sums"], manager, 4)
    alone = run_tasks(open_model(model_name_or_path=str(tiny_model)), ["sums"], manager, 4)

    def read_logprobs(results):
        return torch.tensor([[one[0] for one in row["filtered_resps"]] for row in results["samples"]["sums"]])

    assert torch.allclose(read_logprobs(off), read_logprobs(alone), atol=1e-5)
    assert (read_logprobs(off) - read_logprobs(with_adapter)).abs().max() > 0.1
    assert saved["base"] == read_scores(alone) and saved["run"] == read_scores(with_adapter)


def test_chat_template_changes_what_is_asked_without_bars_in_a_log(run, capsys):
    manager = load_task_manager(["quiz_en"], None)
    chat = open_model(checkpoint_dir=str(run))
    plain, templated = (
        run_tasks(chat, ["quiz_en"], manager, 4, limit=2, chat_template=on)["samples"]["quiz_en"]
        for on in (False, True)
    )
    assert plain[0]["arguments"][0][0].startswith("Question: What is the capital of France?")
    assert templated[0]["arguments"][0][0].startswith("<|im_start|>")
    noise = capsys.readouterr().err
    assert "Tokenizing inputs" not in noise and "loglikelihood requests" not in noise


def test_quizzes_hold_40_questions_with_one_right_answer_each():
    for code in ("en", "zh"):
        rows = read_lines(ROOT / "eval" / "tasks" / f"quiz_{code}.jsonl")
        assert len(rows) == len({row["question"] for row in rows}) == 40
        assert all(len(set(row["choices"])) == 4 and row["answer"] in range(4) for row in rows)
        assert max(Counter(row["answer"] for row in rows).values()) < 20


def test_scores_stand_side_by_side_with_standard_errors():
    rows = [{"task": "t", "metric": "acc", "value": 0.5, "stderr": 0.1}]
    table = render_scores({"run": rows, "base": [rows[0] | {"value": 0.25, "stderr": None}]})
    assert table.splitlines()[0] == "| task | metric | run | base |"
    assert table.splitlines()[2] == "| t | acc | 0.5000 ± 0.1000 | 0.2500 |"


def test_mistakes_are_one_line(run, tiny_model, tmp_path, call_main):
    base = ["--model_name_or_path", tiny_model, "--bits", "16"]
    with pytest.raises(UserError, match="--tasks no_such_task: no such task"):
        call_main("eval.lm_tasks", *base, "--tasks", "no_such_task")
    with pytest.raises(UserError, match="--base_too switches an adapter off"):
        call_main("eval.lm_tasks", *base, "--base_too")
    with pytest.raises(UserError, match="--questions: name a question file"):
        call_main("eval.generate_answers", *base)
    with pytest.raises(UserError, match="eval/prompts"):
        call_main("eval.generate_answers", *base, "--questions", tmp_path / "none.jsonl")


@pytest.mark.slow
def test_data_set_out_of_reach_is_one_line(tiny_model, tmp_path, call_main):
    base = ["--model_name_or_path", tiny_model, "--bits", "16"]
    with pytest.raises(UserError, match="a data set cannot be had"):
        call_main("eval.lm_tasks", *base, "--tasks", "arc_easy", "--output_dir", tmp_path)
