"""Each row of the sources gets its part of the run: trained on, evaluated on, predicted, or not used.

One pass over a source checks every row and keeps 8 bytes of hash of its messages. The part of a row, one
more byte, follows from these hashes and --data_seed: the rows with the smallest scrambled hashes are held
out. So it is the same at every start and in any order of the file, and all copies of a row are on one
side: a model is never measured on what it was trained on. The rows stay on disk; a million of them take 9
MB here.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.console import UserError, notice
from utils.data.formats import read_chat
from utils.data.scanning import Scan, scan_source
from utils.data.sources import Source, find_sources
from utils.prompts.messages import EVAL, TEST, TRAIN, Chat
from utils.run.record import find_run_record

MAX_HELD_OUT, MAX_HELD_OUT_SHARE = 1024, 0.1
PARTS = ("", TRAIN, EVAL, TEST)  # a row's part is kept as the index into this; 0: not used


@dataclass
class Rows:
    """The rows of a run, still on disk: for each source the part of every row  # uint8 [rows]"""

    sources: list[Source]
    scans: list[Scan]
    parts: list[np.ndarray]
    held_out_copies: int = 0  # rows not trained on: a held-out row holds the same chat

    def count(self, part: str) -> int:
        return sum(int((parts == PARTS.index(part)).sum()) for parts in self.parts)

    def read(self, marker: str) -> Iterator[tuple[str, int, int, Chat]]:
        """(part, index of the source, number of the row, chat) of every row that is used, in file order."""
        for index, (source, parts) in enumerate(zip(self.sources, self.parts, strict=True)):
            if parts.any():
                for number, (part, row) in enumerate(zip(parts.tolist(), source.read(), strict=True), 1):
                    if part:
                        yield PARTS[part], index, number, read_chat(row, source.dataset_format, marker)

    def read_held_out(self, part: str, marker: str) -> list[Chat]:
        """The chats held out for `part`, or those held out for the other purpose where there are none."""
        part = part if self.count(part) else {EVAL: TEST, TEST: EVAL}[part]
        return [chat for kept, _, _, chat in self.read(marker) if kept == part]

    def describe(self) -> dict[str, Any]:
        """What run.json keeps."""
        return {
            "sources": [
                source.describe() | {"rows": len(scan.hashes)}
                for source, scan in zip(self.sources, self.scans, strict=True)
            ],
            "rows": {part: self.count(part) for part in PARTS[1:]},
            "held_out_copies": self.held_out_copies,
            "parts_sha256": hashlib.sha256(b"".join(parts.tobytes() for parts in self.parts)).hexdigest(),
        }


