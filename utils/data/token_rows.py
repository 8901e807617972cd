"""Tokenized rows on disk: one flat file of token ids, read through the page cache, never all in memory."""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from utils.prompts.messages import IGNORE_INDEX

READ_TOKENS = 1 << 22


class Example(TypedDict):
    input_ids: np.ndarray  # int64 [tokens]
    labels: np.ndarray  # int64 [tokens]
    row: np.int64  # its index in the set


@dataclass
class TokenRows:
    """A map-style dataset of Examples.

    `tokens` holds the id of a trained token and the complement of the id (~id, negative) of one that is only
    read: half the space of two arrays, and labels can never be out of step with their tokens.
    """

    tokens: np.ndarray  # int32 [all tokens]
    offsets: np.ndarray  # int64 [rows + 1]
    origins: np.ndarray  # int32 [rows, 2]: index of the source, number of the row in it
    found: dict[str, Any] = field(default_factory=dict)  # what was counted while tokenizing

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        signed = self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)
        trained = signed >= 0
        return {
            "input_ids": np.where(trained, signed, ~signed),
            "labels": np.where(trained, signed, IGNORE_INDEX),
            "row": np.int64(index),
        }

    def read_tokens(self) -> Iterator[np.ndarray]:
        """`tokens` in pieces, read from the file: a mapped page would count as memory of this process."""
        if not isinstance(self.tokens, np.memmap) or self.tokens.filename is None:
            yield self.tokens
            return
        with open(self.tokens.filename, "rb") as file:
            while len(piece := np.fromfile(file, np.int32, READ_TOKENS)):
                yield piece

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row  # int64 [rows]"""
        return np.diff(self.offsets)


class TokenWriter:
    """Rows appended to a folder; `close` makes them readable by open_rows."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.file = folder, open(folder / "tokens.bin", "wb")
        self.lengths, self.origins = array("q"), array("i")

    def append(self, signed: np.ndarray, source: int, number: int) -> None:
        self.file.write(signed.astype(np.int32, copy=False).tobytes())
        self.lengths.append(len(signed))
        self.origins.extend((source, number))

    def close(self, found: dict[str, Any]) -> None:
        self.file.close()
        np.save(self.folder / "offsets.npy", np.cumsum(np.concatenate([[0], self.lengths]), dtype=np.int64))
        np.save(self.folder / "origins.npy", np.array(self.origins, np.int32).reshape(-1, 2))
        (self.folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def open_rows(folder: Path) -> TokenRows:
    empty = (folder / "tokens.bin").stat().st_size == 0
    return TokenRows(
        np.zeros(0, np.int32) if empty else np.memmap(folder / "tokens.bin", np.int32, "r"),
        np.load(folder / "offsets.npy"),
        np.load(folder / "origins.npy"),
        json.loads((folder / "found.json").read_text(encoding="utf-8")),
    )
