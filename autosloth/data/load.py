"""The dataset's rows as they are, from the Hub, a web address or local files."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..hub_client import UNREACHED, ask_for, first_lines, is_offline, reading
from ..output import say
from ..retries import STALLED_S, SpoiledError, as_hashed, cause_of, in_words, persistently
from ..settings import Settings
from ..values import DATA_SUFFIXES, is_address, is_hub_id
from .files import PASSAGE, read_source, sources_of, unread_in
from .recognise import IGNORE, media_refused
from .sources import Source
from .tables import BATCH, delimiter_of, plain
from .turns import Row

MAX_NAMED = 5  # files in a line
SHIFTED = "Length of header"  # how pandas begins to say that a row has more cells than the header
CHARACTERS = 3  # a token has, at least, in the prose of most languages that Latin letters write


def load_raw(settings: Settings, setting: str = "split") -> tuple[Iterator[Row], str | None]:
    """The rows of the split that a setting (`split`, `eval_split`) names, one at a time, and the commit they come from when they come from the Hub. Raises DataError."""
    if is_hub_id(settings.dataset):
        return load_from_hub(settings, setting)
    return load_from_files(settings, setting), None


def load_from_hub(settings: Settings, setting: str) -> tuple[Iterator[Row], str | None]:
    """The rows of a split of a dataset on the Hub, and the commit they are from. Raises DataError."""
    from datasets import Audio, Image, Video

    ask_for("dataset", settings.dataset)
    with dataset_errors(settings.dataset):
        builder = prepared(settings.dataset, settings.dataset_config)
    splits = list(builder.info.splits or ())
    split = getattr(settings, setting)
    refuse_missing(settings.dataset, split_names(settings.dataset, split), splits, setting)
    with dataset_errors(settings.dataset):
        found = builder.as_dataset(split=split)
    media = [name for name, kind in found.features.items() if isinstance(kind, (Audio, Image, Video))]
    if seen := [name for name in media if settings.columns.get(name) != IGNORE]:
        raise media_refused(settings.dataset, seen[0])
    texts = found.select_columns([name for name in found.features if name not in media])
    parts = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
    rows = (row for part in parts for row in plain(rows_in(part), texts.data.schema, texts.features))
    return rows, builder.hash  # `datasets` keys its cache by the commit


def prepared(name: str, config: str | None) -> Any:
    """The builder of a dataset on the Hub, its tables made; CSV that `datasets` would part at commas is parted at its own delimiter. Raises DataError and what `datasets` raises."""
    from datasets.exceptions import DatasetGenerationError

    builder = builder_of(name, config)
    try:
        persistently(partial(prepare, builder))
    except DatasetGenerationError:
        delimiter = delimiter_of(first_line(builder)) if by_commas(builder) else ","
        if delimiter == ",":
            raise
    else:
        refuse_shifted(name, builder)
        columns = list(builder.info.features or ())
        delimiter = delimiter_of(columns[0]) if len(columns) == 1 and by_commas(builder) else ","
        if delimiter == ",":
            return builder
    builder = builder_of(name, builder.config.name, sep=delimiter)
    persistently(partial(prepare, builder))
    return builder


def builder_of(name: str, config: str | None, **kwargs: Any) -> Any:
    """What makes the tables of a dataset on the Hub, or, offline, has those made before, of commas or another delimiter. Raises what `datasets` raises."""
    from datasets import load_dataset_builder

    load = partial(load_dataset_builder, name, config)
    try:
        return persistently(partial(load, **kwargs))
    except ValueError:
        for delimiter in ";\t|" if is_offline() and not kwargs else "":
            with contextlib.suppress(ValueError):
                return load(sep=delimiter)
        raise


def by_commas(builder: Any) -> bool:
    """Whether a dataset is CSV that is parted at commas, as is the default; of tables that are found offline that is not known."""
    config = builder.config
    return builder.info.builder_name == "csv" and getattr(config, "sep", ",") == "," and not getattr(config, "delimiter", None)  # fmt: skip


def first_line(builder: Any) -> str:
    """The first line of the first file of a dataset of text files, which are downloaded already."""
    from datasets import DownloadConfig, DownloadManager

    manager = DownloadManager(download_config=DownloadConfig(disable_tqdm=True, token=builder.token))
    address = next(file for files in builder.config.data_files.values() for file in files)
    path = next(iter(manager.iter_files(manager.download_and_extract(address))))
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline()


def refuse_shifted(name: str, builder: Any) -> None:
    """Raises DataError where the tables of a CSV, which another program has made, have the first column as an index that no file names."""
    index = "__index_level_0__"  # pandas' name for what has none
    if getattr(builder.config, "index_col", None) is False and index in builder.info.features and index not in first_line(builder):  # fmt: skip
        raise too_many_cells(name)


def too_many_cells(name: str) -> DataError:
    """The error of a CSV on the Hub with a row that has more cells than there are columns."""
    return DataError(
        f"A file of the dataset {name} has a row with more cells than its first line names columns, so it is not clear which is whose.",
        "Download its files and give their path: they are then read row by row, and the wrong line is named.",
    )


def prepare(builder: Any) -> None:
    """Download the files of a dataset and make its tables, of no file that arrived spoiled. Raises SpoiledError.

    In CSV pandas would take the first cells of a row with too many for an index, and shift all others: here it warns, which is an error.
    """
    if getattr(builder.config, "index_col", False) is None:  # which the name of the cache does not depend on
        builder.config.index_col = False
    try:
        with as_hashed(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=SHIFTED)
            builder.download_and_prepare()
    except SpoiledError:
        shutil.rmtree(builder.cache_dir, ignore_errors=True)  # tables that were made of it
        raise


def rows_in(part: dict[str, list]) -> list[Row]:
    """The rows of a part of a dataset, which comes by column."""
    return [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]


def look_up(settings: Settings) -> list[str] | None:
    """Whether a Hub dataset has the configuration and the splits that are asked for; no row is fetched. Gives its columns where they are known. Raises DataError."""
    from datasets import load_dataset_builder

    ask_for("dataset", settings.dataset)
    if is_offline():
        return None
    with dataset_errors(settings.dataset):
        builder = persistently(partial(load_dataset_builder, settings.dataset, settings.dataset_config))
    splits = [str(split) for split in builder.config.data_files or builder.info.splits or ()]
    for setting in ("split", "eval_split"):
        if split := getattr(settings, setting):
            refuse_missing(settings.dataset, split_names(settings.dataset, split), splits, setting)
    return list(builder.info.features) if builder.info.features else None


@contextlib.contextmanager
def dataset_errors(name: str) -> Iterator[None]:
    """Turn the errors of `datasets` for a Hub dataset into a DataError that says what to do."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

    try:
        with reading("dataset", name):
            yield
    except DatasetGenerationError as error:
        if str(error.__cause__).startswith(SHIFTED):
            raise too_many_cells(name) from None
        raise DataError(
            f"The files of the dataset {name} cannot be read ({first_lines(error.__cause__ or error)}).",
            "Download its files and give their path: they are then read row by row, and the wrong line is named.",
        ) from None
    except (EmptyDatasetError, DataFilesNotFoundError, RuntimeError) as error:  # the last one is for loading scripts
        raise DataError(
            f"The dataset {name} has no files that can be loaded ({first_lines(error)}).",
            f"Choose one that has {', '.join(DATA_SUFFIXES)} files.",
        ) from None
    except (DatasetNotFoundError, ConnectionError) as error:
        raise DataError(f"The dataset {name} {UNREACHED} ({first_lines(error)}).", "Run again.") from None
    except ValueError as error:
        todo = "Set `dataset_config` or `split` to one that it has."
        raise DataError(f"The dataset {name} could not be loaded ({first_lines(error)}).", todo) from None


