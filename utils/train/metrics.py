"""ROUGE and BLEU of generated answers: words by jieba for ROUGE, characters for BLEU, as in Chinese work.

Figures are means over the answers, in percent. Chinese has no blanks, so plain ROUGE would see one word;
characters make BLEU read higher on English than the usual BLEU over words.
"""

import functools
from typing import Any

ROUGE_NAMES = ("rouge-1", "rouge-2", "rouge-l")


@functools.cache
def load_scorers() -> tuple[Any, Any, Any]:
    """(jieba, a Rouge, BLEU's smoothing): 4 seconds of imports that only a run with predictions pays."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction
    from rouge_chinese import Rouge

    jieba.setLogLevel("WARNING")  # it tells on stderr where its dictionary is cached
    return jieba, Rouge(exclusive=False), SmoothingFunction().method3  # a word said twice counts twice


def score_answer(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1/2/L F1 over jieba's words and BLEU-4 over characters (NIST smoothing), in percent.

    An empty answer, which the libraries refuse, scores 0.
    """
    if not prediction.strip() or not reference.strip():
        return dict.fromkeys((*ROUGE_NAMES, "bleu-4"), 0.0)
    from nltk.translate.bleu_score import sentence_bleu

    jieba, rouge, smoothing = load_scorers()
    words = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
    (scores,) = rouge.get_scores(*words)
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
    return {name: 100 * scores[name]["f"] for name in ROUGE_NAMES} | {"bleu-4": 100 * bleu}


def score_answers(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Means of score_answer over all pairs."""
    rows = [score_answer(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in rows[0]}
