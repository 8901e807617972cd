"""MMLU: the same letter logits as lm-evaluation-harness, batched or not, and files or the hub's rows."""

import json
import time

import pytest
import torch
from helpers import ROOT

from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.console import UserError
from utils.models.folder import resolve_model
from utils.train.mmlu import (
    compute_letter_logits,
    evaluate_mmlu,
    find_letter_tokens,
    format_hub_questions,
    load_mmlu,
)

PAPER_FILE = ROOT / "data" / "mmlu" / "zero_shot_mmlu_val.json"  # not ours to ship: see eval/README.md
# subject, question, the four choices, the right one
OWN_QUESTIONS = [
    ("world_geography", "Which city is the capital of Japan?", "Osaka|Kyoto|Tokyo|Nagoya", 2),
    ("world_geography", "Which river flows through Cairo?", "The Nile|The Niger|The Congo|The Tigris", 0),
    (
        "world_geography",
        "Which ocean lies between Africa and Australia?",
        "Arctic|Atlantic|Pacific|Indian",
        3,
    ),
    ("world_geography", "Mount Everest stands on the border of Nepal and", "India|China|Bhutan|Pakistan", 1),
    ("arithmetic", "What is 7 times 8?", "54|56|58|64", 1),
    ("arithmetic", "Which of these numbers is prime?", "21|27|29|33", 2),
    ("arithmetic", "A shirt of 40 dollars is sold for 25% less. What does it cost?", "30|32|35|15", 0),
    ("arithmetic", "Half of what number is 17?", "8.5|19|27|34", 3),
    ("biology", "Which part of a plant cell makes sugar from light?", "Nucleus|Vacuole|Chloroplast|Wall", 2),
    ("biology", "How many legs does a spider have?", "Six|Eight|Ten|Twelve", 1),
    ("biology", "Which blood cells carry oxygen?", "Red cells|White cells|Platelets|Plasma cells", 0),
    ("biology", "Which of these animals is a mammal?", "Penguin|Shark|Crocodile|Dolphin", 3),
    ("chinese", "《红楼梦》的作者是谁？", "吴承恩|曹雪芹|罗贯中|施耐庵", 1),
    ("chinese", "中国的首都是哪里？", "北京|上海|广州|西安", 0),
    ("chinese", "一年有几个季节？", "两个|三个|四个|五个", 2),
    ("chinese", "“床前明月光”的下一句是什么？", "低头思故乡|举头望明月|春眠不觉晓|疑是地上霜", 3),
]
ROWS = [
    {"subject": subject, "question": question, "choices": choices.split("|"), "answer": answer}
    for subject, question, choices, answer in OWN_QUESTIONS
]
QUESTIONS = format_hub_questions(ROWS, [], shots=0)


@pytest.fixture(scope="module")
def smol(smollm2):
    from utils.chat.generation import load_run

    return load_run(resolve_model(ModelArguments(str(smollm2), bits=32), set()))


def ask_lm_eval(chat, questions):
    """Log probabilities of " A" to " D" behind each question, by lm-evaluation-harness  # [questions, 4]"""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=chat.model, tokenizer=chat.tokenizer.raw, batch_size=8)
    requests = [
        Instance("loglikelihood", {}, (question["input"], f" {letter}"), i)
        for i, question in enumerate(questions)
        for letter in "ABCD"
    ]
    return torch.tensor([score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]).view(-1, 4)


def compute_centred(logits):
    """Logits and log probabilities differ by one number a question."""
    return logits - logits.mean(1, keepdim=True)


def check_against_lm_eval(chat, questions):
    ours = compute_letter_logits(
        chat.model, chat.tokenizer.raw, [question["input"] for question in questions], 2048, 8
    )
    theirs = ask_lm_eval(chat, questions)
    assert (compute_centred(ours) - compute_centred(theirs)).abs().max() < 2e-4
    assert torch.equal(ours.argsort(1), theirs.argsort(1))
    return ours


def test_letter_logits_equal_those_of_lm_eval_to_the_question(smol):
    ours = check_against_lm_eval(smol, QUESTIONS)
    # This small model always likes A best; that the logits follow the question is what equality is worth.
    assert compute_centred(ours).std(0).min() > 0.1


def test_letters_are_the_tokens_behind_the_question(smol, tmp_path):
    tokens = find_letter_tokens(smol.tokenizer.raw)
    assert list(tokens) == [" A", " B", " C", " D"]
    assert smol.tokenizer.raw.convert_ids_to_tokens(list(tokens.values())) == ["ĠA", "ĠB", "ĠC", "ĠD"]


