"""A base on the Hub that is too large for the disk: its shards are downloaded one at a time and deleted after use.

What stands in for a shard that was not fetched is a file of its length that holds its header and takes no room, so that names,
shapes and places of all weights are known. Shards that were in the Hub's cache before are used, and deleted, in the same way.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ExportError
from ..hardware import GB
from ..hub_client import is_offline, reading
from ..output import say
from ..retries import downloaded, persistently
from ..run import existing_parent, read_json, write_json
from .files import shard_names

TOLD = "streamed.json"  # beside the stand-ins: whose they are
SPARE_GB = 0.5  # of the disk: checkpoints, data and what else a run leaves


@contextlib.contextmanager
def streamed_base(small: Path, repo: str, target: Path, writes: float) -> Iterator[Path | None]:
    """A folder with stand-ins for the shards of a model, where the disk is too small for them and the result; else None.

    small: the model's folder in the Hub's cache, named by its commit, with config and tokenizer; target: the folder that is
    written to; writes: how much, in sizes of the model. Raises ModelError.
    """
    if is_offline():
        yield None
        return
    shards = shards_there(small, repo)
    if not is_short(shards, target, writes):
        yield None
        return
    size = sum(shard.file_size for shard in shards) / GB
    say(
        f"base: the disk is too small for {repo} ({size:.1f} GB) and the result, so its shards are downloaded one at a time and deleted after use"
    )
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        folder = Path(temporary)
        lay_stand_ins(folder, small, repo, shards)
        sizes = {shard.filename: shard.file_size for shard in shards}
        write_json(folder / TOLD, {"repo": repo, "commit": small.name, "folder": temporary, "sizes": sizes})
        yield folder


@contextlib.contextmanager
def headers_only(small: Path, repo: str) -> Iterator[Path]:
    """A folder with a model's small files, and with stand-ins for the shards that are not in the Hub's cache: their headers alone are downloaded. Raises ModelError."""
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        lay_stand_ins(Path(temporary), small, repo, shards_there(small, repo))
        yield Path(temporary)


def shards_there(small: Path, repo: str) -> list[Any]:
    """What the Hub and its cache know of a model's shards, in order. Raises ModelError."""
    from huggingface_hub import snapshot_download

    look_up = partial(snapshot_download, repo, revision=small.name, allow_patterns=shard_names(small), dry_run=True)
    with reading("model", repo):
        found = persistently(look_up)
    return sorted(found, key=lambda shard: shard.filename)


def lay_stand_ins(folder: Path, small: Path, repo: str, shards: list[Any]) -> None:
    """Fill a folder with links to a model's small files and to the shards in the Hub's cache, and stand-ins for the others. Raises ModelError."""
    for path in small.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path.resolve())
    for shard in shards:
        if shard.is_cached:
            (folder / shard.filename).symlink_to(Path(shard.local_path).absolute())
            continue
        with reading("model", repo):
            there = f"{repo}@{small.name}/{shard.filename}"
            persistently(partial(fetch_header, there, folder / shard.filename, shard.file_size))


def fetch_header(there: str, path: Path, size: int) -> None:
    """Write what stands in for a shard on the Hub."""
    from huggingface_hub import HfFileSystem

    with HfFileSystem().open(there) as shard:
        stand_in(path, shard, size)


def is_short(shards: list[Any], target: Path, writes: float) -> bool:
    """Whether the Hub's cache has no room for the shards that it lacks, and for what is written to the same disk."""
    cache, target = cache_folder(), existing_parent(target)
    needed = sum(shard.file_size for shard in shards if shard.will_download)
    if same_disk(cache, target):
        needed += writes * sum(shard.file_size for shard in shards)
    return bool(shards) and needed + SPARE_GB * GB > shutil.disk_usage(cache).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders share their room."""
    return one.stat().st_dev == other.stat().st_dev


def cache_folder() -> Path:
    """The Hub's cache, or what will hold it."""
    from huggingface_hub import constants

    return existing_parent(Path(constants.HF_HUB_CACHE))


def stand_in(path: Path, shard: BinaryIO, size: int) -> None:
    """Write the header of a shard, and a hole in place of its weights; `path` is never without either."""
    length = shard.read(8)
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(length + shard.read(int.from_bytes(length, "little")))
    os.truncate(partial, size)
    os.replace(partial, path)


class Shards:
    """The shards of a base: in a folder of `streamed_base`, or of links to it, fetched and deleted; in any other, all there and kept."""

    def __init__(self, folder: Path):
        told = read_json(folder / TOLD)
        self.sizes: dict[str, int] = told.get("sizes", {})  # bytes, by name
        self.repo, self.commit, self.folder = told.get("repo"), told.get("commit"), Path(told.get("folder", folder))
        self.here = {name for name in self.sizes if (self.folder / name).is_symlink()}
        self.lock = threading.Lock()

    def need(self, path: str | Path) -> None:
        """Come back when the weights of a shard can be read. Raises ModelError, and ExportError when there is no room for it."""
        name = Path(path).name
        if name in self.here or name not in self.sizes:
            return
        with self.lock:
            if name not in self.here:
                self.fetch(name)
                self.here.add(name)

    def fetch(self, name: str) -> None:
        """Put a link to a shard in the Hub's cache in place of what stands in for it."""
        from huggingface_hub import hf_hub_download

        free, size = shutil.disk_usage(cache_folder()).free, self.sizes[name]
        if size > free:
            raise ExportError(
                f"{name} of {self.repo} takes {size / GB:.2f} GB, and {free / GB:.2f} GB of disk are free.",
                "Free some space, or set HF_HOME to a folder on another disk, and run again.",
            )
        with reading("model", self.repo):
            fetched = downloaded(partial(hf_hub_download, self.repo, name, revision=self.commit))
        link = self.folder / f".{name}"
        link.symlink_to(Path(fetched).absolute())
        os.replace(link, self.folder / name)
        say(f"base: {name}, {size / GB:.2f} GB, downloaded")

    def drop(self, path: str | Path) -> None:
        """Delete a shard that was used; whoever needs it again gets it again."""
        name = Path(path).name
        if name in self.here:
            self.here.remove(name)
            cached = Path(os.readlink(self.folder / name))
            with open(cached, "rb") as shard:
                stand_in(self.folder / name, shard, self.sizes[name])
            blob = cached.resolve()
            cached.unlink()
            blob.unlink(missing_ok=True)  # the same file where the cache has no links

    def to_free(self, target: Path) -> int:
        """Bytes that will come free for this folder as the shards are used."""
        shared = self.here and same_disk(cache_folder(), target)
        return sum(self.sizes[name] for name in self.here) if shared else 0


def shard_by_shard(needs: dict[str, set[str]]) -> Iterator[tuple[list[str], list[str]]]:
    """Tensors in the order of the shards that they are made of: those for which one more is enough, and the shards that no later one needs.

    >>> list(shard_by_shard({"a": {"1"}, "b": {"1", "2"}, "c": {"3"}, "none": set()}))
    [(['none'], []), (['a'], []), (['b'], ['1', '2']), (['c'], ['3'])]
    """
    turns = {name: max(shards, default="") for name, shards in needs.items()}
    ends: dict[str, str] = {}
    for name, shards in needs.items():
        ends |= {shard: max(ends.get(shard, ""), turns[name]) for shard in sorted(shards)}
    for turn in sorted(set(turns.values())):
        names = [name for name in needs if turns[name] == turn]
        yield names, [shard for shard, end in ends.items() if end == turn]
