"""Review files of the QLoRA paper: a judge's verdicts on pairs of answers, one JSON line each.

{review_id, question_id, answer1_id, answer2_id, reviewer_id, metadata, text, score}; OASST's reviews have
message_id in place of question_id. A three-class score is 1 or 2, the better answer, or 3, a tie; a
score-relative one is [score 1, score 2], each out of 10.

A file's name, A-vs-B, tells who was compared, but not who wrote answer 1: most score-relative files of the
paper are named the other way round. An answer keeps its id in all files it was judged in, so an id that is
in A-vs-B and in A-vs-C is A's. It also tells that two names stand for one model.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.console import UserError, notice

# <answers 1>-vs-<answers 2>-<judge>-reviewer[-threeclass].jsonl, as the paper's repository names them.
FILE_NAME = re.compile(r"(.+)-vs-(.+?)-(?:gpt-[\w.]+|[\w.]+)-reviewer(?:-threeclass)?")
TIE = 3
SAME_SHARE = 0.9  # of the answers to questions that both answered: two names of one model
SAME_LEAST = 10  # questions; on fewer, two models may well agree


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
    matches, without, alone = [], 0, 0
    files = {path: read_reviews(path) for path in map(Path, paths)}
    orders = order_players(files)
    rows = [
        (path, review, read_players(review) or orders.get(path) or name_players(path))
        for path, reviews in files.items()
        for review in reviews
    ]
    same = find_same_players([(review, players) for _, review, players in rows if not read_players(review)])
    for path, review, players in rows:
        winner, scores = read_verdict(review, path)
        one, two = (same.get(player, player) for player in players)
        if winner is None:
            without += 1
        elif one == two:
            alone += 1
        else:
            matches.append(Match(read_question_id(review), one, two, winner, scores))
    if without:
        notice(f"{without} reviews hold no verdict and are left out")
    if alone:
        notice(f"{alone} reviews compare a model with itself and are left out")
    if not matches:
        raise UserError(f"--reviews {' '.join(paths)}: no review in them has a verdict on two models")
    return matches


def read_reviews(path: Path) -> list[dict[str, Any]]:
    """The reviews of a file. Raises UserError naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other ends of lines
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
        if not isinstance(review, dict) or not (
            "score" in review and review.keys() & {"question_id", "message_id"}
        ):
            raise UserError(
                f"{path}: line {number} is no review: question_id (or message_id) and score are needed"
            )
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
        f"{path}: question {read_question_id(review)} has the score {score!r}: 1, 2, 3 or [a, b] is read"
    )


def read_question_id(review: dict[str, Any]) -> str:
    return str(review["question_id"] if "question_id" in review else review["message_id"])


def read_players(review: dict[str, Any]) -> tuple[str, str] | None:
    """Who wrote answers 1 and 2, where the review itself says so, as eval.judge's do."""
    metadata = review.get("metadata")
    if not isinstance(metadata, dict) or not {"player1", "player2"} <= metadata.keys():
        return None
    return metadata["player1"], metadata["player2"]


def order_players(files: dict[Path, list[dict[str, Any]]]) -> dict[Path, tuple[str, str]]:
    """{file: (who wrote its answers 1, who its answers 2)}, by answer ids, else by name; both are said.

    Two models may give one answer (an empty one), and with it one id: so all rows of a file vote.
    """
    unnamed = {path: [row for row in rows if not read_players(row)] for path, rows in files.items()}
    names = {path: name_players(path) for path, rows in unnamed.items() if rows}
    pairs: dict[tuple[str, str], set[frozenset[str]]] = {}  # in which pairings an answer was judged
    for path, players in names.items():
        for answer in (answer for row in unnamed[path] for answer in read_answer_keys(row)):
            pairs.setdefault(answer, set()).add(frozenset(players))
    shares = share_pairings(pairs)
    orders, swapped, unsure = {}, [], []
    for path, (one, two) in names.items():
        votes = 0
        for row in unnamed[path]:
            for answer, sign in zip(read_answer_keys(row), (1, -1), strict=False):
                lead = shares[answer][one] - shares[answer][two]
                votes += sign * ((lead > 0) - (lead < 0))
        orders[path] = (two, one) if votes < 0 else (one, two)
        swapped += [path] if votes < 0 else []
        unsure += [path] if votes == 0 else []
    if swapped:
        notice(
            f"{len(swapped)} of {len(names)} files are named the other way round, the first is "
            f"{swapped[0].name}: who is who is taken from the answer ids"
        )
    if unsure:
        notice(
            f"who wrote answers 1 and 2 of {len(unsure)} files is taken from their names: answer ids tell it "
            "only beside reviews of the same answers against a third model"
        )
    return orders


