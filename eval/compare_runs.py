"""Held-out losses of two settings over several seeds, and whether the fast one falls behind.

    python -m eval.compare_runs output/quality --seeds 0 1 2

reads plain-0, fast-0, plain-1, ... in that folder (scripts/quality.sh makes them). The exit code is 1 where
the mean of the differences fast - plain, seed by seed, is larger than the range of plain losses over seeds.
In float32 the two agree to many digits. In 16 bits the fast one may well come out better: PEFT rounds the
small parts of a young adapter away (docs/results.md).

    python -m eval.compare_runs output/quantization --settings bf16 nf4 --seeds 0 1 2

Other settings get a row each and no verdict: mean losses before and after training, and how far these are
from the first setting's (scripts/quantization.sh makes the runs).
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.arguments import flag
from utils.console import UserError, notice, run_main
from utils.flags.parser import parse_args, prepend_flag

PAIR = ["plain", "fast"]
Losses = tuple[float, float]  # nats per token of the held-out rows, before and after training


@dataclass
class CompareArguments:
    _argument_group_name = "comparison"
    runs: str = flag("output/quality", "Folder of the runs, SETTING-SEED.")
    settings: list[str] = flag(PAIR, "Others than these two are held against the first of them.")
    seeds: list[int] = flag([0, 1, 2], "Two or more.")

    def __post_init__(self):
        if len(set(self.seeds)) < 2:
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: a spread needs two different ones")


def main() -> None:
    (arguments,) = parse_args(prepend_flag(sys.argv[1:], "--runs"), [CompareArguments], __doc__)
    losses = {
        setting: [read_losses(Path(arguments.runs, f"{setting}-{seed}")) for seed in arguments.seeds]
        for setting in arguments.settings
    }
    if arguments.settings != PAIR:
        return notice(list_gaps(losses))
    plain, fast = ([after for _, after in losses[setting]] for setting in PAIR)
    table, is_as_good = compare_losses(arguments.seeds, plain, fast)
    notice(table)
    if not is_as_good:
        raise SystemExit(1)


def read_losses(run: Path) -> Losses:
    path = run / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): train {run.name} anew") from error
    if "eval_loss" not in metrics:
        raise UserError(f"{path} holds no eval_loss: train {run.name} with --do_train --do_eval")
    measured = [entry["eval_loss"] for entry in metrics.get("log", []) if "eval_loss" in entry]
    return (*measured, metrics["eval_loss"])[0], metrics["eval_loss"]


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


def list_gaps(losses: dict[str, list[Losses]]) -> str:
    """A row for each setting, means over its seeds; the gaps are to the first setting."""
    means = {
        setting: [statistics.mean(column) for column in zip(*pairs, strict=True)]
        for setting, pairs in losses.items()
    }
    first = next(iter(means))
    lines = [f"| setting | before | against {first} | after | ± over seeds | against {first} |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for setting, (before, after) in means.items():
        spread = statistics.stdev(after for _, after in losses[setting])
        gaps = [f"{own / other - 1:+.1%}" for own, other in zip(means[setting], means[first], strict=True)]
        lines.append(f"| {setting} | {before:.4f} | {gaps[0]} | {after:.4f} | {spread:.4f} | {gaps[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