def load_from_files(settings: Settings, setting: str) -> Iterator[Row]:
    """The rows of the split that a setting names of a local file, folder or archive, or of one at an address. Raises DataError.

    Files belong to the split that their name or folder tells, by the convention of `datasets`
    (huggingface.co/docs/datasets/repository_structure); where none tells, all are `train`.
    """
    name, split = settings.dataset, getattr(settings, setting)
    sources = files_of(name)
    splits, wanted = by_split(sources), split_names(name, split)
    refuse_missing(name.partition("?")[0], wanted, list(splits), setting)
    if setting == "split":
        others = split_names(name, settings.eval_split) if settings.eval_split else []
        tell_files(name, sources, {part: files for part, files in splits.items() if part not in wanted + others})
    read = partial(read_source, passage=min(PASSAGE, settings.max_length * CHARACTERS))
    if "+".join(wanted) == split.replace(" ", ""):  # whole splits
        return (row for part in wanted for source in splits[part] for row in read(source))
    return parts_of_splits(name, split, {part: splits[part] for part in wanted}, read)


def tell_files(name: str, sources: list[Source], left_out: dict[str, list[Source]]) -> None:
    """Say which files of a folder or an archive are not read, and which are left out as they belong to a split that is not asked for."""
    path = Path(name).expanduser()
    if unread := [] if is_address(name) else unread_in(path, sources):
        say(f"data: not read of {path.name}: {listed(unread)}")
    for split, files in left_out.items():
        names = listed([source.name for source in files])
        say(f"data: left out as the split `{split}`, by name: {names}; `eval_split: {split}` measures with it")


