"""The data report says what will be trained on, before the model is loaded.

    train: 128 rows -> 128 sequences, 8,455 tokens, 3,090 trained (37%), longest 137

What spoils a run without an error is in its data: no labels at all, answers cut off before their stop
token, rows lost to a template. So each thing that was cut, left out or mended is counted here with the
numbers of its first rows, three rows are shown as the model sees them, and a red finding stops the run
with exit code 3. The example is that of `python qlora_finetune.py --dataset_name
data/guanaco_identity.jsonl --data_report` on SmolLM2-135M-Instruct.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.console import UserError, is_main_process, notice
from utils.data import tokenizing
from utils.data.packing import choose_capacity, measure_packing, measure_padding
from utils.data.preferences import NOT_WANTED
from utils.data.rows import PARTS, Rows
from utils.data.thoughts import describe_thoughts
from utils.data.token_rows import TokenRows
from utils.models.base import has_gpu
from utils.models.folder import read_model_config
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.messages import EVAL, IGNORE_INDEX, TEST, TRAIN
from utils.run.record import write_json

MAX_LOST_SHARE = 0.2
CUTS = (  # what is cut, the share of sequences that may be, what it does, the flag that mends it
    # Nearly all: QLoRA's recipe for Guanaco leaves 16 tokens to the prompts of single exchanges.
    (tokenizing.PROMPT_CUT, 0.9, "lost the beginning of their prompts", "--source_max_len"),
    (tokenizing.NO_STOP, 0.5, "have no stop token, so replies would not end", "--target_max_len"),
)
MEASURED_ROWS = 20_000  # a sample is enough for shares of packing
GREEN, PLAIN = "\033[32m", "\033[0m"


class RedReport(UserError):
    """The data would teach nothing, or something else than what the files hold."""

    exit_code = 3


def report_data(
    rows: Rows,
    datasets: dict[str, TokenRows],
    tokenizer: ChatTokenizer,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Print the report, write data_report.json and .png into the run's folder, raise RedReport where due."""
    if not (training_args.do_train or data_args.data_report):
        for part in (EVAL, TEST):
            if len(datasets[part]):
                notice(describe_part(part, measure_part(rows, part, datasets[part])))
        return
    config = read_model_config(model_args)
    vocabulary = config.get("text_config", config).get("vocab_size", len(tokenizer.raw))
    report = build_report(rows, datasets, vocabulary, data_args, training_args, has_gpu(model_args))
    report["thinking"] = describe_thoughts(datasets[TRAIN].found, tokenizer.style, tokenizer.thinking)
    notice(describe_report(report, data_args.max_len))
    if is_main_process():
        show_rows(datasets[TRAIN], [source.name for source in rows.sources], tokenizer.raw)
        folder = training_args.run_dir
        write_json(report, folder / "data_report.json")
        save_histogram(datasets[TRAIN].lengths, folder / "data_report.png")
        notice(f"the report with row numbers is in {folder}/data_report.json")
    if rows.count(EVAL) and not len(datasets[EVAL]) and training_args.eval_strategy != "no":
        raise UserError(
            f"--eval_strategy {training_args.eval_strategy}: not one of {rows.count(EVAL):,} held-out rows "
            "has anything to evaluate; see what became of them above"
        )
    if report["red"] and not data_args.ignore_data_report:
        raise RedReport(f"{'; '.join(report['red'])} (--ignore_data_report trains all the same)")


def build_report(
    rows: Rows,
    datasets: dict[str, TokenRows],
    vocabulary: int,
    data_args: DataArguments,
    training_args: TrainingArguments,
    on_gpu: bool,
) -> dict[str, Any]:
    """The report as plain values: what data_report.json holds."""
    parts = {part: measure_part(rows, part, found) for part, found in datasets.items() if rows.count(part)}
    report: dict[str, Any] = {
        "sources": [
            source.describe()
            | {
                "rows": len(scan.hashes),
                "left_out": scan.bad,
                "cleaned": scan.cleaned,
                "not_trained": scan.unread,
            }
            for source, scan in zip(rows.sources, rows.scans, strict=True)
        ],
        "parts": parts,
        "duplicates": count_duplicates(rows),
        "held_out_copies": rows.held_out_copies,
        "over_the_vocabulary": [part for part, found in parts.items() if found["largest_id"] >= vocabulary],
    }
    lengths = datasets[TRAIN].lengths
    if len(lengths):
        report["packing"] = measure_packings(lengths, data_args, training_args, on_gpu)
        report["suggested_model_max_length"] = suggest_max_length(datasets[TRAIN].found["uncut"])
    report["red"] = find_red(report, vocabulary)
    return report


