"""What is compared before and after a run: each measure item by item, with an interval of the difference.

Both sides see the same items, so the interval is of the paired difference: items are drawn anew 10,000 times
with replacement. It says how far other items of this kind could move the result, not another training seed.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from utils.data.token_rows import Example

CHINESE = re.compile(r"[\u3400-\u9fff]")
LATIN_WORD = re.compile(r"[A-Za-zÀ-ÿ]+")
CLAUSE_END = re.compile(r"[。！？!?，,；;、\n\"“”()（）]|\.(?=\s|$)")
LEAD_IN = re.compile(r".*[:：]")
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:['’-][^\W_\u3400-\u9fff]+)*")
PHRASE_WORDS = 3  # a Chinese character counts as one; "yes", "of course", "当然" are no phrase
COLLAPSED_ANSWERS, COLLAPSED_SHARE = 3, 0.1
CODE = re.compile(r"```.*?(```|$)", re.DOTALL)


@dataclass(frozen=True)
class Measure:
    """Values of the same items before and after; `better` is the wanted direction, if there is one."""

    name: str
    before: Sequence[float]
    after: Sequence[float]
    better: Literal["higher", "lower"] | None
    weights: Sequence[float] | None = None
    percent: bool = False
    verdict: str | None = None  # where the measure has a rule of its own

    def compare(self, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
        """{name, items, before, after, change, low, high, verdict}; low to high holds 95% of the draws.

        The verdict is better or worse where that interval leaves out 0, else unclear.
        """
        import numpy as np

        before, after = np.array(self.before, float), np.array(self.after, float)
        weights = np.ones(len(before)) if self.weights is None else np.array(self.weights, float)
        drawn = np.random.default_rng(seed).integers(len(before), size=(draws, len(before)))
        total = weights[drawn].sum(1)
        changes = (weights * (after - before))[drawn].sum(1) / total
        low, high = np.percentile(changes, [2.5, 97.5])
        first, second = np.average(before, weights=weights), np.average(after, weights=weights)
        verdict = "unclear" if low <= 0 <= high else "changed"
        if verdict == "changed" and self.better:
            verdict = "better" if (second > first) == (self.better == "higher") else "worse"
        verdict = self.verdict or verdict
        numbers = {"before": first, "after": second, "change": second - first, "low": low, "high": high}
        return (
            {"name": self.name, "items": len(before), "percent": self.percent}
            | {name: round(float(number), 6) for name, number in numbers.items()}
            | {"verdict": verdict}
        )


def compute_row_losses(model: Any, rows: list["Example"]) -> tuple[list[float], list[int]]:
    """(mean loss in nats of each row's label tokens, their count), of {input_ids, labels}."""
    import torch

    from utils.prompts.messages import IGNORE_INDEX

    losses, counts = [], []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.as_tensor(row["input_ids"])[None].to(model.device)).logits[0, :-1]
            targets = torch.as_tensor(row["labels"][1:]).to(logits.device)
            losses.append(
                torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX).item()
            )
            counts.append(int((targets != IGNORE_INDEX).sum()))
    return losses, counts


def measure_repetition(ids: Sequence[int], size: int = 4) -> float:
    """Share of the answer's n-grams of tokens that were there before: 0 says nothing twice, 1 loops."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def find_shared_openings(answers: Sequence[Sequence[int]], size: int = 4) -> list[bool]:
    """Of each answer (token ids) whether another one begins with the same tokens: a model with one phrase."""
    openings = [tuple(ids[:size]) for ids in answers]
    counts = Counter(openings)
    return [counts[opening] > 1 for opening in openings]


def find_phrases(question: str, answer: str) -> set[str]:
    """The answer's clauses of three words and more.

    Left out are code, clauses that the question has too, and what leads to a colon ("Here are some tips:").
    """
    asked = f" {' '.join(WORD.findall(question.lower()))} "
    parts = CLAUSE_END.split(CODE.sub("\n", answer.lower()))
    clauses = (WORD.findall(LEAD_IN.sub("", part)) for part in parts)
    phrases = {" ".join(words) for words in clauses if len(words) >= PHRASE_WORDS}
    return {phrase for phrase in phrases if f" {phrase} " not in asked}


def find_collapsed(questions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Of each answer whether it says the phrase that the most answers say, where two do: "我是 Guanaco"."""
    said = [find_phrases(*pair) for pair in zip(questions, answers, strict=True)]
    counts = Counter(phrase for phrases in said for phrase in sorted(phrases))
    (common, count), *_ = counts.most_common(1) or [("", 0)]
    return [count > 1 and common in phrases for phrases in said]


def measure_collapse(questions: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Measure:
    """How many answers say one phrase; worse by three answers and a tenth of all, whatever its interval.

    An interval calls three of 24 unclear. But of 300 draws of 24 rows of Alpaca in Chinese, one has a phrase
    that three answers say; a model that learned its name said it in 9 of 24 (eval/generations/quickstart).
    """
    first, second = (find_collapsed(questions, texts) for texts in (before, after))
    gained = sum(second) - sum(first)
    has_collapsed = gained >= max(COLLAPSED_ANSWERS, COLLAPSED_SHARE * len(questions))
    verdict = "worse" if has_collapsed else None
    return Measure("answers of one phrase", first, second, "lower", percent=True, verdict=verdict)


def detect_language(text: str) -> Literal["zh", "en"] | None:
    """Chinese or a Latin-script language, by what most of the text is, code left out; None for neither."""
    text = CODE.sub(" ", text)
    chinese, words = len(CHINESE.findall(text)), len(LATIN_WORD.findall(text))
    if chinese == words == 0:
        return None
    # A Chinese word is about 1.5 characters; names and terms in Latin letters are usual in Chinese answers.
    return "zh" if chinese / 1.5 >= words / 2 else "en"


def measure_answers(
    questions: list[str], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[Measure]:
    """Stops, length, repetition, sameness, language of answers {generation, ids, stopped} to `questions`."""

    def compare(name: str, key: Any, better: Any, chosen: list[int], percent: bool = True) -> list[Measure]:
        if not chosen:
            return []
        first, second = ([key(rows[i]) for i in chosen] for rows in (before, after))
        return [Measure(name, first, second, better, percent=percent)]

    everything = list(range(len(questions)))
    language = [detect_language(question) for question in questions]
    measures = compare("answers that came to an end", lambda row: float(row["stopped"]), "higher", everything)
    measures += compare("length, tokens", lambda row: float(len(row["ids"])), None, everything, False)
    measures += compare("repeated 4-grams", lambda row: measure_repetition(row["ids"]), "lower", everything)
    first, second = (find_shared_openings([row["ids"] for row in rows]) for rows in (before, after))
    measures.append(Measure("answers that open like another one", first, second, "lower", percent=True))
    texts = ([row["generation"] for row in rows] for rows in (before, after))
    measures.append(measure_collapse(questions, *texts))
    for code, name, other in (("zh", "Chinese", "en"), ("en", "English", "zh")):
        measures += compare(
            f"{name} questions answered in another language",
            lambda row, other=other: float(detect_language(row["generation"]) == other),
            "lower",
            [i for i in everything if language[i] == code],
        )
    return measures
