"""Data files: which files a path means (a file, a folder, an archive), and the rows in each."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from ..errors import DataError
from ..fetch import first_lines
from ..values import DATA_SUFFIXES
from .normalise import Row

# What `datasets` writes beside its Arrow files, and what macOS puts into archives.
NO_DATA = re.compile(r"(^|/)(\..*|__MACOSX/.*|dataset_infos?\.json|dataset_dict\.json|state\.json)$")


class Source(NamedTuple):
    """One data file: its name as the user knows it, and how to open it."""

    name: str
    open: Callable[[], BinaryIO]


def sources_of(path: Path, name: str) -> list[Source]:
    """The data files that a path stands for; their names are relative to a folder or an archive. Raises DataError."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        found = [source for file in files for source in sources_in(file, file.relative_to(path).as_posix())]
        what = f"The folder {name} holds no data file."
    elif path.is_file():
        found = sources_in(path, PurePosixPath(name).name)
        what = f"The dataset file {name} has no form that is known here."
    else:
        raise DataError(f"The dataset file {name} does not exist.", "Check the path, or upload the file first.")
    if not found:
        raise DataError(what, f"Give files that end in {', '.join(DATA_SUFFIXES)}.")
    return found


def sources_in(path: Path, name: str) -> list[Source]:
    """The data files in one file: itself, or the members of a zip archive; none when its name tells no form."""
    if NO_DATA.search(name):
        return []
    if name.lower().endswith(".zip"):
        with archive_errors(name), zipfile.ZipFile(path) as archive:
            members = sorted(
                member for member in archive.namelist() if suffix_of(member) and not NO_DATA.search(member)
            )
        return [Source(member, partial(open_member, path, member)) for member in members]
    return [Source(name, partial(open, path, "rb"))] if suffix_of(name) else []


def open_member(archive: Path, member: str) -> BinaryIO:
    """A member of a zip archive, unpacked in memory."""
    with zipfile.ZipFile(archive) as opened:
        return io.BytesIO(opened.read(member))


def suffix_of(name: str) -> str | None:
    """The end of a file's name that tells its form, `.gz` taken off.

    >>> suffix_of("data/Train.JSONL.gz")
    '.jsonl'
    """
    suffix = PurePosixPath(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in READERS else None


def read_source(source: Source) -> Iterator[Row]:
    """The rows of one data file. Raises DataError."""
    with archive_errors(source.name), source.open() as file:
        data = gzip.decompress(file.read()) if source.name.lower().endswith(".gz") else file.read()
    if not data.strip():
        raise DataError(f"The dataset file {source.name} is empty.", "Give one with at least two rows.")
    for number, row in enumerate(READERS[suffix_of(source.name)](source.name, data), start=1):
        if not isinstance(row, dict):
            what = f"Row {number} of {source.name} is {json.dumps(row)[:60]}, and no record with named columns."
            raise DataError(what, 'Write each row as {"question": "...", "answer": "..."}.')
        yield row


@contextlib.contextmanager
def archive_errors(name: str) -> Iterator[None]:
    """Turn what zipfile and gzip say of a bad archive into a DataError."""
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, RuntimeError, NotImplementedError) as error:
        what = f"The archive {name} cannot be unpacked ({first_lines(error)})."
        raise DataError(what, "Pack the files again without a password, or give them unpacked.") from None


def text_in(name: str, data: bytes) -> str:
    """Text in UTF-8, or in what its byte-order mark says. Raises DataError with the line of the first byte that is none."""
    marks = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((marks[mark] for mark in marks if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name} is no text in {encoding.removesuffix('-sig').upper()}: line {line} holds the byte 0x{data[error.start]:02X}.",
            "Save it as UTF-8 (in Excel: CSV UTF-8).",
        ) from None
    if text[:200].lstrip().lower().startswith(("<!doctype", "<html")):
        raise DataError(f"{name} is a web page, not a data file.", "Give the address of the file itself.")
    return text


def read_lines(name: str, data: bytes) -> Iterator[Any]:
    """The values of a JSON Lines file. Raises DataError with the number of a broken line."""
    for number, line in enumerate(io.StringIO(text_in(name, data)), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise broken(name, number, error) from None


def read_json(name: str, data: bytes) -> list[Any]:
    """The values of a JSON file: a list of rows, JSON Lines after all, or one of the wrappings that tools write. Raises DataError."""
    text = text_in(name, data)
    try:
        return unwrapped(name, json.loads(text))
    except RecursionError as error:
        raise broken(name, 1, error) from None
    except json.JSONDecodeError as error:
        first = text.lstrip().partition("\n")[0].strip()
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(first), dict):
                return list(read_lines(name, data))
        raise broken(name, error.lineno, error) from None


def broken(name: str, line: int, error: Exception) -> DataError:
    """The error of a line that is no JSON."""
    reason = getattr(error, "msg", "nested too deeply")
    return DataError(f"Line {line} of {name} is no valid JSON ({reason}).", "Correct or delete that line.")


