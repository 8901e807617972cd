"""Review files of the QLoRA paper: a judge's verdicts on pairs of answers, one JSON line each.

{review_id, question_id, answer1_id, answer2_id, reviewer_id, metadata, text, score}. A three-class score is 1
or 2, the better answer, or 3, a tie; a score-relative one is [score 1, score 2], each out of 10.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.console import UserError, notice

# <answers 1>-vs-<answers 2>-<judge>-reviewer[-threeclass].jsonl, as the paper's repository names them.
FILE_NAME = re.compile(r"(.+)-vs-(.+?)-(?:gpt-[\w.]+|[\w.]+)-reviewer(?:-threeclass)?")
TIE = 3


@dataclass(frozen=True)
class Match:
    """One verdict. `winner` is 1, 2 or 3 (a tie); `scores` are those of a score-relative review."""

    question_id: str
    player1: str
    player2: str
    winner: int
    scores: tuple[float, float] | None = None


def load_matches(paths: list[str]) -> list[Match]:
    """Every verdict of the files; a review without one is left out. Raises UserError for no review."""
    reviews = [(path, review) for path in map(Path, paths) for review in read_reviews(path)]
    owners = find_owners(reviews)
    matches, without, turned = [], 0, set()
    for path, review in reviews:
        winner, scores = read_verdict(review, path)
        without += winner is None
        if winner is not None:
            names = order_players(review, path, owners)
            if names != name_players(review, path):
                turned.add(path)
            matches.append(Match(str(review["question_id"]), *names, winner, scores))
    if turned:
        notice(
            f"{len(turned)} of {len(paths)} files are named the other way round: the answers' ids tell who "
            "wrote them"
        )
    if without:
        notice(f"{without} reviews hold no verdict and are left out")
    if not matches:
        raise UserError(f"--reviews {' '.join(paths)}: no review in them has a verdict")
    return matches


def read_reviews(path: Path) -> list[dict[str, Any]]:
    """The reviews of a file. Raises UserError naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error
    reviews = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            review = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is no JSON ({error.msg}): mend or remove it") from error
        if isinstance(review, dict) and "message_id" in review:  # of the OASST questions
            review = {"question_id": review["message_id"]} | review
        if not isinstance(review, dict) or not {"question_id", "score"} <= review.keys():
            raise UserError(f"{path}: line {number} is no review: question_id and score are needed")
        reviews.append(review)
    return reviews


def read_verdict(review: dict[str, Any], path: Path) -> tuple[int | None, tuple[float, float] | None]:
    """(winner, scores). The winner is None where the judge gave no usable verdict (-1, or [-1, -1])."""
    score = review["score"]
    if score in (-1, "-1", None) or score in ([-1, -1], [-1]):
        return None, None
    if score in (1, 2, TIE, "1", "2", "3"):
        return int(score), None
    if isinstance(score, list) and len(score) == 2 and all(isinstance(one, int | float) for one in score):
        first, second = map(float, score)
        return (TIE if first == second else 1 if first > second else 2), (first, second)
    raise UserError(
        f"{path}: question {review['question_id']} has the score {score!r}: 1, 2, 3 or [a, b] is read"
    )


def find_owners(reviews: list[tuple[Path, dict[str, Any]]]) -> dict[str, set[str]]:
    """{answer id: who may have written it}: the players that all files with this answer are named after.

    One name is left where an answer was compared with those of several others.
    """
    owners: dict[str, set[str]] = {}
    for path, review in reviews:
        players = set(name_players(review, path))
        for answer in (review.get("answer1_id"), review.get("answer2_id")):
            if answer is not None:
                owners[answer] = owners.get(answer, players) & players
    return owners


def order_players(review: dict[str, Any], path: Path, owners: dict[str, set[str]]) -> tuple[str, str]:
    """(writer of answer 1, of answer 2), by the answers' ids where they tell, else as the file is named."""
    names = name_players(review, path)
    if names[0] == names[1] or "player1" in (review.get("metadata") or {}):
        return names
    for place, answer in enumerate((review.get("answer1_id"), review.get("answer2_id"))):
        found = owners.get(answer, set())
        if len(found) == 1:
            return names if names[place] in found else names[::-1]
    return names


def name_players(review: dict[str, Any], path: Path) -> tuple[str, str]:
    """Who was compared: as the review's metadata says, else as the file is named."""
    metadata = review.get("metadata") or {}
    if "player1" in metadata and "player2" in metadata:
        return metadata["player1"], metadata["player2"]
    found = FILE_NAME.fullmatch(path.stem)
    if found is None:
        raise UserError(
            f"{path}: who was compared is read from a name like A-vs-B-gpt-4-reviewer-threeclass.jsonl"
        )
    return shorten_name(found[1]), shorten_name(found[2])


def shorten_name(stem: str) -> str:
    """`answer-gpt4` -> `gpt4`; `65b-guanaco-vicuna-generations-topp0.9-temp0.7` -> `65b-guanaco`."""
    return re.sub(r"-(vicuna|oa)-generations.*$", "", re.sub(r"^answers?[-_]", "", stem))


def count_results(matches: list[Match]) -> dict[str, dict[str, int]]:
    """{player: {wins, ties, losses}}."""
    counts: dict[str, dict[str, int]] = {}
    for match in matches:
        for player, number in ((match.player1, 1), (match.player2, 2)):
            result = "ties" if match.winner == TIE else "wins" if match.winner == number else "losses"
            counts.setdefault(player, {"wins": 0, "ties": 0, "losses": 0})[result] += 1
    return counts


def measure_order_agreement(matches: list[Match]) -> tuple[int, int]:
    """(questions with one verdict in both orders, questions judged in both): judges favour a place."""
    named: dict[tuple[str, frozenset[str]], list[tuple[str, str]]] = {}
    for match in matches:
        players = (match.player1, match.player2)
        winner = "tie" if match.winner == TIE else players[match.winner - 1]
        named.setdefault((match.question_id, frozenset(players)), []).append((match.player1, winner))
    both = [verdicts for verdicts in named.values() if len({first for first, _ in verdicts}) == 2]
    return sum(len({winner for _, winner in verdicts}) == 1 for verdicts in both), len(both)


def relate_scores(matches: list[Match]) -> dict[tuple[str, str], float]:
    """{(A, B): A's total score over B's, mean of both orders} of score-relative reviews (paper, table 6)."""
    totals: dict[tuple[str, str], list[float]] = {}
    for match in matches:
        if match.scores:
            total = totals.setdefault((match.player1, match.player2), [0.0, 0.0])
            total[0] += match.scores[0]
            total[1] += match.scores[1]
    ratios: dict[tuple[str, str], list[float]] = {}
    for (one, two), (first, second) in totals.items():
        if (two, one) in ratios:
            ratios[two, one].append(second / first)
        else:
            ratios[one, two] = [first / second]
    return {pair: sum(orders) / len(orders) for pair, orders in ratios.items()}
