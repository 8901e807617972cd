"""One pass over a source checks every row and hashes its content.

Equal chats have equal hashes, whatever the formats of their files: duplicates are found by them, and rows
are held out by them (rows.py). A pass over a million rows takes some 20 s, so that of a large
file is kept.
"""

import hashlib
import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.console import UserError
from utils.data.cache import find_or_build, hash_code
from utils.data.file_text import measure_size
from utils.data.formats import ALIASES, find_format, read_row
from utils.data.readers import find_kind
from utils.data.sources import Source
from utils.prompts.messages import Message
from utils.prompts.rendering import CLOSE, THOUGHT_KEYS, convert_arguments, split_thought

LISTED_ROWS = 100  # row numbers kept of each finding
CACHED_ROWS = 20_000  # scanning fewer takes less than a second


Findings = dict[str, list[Any]]  # what was found -> [rows, numbers of the first of them, from 1]


def note(findings: Findings, what: str, number: int) -> None:
    count, numbers = findings.setdefault(what, [0, []])
    findings[what][0] = count + 1
    if count < LISTED_ROWS:
        numbers.append(number)


@dataclass
class Scan:
    """What one pass over a source found. A hash of 0 marks a row that cannot be used."""

    hashes: np.ndarray  # uint64 [rows]
    bad: Findings = field(default_factory=dict)  # by the reason
    cleaned: Findings = field(default_factory=dict)
    unread: Findings = field(default_factory=dict)  # by the column, with a text that is not trained


def find_content(message: Message) -> Message:
    """What makes two messages the same, however a file writes thoughts and calls: not marks, not ids."""
    if len(message) == 2 and (message["role"] != "assistant" or CLOSE not in message["content"]):
        return message
    is_reply = message["role"] == "assistant"
    thought, said = split_thought(message) if is_reply else ("", message["content"])
    same = {"role": message["role"], "content": said}
    if thought:
        same[THOUGHT_KEYS[0]] = thought
    if message.get("tool_calls"):
        try:
            calls = [call.get("function", call) for call in convert_arguments(message, dict)["tool_calls"]]
            same["tool_calls"] = [[call.get("name"), call.get("arguments")] for call in calls]
        except TypeError:  # no calls as templates take them: the row is left out later, with this reason
            same["tool_calls"] = message["tool_calls"]
    return same


def scan_source(source: Source) -> Scan:
    """Read a source once: check every row and hash its content. Kept on disk for large sources."""

    def build(folder: Path) -> None:
        scan = scan_rows(source)
        np.save(folder / "hashes.npy", scan.hashes)
        found = {name: value for name, value in vars(scan).items() if name != "hashes"}
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")

    if source.path is not None and measure_size(source.path) < 200 * CACHED_ROWS:
        return scan_rows(source)
    kind = find_kind(source.path) if source.path else None  # the same bytes are other rows as .csv and .tsv
    folder, _ = find_or_build(
        "scan",
        build,
        digest=source.digest,
        kind=kind,
        dataset_format=source.dataset_format,
        columns=source.layout and source.layout.describe(),
        code=hash_code(__name__),
    )
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return Scan(np.load(folder / "hashes.npy"), **found)


def scan_rows(source: Source) -> Scan:
    scan, hashes = Scan(np.zeros(0, np.uint64)), array("Q")
    write_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str).encode
    own_names = dict(source.layout.columns) if source.layout else {}
    for number, row in enumerate(source.read(), 1):
        try:
            chat = read_row(row, source.dataset_format)
        except UserError as error:
            theirs = find_format(row)
            is_other = theirs not in (None, ALIASES.get(source.dataset_format, source.dataset_format))
            other = f"is of format {theirs} and not {source.dataset_format}"
            reason = f"{other}: a file, and --dataset_format, is for rows of one format"
            note(scan.bad, reason if is_other else str(error), number)
            hashes.append(0)
            continue
        for what in chat.cleaned:
            note(scan.cleaned, what, number)
        for column in chat.unread:
            note(scan.unread, own_names.get(column, column), number)
        content = write_json([list(map(find_content, chat.messages)), chat.tools])
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little") or 1)
    scan.hashes = np.array(hashes, np.uint64)
    return scan