def share_pairings(
    pairs: dict[tuple[str, str], set[frozenset[str]]],
) -> dict[tuple[str, str], dict[str, float]]:
    """{answer: {player: in which share of the player's pairings it was judged}}: 1 for who wrote it.

    Counts would not do: of a model that met ChatGPT under two names they say that ChatGPT wrote its answers.
    """
    played: dict[tuple[str, str], set[frozenset[str]]] = {}  # pairings of a player that judged a question
    for (question, _), seen in pairs.items():
        for pair in seen:
            for player in pair:
                played.setdefault((question, player), set()).add(pair)
    return {
        (question, answer): {
            player: count / len(played[question, player])
            for player, count in Counter(player for pair in seen for player in pair).items()
        }
        for (question, answer), seen in pairs.items()
    }


def find_same_players(rows: list[tuple[dict[str, Any], tuple[str, str]]]) -> dict[str, str]:
    """{name: the name it is counted under} of a model with several names: its answers tell; it is said.

    The paper's files call Guanaco 13B both 13b-guanaco and 13b-oassist. The name with more reviews stays.
    Reviews that name their players themselves are believed: a base and its run may well answer alike.
    """
    answers: dict[str, dict[str, set[str]]] = {}  # of each player, ids of a question's answers
    for review, players in rows:
        for player, (question, answer) in zip(players, read_answer_keys(review), strict=False):
            answers.setdefault(player, {}).setdefault(question, set()).add(answer)
    reviews = Counter(player for _, players in rows for player in players)
    kept: list[str] = []
    same: dict[str, str] = {}
    for player in sorted(answers, key=lambda player: -reviews[player]):
        for other in kept:
            agreed, shared = count_same_answers(answers[player], answers[other])
            if shared >= SAME_LEAST and agreed >= SAME_SHARE * shared:
                same[player] = other
                notice(f"{player} and {other} are one player: {agreed} of {shared} answers are the same")
                break
        else:
            kept.append(player)
    return same


def count_same_answers(mine: dict[str, set[str]], theirs: dict[str, set[str]]) -> tuple[int, int]:
    """(questions with one and the same answer, questions that both answered)."""
    shared = mine.keys() & theirs.keys()
    same = [question for question in shared if mine[question] == theirs[question]]
    return sum(len(mine[question]) == 1 for question in same), len(shared)


def read_answer_keys(review: dict[str, Any]) -> list[tuple[str, str]]:
    """[(question, id of answer 1), (question, id of answer 2)], empty where the review has no ids."""
    ids = [review.get("answer1_id"), review.get("answer2_id")]
    return [(read_question_id(review), str(one)) for one in ids] if all(ids) else []


def name_players(path: Path) -> tuple[str, str]:
    """The two that a file is named after, in the name's order."""
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
    """{(A, B): A's total score over B's, mean of both orders} of score-relative reviews (paper, table 6).

    B is the one of the two that was compared with more models: ChatGPT in the paper.
    """
    totals: dict[tuple[str, str], list[float]] = {}
    for match in matches:
        if match.scores:
            total = totals.setdefault((match.player1, match.player2), [0.0, 0.0])
            total[0] += match.scores[0]
            total[1] += match.scores[1]
    pairings = Counter(player for pair in {frozenset(players) for players in totals} for player in pair)
    ratios: dict[tuple[str, str], list[float]] = {}
    for (one, two), (first, second) in totals.items():
        if not (first > 0 and second > 0):
            continue  # no ratio
        if (two, one) in ratios or pairings[one] > pairings[two]:
            ratios.setdefault((two, one), []).append(second / first)
        else:
            ratios.setdefault((one, two), []).append(first / second)
    return {pair: sum(orders) / len(orders) for pair, orders in ratios.items()}
