"""A file's bytes and text: plain, gzipped or in a zip file; UTF-8, UTF-16 or GB18030, which GBK is part of.

A zip file is read as the folder that it holds: `rows.zip/train.json` is a file of it.
"""

import codecs
import functools
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

from utils.console import UserError, notice

PIECE = 1 << 20  # bytes read at once
# Latin and Big5 text may be valid GB18030 too, but of rare characters: few of them are in GB2312, which
# holds 99% of a Chinese text.
MIN_GB2312_SHARE = 0.8


def split_archive(path: Path) -> tuple[Path, str | None]:
    """(the file on disk, the name inside it where that is a zip file)."""
    for parent in path.parents:
        if parent.suffix.lower() == ".zip" and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return path, None


def list_archive(path: Path) -> list[Path]:
    """The files in a zip file, by name; what a Mac adds is left out."""
    with open_archive(path) as archive:
        names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    return [path / name for name in names if not name.startswith("__MACOSX/")]


def is_in_archive(path: Path) -> bool:
    disk, member = split_archive(path)
    return member is not None and path in list_archive(disk)


def open_archive(path: Path) -> ZipFile:
    try:
        return ZipFile(path)
    except BadZipFile as error:
        raise UserError(f"{path} is a damaged zip file ({error}): download it again") from error


def measure_size(path: Path) -> int:
    """Bytes of the file, as open_raw gives them."""
    disk, member = split_archive(path)
    if member is None:
        return disk.stat().st_size
    with open_archive(disk) as archive:
        return archive.getinfo(member).file_size


def open_raw(path: Path) -> IO[bytes]:
    """The file's bytes as they are stored, in a zip file as they were packed."""
    disk, member = split_archive(path)
    if member is None:
        return open(disk, "rb")
    with open_archive(disk) as archive:  # what is open stays so
        if archive.getinfo(member).flag_bits & 1:
            raise UserError(f"{disk} is locked by a password: unpack it")
        try:
            return archive.open(member)
        except NotImplementedError as error:
            raise UserError(f"{disk} cannot be read as it is packed ({error}): unpack it") from error


def hash_content(path: Path) -> str:
    """SHA-256 of the bytes that open_raw gives."""
    with damage_explained(path), open_raw(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # of a zip file, too


@contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """One line where what the file is packed in is damaged: the zip file that it is in, or its own gzip."""
    try:
        yield
    except (BadZipFile, EOFError, zlib.error, gzip.BadGzipFile) as error:
        is_own = path.suffix == ".gz" and not isinstance(error, BadZipFile)
        what = "a damaged gzip file" if is_own else "damaged in its zip file"
        raise UserError(f"{path} is {what} ({error}): download it again") from error


def open_binary(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.GzipFile(fileobj=open_raw(path)) if path.suffix == ".gz" else open_raw(path)


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """The text without its byte order mark. Raises UserError where it is of none of the three encodings."""
    return io.TextIOWrapper(open_binary(path), encoding=find_encoding(path), newline=newline)


def find_encoding(path: Path) -> str:
    status = split_archive(path)[0].stat()
    return read_encoding(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1000)
def read_encoding(path: Path, size: int, changed: int) -> str:
    """The encoding by the whole file, a piece at a time; said where it is not UTF-8, the usual one.

    `size` and `changed` (ns) tell apart what has stood under this path: one pass a file is enough.
    """
    with open_binary(path) as stream:
        start = stream.read(2)
    # Without a mark, the first character of UTF-16 tells its kind: ASCII, as in JSON and most tables.
    marks = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    if start not in marks and start.count(0) == 1:
        marks[start] = "utf-16-le" if start[1] == 0 else "utf-16-be"
    try:
        for _ in decode_pieces(path, marks.get(start, "utf-8-sig")):
            pass
    except UnicodeDecodeError as error:
        if start not in marks and is_chinese(path):
            notice(f"{path}: read as GB18030 (GBK) text, as it is no UTF-8")
            return "gb18030"
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} is no UTF-8 text, nor UTF-16 or GBK ({where}): save it as UTF-8") from error
    if start in marks:
        notice(f"{path}: read as UTF-16 text")
    return marks.get(start, "utf-8-sig")


def decode_pieces(path: Path, encoding: str) -> Iterator[str]:
    """The text in pieces. The `start` of a UnicodeDecodeError counts from the file's beginning."""
    decoder, at = codecs.getincrementaldecoder(encoding)(), 0
    with open_binary(path) as stream:
        while True:
            piece, kept = stream.read(PIECE), len(decoder.getstate()[0])
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                error.start += at - kept
                raise
            if not piece:
                return
            at += len(piece)


def is_chinese(path: Path) -> bool:
    """Whether these bytes are GB18030 text of characters that people write."""
    common = foreign = 0
    try:
        for text in decode_pieces(path, "gb18030"):
            ascii_count = len(text.encode("ascii", "ignore"))
            foreign += len(text) - ascii_count
            common += (len(text.encode("gb2312", "ignore")) - ascii_count) // 2
    except UnicodeDecodeError:
        return False
    return common >= MIN_GB2312_SHARE * foreign
