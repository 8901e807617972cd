"""The tournament: counts, known strengths, speed, files as the paper's repository names them."""

import json
import random
import time
from itertools import permutations
from pathlib import Path

import pytest

from eval.answers.reviews import Match, count_results, load_matches, measure_order_agreement, relate_scores
from eval.elo import rate_players
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


def write_relative(path, first, second, scores, key="question_id"):
    """A score-relative file of answers with the ids `first`-N and `second`-N."""
    rows = [
        {key: i, "answer1_id": f"{first}-{i}", "answer2_id": f"{second}-{i}", "metadata": {}, "score": score}
        for i, score in enumerate(scores)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_answer_ids_tell_who_is_who_where_files_are_named_the_other_way_round(tmp_path, capsys):
    """Small scores 6 and 7 of ChatGPT's 8 and 8, large 10 of 8, in files that all say the opposite."""
    files = [
        write_relative(tmp_path / "7b-vs-gpt-3.5-gpt4-reviewer.jsonl", "chat", "seven", [[8, 6], [8, 7]]),
        write_relative(tmp_path / "gpt-3.5-vs-7b-gpt4-reviewer.jsonl", "seven", "chat", [[6, 8], [7, 8]]),
        write_relative(tmp_path / "65b-vs-gpt-3.5-gpt4-reviewer.jsonl", "chat", "large", [[8, 10], [8, 10]]),
    ]
    matches = load_matches(files)
    assert relate_scores(matches) == {("7b", "gpt-3.5"): 13 / 16, ("65b", "gpt-3.5"): 20 / 16}
    assert count_results(matches)["7b"] == {"wins": 0, "ties": 0, "losses": 4}
    assert "3 of 3 files are named the other way round" in capsys.readouterr().out
    assert relate_scores(load_matches(files[:2])) == {("7b", "gpt-3.5"): pytest.approx(16 / 13)}
    assert "of 2 files is taken from their names" in capsys.readouterr().out


def test_one_model_under_two_names_is_one_player(tmp_path, capsys):
    """As in the paper's files: 13b-oassist in some, 13b-guanaco in others, one answer of 20 asked anew."""
    scores = [[8, 7]] * 20
    files = [
        write_relative(tmp_path / "13b-guanaco-vs-gpt-3.5-gpt4-reviewer.jsonl", "mine", "chat", scores),
        write_relative(tmp_path / "gpt-3.5-vs-13b-oassist-gpt4-reviewer.jsonl", "chat", "mine", scores),
        write_relative(tmp_path / "13b-guanaco-vs-bard-gpt4-reviewer.jsonl", "mine", "bard", scores),
        write_relative(tmp_path / "13b-alpaca-vs-gpt-3.5-gpt4-reviewer.jsonl", "alpaca", "chat", scores),
        write_relative(tmp_path / "13b-oassist-vs-13b-guanaco-gpt4-reviewer.jsonl", "mine", "mine", scores),
    ]
    oassist = tmp_path / "gpt-3.5-vs-13b-oassist-gpt4-reviewer.jsonl"
    oassist.write_text(oassist.read_text().replace("mine-7", "anew-7"))
    results = count_results(load_matches(files))
    printed = capsys.readouterr().out
    assert results == {
        "13b-guanaco": {"wins": 40, "ties": 0, "losses": 20},
        "gpt-3.5": {"wins": 20, "ties": 0, "losses": 40},
        "bard": {"wins": 0, "ties": 0, "losses": 20},
        "13b-alpaca": {"wins": 20, "ties": 0, "losses": 0},
    }
    assert "13b-oassist and 13b-guanaco are one player: 19 of 20 answers are the same" in printed
    assert "20 reviews compare a model with itself and are left out" in printed


def test_two_names_of_a_model_do_not_turn_its_files_round(tmp_path, capsys):
    """Two names against ChatGPT only: its answers were judged beside ChatGPT's twice, and are its own."""
    files = [
        write_relative(tmp_path / f"{name}-vs-gpt-3.5-gpt4-reviewer.jsonl", "chat", first, [[8, 6]] * 12)
        for name, first in (("7b-guanaco", "mine"), ("7b-oassist", "mine"), ("65b", "large"))
    ]
    assert count_results(load_matches(files)) == {
        "gpt-3.5": {"wins": 36, "ties": 0, "losses": 0},
        "7b-guanaco": {"wins": 0, "ties": 0, "losses": 24},
        "65b": {"wins": 0, "ties": 0, "losses": 12},
    }
    assert "3 of 3 files are named the other way round" in capsys.readouterr().out


def test_models_that_agree_on_some_answers_or_that_reviews_name_stay_two(tmp_path, capsys):
    files = []
    for name in ("7b", "13b"):
        path = tmp_path / f"{name}-vs-gpt-3.5-gpt4-reviewer.jsonl"
        rows = Path(write_relative(path, name, "chat", [[7, 8]] * 20)).read_text().splitlines()
        path.write_text("\n".join([*rows[:3], *(row.replace(f"{name}-", "same-") for row in rows[3:])]))
        files.append(str(path))
    assert set(count_results(load_matches(files))) == {"7b", "13b", "gpt-3.5"}
    named = []
    for name in ("base", "run"):
        path = Path(write_relative(tmp_path / f"{name}.jsonl", "same", "chat", [[7, 8]] * 20))
        path.write_text(path.read_text().replace("{}", f'{{"player1": "{name}", "player2": "chat"}}'))
        named.append(str(path))
    assert set(count_results(load_matches(named))) == {"base", "run", "chat"}
    assert "one player" not in capsys.readouterr().out


def test_one_answer_that_two_models_gave_turns_no_file_round(tmp_path):
    """Both small models gave no answer to question 0; ids are made of the text."""
    files = []
    for name in ("7b", "13b"):
        path = tmp_path / f"{name}-vs-gpt-3.5-gpt4-reviewer.jsonl"
        rows = Path(write_relative(path, name, "chat", [[1, 9], [7, 8], [7, 8]])).read_text()
        path.write_text(rows.replace(f"{name}-0", "empty"))
        files.append(str(path))
    assert {(match.player1, match.player2) for match in load_matches(files)} == {
        ("7b", "gpt-3.5"),
        ("13b", "gpt-3.5"),
    }


def test_oasst_reviews_are_read_by_message_id(tmp_path):
    path = tmp_path / "a-vs-b-gpt-4-reviewer-threeclass.jsonl"
    write_relative(path, "a", "b", [1, 2, -1], key="message_id")
    assert [(match.question_id, match.winner) for match in load_matches([str(path)])] == [("0", 1), ("1", 2)]


def test_reviews_without_verdict_are_left_out_and_said(tmp_path, capsys):
    path = write_reviews(tmp_path / "a-vs-b-gpt-4-reviewer-threeclass.jsonl", [1, -1, [-1, -1]])
    assert len(load_matches([path])) == 1
    assert "2 reviews hold no verdict" in capsys.readouterr().out


def test_text_with_other_ends_of_lines_and_scores_of_zero_are_read(tmp_path):
    path = tmp_path / "a-vs-b-gpt-4-reviewer.jsonl"
    row = {"question_id": 1, "score": [0, 0], "text": "one\u2028two\x85three", "metadata": "none"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    matches = load_matches([str(path)])
    assert [match.winner for match in matches] == [3] and relate_scores(matches) == {}


@pytest.mark.parametrize(
    "flags, said",
    [([], "name the review files"), (["r.jsonl", "--seed", "-1"], "--seed -1"),
     (["r.jsonl", "--output_dir", __file__], "is a file: name a folder")],
)  # fmt: skip
def test_bad_flag_of_a_tournament_is_one_line(call_main, flags, said):
    with pytest.raises(UserError, match=said):
        call_main("eval.elo", *flags)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a-vs-b-gpt-4-reviewer.jsonl", '{"question_id": 1, "score": 9}', "has the score 9"),
        ("a-vs-b-gpt-4-reviewer.jsonl", '{"question_id": 1', "line 1 is no JSON"),
        (
            "a-vs-b-gpt-4-reviewer.jsonl",
            '{"text": "?"}',
            r"question_id \(or message_id\) and score are needed",
        ),
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
