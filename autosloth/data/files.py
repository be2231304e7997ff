"""Data files: which files a path means (a file, a folder, an archive), and the rows in each, one at a time."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from ..errors import DataError
from ..hardware import GB
from ..hub_client import first_lines
from ..values import DATA_SUFFIXES
from .schemas import KNOWN_COLUMNS, plain_name
from .turns import SPEAKER, Row

# What `datasets` writes beside its Arrow files, and what macOS puts into archives.
NO_DATA = re.compile(r"(^|/)(\..*|__MACOSX/.*|dataset_infos?\.json|dataset_dict\.json|state\.json)$")
ABOUT_IT = re.compile(r"(^|/)(readme|licen[cs]e|changelog)[^/]*$", re.IGNORECASE)  # what lies beside many a dataset
# How a JSON document begins that holds splits: {"train": [...], "test": [...]}.
WITH_SPLITS = re.compile(rb'\A(\xef\xbb\xbf)?\s*\{\s*"(train|test|validation|valid|dev|val|eval)"\s*:\s*\[')
BATCH = 1000  # rows of a table that are in memory at once
JSON_GROWS = 8  # times its size that a JSON document takes in memory, at most
PROSE = (".txt", ".md")
PASSAGE = 4000  # characters of a row of a plain text, at most: about 1000 tokens
PACKED = 8  # times its size that a gzipped file may unpack to, as texts do


class Source(NamedTuple):
    """One data file: its name as the user knows it, how to open it, its form (`.csv`), and its size in bytes, unpacked."""

    name: str
    open: Callable[[], BinaryIO]
    form: str
    size: int = 0


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
    return [source for source in found if source.form not in PROSE] or found  # a README lies beside many a dataset


def sources_in(path: Path, name: str) -> list[Source]:
    """The data files in one file: itself, the members of a zip archive, or the splits of a JSON document; none when its name tells no form."""
    form = suffix_of(name)
    if NO_DATA.search(name) or not (form or name.lower().endswith(".zip")):
        return []
    if form is None:
        with archive_errors(name), zipfile.ZipFile(path) as archive:
            members = {member.filename: member.file_size for member in archive.infolist()}
        data = sorted(member for member in members if suffix_of(member) and not NO_DATA.search(member))
        found = [one_source(each, partial(open_member, path, each), members[each]) for each in data]
    else:
        found = [one_source(name, partial(open, path, "rb"), path.stat().st_size)]
    return [each for source in found for each in (splits_in(source) if source.form == ".json" else [source])]


def one_source(name: str, open_file: Callable[[], BinaryIO], size: int) -> Source:
    """A file of a form that is known, unpacked as it is read where its name ends in `.gz`."""
    if name.lower().endswith(".gz"):
        return Source(name, lambda: gzip.GzipFile(fileobj=open_file()), suffix_of(name), size * PACKED)
    return Source(name, open_file, suffix_of(name), size)


def unread_in(path: Path, sources: list[Source]) -> list[str]:
    """The files of a folder or a zip archive that none of these sources stands for, as the user knows them; hidden ones are not counted."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist() if not member.is_dir()]
    else:
        return []
    read = {source.name for source in sources} | {source.name.rpartition(" (")[0] for source in sources}  # of splits
    packed = [name for name in names if name.lower().endswith(".zip") and path.is_dir()]  # whose members are sources
    others = (name for name in names if name not in read and name not in packed)
    return [name for name in others if not NO_DATA.search(name) and not ABOUT_IT.search(name)]


def splits_in(source: Source) -> list[Source]:
    """The splits of a JSON document that holds some, each as a file of its own; else the document."""
    with archive_errors(source.name), source.open() as file:
        if not WITH_SPLITS.match(file.read(200)):
            return [source]
    try:
        content = parse_json(whole_text(source))
    except (ValueError, RecursionError):
        return [source]  # reading it tells what is wrong
    if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in content.values()):
        return [source]
    return [
        Source(f"{source.name} ({split})", partial(io.BytesIO, json.dumps(rows).encode()), ".json", source.size)
        for split, rows in content.items()
    ]


def open_member(archive: Path, member: str) -> BinaryIO:
    """A member of a zip archive, unpacked as it is read."""
    return zipfile.ZipFile(archive).open(member)