def measure_part(rows: Rows, part: str, found: TokenRows) -> dict[str, Any]:
    trained = largest = 0
    for signed in found.read_tokens():
        trained += int((signed >= 0).sum())
        largest = max(largest, int(np.where(signed >= 0, signed, ~signed).max(initial=0)))
    return {
        "rows": rows.count(part),
        "sequences": len(found),
        "tokens": len(found.tokens),
        "trained_tokens": trained,
        "longest": int(found.lengths.max(initial=0)),
        "largest_id": largest,
        "findings": found.found["counts"],
        "finding_rows": found.found["rows"],
    }


def count_duplicates(rows: Rows) -> int:
    """Training rows whose content another training row has too, beyond the first."""
    pairs = zip(rows.scans, rows.parts, strict=True)
    hashes = np.concatenate([scan.hashes[parts == PARTS.index(TRAIN)] for scan, parts in pairs])
    return len(hashes) - len(np.unique(hashes))


def measure_packings(
    lengths: np.ndarray, data_args: DataArguments, training_args: TrainingArguments, on_gpu: bool
) -> dict[str, float]:
    """Shares of real among computed tokens, in the order of a random epoch; sizes are fixed on a GPU only.

    Packed by the capacity that the flags ask for: what a plan takes is known when the model is.
    """
    sample = np.random.default_rng(0).permutation(lengths)[:MEASURED_ROWS].tolist()
    batch = training_args.per_device_train_batch_size
    rows_per_step = batch * training_args.gradient_accumulation_steps
    capacity = choose_capacity(lengths, batch, rows_per_step, data_args.max_len, on_gpu)
    return {
        "rows_per_step": rows_per_step,
        "capacity": capacity,
        "packed": round(measure_packing(sample, rows_per_step, capacity, fixed=on_gpu), 4),
        "padded": round(measure_padding(sample, batch), 4),
    }


def suggest_max_length(uncut: dict[str, int]) -> int:
    """Holds 99% of the rows as they were before any cut, a multiple of LENGTH_STEP."""
    lengths, counts = np.array(sorted((int(length), count) for length, count in uncut.items())).T
    return int(lengths[np.searchsorted(np.cumsum(counts), 0.99 * counts.sum())])


def find_red(report: dict[str, Any], vocabulary: int) -> list[str]:
    """What makes training pointless or wrong."""
    red = []
    train = report["parts"].get(TRAIN, {"rows": 0, "sequences": 0, "findings": {}})
    findings = train["findings"]
    if not train["sequences"]:
        red.append(f"not one of {train['rows']:,} rows has anything to train on")
    sources = [source for source in report["sources"] if source["part"] == TRAIN]
    left_out = [own for source in sources for own in source["left_out"].items()]
    unwanted = sum(count for reason, (count, _) in left_out if reason.startswith(NOT_WANTED))
    read = sum(source["rows"] for source in sources) - unwanted
    lost = sum(count for _, (count, _) in left_out) - unwanted
    lost += sum(count for what, count in findings.items() if what.startswith("dropped"))
    if read and train["sequences"] and lost > MAX_LOST_SHARE * read:
        red.append(f"{lost:,} of {read:,} rows are lost")
    for what, share, harm, flag in CUTS:
        count, sequences = findings.get(what, 0), train["sequences"]
        if sequences and count > share * sequences:
            red.append(f"{count:,} of {sequences:,} sequences {harm}: raise {flag} or --model_max_length")
    if report["over_the_vocabulary"]:
        red.append(f"token ids reach beyond the model's {vocabulary:,}: the tokenizer is another model's")
    return red


