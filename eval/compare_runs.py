"""Held-out losses of two settings over several seeds, and whether the fast one falls behind.

    python -m eval.compare_runs output/quality --seeds 0 1 2

reads plain-0, fast-0, plain-1, ... in that folder (scripts/quality.sh makes them). The exit code is 1 where
the mean of the differences fast - plain, seed by seed, is larger than the range of plain losses over seeds.
In float32 the two agree to many digits. In 16 bits the fast one may well come out better: PEFT rounds the
small parts of a young adapter away (docs/results.md).
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from utils.console import UserError, notice, run_main
from utils.flags.parser import name_leading_words, parse_args

SETTINGS = ("plain", "fast")


@dataclass
class CompareArguments:
    _argument_group_name = "comparison"
    runs: str = HfArg(default="output/quality", help="Folder of the runs, SETTING-SEED.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="Two or more.")

    def __post_init__(self):
        if len(set(self.seeds)) < 2:
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: a spread needs two different ones")


def main() -> None:
    (arguments,) = parse_args(name_leading_words(sys.argv[1:], "--runs"), [CompareArguments], __doc__)
    losses = {
        setting: [read_loss(Path(arguments.runs, f"{setting}-{seed}")) for seed in arguments.seeds]
        for setting in SETTINGS
    }
    table, is_as_good = compare_losses(arguments.seeds, losses["plain"], losses["fast"])
    notice(table)
    if not is_as_good:
        raise SystemExit(1)


def read_loss(run: Path) -> float:
    """Nats per token of the held-out rows, after training."""
    path = run / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "eval_loss" not in metrics:
        raise UserError(f"{path} holds no eval_loss: train {run.name} with --do_train --do_eval")
    return metrics["eval_loss"]


def compare_losses(seeds: list[int], plain: list[float], fast: list[float]) -> tuple[str, bool]:
    """(table with the verdict below it, whether fast is worse by no more than seeds differ)"""
    differences = [other - own for own, other in zip(plain, fast, strict=True)]
    gap, spread = statistics.mean(differences), max(plain) - min(plain)
    verdict = "equal within" if abs(gap) <= spread else "fast is BETTER by more than" if gap < 0 else None
    lines = ["| seed | plain | fast | fast - plain |", "|---|---:|---:|---:|"]
    rows = [*zip(seeds, plain, fast, strict=True), ("mean", statistics.mean(plain), statistics.mean(fast))]
    lines += [f"| {seed} | {own:.4f} | {other:.4f} | {other - own:+.4f} |" for seed, own, other in rows]
    said = verdict or "fast is WORSE by more than"
    lines.append(f"held-out losses: {said} the spread of seeds ({abs(gap):.4f} against {spread:.4f})")
    return "\n".join(lines), verdict is not None


if __name__ == "__main__":
    run_main(main)