def unwrapped(name: str, content: Any) -> list[Any]:
    """The rows in a JSON document.

    Beside a list there are {"data": [rows]}, {column: [values]}, and pandas' {column: {index: value}}.

    >>> unwrapped("x.json", {"version": 1, "data": [{"a": 1}]})
    [{'a': 1}]
    """
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and content:
        lists = [value for value in content.values() if isinstance(value, list)]
        of_rows = [value for value in lists if value and all(isinstance(row, dict) for row in value)]
        if not ROW_KEYS & content.keys() and len(of_rows) == 1:
            return of_rows[0]
        if len(lists) == len(content) > 1 and len({len(value) for value in lists}) == 1:
            return [dict(zip(content, values, strict=True)) for values in zip(*lists, strict=True)]
        columns = [value for value in content.values() if isinstance(value, dict)]
        if len(columns) == len(content) and len({tuple(column) for column in columns}) == 1 and "0" in columns[0]:
            return [{key: column[index] for key, column in content.items()} for index in columns[0]]
        if not of_rows or ROW_KEYS & content.keys():
            return [content]
    raise DataError(
        f"{name} holds no list of rows.", 'Write a list of records: [{"question": "...", "answer": "..."}].'
    )


ROW_KEYS = {"messages", "conversations", "chosen"}  # lists that belong to one row


def read_csv(name: str, data: bytes, delimiter: str | None = None) -> Iterator[Row]:
    """The rows of a CSV file, every cell as the text that stands there; the header tells the delimiter. Raises DataError.

    A quote that does not end where its cell ends would swallow rows without a word, so it is refused. With tabs
    (`delimiter` given, as in TSV) quotes are text.
    """
    text = text_in(name, data)
    if "\n" not in text:  # as old Macs end their lines
        text = text.replace("\r", "\n")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    header = text.partition("\n")[0]
    quoting = csv.QUOTE_MINIMAL if delimiter is None else csv.QUOTE_NONE
    delimiter = delimiter or max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    begun = 1
    try:
        columns, begun = next(reader), reader.line_num + 1
        twice = [column for column in columns if columns.count(column) > 1]
        if twice:
            raise DataError(f"{name} has two columns named {twice[0]!r}.", "Rename one of them.")
        for cells in reader:
            if len(cells) > len(columns):
                what = f"Line {reader.line_num} of {name} has {len(cells)} cells under {len(columns)} columns."
                raise DataError(what, f"Quote texts that hold {delimiter!r}.")
            if cells:
                yield dict(zip(columns, cells, strict=False))
            begun = reader.line_num + 1
    except csv.Error as error:
        lines = f"Line {begun}" if reader.line_num <= begun else f"What begins in line {begun}"
        raise DataError(
            f"{lines} of {name} is no CSV: a quote is opened and not closed where its cell ends ({error}, line {reader.line_num}).",
            'Close that quote; within a quoted cell a quote is written twice ("").',
        ) from None


def read_parquet(name: str, data: bytes) -> list[Row]:
    """The rows of a Parquet file. Raises DataError."""
    import pyarrow.parquet

    with arrow_errors(name, "Parquet"):
        return rows_of(pyarrow.parquet.read_table(io.BytesIO(data)))


def read_arrow(name: str, data: bytes) -> list[Row]:
    """The rows of an Arrow file, in the stream format that `datasets` writes or the file format. Raises DataError."""
    import pyarrow

    opened = pyarrow.ipc.open_file if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    with arrow_errors(name, "Arrow"):
        return rows_of(opened(data).read_all())


def rows_of(table: Any) -> list[Row]:
    """The rows of an Arrow table from a file; what its labels are called stands in its schema, if `datasets` wrote it."""
    from datasets import Features

    told = b"huggingface" in (table.schema.metadata or {})
    return plain(table.to_pylist(), table.schema, Features.from_arrow_schema(table.schema) if told else {})


def plain(rows: list[Row], schema: Any, features: Any) -> list[Row]:
    """Rows from Arrow with labels as their names, and without the keys that Arrow fills with null where other rows have them."""
    from datasets import ClassLabel

    labels = {name: kind for name, kind in features.items() if isinstance(kind, ClassLabel)}
    nested = [field.name for field in schema if "struct<" in str(field.type)]
    for row in rows:
        for name, kind in labels.items():
            row[name] = None if row[name] is None or row[name] < 0 else kind.int2str(row[name])
        for name in nested:
            row[name] = without_nulls(row[name])
    return rows


def without_nulls(value: Any) -> Any:
    """A value without the keys of its mappings that hold None.

    >>> without_nulls([{"city": "Ulm", "expr": None}])
    [{'city': 'Ulm'}]
    """
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


@contextlib.contextmanager
def arrow_errors(name: str, form: str) -> Iterator[None]:
    """Turn pyarrow's errors for a damaged file into a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{name} cannot be read as {form} ({first_lines(error)}).", "Write or download the file again."
        ) from None


READERS: dict[str, Callable[[str, bytes], Any]] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