def listed(names: list[str]) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")


def files_of(name: str) -> list[Source]:
    """The data files that a path or an address stands for. Raises DataError."""
    path, name = (fetch_address(name), name.partition("?")[0]) if is_address(name) else (Path(name).expanduser(), name)
    return sources_of(path, name)


def parts_of_splits(
    name: str, split: str, splits: dict[str, list[Source]], read: Callable[[Source], Iterator[Row]]
) -> Iterator[Row]:
    """The rows of `train[:10%]+test[5:]`; for that the rows of each split are counted first. Raises DataError."""
    from datasets import ReadInstruction

    counts = {part: sum(1 for source in sources for _ in read(source)) for part, sources in splits.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(counts)
    except (ValueError, AssertionError) as error:
        raise wrong_split(name, split, error) from None
    for part in parts:
        rows = (row for source in splits[part.splitname] for row in read(source))
        yield from itertools.islice(rows, part.from_, part.to)


def split_names(name: str, split: str) -> list[str]:
    """The splits that `train[:100]+test` is made of. Raises DataError when it cannot be understood."""
    from datasets import ReadInstruction

    try:
        return [part.partition("[")[0] for part in ReadInstruction.from_spec(split).to_spec().split("+")]
    except (ValueError, AssertionError) as error:
        raise wrong_split(name, split, error) from None


def wrong_split(name: str, split: str, error: Exception) -> DataError:
    """The error of a split that `datasets` cannot read."""
    what = f"`{split}` names no part of the dataset {name} ({first_lines(error)})."
    return DataError(what, "Write a split such as `train`, or a part of it such as `train[:2000]` or `train[:10%]`.")


def refuse_missing(name: str, wanted: list[str], splits: list[str], setting: str) -> None:
    """Raises DataError when a split is asked for that is not there, with those that are; setting: which one asks."""
    missing = [part for part in wanted if part not in splits]
    if splits and missing:
        raise DataError(
            f"The dataset {name} has no split `{missing[0]}`.",
            f"Set `{setting}` to one that it has ({', '.join(splits)}), or to a part of it such as `{splits[0]}[:2000]`.",
        )


def by_split(sources: list[Source]) -> dict[str, list[Source]]:
    """Sources by the split that their path tells."""
    from datasets.data_files import SPLIT_KEYWORDS

    found: dict[str, list[Source]] = {}
    for source in sources:
        words = set(re.split(r"[^a-z]+", source.name.lower()))
        told = next((str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)), None)
        found.setdefault(told if len(sources) > 1 and told else "train", []).append(source)
    return found


def fetch_address(address: str) -> Path:
    """The file at an http(s) address, in the cache of `datasets`; a page of GitHub or the Hub about a file stands for the file. Raises DataError."""
    import fsspec
    from aiohttp import ClientError, ClientTimeout
    from datasets import DownloadConfig, DownloadManager

    address = re.sub(r"^(https://github\.com/[^/]+/[^/]+)/blob/", r"\1/raw/", address)
    address = re.sub(r"^(https://huggingface\.co/.+?)/blob/", r"\1/resolve/", address)
    shown, _, query = address.partition("?")  # what follows may be a key
    limits = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)}}

    def download() -> str:
        marked = "ETag" in fsspec.filesystem("http", **limits).info(
            address
        )  # else the cache could not tell a changed file
        config = DownloadConfig(
            disable_tqdm=True, force_download=not marked, storage_options={"http": limits, "https": limits}
        )
        return DownloadManager(download_config=config).download(address)

    try:
        return Path(persistently(download))
    except (OSError, ValueError, ClientError) as error:
        cause = cause_of(error)
        reason = in_words(cause) if cause else first_lines(error) or type(error).__name__
        raise DataError(
            f"The address {shown} could not be fetched ({reason.replace(query, '...') if query else reason}).",
            "Check it in a browser and run again; or download the file and give its path.",
        ) from None