def suffix_of(name: str) -> str | None:
    """The end of a file's name that tells its form, `.gz` taken off.

    >>> suffix_of("data/Train.JSONL.gz")
    '.jsonl'
    """
    suffix = PurePosixPath(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in READERS else None


def read_source(source: Source, passage: int = PASSAGE) -> Iterator[Row]:
    """The rows of one data file; passage: characters that a row of a plain text may have. Raises DataError."""
    read = partial(read_text, passage=passage) if source.form in PROSE else READERS[source.form]
    with archive_errors(source.name):
        for number, row in enumerate(read(source), start=1):
            if not isinstance(row, dict):
                what = f"Row {number} of {source.name} is {json.dumps(row)[:60]}, and no record with named columns."
                raise DataError(what, 'Write each row as {"question": "...", "answer": "..."}.')
            yield row


def empty(name: str) -> DataError:
    """The error of a file in which nothing stands."""
    return DataError(f"The dataset file {name} is empty.", "Give one with at least two rows.")


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


def read_lines(source: Source) -> Iterator[Any]:
    """The values of a JSON Lines file. Raises DataError with the number of a broken line."""
    blank = True
    for number, line in enumerate(lines_of(source), start=1):
        if line.strip():
            blank = False
            try:
                yield parse_json(line)
            except (ValueError, RecursionError) as error:
                raise broken(source.name, number, error) from None
    if blank:
        raise empty(source.name)


def read_json(source: Source) -> Iterator[Any]:
    """The values of a JSON file: a list of rows, JSON Lines after all, or one of the wrappings that tools write. Raises DataError."""
    text = whole_text(source)
    if not text.strip():
        raise empty(source.name)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        first = text.lstrip().partition("\n")[0].strip()
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(parse_json(first), dict):
                yield from read_lines(source)
                return
        raise broken(source.name, getattr(error, "lineno", None), error) from None
    yield from unwrapped(source.name, content)


def read_text(source: Source, passage: int = PASSAGE) -> Iterator[Row]:
    """A plain text as rows of whole paragraphs, of at most so many characters where the paragraphs allow it."""
    row = ""
    for paragraph in re.split(r"(?<=\n)[ \t\r]*\n(?=\s*\S)", whole_text(source)):
        if row and len(row) + len(paragraph) > passage:
            yield {"text": row.strip("\r\n")}
            row = ""
        row += ("\n" if row else "") + paragraph
    if not row.strip():
        raise empty(source.name)
    yield {"text": row.strip("\r\n")}


def parse_json(text: str) -> Any:
    """What JSON text says. Raises ValueError, RecursionError."""
    return DECODER.decode(text.strip())


def only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of these keys and values. Raises ValueError where a key stands twice, of which only one could be kept."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one mapping")
    return mapping


DECODER = json.JSONDecoder(object_pairs_hook=only_once)


def broken(name: str, line: int | None, error: Exception) -> DataError:
    """The error of a line, or a document, that is no JSON."""
    reason = (
        "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", None) or first_lines(error)
    )
    where = f"Line {line} of {name}" if line else name
    return DataError(f"{where} is no valid JSON ({reason}).", f"Correct {'or delete that line' if line else 'it'}.")


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
        if len(of_rows) == 1 and not is_row(content, of_rows[0]):
            return of_rows[0]
        if len(lists) == len(content) > 1 and len({len(value) for value in lists}) == 1:
            return [dict(zip(content, values, strict=True)) for values in zip(*lists, strict=True)]
        columns = [value for value in content.values() if isinstance(value, dict)]
        if len(columns) == len(content) and len({tuple(column) for column in columns}) == 1 and "0" in columns[0]:
            return [{key: column[index] for key, column in content.items()} for index in columns[0]]
        if not of_rows or is_row(content, []):
            return [content]
    raise DataError(
        f"{name} holds no list of rows.", 'Write a list of records: [{"question": "...", "answer": "..."}].'
    )


def is_row(content: Row, listed: list[Row]) -> bool:
    """Whether a mapping is a row itself, not the wrapping of these rows: it has a column whose name is known, and that is no mere list of rows."""
    known = {key for key in content if plain_name(key) in KNOWN_COLUMNS}
    turns = bool(listed) and all(row.keys() & set(SPEAKER) for row in listed)
    return bool(known if turns else {key for key in known if content[key] is not listed})


