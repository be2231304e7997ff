"""The rows of tables: CSV and TSV, Parquet and Arrow."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import DataError
from ..hub_client import first_lines
from .sources import Source, empty, lines_of
from .turns import Row

BATCH = 1000  # rows of a table that are in memory at once
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a cell, as CSV quotes it


def read_csv(source: Source) -> Iterator[Row]:
    """The rows of a table in text, every cell as the text that stands there; the header tells the delimiter. Raises DataError.

    A quote that does not end where its cell ends would swallow rows without a word, so it is refused. In TSV quotes are text,
    but where the cells that begin with one are all quoted as CSV quotes them.
    """
    name, lines = source.name, lines_of(source)
    header, quoting, delimiter, told = next(lines, ""), csv.QUOTE_NONE, "\t", None
    if source.form == ".csv" and (told := re.fullmatch(r"sep=(.)\s*", header)):  # for Excel
        header = next(lines, "")
    if not header.strip():
        raise empty(name)
    if source.form == ".csv":
        quoting = csv.QUOTE_MINIMAL
        delimiter = told[1] if told else delimiter_of(header)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    seen: list[str] = []  # the lines of the row at hand
    reader = csv.reader(
        remembered(itertools.chain([header], lines), seen), delimiter=delimiter, quoting=quoting, strict=True
    )
    begun, odd, table = 1, False, quoting == csv.QUOTE_NONE
    quoted = table and is_quoted(source)
    try:
        columns, begun = next(reader), reader.line_num + 1
        if quoted:
            columns = [unquoted(column) for column in columns]
        twice = [column for column in columns if columns.count(column) > 1]
        if twice:
            raise DataError(f"{name} has two columns named {twice[0]!r}.", "Rename one of them.")
        for cells in reader:
            if len(cells) > len(columns):
                what = f"Line {reader.line_num} of {name} has {len(cells)} cells under {len(columns)} columns."
                raise DataError(what, f"Quote texts that hold {delimiter!r}.")
            refuse_odd_quotes(name, begun, cells, seen, delimiter, odd and len(cells) < len(columns))
            odd = table and bool(cells) and cells[-1].startswith('"') and cells[-1].count('"') % 2 == 1
            if quoted:
                cells = [unquoted(cell) for cell in cells]
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


def delimiter_of(header: str) -> str:
    """What stands between the names of columns in this line: of the marks that may, the one that makes the most columns.

    >>> delimiter_of("question;answer"), delimiter_of('"a;b",c')
    (';', ',')
    """
    return max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def is_quoted(source: Source) -> bool:
    """Whether cells of a table with tabs, as far as its first lines tell, are quoted as CSV quotes them: each that begins with a quote. Raises DataError."""
    lines = itertools.islice(lines_of(source), BATCH)
    cells = [cell for line in lines for cell in line.rstrip("\r\n").split("\t") if cell.startswith('"')]
    return bool(cells) and all(QUOTED.fullmatch(cell) for cell in cells)


def unquoted(cell: str) -> str:
    """The text of a cell that CSV has quoted; any other cell as it is.

    >>> unquoted('"' + 'say ""hi""' + '"')
    'say "hi"'
    """
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


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
