"""The tournament: counts, known strengths, speed, files as the paper's repository names them."""

import json
import random
import time
from itertools import permutations

import pytest

from eval.elo import rate_players
from eval.reviews import Match, count_results, load_matches, measure_order_agreement, relate_scores
from utils.console import UserError

STRENGTHS = {"strong": 1120, "good": 1040, "fair": 960, "weak": 880}  # their mean is the start, 1000


def play_tournament(questions, seed, ties=0.1):
    """Matches of every ordered pair, won as Elo's formula says."""
    generator = random.Random(seed)
    matches = []
    for one, two in permutations(STRENGTHS, 2):
        chance = 1 / (1 + 10 ** ((STRENGTHS[two] - STRENGTHS[one]) / 400))
        for question in range(questions):
            winner = 1 if generator.random() < chance else 2
            matches.append(Match(str(question), one, two, 3 if generator.random() < ties else winner))
    return matches


def write_reviews(path, scores, metadata=None):
    rows = [
        {
            "review_id": f"r{i}", "question_id": i, "answer1_id": f"a{i}", "answer2_id": f"b{i}",
            "reviewer_id": 1, "metadata": metadata or {}, "text": f"Because.\n\n{score}", "score": score,
        }
        for i, score in enumerate(scores, 1)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_known_strengths_are_recovered_within_the_interval():
    rows = {row["player"]: row for row in rate_players(play_tournament(80, 0, ties=0.0), 10_000, 42)}
    assert list(rows) == list(STRENGTHS)
    for player, strength in STRENGTHS.items():
        assert rows[player]["low"] < strength < rows[player]["high"]
        assert rows[player]["high"] - rows[player]["low"] < 250


def test_one_ordering_is_elo_by_hand():
    rows = rate_players([Match("1", "a", "b", 1)], orderings=3, seed=0)
    assert [(row["player"], row["elo"], row["low"], row["high"]) for row in rows] == [
        ("a", 1016.0, 1016.0, 1016.0),
        ("b", 984.0, 984.0, 984.0),
    ]
    tied = rate_players([Match("1", "a", "b", 3)], orderings=1, seed=0)
    assert {row["elo"] for row in tied} == {1000.0}


def test_all_orderings_equal_a_plain_loop_over_each():
    import numpy as np

    from eval.elo import compute_elo

    matches = play_tournament(3, seed=1)
    players = sorted(STRENGTHS)
    ratings = compute_elo(matches, players, orderings=5, seed=7)
    order = np.random.default_rng(7).permuted(
        np.tile(np.arange(len(matches), dtype=np.int32), (5, 1)), axis=1
    )
    for i in range(5):
        plain = dict.fromkeys(players, 1000.0)
        for match in (matches[j] for j in order[i]):
            one, two = plain[match.player1], plain[match.player2]
            gain = 32 * ({1: 1.0, 2: 0.0, 3: 0.5}[match.winner] - 1 / (1 + 10 ** ((two - one) / 400)))
            plain[match.player1] += gain
            plain[match.player2] -= gain
        assert ratings[i] == pytest.approx([plain[player] for player in players], abs=1e-9)


def test_12_files_of_80_reviews_take_under_10_seconds(tmp_path, call_main):
    files = []
    matches = play_tournament(80, seed=2)
    for one, two in permutations(STRENGTHS, 2):
        scores = [match.winner for match in matches if (match.player1, match.player2) == (one, two)]
        files.append(
            write_reviews(tmp_path / f"answer-{one}-vs-answer-{two}-gpt-4-reviewer-threeclass.jsonl", scores)
        )
    start = time.perf_counter()
    printed = call_main("eval.elo", *files, "--output_dir", tmp_path / "elo")
    seconds = time.perf_counter() - start
    assert len(files) == 12 and seconds < 10
    assert "960 reviews, 10,000 orderings" in printed and "| strong |" in printed
    assert sorted(path.name for path in (tmp_path / "elo").iterdir()) == ["elo.json", "elo.md", "elo.png"]
    assert (tmp_path / "elo" / "elo.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "elo" / "elo.json").read_text())["players"]) == 4


def test_wins_ties_and_losses_are_counted_over_both_orders(tmp_path):
    files = [
        write_reviews(tmp_path / "answer-gpt35-vs-answer-gpt4-gpt-4-reviewer-threeclass.jsonl", [2, 2, 3, 1]),
        write_reviews(tmp_path / "answer-gpt4-vs-answer-gpt35-gpt-4-reviewer-threeclass.jsonl", [1, 3, 3, 1]),
    ]
    matches = load_matches(files)
    assert count_results(matches) == {
        "gpt35": {"wins": 1, "ties": 3, "losses": 4},
        "gpt4": {"wins": 4, "ties": 3, "losses": 1},
    }
    assert measure_order_agreement(matches) == (2, 4)


@pytest.mark.parametrize(
    "name, players",
    [
        ("answer-gpt35-vs-answer-gpt4-gpt-4-reviewer-threeclass", ("gpt35", "gpt4")),
        (
            "13b-guanaco-vicuna-generations-topp0.9-temp0.7-vs-65b-guanaco-vicuna-generations-topp0.9-temp0.7"
            "-gpt-4-reviewer-threeclass",
            ("13b-guanaco", "65b-guanaco"),
        ),
        ("65b-alpaca-vicuna-generations-topp0.9-temp0.7-vs-gpt-3.5-gpt4-reviewer", ("65b-alpaca", "gpt-3.5")),
    ],
)
def test_players_are_read_from_the_papers_file_names(tmp_path, name, players):
    (match,) = load_matches([write_reviews(tmp_path / f"{name}.jsonl", [1])])
    assert (match.player1, match.player2) == players


def test_metadata_names_the_players_before_the_file_does(tmp_path):
    path = write_reviews(tmp_path / "x-vs-y-z-reviewer.jsonl", [1], {"player1": "my run", "player2": "base"})
    assert [(match.player1, match.player2) for match in load_matches([path])] == [("my run", "base")]


def test_score_relative_reviews_give_winners_and_a_share_over_both_orders(tmp_path):
    files = [
        write_reviews(tmp_path / "mine-vs-gpt-3.5-gpt4-reviewer.jsonl", [[8.0, 10.0], [7, 7]]),
        write_reviews(tmp_path / "gpt-3.5-vs-mine-gpt4-reviewer.jsonl", [[9, 8.0]]),
    ]
    matches = load_matches(files)
    assert [match.winner for match in matches] == [2, 3, 1]
    assert relate_scores(matches) == {("mine", "gpt-3.5"): pytest.approx((15 / 17 + 8 / 9) / 2)}


def test_reviews_without_verdict_are_left_out_and_said(tmp_path, capsys):
    path = write_reviews(tmp_path / "a-vs-b-gpt-4-reviewer-threeclass.jsonl", [1, -1, [-1, -1]])
    assert len(load_matches([path])) == 1
    assert "2 reviews hold no verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a-vs-b-gpt-4-reviewer.jsonl", '{"question_id": 1, "score": 9}', "has the score 9"),
        ("a-vs-b-gpt-4-reviewer.jsonl", '{"question_id": 1', "line 1 is no JSON"),
        ("a-vs-b-gpt-4-reviewer.jsonl", '{"text": "?"}', "question_id and score are needed"),
        ("reviews.jsonl", '{"question_id": 1, "score": 1}', "who was compared"),
        ("a-vs-b-gpt-4-reviewer.jsonl", "", "no review in them"),
    ],
)
def test_bad_review_file_is_one_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        load_matches([str(tmp_path / name)])
    with pytest.raises(UserError, match="cannot be read"):
        load_matches([str(tmp_path / "missing.jsonl")])