def read_csv(source: Source) -> Iterator[Row]:
    """The rows of a table in text, every cell as the text that stands there; the header tells the delimiter. Raises DataError.

    A quote that does not end where its cell ends would swallow rows without a word, so it is refused. With tabs, as in TSV,
    quotes are text.
    """
    name, lines = source.name, lines_of(source)
    header, quoting, delimiter, told = next(lines, ""), csv.QUOTE_NONE, "\t", None
    if source.form == ".csv" and (told := re.fullmatch(r"sep=(.)\s*", header)):  # for Excel
        header = next(lines, "")
    if not header.strip():
        raise empty(name)
    if source.form == ".csv":
        quoting = csv.QUOTE_MINIMAL
        delimiter = (
            told[1] if told else max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
        )
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    seen: list[str] = []  # the lines of the row at hand
    reader = csv.reader(
        remembered(itertools.chain([header], lines), seen), delimiter=delimiter, quoting=quoting, strict=True
    )
    begun, odd, table = 1, False, quoting == csv.QUOTE_NONE
    try:
        columns, begun = next(reader), reader.line_num + 1
        twice = [column for column in columns if columns.count(column) > 1]
        if twice:
            raise DataError(f"{name} has two columns named {twice[0]!r}.", "Rename one of them.")
        for cells in reader:
            if len(cells) > len(columns):
                what = f"Line {reader.line_num} of {name} has {len(cells)} cells under {len(columns)} columns."
                raise DataError(what, f"Quote texts that hold {delimiter!r}.")
            refuse_odd_quotes(name, begun, cells, seen, delimiter, odd and len(cells) < len(columns))
            odd = table and bool(cells) and cells[-1].startswith('"') and cells[-1].count('"') % 2 == 1
            if cells:
                yield dict(zip(columns, cells, strict=False))
            begun = reader.line_num + 1
            seen.clear()
    except csv.Error as error:
        lines = f"Line {begun}" if reader.line_num <= begun else f"What begins in line {begun}"
        if "new-line" in str(error):
            raise DataError(
                f"{lines} of {name} is no CSV: a carriage return stands alone within a cell.",
                "Save the file with one kind of line ends, or quote that cell.",
            ) from None
        raise DataError(
            f"{lines} of {name} is no CSV: a quote is opened and not closed where its cell ends ({error}, line {reader.line_num}).",
            'Close that quote; within a quoted cell a quote is written twice ("").',
        ) from None


def remembered(lines: Iterable[str], seen: list[str]) -> Iterator[str]:
    """The same lines, each added to those that were seen."""
    for line in lines:
        seen.append(line)
        yield line


def refuse_odd_quotes(name: str, line: int, cells: list[str], lines: list[str], delimiter: str, goes_on: bool) -> None:
    """Raises DataError where a quote that was meant to quote a cell would be taken for text: behind a blank, or in a table with tabs over several lines."""
    behind = any(cell[:1] in " \t" and cell.lstrip(" \t").startswith('"') for cell in cells)
    if behind and re.search(rf'(^|{re.escape(delimiter)})[ \t]+"', "".join(lines), re.MULTILINE):
        what = f"Line {line} of {name} has a blank before a quote, which would become a part of the text."
        raise DataError(what, f"Take the blanks between {delimiter!r} and the quote away.")
    if goes_on and any(cell.endswith('"') for cell in cells):
        what = f"Line {line} of {name} goes on with a quoted cell of the line before; with tabs, quotes are text and a row is one line."
        raise DataError(what, "Write the table as CSV, where quotes keep a cell together.")


def read_parquet(source: Source) -> Iterator[Row]:
    """The rows of a Parquet file. Raises DataError."""
    import pyarrow.parquet

    with arrow_errors(source.name, "Parquet"), source.open() as file:
        opened = file if file.seekable() else io.BytesIO(file.read())
        for batch in pyarrow.parquet.ParquetFile(opened).iter_batches(BATCH):
            yield from rows_of(batch)


def read_arrow(source: Source) -> Iterator[Row]:
    """The rows of an Arrow file, in the stream format that `datasets` writes or the file format. Raises DataError."""
    import pyarrow

    with arrow_errors(source.name, "Arrow"), source.open() as file:
        opened = file if file.seekable() else io.BytesIO(file.read())
        whole = opened.read(6) == b"ARROW1"
        opened.seek(0)
        reader = (pyarrow.ipc.open_file if whole else pyarrow.ipc.open_stream)(opened)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                yield from rows_of(batch.slice(start, BATCH))


def rows_of(table: Any) -> list[Row]:
    """The rows of an Arrow table or batch from a file; what its labels are called stands in its schema, if `datasets` wrote it."""
    from datasets import Features

    names = table.schema.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns are named {twice[0]!r}")
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
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{name} cannot be read as {form} ({first_lines(error)}).",
            "Write or download the file again, without what the message names.",
        ) from None


READERS: dict[str, Callable[[Source], Iterator[Any]]] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
    ".md": read_text,
}
