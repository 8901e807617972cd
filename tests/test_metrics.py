"""ROUGE and BLEU: what the libraries themselves say, on text of both languages."""

import json
import random

import jieba
import pytest
from helpers import ROOT
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from utils.train.metrics import score_answer, score_answers

CHINESE = "我们今天在北京学习语言模型，它用四位量化和低秩适配器微调。天气很好！你是谁？苹果和香蕉都是水果"
ENGLISH = (
    "the model answers a short question about four bit adapters, and cats sit on Paris mats. Why? no".split()
)


def write_text(generator: random.Random) -> str:
    """A random text of 1 to 60 pieces: Chinese characters, English words, or both."""
    language = generator.choice(["zh", "en", "both"])
    pieces = []
    for _ in range(generator.randint(1, 60)):
        chinese = language == "zh" or (language == "both" and generator.random() < 0.5)
        pieces.append(generator.choice(CHINESE) if chinese else f" {generator.choice(ENGLISH)} ")
    return "".join(pieces)


def test_scores_equal_the_libraries_called_directly_on_200_pairs():
    generator = random.Random(0)
    pairs = [(write_text(generator), write_text(generator)) for _ in range(190)]
    pairs += [(text, text) for text, _ in pairs[:10]]
    seen = set()
    for prediction, reference in pairs:
        scores = score_answer(prediction, reference)
        rouge = Rouge(exclusive=False).get_scores(
            " ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference))
        )[0]
        for name in ("rouge-1", "rouge-2", "rouge-l"):
            assert scores[name] == 100 * rouge[name]["f"]
        bleu = sentence_bleu(
            [list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3
        )
        assert scores["bleu-4"] == 100 * bleu
        seen.add(round(scores["rouge-1"]))
    assert len(seen) > 20  # the pairs are no trivial ones


def test_equal_texts_score_100_and_strange_ones_0():
    assert score_answer("我是 Guanaco。", "我是 Guanaco。") == pytest.approx(
        {"rouge-1": 100, "rouge-2": 100, "rouge-l": 100, "bleu-4": 100}, abs=1e-5
    )
    assert max(score_answer("苹果", "天气").values()) == 0


def test_empty_answer_scores_0_and_counts_in_the_mean():
    assert set(score_answer("", "天气").values()) == {0} == set(score_answer(" \n", "x").values())
    halved = score_answers(["我是模型", ""], ["我是模型", "我是模型"])
    assert halved["rouge-1"] == pytest.approx(50, abs=1e-4)


def test_chinese_is_cut_into_words_not_read_as_one():
    scores = score_answer("我们在北京学习", "他们在北京工作")
    assert 0 < scores["rouge-1"] < 100


def test_word_that_is_said_again_and_again_counts_each_time():
    """One of four words is right, and all of the one asked for: F1 is 2 * 0.25 / 1.25."""
    assert score_answer("the the the the", "the")["rouge-1"] == pytest.approx(40, abs=1e-3)


def test_evaluations_and_predictions_of_a_run_carry_the_scores(call_main, tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", ROOT / "data" / "guanaco_identity.jsonl"]
    argv += [
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        "2",
        "--eval_dataset_size",
        "4",
        "--lora_r",
        "4",
    ]
    argv += ["--source_max_len", "200", "--target_max_len", "100", "--gradient_accumulation_steps", "1"]
    argv += ["--do_train", "--do_eval", "--do_predict", "--predict_with_generate", "--max_new_tokens", "8"]
    argv += ["--eval_strategy", "steps", "--eval_steps", "1", "--gradient_checkpointing", "False"]
    printed = call_main("qlora_finetune", *argv)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    names = [name for name in metrics if "rouge" in name or "bleu" in name]
    kinds = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
    assert names == [f"{part}_{kind}" for part in ("eval", "predict") for kind in kinds]
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    expected = score_answers([row["prediction"] for row in rows], [row["reference"] for row in rows])
    assert len(rows) == 4 and all(metrics[f"predict_{kind}"] == expected[kind] for kind in kinds)
    logged = [entry for entry in metrics["log"] if "eval_rouge-1" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert "step 1: rouge-1 " in printed and "over 4 answers" in printed
