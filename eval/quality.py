"""What quantizing the base costs: one fine-tuning on 4, 8 and 16 bits and of every weight, several seeds.

    python -m eval.quality --model models/SmolLM2-135M-Instruct --dataset_name DATA --seeds 0 1 2 --jobs 1

Each run is qlora_finetune.py as anyone starts it; other flags are passed on to it:

    python -m eval.quality --model MODEL --dataset_name DATA -- --num_train_epochs 1 --lora_r 32
"""

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from utils.arguments import flag, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import parse_args
from utils.repository import REPOSITORY

BASES = {
    "NF4": "--bits 4 --quant_type nf4 --double_quant",
    "FP4": "--bits 4 --quant_type fp4 --double_quant",
    "INT8": "--bits 8",
    "BF16": "--bits 16",
    "full": "--bits 32 --full_finetune --learning_rate 2e-5",
}
TRAINING = """--do_train --do_eval --eval_on_start True --save_strategy no --num_train_epochs 3
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --source_max_len 512 --target_max_len 512
    --lora_r 16 --lora_alpha 32 --learning_rate 5e-4 --lr_scheduler_type cosine --warmup_steps 0.1
    --eval_dataset_size 100 --gradient_checkpointing False --logging_steps 5 --disable_tqdm True""".split()


@dataclass
class QualityArguments:
    _argument_group_name = "quality"
    model: str | None = flag(default=None, help="Folder or hub id of the base.")
    dataset_name: str | None = flag(default=None, help="What to train on, as for qlora_finetune.py.")
    bases: list[str] = flag(default_factory=lambda: list(BASES), help=f"Of {', '.join(BASES)}.")
    seeds: list[int] = flag(default_factory=lambda: [0, 1, 2], help="Of adapter and order of rows.")
    jobs: int = flag(default=1, help="Runs at once.")
    output_dir: str = flag(default="output/quality", help="Folder of the runs and of quality.md, .json.")

    def __post_init__(self):
        require_positive(self, "jobs")
        if not self.model or not self.dataset_name:
            raise UserError("--model and --dataset_name are needed: what to train, and on what")
        if unknown := set(self.bases) - set(BASES):
            raise UserError(f"--bases {' '.join(sorted(unknown))}: use {', '.join(BASES)}")


@dataclass
class Outcome:
    """One run: nats per token of the held-out rows."""

    base: str
    seed: int
    before: float
    after: float
    seconds: float
    peak_memory_gib: float


def main() -> None:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, passed_on = sys.argv[1:end], sys.argv[end + 1 :]
    (arguments,) = parse_args(words, [QualityArguments], __doc__)
    runs = [(base, seed) for base in arguments.bases for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(lambda run: train(*run, arguments, passed_on), runs))
    folder = Path(arguments.output_dir)
    table = format_table(outcomes)
    (folder / "quality.md").write_text(table + "\n", encoding="utf-8")
    (folder / "quality.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=2))
    notice(f"{table}\nsaved in {folder}/quality.md and quality.json")


def train(base: str, seed: int, arguments: QualityArguments, passed_on: list[str]) -> Outcome:
    """One run in a process of its own; one that is finished already is read, not repeated."""
    run = Path(arguments.output_dir, f"{base}-{seed}")
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / "qlora_finetune.py"), "--model_name_or_path", arguments.model]
    command += ["--dataset_name", arguments.dataset_name, "--output_dir", str(run), *TRAINING]
    command += [*BASES[base].split(), "--seed", str(seed), *passed_on]
    log = run.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        said = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise UserError(f"{base}, seed {seed} ended with code {code}: {said} ({log})")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    losses = [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry]
    outcome = Outcome(base, seed, losses[0], losses[-1], metrics["train_seconds"], metrics["peak_memory_gib"])
    notice(f"{base}, seed {seed}: held-out loss {outcome.before:.4f} before, {outcome.after:.4f} after")
    return outcome


def format_table(outcomes: list[Outcome]) -> str:
    """Mean and standard deviation over seeds; the gaps are to BF16, or to the first base without it."""
    means = {}
    for base in dict.fromkeys(outcome.base for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.base == base]
        after = [outcome.after for outcome in own]
        spread = statistics.stdev(after) if len(after) > 1 else 0.0
        means[base] = (own[0].before, statistics.mean(after), spread, statistics.mean(o.seconds for o in own))
    name = "BF16" if "BF16" in means else next(iter(means))
    lines = [
        f"| base | loss before | against {name} | after | ± over seeds | against {name} | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for base, (before, after, spread, seconds) in means.items():
        gaps = [f"{loss / other - 1:+.1%}" for loss, other in zip((before, after), means[name], strict=False)]
        cells = (base, f"{before:.4f}", gaps[0], f"{after:.4f}", f"{spread:.4f}", gaps[1], f"{seconds:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
