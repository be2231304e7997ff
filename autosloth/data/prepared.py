"""Rows that are ready, on disk: written as they come, and then drawn into those to train on and those held out."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .clean import measured_by
from .encode import IGNORED, batches_of
from .turns import Row

AS_JSON = json.JSONEncoder(default=str).encode


class Prepared:
    """Rows in a Parquet file; in memory is only what is needed to draw from them and to count."""

    def __init__(self, rows: Iterator[Row], path: Path):
        import pyarrow.parquet

        self.path, self.keys, self.tokens, self.learnt = path, [], array("q"), array("q")
        writer = None
        for batch in batches_of(rows):
            table = table_of(batch)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            for row in batch:
                answers = len(row.get("rejected_ids", ()))
                self.keys.append(measured_by(row))
                self.tokens.append(len(row["input_ids"]) + len(row.get("prompt_ids", ())) + answers)
                self.learnt.append(int((row["labels"] != IGNORED).sum()) + answers)
        if writer:
            writer.close()

    def take(self, numbers: list[int], path: Path) -> None:
        """Write the rows of these numbers, which rise, to a file of their own."""
        import numpy
        import pyarrow.parquet

        wanted, source = numpy.zeros(len(self.keys), dtype=bool), pyarrow.parquet.ParquetFile(self.path)
        wanted[numbers] = True
        with pyarrow.parquet.ParquetWriter(path, source.schema_arrow) as writer:
            begin = 0
            for group in range(source.num_row_groups):
                table = source.read_row_group(group)
                chosen = wanted[begin : begin + table.num_rows]
                begin += table.num_rows
                if chosen.any():
                    writer.write_table(table.filter(chosen))


def table_of(rows: list[Row]) -> Any:
    """Rows as an Arrow table: `messages` and `tools` (JSON), `text`, `input_ids` and `labels` (int32 lists); pairs with what `encode_pairs` adds."""
    import pyarrow
    from datasets import Features, Json, List, Value

    numbers, chat, text = List(Value("int32")), Json(), Value("string")
    kinds = {"messages": chat, "tools": chat, "text": text, "input_ids": numbers, "labels": numbers}
    if "rejected_ids" in rows[0]:
        kinds |= {"prompt": chat, "chosen": chat, "rejected": chat, "rejected_text": text}
        kinds |= {"prompt_ids": numbers, "chosen_ids": numbers, "rejected_ids": numbers}
    columns = {
        name: [AS_JSON(row.get(name)) if kind is chat else row[name] for row in rows] for name, kind in kinds.items()
    }
    return pyarrow.table(columns).cast(Features(kinds).arrow_schema)


def first_whole(path: Path, max_length: int) -> Row | None:
    """The first of a file's rows, as far as its first group goes, that was not cut."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    rows = file.read_row_group(0, columns=["input_ids", "labels"]).to_pylist() if file.num_row_groups else []
    return next((row for row in rows if len(row["input_ids"]) < max_length), None)
