"""Data files: which files a path means (a file, a folder, an archive), and the rows in each, one at a time."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import DataError
from ..hub_client import first_lines
from ..values import DATA_SUFFIXES
from .schemas import KNOWN_COLUMNS, plain_name
from .sources import Source, archive_errors, empty, lines_of, whole_text
from .tables import read_arrow, read_csv, read_parquet
from .turns import SPEAKER, Row

# What `datasets` writes beside its Arrow files, and what macOS puts into archives.
NO_DATA = re.compile(r"(^|/)(\..*|__MACOSX/.*|dataset_infos?\.json|dataset_dict\.json|state\.json)$")
ABOUT_IT = re.compile(r"(^|/)(readme|licen[cs]e|changelog)[^/]*$", re.IGNORECASE)  # what lies beside many a dataset
# How a JSON document begins that holds splits: {"train": [...], "test": [...]}.
WITH_SPLITS = re.compile(rb'\A(\xef\xbb\xbf)?\s*\{\s*"(train|test|validation|valid|dev|val|eval)"\s*:\s*\[')
PROSE = (".txt", ".md")
PASSAGE = 4000  # characters of a row of a plain text, at most: about 1000 tokens
PACKED = 8  # times its size that a gzipped file may unpack to, as texts do


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
