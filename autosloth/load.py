"""The dataset's rows, from a file or from the Hub, before their form is looked at."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError
from .fetch import ask_for, first_lines, is_offline, reading
from .settings import DATA_SUFFIXES, SFTSettings, is_hub_id

FILE_FORMATS = dict(zip(DATA_SUFFIXES, ("json", "json", "csv", "parquet"), strict=True))


def load_raw(settings: SFTSettings) -> Any:
    """A `datasets.Dataset` from a local file or a Hub id. Raises DataError."""
    if is_hub_id(settings.dataset):
        return load_from_hub(settings)
    return load_file(Path(settings.dataset).expanduser(), settings.split)


def load_file(path: Path, split: str) -> Any:
    """The rows of a JSON, JSONL, CSV or Parquet file. Raises DataError."""
    if path.is_dir():
        raise DataError(f"The dataset {path} is a folder.", "Name one file in it.")
    if not path.is_file():
        raise DataError(f"The dataset file {path} does not exist.", "Check the path, or upload the file first.")
    form = FILE_FORMATS.get(path.suffix.lower())
    if form is None:
        ends = ", ".join(FILE_FORMATS)
        raise DataError(f"The dataset file {path} has no form that is known here.", f"Give a file that ends in {ends}.")
    if not path.stat().st_size or (path.stat().st_size < 100 and not path.read_bytes().strip(b" \r\n[]{}")):
        raise DataError(f"The dataset file {path} is empty.", "Give one with at least two rows.")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(form, data_files={"train": glob.escape(str(path))}, split=split)
    except (DatasetGenerationError, ValueError) as error:
        reason = first_lines(error.__cause__ or error)
        raise DataError(
            f"The dataset file {path} cannot be read as {form} with split `{split}` ({reason}).",
            "Correct the file: one record per line for JSONL, a list of records for JSON.",
        ) from None


def load_from_hub(settings: SFTSettings) -> Any:
    """A dataset by its Hub id. Raises DataError."""
    from datasets import load_dataset

    ask_for("dataset", settings.dataset)
    with dataset_errors(settings.dataset):
        return load_dataset(settings.dataset, settings.dataset_config, split=settings.split)


def look_up(settings: SFTSettings) -> None:
    """Whether a Hub dataset has the configuration and the split that are asked for; no row is fetched. Raises DataError."""
    from datasets import ReadInstruction, load_dataset_builder

    ask_for("dataset", settings.dataset)
    if is_offline():
        return
    with dataset_errors(settings.dataset):
        builder = load_dataset_builder(settings.dataset, settings.dataset_config)
        wanted = ReadInstruction.from_spec(settings.split).to_spec()
    splits = [str(split) for split in builder.config.data_files or builder.info.splits or ()]
    missing = [name for name in (part.partition("[")[0] for part in wanted.split("+")) if name not in splits]
    if splits and missing:
        raise DataError(
            f"The dataset {settings.dataset} has no split `{missing[0]}`.",
            f"Set `split` to one that it has ({', '.join(splits)}), or to a part of it such as `{splits[0]}[:2000]`.",
        )


@contextlib.contextmanager
def dataset_errors(name: str) -> Iterator[None]:
    """Turn the errors of `datasets` for a Hub dataset into a DataError that says what to do."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

    try:
        with reading("dataset", name):
            yield
    except DatasetGenerationError as error:
        raise DataError(
            f"The files of the dataset {name} cannot be read ({first_lines(error.__cause__ or error)}).",
            "Choose another dataset, or download it, correct it and give the file.",
        ) from None
    except (EmptyDatasetError, DataFilesNotFoundError, RuntimeError) as error:  # the last one is for loading scripts
        raise DataError(
            f"The dataset {name} has no files that can be loaded ({first_lines(error)}).",
            f"Choose one that has {', '.join(DATA_SUFFIXES)} files.",
        ) from None
    except (DatasetNotFoundError, ConnectionError) as error:
        raise DataError(f"The dataset {name} could not be fetched ({first_lines(error)}).", "Run again.") from None
    except ValueError as error:
        todo = "Set `dataset_config` or `split` to one that it has."
        raise DataError(f"The dataset {name} could not be loaded ({first_lines(error)}).", todo) from None