@pytest.mark.slow
def test_batches_and_the_order_of_questions_change_nothing_but_rounding(smol):
    inputs = [question["input"] for question in QUESTIONS]
    together = compute_letter_logits(smol.model, smol.tokenizer.raw, inputs, 2048, 8)
    alone = compute_letter_logits(smol.model, smol.tokenizer.raw, inputs, 2048, 1)
    backwards = compute_letter_logits(smol.model, smol.tokenizer.raw, inputs[::-1], 2048, 8)
    assert torch.allclose(together, alone, atol=2e-4) and torch.allclose(
        together, backwards.flip(0), atol=2e-4
    )
    again = compute_letter_logits(smol.model, smol.tokenizer.raw, inputs, 2048, 8)
    assert torch.equal(together, again)


def test_long_question_loses_its_beginning(smol):
    text = QUESTIONS[0]["input"]
    last = smol.tokenizer.raw.decode(smol.tokenizer.raw(text).input_ids[-16:])
    cut, short = (
        compute_letter_logits(smol.model, smol.tokenizer.raw, [question], length, 1)
        for question, length in ((text, 16), (last, 2048))
    )
    assert torch.equal(cut, short)


def test_accuracy_is_the_mean_over_subjects_not_over_questions(smol):
    uneven = [*QUESTIONS[:4], QUESTIONS[12]]
    logits = compute_letter_logits(
        smol.model, smol.tokenizer.raw, [question["input"] for question in uneven], 2048, 8
    )
    right = [
        "ABCD"[choice] == question["output"]
        for choice, question in zip(logits.argmax(1), uneven, strict=True)
    ]
    scores = evaluate_mmlu(smol.model, smol.tokenizer.raw, uneven, 2048, 8)
    assert scores["mmlu_world_geography"] == sum(right[:4]) / 4 and scores["mmlu_chinese"] == right[4]
    assert scores["mmlu_accuracy"] == (sum(right[:4]) / 4 + right[4]) / 2


def test_hub_rows_take_the_layout_of_the_original_files():
    (question,) = format_hub_questions(ROWS[:1], ROWS[2:5], shots=5)
    assert question == {
        "subject": "world_geography",
        "input": "The following are multiple choice questions (with answers) about  world geography.\n\n"
        "Which ocean lies between Africa and Australia?\nA. Arctic\nB. Atlantic\nC. Pacific\nD. Indian\nAnswer: D\n\n"
        "Mount Everest stands on the border of Nepal and\nA. India\nB. China\nC. Bhutan\nD. Pakistan\nAnswer: B\n\n"
        "Which city is the capital of Japan?\nA. Osaka\nB. Kyoto\nC. Tokyo\nD. Nagoya\nAnswer:",
        "output": "C",
    }


def test_files_are_read_as_lines_or_array_and_cut_to_the_samples_asked_for(tmp_path):
    for name, text in (
        ("zero_shot_mmlu_test.json", "\n".join(map(json.dumps, QUESTIONS))),
        ("five_shot_mmlu_val.json", json.dumps(QUESTIONS)),
    ):
        (tmp_path / name).write_text(text)
    data_args = DataArguments(data_dir=str(tmp_path))
    lines = load_mmlu(TrainingArguments(mmlu_split="test", max_mmlu_samples=3), data_args)
    assert lines == QUESTIONS[:3]
    assert load_mmlu(TrainingArguments(mmlu_dataset="mmlu-fs"), data_args) == QUESTIONS


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is no JSON"),
        ("", "is empty"),
        ('{"subject": "a", "input": "b"}', "question 1 needs subject"),
        ('{"subject": "a", "input": "b", "output": "AB"}', "one letter A to D"),
    ],
)
def test_bad_question_file_is_one_line(tmp_path, text, says):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=says):
        load_mmlu(TrainingArguments(mmlu_dataset=str(tmp_path / "mine.json")), DataArguments())


def test_questions_found_nowhere_offline_name_the_file_and_where_it_is(tmp_path):
    with pytest.raises(UserError, match="five_shot_mmlu_test.json .*QLoRA paper's repository"):
        load_mmlu(
            TrainingArguments(mmlu_dataset="mmlu-fs", mmlu_split="test"),
            DataArguments(data_dir=str(tmp_path)),
        )


@pytest.mark.alone
@pytest.mark.slow
def test_all_1531_questions_of_the_paper_equal_lm_eval_and_take_under_15_minutes(smol):
    if not PAPER_FILE.is_file():
        pytest.skip(f"{PAPER_FILE.relative_to(ROOT)} is not there: eval/README.md says where it is")
    questions = load_mmlu(TrainingArguments(mmlu_dataset=str(PAPER_FILE)), DataArguments())
    assert len(questions) == 1531
    start = time.perf_counter()
    scores = evaluate_mmlu(smol.model, smol.tokenizer.raw, questions, 2048, 8)
    seconds = time.perf_counter() - start
    print(f"1,531 questions in {seconds:.0f} s, mean over subjects {scores['mmlu_accuracy']:.4f}")
    check_against_lm_eval(smol, questions)
    assert seconds < 900
