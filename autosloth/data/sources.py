"""One data file as its bytes and as text, whatever its encoding and its packing."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from ..errors import DataError
from ..hardware import GB
from ..hub_client import first_lines

JSON_GROWS = 8  # times its size that a JSON document takes in memory, at most


class Source(NamedTuple):
    """One data file: its name as the user knows it, how to open it, its form (`.csv`), and its size in bytes, unpacked."""

    name: str
    open: Callable[[], BinaryIO]
    form: str
    size: int = 0


@contextlib.contextmanager
def archive_errors(name: str) -> Iterator[None]:
    """Turn what zipfile and gzip say of a bad archive into a DataError."""
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        what = f"The archive {name} cannot be unpacked ({first_lines(error)})."
        raise DataError(what, "Pack the files again without a password, or give them unpacked.") from None


def lines_of(source: Source) -> Iterator[str]:
    """The lines of a text in UTF-8, or in what its byte-order mark says, with their ends. Raises DataError with the line of the first byte that is none."""
    with source.open() as file:
        start = file.read(4)
        wide = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
        if wide:
            yield from io.StringIO(decoded(source.name, start + file.read(), wide, 1))
            return
        first = (start if start.endswith(b"\n") else start + file.readline()).removeprefix(codecs.BOM_UTF8)
        if first.rstrip(b"\r\n").find(b"\r") >= 0:  # as old Macs end their lines
            first = first + file.read()
            first = first.replace(b"\r", b"\n") if b"\n" not in first else first
            yield from io.StringIO(decoded(source.name, first, "utf-8", 1))
            return
        if first[:200].lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise DataError(f"{source.name} is a web page, not a data file.", "Give the address of the file itself.")
        for number, line in enumerate(itertools.chain(io.BytesIO(first), file), start=1):
            yield decoded(source.name, line, "utf-8", number)


# Longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


def decoded(name: str, data: bytes, encoding: str, line: int) -> str:
    """Bytes as text, which begins at this line of the file. Raises DataError."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{name} is no text in {encoding.upper()}: line {at} holds the byte 0x{data[error.start]:02X}.",
            "Save it as UTF-8 (in Excel: CSV UTF-8).",
        ) from None


def whole_text(source: Source) -> str:
    """All of a text at once. Raises DataError when that would not fit into the memory."""
    import psutil

    free, needed = psutil.virtual_memory().available, source.size * JSON_GROWS
    if needed > free:
        raise DataError(
            f"{source.name} is one JSON document of {source.size / GB:.1f} GB, which is read as a whole and takes up to {needed / GB:.0f} GB of memory; {free / GB:.1f} GB are free.",
            "Write its rows as JSON Lines or Parquet, which are read row by row.",
        )
    return "".join(lines_of(source))


def empty(name: str) -> DataError:
    """The error of a file in which nothing stands."""
    return DataError(f"The dataset file {name} is empty.", "Give one with at least two rows.")
