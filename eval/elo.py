"""The QLoRA paper's tournament: Elo ratings from review files, over 10,000 orders of the matches.

    python -m eval.elo REVIEWS.jsonl ... --output_dir output/elo

Prints the table; the folder gets elo.md, elo.json and elo.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers.reviews import (
    TIE,
    Match,
    count_results,
    load_matches,
    measure_order_agreement,
    relate_scores,
)
from utils.arguments import flag, require_folder, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import parse_args, prepend_flag
from utils.run.record import write_json

START, K = 1000.0, 32.0  # the paper's


@dataclass
class EloArguments:
    _argument_group_name = "tournament"
    reviews: list[str] = flag([], "Review files, A against B and B against A.")
    output_dir: str = flag("output/elo", "Folder of elo.md, elo.json and elo.png.")
    orderings: int = flag(10_000, "Random orders of the matches.")
    seed: int = flag(42, "Seed of the orders.")

    def __post_init__(self):
        require_positive(self, "orderings")
        require_folder(self, "output_dir")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: use 0 or more")
        if not self.reviews:
            raise UserError("name the review files: python -m eval.elo REVIEWS.jsonl ...")


def main() -> None:
    (elo_args,) = parse_args(prepend_flag(sys.argv[1:], "--reviews"), [EloArguments], __doc__)
    matches = load_matches(elo_args.reviews)
    rows = rate_players(matches, elo_args.orderings, elo_args.seed)
    page = render_tournament(matches, rows, elo_args.orderings)
    print(page)
    folder = Path(elo_args.output_dir)
    write_json(
        {"reviews": elo_args.reviews, "orderings": elo_args.orderings, "players": rows}, folder / "elo.json"
    )
    (folder / "elo.md").write_text(page + "\n\n![Elo](elo.png)\n", encoding="utf-8")
    draw_ratings(rows, folder / "elo.png")
    notice(f"elo.md, elo.json and elo.png are in {folder}")


def rate_players(matches: list[Match], orderings: int, seed: int) -> list[dict[str, Any]]:
    """{player, elo, low, high, wins, ties, losses}, best first; low and high hold 95% of the orderings."""
    import numpy as np

    results = count_results(matches)
    ratings = compute_elo(matches, sorted(results), orderings, seed)
    low, high = np.percentile(ratings, [2.5, 97.5], axis=0)
    rows = [
        {
            "player": player,
            "elo": round(float(ratings[:, i].mean()), 1),
            "low": round(float(low[i]), 1),
            "high": round(float(high[i]), 1),
        }
        | results[player]
        for i, player in enumerate(sorted(results))
    ]
    return sorted(rows, key=lambda row: -row["elo"])


def compute_elo(matches: list[Match], players: list[str], orderings: int, seed: int) -> Any:
    """Final ratings of every ordering, all orderings stepped at once  # [orderings, players]"""
    import numpy as np

    number = {player: i for i, player in enumerate(players)}
    first = np.array([number[match.player1] for match in matches])
    second = np.array([number[match.player2] for match in matches])
    points = np.array([0.5 if match.winner == TIE else float(match.winner == 1) for match in matches])
    generator = np.random.default_rng(seed)
    order = np.tile(np.arange(len(matches), dtype=np.int32), (orderings, 1))
    order = generator.permuted(order, axis=1).T  # [matches, orderings]
    ratings = np.full((orderings, len(players)), START)
    rows = np.arange(orderings)
    for played in order:
        one, two = first[played], second[played]
        expected = 1 / (1 + 10 ** ((ratings[rows, two] - ratings[rows, one]) / 400))
        gain = K * (points[played] - expected)
        ratings[rows, one] += gain
        ratings[rows, two] -= gain
    return ratings


def render_tournament(matches: list[Match], rows: list[dict[str, Any]], orderings: int) -> str:
    """The table, and what the reviews say about the judge, as markdown."""
    lines = ["| model | Elo | 95% of orderings | wins | ties | losses |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row['player']} | {row['elo']:.0f} | {row['low']:.0f} to {row['high']:.0f} "
        f"| {row['wins']} | {row['ties']} | {row['losses']} |"
        for row in rows
    ]
    lines.append(f"\n{len(matches):,} reviews, {orderings:,} orderings, start {START:.0f}, K {K:.0f}.")
    agreed, both = measure_order_agreement(matches)
    if both:
        lines.append(
            f"Of {both} questions judged in both orders {agreed} ({agreed / both:.0%}) got one verdict."
        )
    for (one, two), ratio in relate_scores(matches).items():
        lines.append(f"{one} scores {ratio:.1%} of {two}.")
    return "\n".join(lines)


def draw_ratings(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratings with their intervals, best on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(rows)), dpi=120, layout="tight")
    axes = figure.subplots()
    names = [row["player"] for row in rows][::-1]
    ratings = [row["elo"] for row in rows][::-1]
    spread = [
        [row["elo"] - row["low"] for row in rows][::-1],
        [row["high"] - row["elo"] for row in rows][::-1],
    ]
    axes.errorbar(ratings, names, xerr=spread, fmt="o", capsize=4)
    axes.axvline(START, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="Elo, mean and 95% of the orderings", ylim=(-0.7, len(rows) - 0.3))
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path)


if __name__ == "__main__":
    run_main(main)