def describe_part(part: str, found: dict[str, Any]) -> str:
    name = {TRAIN: "train", EVAL: "held out for evaluation", TEST: "held out for prediction"}[part]
    share = found["trained_tokens"] / max(found["tokens"], 1)
    return (
        f"{name}: {found['rows']:,} rows -> {found['sequences']:,} sequences, {found['tokens']:,} tokens, "
        f"{found['trained_tokens']:,} trained ({share:.0%}), longest {found['longest']:,}"
    )


def describe_report(report: dict[str, Any], limit: int | None = None) -> str:
    """The report's lines; `limit`: the longest row allowed, tokens."""
    lines = []
    for part, found in report["parts"].items():
        lines.append(describe_part(part, found))
        for what, count in found["findings"].items():
            first = ", ".join(map(str, found["finding_rows"][what][:3]))
            share = f"{count:,} ({count / max(found['rows'], 1):.0%})"
            lines.append(f"  {share} {what} (row {first}{', ...' if count > 3 else ''})")
    for source in report["sources"]:
        for note, (count, where) in source["cleaned"].items():
            lines.append(f"  {source['name']}: {count:,} rows with {note} (row {where[0]} first)")
    if report["duplicates"]:
        lines.append(f"  {report['duplicates']:,} training rows repeat another one")
    if report["held_out_copies"]:
        lines.append(
            f"  {report['held_out_copies']:,} rows are not trained on: a held-out row holds the same chat"
        )
    if "packing" in report:
        packing, length = report["packing"], report["suggested_model_max_length"]
        capacity = f"micro-batches of {packing['capacity']:,}"
        lines.append(
            f"{packing['rows_per_step']} rows a step: of all tokens computed {packing['packed']:.1%} are "
            f"real where rows are packed into {capacity}, {packing['padded']:.1%} where they are padded"
            + (f"; --model_max_length {length} would hold 99% of the rows" if length != limit else "")
        )
    lines += report.get("thinking", [])
    lines += [f"RED: {finding}" for finding in report["red"]]
    return "\n".join(lines)


def choose_edges(lengths: np.ndarray, bins: int) -> np.ndarray:
    """Where bins of whole tokens begin, all of one width, and where the last one ends; `bins` at most."""
    low, high = (int(lengths.min()), int(lengths.max()) + 1) if len(lengths) else (0, 1)
    width = -(-(high - low) // bins)
    return np.arange(low, high + width, width)


def draw_histogram(lengths: np.ndarray, bins: int = 8, width: int = 40) -> str:
    """Rows by length, as bars of text."""
    edges = choose_edges(lengths, bins)
    counts, _ = np.histogram(lengths, edges)
    return "\n".join(
        f"  {low:>6,}-{high - 1:<6,} {'█' * -(-width * count // counts.max()):<{width}} {count:,}"
        for count, low, high in zip(counts.tolist(), edges.tolist(), edges[1:].tolist(), strict=False)
    )


def save_histogram(lengths: np.ndarray, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.hist(lengths, bins=(choose_edges(lengths, 40) - 0.5).tolist())
    axes.set(xlabel="tokens in a row", ylabel="rows")
    axes.locator_params(integer=True)
    figure.savefig(path)


def show_rows(
    found: TokenRows, sources: list[str], tokenizer: Any, count: int = 3, characters: int = 500
) -> None:
    """Rows as the model sees them, what is trained in green (between ⟦ ⟧ where colours are not shown)."""
    if not len(found):
        return
    print(f"lengths, tokens:\n{draw_histogram(found.lengths)}")
    opening, closing = (GREEN, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    for index in range(min(count, len(found))):
        row = found[index]
        trained = row["labels"] != IGNORE_INDEX
        bounds = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(trained)]
        text = ""
        for start, end in zip(bounds, bounds[1:], strict=False):
            piece = tokenizer.decode(row["input_ids"][start:end])
            if len(piece) > characters:
                piece = f"{piece[: characters // 2]} [...] {piece[-characters // 2 :]}"
            text += f"{opening}{piece}{closing}" if trained[start] else piece
        source, number = found.origins[index]
        print(f"--- row {number} of {sources[source]}\n{text.rstrip()}")
    print("---", flush=True)