def load_rows(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Rows:
    """Every row of the run, checked and split. Bad files fail here, before anything heavy is imported."""
    sources = find_sources(data_args.dataset_name, data_args)
    wants_eval = training_args.do_eval or training_args.eval_strategy != "no"
    wanted = [part for part, asked in ((EVAL, wants_eval), (TEST, training_args.do_predict)) if asked]
    record = None
    if model_args.checkpoint_dir and not training_args.do_train:
        record = find_run_record(Path(model_args.checkpoint_dir))
        wanted = find_held_out(record) or wanted
    if data_args.eval_dataset_name:
        sources = [source for source in sources if source.part == TRAIN]
        sources += find_sources(data_args.eval_dataset_name, data_args, EVAL, "--eval_dataset_name")
    scans = [scan_source(source) for source in sources]
    report_sources(sources, scans, wanted)
    copies = find_copies(sources, scans)
    parts = assign_parts(sources, scans, copies, wanted, data_args, training_args.data_seed)
    rows = Rows(sources, scans, parts, int(copies.sum()))
    if record:
        report_trained_rows(record, rows, data_args, training_args)
    if not (training_args.do_train or data_args.data_report):
        for own in parts:
            own[own == PARTS.index(TRAIN)] = 0
    if not rows.count(TRAIN) and training_args.do_train:
        held_out = f": {rows.held_out_copies:,} of them are held out" if rows.held_out_copies else ""
        raise UserError(f"--dataset_name {data_args.dataset_name} leaves no row to train on{held_out}")
    return rows


def find_held_out(record: dict[str, Any] | None) -> list[str]:
    """What a run held rows out for, so that a later evaluation measures none that it trained on."""
    counts = record["data"]["rows"] if record else {}
    return [part for part in (EVAL, TEST) if counts.get(part)]


def report_trained_rows(
    record: dict[str, Any], rows: Rows, data_args: DataArguments, training_args: TrainingArguments
) -> None:
    """Say where rows that the run trained on are evaluated: it held none out, others, or split otherwise."""
    copies = count_trained_copies(record, rows)
    if copies:
        notice(f"careful: {copies:,} rows of the run's data hold the chat of a row that is evaluated now")
    if any(source.part != TRAIN for source in rows.sources):
        return
    if {source.digest for source in rows.sources}.isdisjoint(
        own["sha256"] for own in record["data"]["sources"]
    ):
        return  # other rows
    now = {"eval_dataset_size": data_args.eval_dataset_size, "data_seed": training_args.data_seed}
    changed = [f"--{name} {value}" for name, value in now.items() if record["arguments"].get(name) != value]
    if not find_held_out(record):
        notice("careful: the run held nothing out, so it was trained on the rows that are evaluated now")
    elif changed:
        notice(f"careful: {' '.join(changed)} is not the run's, so rows it was trained on are evaluated too")


def count_trained_copies(record: dict[str, Any], rows: Rows) -> int:
    """Rows of the run's data that hold the chat of a row which the run did not know to be held out."""
    recorded = record["data"]["sources"] if "held_out_copies" in record["data"] else []
    left_out = {own["sha256"] for own in recorded if own["part"] != TRAIN}
    trained = {own["sha256"] for own in record["data"]["sources"] if own["part"] == TRAIN}
    pairs = [
        (source, scan)
        for source, scan in zip(rows.sources, rows.scans, strict=True)
        if (source.digest in trained if source.part == TRAIN else source.digest not in left_out)
    ]
    return int(find_copies(*zip(*pairs, strict=True)).sum()) if pairs else 0


def report_sources(sources: list[Source], scans: list[Scan], wanted: list[str]) -> None:
    """One line a source; raises UserError where one that is needed has no row that can be used."""
    for source, scan in zip(sources, scans, strict=True):
        bad = int((scan.hashes == 0).sum())
        line = f"{source.name}: {len(scan.hashes):,} rows, format {source.dataset_format}"
        if source.sample is not None and source.sample < len(scan.hashes):
            line += f", {source.sample:,} of them drawn"
        if source.dataset_format == "preference":
            line += " (the chosen answers are trained, the rejected left out)"
        for reason, (count, numbers) in list(scan.bad.items())[:3]:
            line += f"\n  {count:,} left out, row {numbers[0]} first: {reason}"
        if len(scan.bad) > 3:
            line += f"\n  {bad:,} left out in all"
        if scan.unread:
            columns = ", ".join(f"{column} ({count:,} rows)" for column, (count, _) in scan.unread.items())
            line += f"\n  texts that are not trained: {columns}; --columns says which column is what"
        if bad == len(scan.hashes) and (source.part == TRAIN or wanted):
            reason, (_, numbers) = next(iter(scan.bad.items()), ("it is empty", (0, [1])))
            raise UserError(f"{source.name}: no row can be used; row {numbers[0]}: {reason}")
        notice(line)


def find_copies(sources: Sequence[Source], scans: Sequence[Scan]) -> np.ndarray:
    """Which rows to train on hold the same chat as a row made for evaluation  # bool [rows of all sources]

    The whole chat, as everywhere in the split: what is measured is the answer, so the same question with
    another answer is another row (many sets ask a few questions thousands of times).
    """
    hashes = np.concatenate([scan.hashes for scan in scans])
    is_made_apart = np.repeat([source.part != TRAIN for source in sources], count_rows(scans))
    return ~is_made_apart & (hashes != 0) & np.isin(hashes, hashes[is_made_apart])


def count_rows(scans: Sequence[Scan]) -> list[int]:
    return [len(scan.hashes) for scan in scans]


def rehash_with_seed(hashes: np.ndarray, salt: str, seed: int) -> np.ndarray:
    """`hashes` scrambled by `salt` and `seed`, the same for rows of equal content  # uint64 [rows]

    To hold rows out, those with the smallest scrambled hashes are taken. So the choice follows from the
    content alone: a row stays held out when others are added, and its copies go with it. (splitmix64's
    finalizer)
    """
    start = hashlib.blake2b(f"{salt} {seed}".encode(), digest_size=8).digest()
    mixed = hashes ^ np.uint64(int.from_bytes(start, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def take_smallest(keys: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """The candidates with the `count` smallest keys; rows of equal content go together  # bool [rows]"""
    if count >= candidates.sum():
        return candidates
    limit = np.partition(keys[candidates], count - 1)[count - 1]
    return candidates & (keys <= limit)


def assign_parts(
    sources: list[Source],
    scans: list[Scan],
    copies: np.ndarray,  # bool [rows]
    wanted: list[str],
    data_args: DataArguments,
    data_seed: int,
) -> list[np.ndarray]:
    """The part of each row. Depends on contents and --data_seed alone, so it is the same at every start."""
    sizes = count_rows(scans)
    hashes = np.concatenate([scan.hashes for scan in scans])
    made_for = np.repeat([PARTS.index(source.part) for source in sources], sizes)
    is_train = made_for == PARTS.index(TRAIN)
    usable = (hashes != 0) & ~copies
    drawn = np.zeros(len(hashes), bool)
    for entry, sample in {source.entry: source.sample for source in sources}.items():
        if sample:
            mine = np.repeat([source.entry == entry for source in sources], sizes)
            if (mine & is_train).any():  # its files made for evaluation stay whole
                mine &= is_train
            # Two counts of one file draw different rows of it.
            free = mine & usable & ~np.isin(hashes, hashes[drawn])
            if sample > free.sum():
                notice(f"{entry}#{sample} takes all of the {int(free.sum()):,} rows that are there to draw")
            places = np.flatnonzero(free)
            first = np.argsort(rehash_with_seed(hashes, "sample", data_seed)[places], kind="stable")
            chosen = np.zeros_like(free)
            chosen[places[first[:sample]]] = True
            usable &= chosen | ~mine
            drawn |= chosen
    parts = np.where(usable & is_train, PARTS.index(TRAIN), 0).astype(np.uint8)
    keys = rehash_with_seed(hashes, "split", data_seed)
    own = usable & ~is_train
    if wanted and own.any():
        split_own(parts, made_for, own, keys, wanted)
    elif wanted:
        hold_out(parts, keys, wanted, data_args)
    keep_first(parts, PARTS.index(TRAIN), data_args.max_train_samples)
    for part in wanted:
        keep_first(parts, PARTS.index(part), data_args.max_eval_samples)
    return np.split(parts, np.cumsum(sizes)[:-1])


def split_own(
    parts: np.ndarray, made_for: np.ndarray, own: np.ndarray, keys: np.ndarray, wanted: list[str]
) -> None:
    """Take the held-out rows that the set comes with (its validation or test split) for those `wanted`.

    Where evaluation and prediction both want rows and the set has one split, each gets half of it.
    """
    kinds = [kind for kind in (EVAL, TEST) if (own & (made_for == PARTS.index(kind))).any()]
    if len(wanted) == 1:
        kind = wanted[0] if wanted[0] in kinds else kinds[0]
        parts[own & (made_for == PARTS.index(kind))] = PARTS.index(wanted[0])
    elif len(kinds) == 2:
        parts[own] = made_for[own]
    else:
        half = take_smallest(keys, own, max(1, int(own.sum()) // 2))
        parts[own] = np.where(half[own], PARTS.index(EVAL), PARTS.index(TEST))


def hold_out(parts: np.ndarray, keys: np.ndarray, wanted: list[str], data_args: DataArguments) -> None:
    """Take the rows with the smallest keys out of training, first for evaluation, then for prediction."""
    total = int((parts == PARTS.index(TRAIN)).sum())
    count = count_held_out(total, len(wanted), data_args)
    for part in wanted:
        left = parts == PARTS.index(TRAIN)
        chosen = take_smallest(keys, left, count)
        if (chosen == left).all():
            raise UserError(
                f"the {total} rows are too alike to hold some out: no copy of a held-out row is trained on; "
                "give --eval_dataset_name, or train without evaluation"
            )
        parts[chosen] = PARTS.index(part)
    if data_args.eval_dataset_size is None:
        counts = {part: int((parts == PARTS.index(part)).sum()) for part in wanted}  # copies go along
        names = {EVAL: "for evaluation", TEST: "for prediction"}
        held_out = ", ".join(f"{count} {names[part]}" for part, count in counts.items())
        notice(f"held out of {total} rows: {held_out} (--eval_dataset_size changes it)")


def count_held_out(total: int, shares: int, data_args: DataArguments) -> int:
    size = data_args.eval_dataset_size
    if size is None:
        count = max(1, min(MAX_HELD_OUT, int(total * MAX_HELD_OUT_SHARE)))
    else:
        count = max(1, round(size * total)) if size < 1 else int(size)
    if count * shares >= total:
        given = count if size is None else f"{size:g}"
        raise UserError(
            f"--eval_dataset_size {given} leaves nothing of {total} rows to train on: use a smaller "
            "count, or a share such as 0.1"
        )
    return count


def keep_first(parts: np.ndarray, part: int, count: int | None) -> None:
    if count is not None:
        parts[np.flatnonzero(parts == part)[count:]] = 0