def write_relative(folder, name, first, second, scores):
    """A score-relative file; `first` and `second` wrote its answers, whatever its name says."""
    rows = [
        {
            "review_id": f"r{i}", "question_id": i, "answer1_id": f"{first}{i}", "answer2_id": f"{second}{i}",
            "reviewer_id": 1, "metadata": {}, "text": "Because.", "score": score,
        }
        for i, score in enumerate(scores, 1)
    ]  # fmt: skip
    path = folder / f"{name}-gpt4-reviewer.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_answers_ids_tell_who_was_compared_where_file_names_lie(tmp_path, capsys):
    """gpt-3.5's answers are in every file: so it is known which are the other's, whatever the order of names."""
    files = [
        write_relative(tmp_path, "7b-vs-gpt-3.5", "gpt", "7b", [[8, 6], [10, 9]]),
        write_relative(tmp_path, "gpt-3.5-vs-7b", "7b", "gpt", [[6, 8], [9, 10]]),
        write_relative(tmp_path, "65b-vs-gpt-3.5", "65b", "gpt", [[9, 9], [9, 9]]),
    ]
    matches = load_matches(files)
    assert "2 of 3 files are named the other way round" in capsys.readouterr().out
    assert {(match.player1, match.player2) for match in matches[:2]} == {("gpt-3.5", "7b")}
    assert relate_scores(matches) == {("gpt-3.5", "7b"): 18 / 15, ("65b", "gpt-3.5"): 1.0}


def test_two_files_of_one_pair_go_by_their_names(tmp_path, capsys):
    """Nothing in them tells whose answers these are."""
    files = [write_relative(tmp_path, "a-vs-b", "x", "y", [[8, 6]])]
    files.append(write_relative(tmp_path, "b-vs-a", "y", "x", [[6, 8]]))
    assert relate_scores(load_matches(files)) == {("a", "b"): 8 / 6}
    assert "other way round" not in capsys.readouterr().out


def test_reviews_of_the_oasst_questions_are_read(tmp_path):
    path = tmp_path / "7b-oa-generations-vs-gpt-4-oa-generations-gpt-4-reviewer-threeclass.jsonl"
    row = {
        "message_id": "0016-ab",
        "answer1_id": "a",
        "answer2_id": "b",
        "metadata": {},
        "text": "2",
        "score": 2,
    }
    path.write_text(json.dumps(row) + "\n")
    assert load_matches([str(path)]) == [Match("0016-ab", "7b", "gpt-4", 2)]
