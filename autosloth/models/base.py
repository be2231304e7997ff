"""The base model's files: where they are, how large they are, and which 16-bit weights the adapter is merged into."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..demo import demo_base
from ..errors import ModelError
from ..hardware import GB, gpu_name
from ..hub_client import ask_for, hub_api, is_offline, model_errors
from ..output import say
from ..retries import downloaded, persistently
from ..settings import Settings
from ..values import is_hub_id
from ..weights import GROWTH, INDEX, headers_only, packing, shard_names, streamed_base

CPU_LIMIT_GB = 3.0  # weights beyond which training without a GPU would take days
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
QUANTIZED_NAME = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)
SMALL_FILES = ["config.json", "generation_config.json", *TOKENIZER_FILES, "*.jinja", INDEX]


def model_source(settings: Settings) -> str:
    """The Hub id or folder that `model` stands for; `demo` is built when it is not there yet."""
    if settings.model == "demo":
        return str(demo_base())
    folder = Path(settings.model).expanduser()
    return str(folder) if folder.is_dir() else settings.model


def model_files(source: str, revision: str | None = None) -> Path:
    """The folder with a model's config, tokenizer and safetensors, downloaded when it is a Hub id. Raises ModelError."""
    folder = small_files(source, revision)
    if Path(source).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, source, revision=folder.name, allow_patterns=shard_names(folder))
    with model_errors(source):  # of one commit: its hash is the folder's name
        return Path(downloaded(fetch))


def small_files(source: str, revision: str | None = None) -> Path:
    """The folder with a model's config and tokenizer, and the index of its weights, but not these. Raises ModelError."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with model_errors(source):
        return Path(downloaded(partial(snapshot_download, source, revision=revision, allow_patterns=SMALL_FILES)))


@contextlib.contextmanager
def export_base(
    settings: Settings, stage: str = "", writes: float = 0, trained: dict[str, str] | None = None
) -> Iterator[Path]:
    """The folder with the weights that the adapter is merged into, in 16 bits or as `model_headers` unpacks them. Raises ModelError.

    stage: who reads them, and says which they are; writes: what will be written to the run's folder, in sizes of the base in 16 bits. Where the disk is too small for both, it is a
    folder of `streamed_base`, to be read by way of `Shards`. trained: the `identity` of the base when it was trained; from the Hub the same commit is taken.
    """
    source, found = sixteen_bit_model(settings)
    if stage:
        say(f"{stage}: reading the weights of {settings.model if settings.model == 'demo' else source}{found}")
    trained = trained if trained and source == model_source(settings) else {}
    revision = trained.get("commit", settings.revision if source == settings.model else None)
    if Path(source).is_dir():
        if trained.get("sample", sample := sampled(Path(source))) != sample:
            raise ModelError(
                f"The weights in {source} are others than those that were trained on.",
                "Put those back, or name a copy of them as `sixteen_bit_model`; an adapter fits no other weights.",
            )
        yield Path(source)
        return
    writes *= growth(source, revision)
    with streamed_base(small_files(source, revision), source, settings.folder, writes) as streamed:
        yield streamed or model_files(source, revision)


def identity(settings: Settings) -> dict[str, str]:
    """What tells the weights of `model` from others of that name: their `commit` on the Hub, or a `sample` of those in a folder. Raises ModelError."""
    source = model_source(settings)
    folder = small_files(source, settings.revision)
    return {"sample": sampled(folder)} if Path(source).is_dir() else {"commit": folder.name}


def sampled(folder: Path) -> str:
    """A hash of sizes and headers of a model's files, and of 256 places in each."""
    found = hashlib.sha256()
    for name in shard_names(folder):
        with open(folder / name, "rb") as shard:
            size = os.fstat(shard.fileno()).st_size
            header = shard.read(8)
            found.update(b"%d" % size + header + shard.read(min(size, int.from_bytes(header, "little"))))
            for place in range(0, size, max(1, size // 256)):
                shard.seek(place)
                found.update(shard.read(4096))
    return found.hexdigest()


@contextlib.contextmanager
def export_headers(settings: Settings) -> Iterator[Path]:
    """The same without the weights: a folder whose shards may be nothing but their headers and holes. Raises ModelError."""
    source = sixteen_bit_model(settings)[0]
    if Path(source).is_dir():
        yield Path(source)
        return
    with headers_only(small_files(source, settings.revision if source == settings.model else None), source) as folder:
        yield folder


def sixteen_bit_model(settings: Settings) -> tuple[str, str]:
    """The name of the 16-bit model that the adapter is merged into, and how it was found, in words that follow it. Raises ModelError.

    What is packed in MXFP4 or FP8 is unpacked as it is read. A repository in another form cannot be merged into without loss; Unsloth's
    own list names each one's original, and where it is silent its naming does.
    """
    if settings.sixteen_bit_model:
        return settings.sixteen_bit_model, ", as `sixteen_bit_model` says"
    source = model_source(settings)
    if not is_quantized(source, settings.revision):
        return source, ", unpacked to 16 bits" if growth(source, settings.revision) > 1 else ""
    original = unsloth_originals().get(source.lower()) or QUANTIZED_NAME.sub("", source)
    if original == source or Path(source).is_dir():
        raise ModelError(
            f"The weights of {source} are stored as {stored_as(source, settings.revision)}, and their 16-bit original is not known.",
            "Name it as `sixteen_bit_model`.",
        )
    return original, f", the 16-bit original of {source}"


def unsloth_originals() -> dict[str, str]:
    """Unsloth's list, repository in 4 or 8 bits (lower case) -> 16-bit repository; read without importing Unsloth, which takes seconds."""
    package = Path(importlib.util.find_spec("unsloth").origin).parent
    listed = runpy.run_path(str(package / "models" / "mapper.py"))
    originals, in_4_bit = listed["INT_TO_FLOAT_MAPPER"], listed["FLOAT_TO_INT_MAPPER"]
    known = {**{other: originals[quantized] for other, quantized in in_4_bit.items()}, **originals}
    return {name.lower(): original for name, original in known.items()}


def is_quantized(source: str, revision: str | None = None) -> bool:
    """Whether a model's weights are stored in a form that is not read here, by its config.json."""
    return stored_as(source, revision) not in (None, *GROWTH)


def stored_as(source: str, revision: str | None = None) -> str | None:
    """How a model's weights are packed, by its config.json: bitsandbytes, fp8, awq, ...; None where they are not."""
    config = small_files(source, revision) / "config.json"
    told = packing(json.loads(config.read_text(encoding="utf-8")))
    return None if told is None else str(told.get("quant_method"))


def growth(source: str, revision: str | None = None) -> float:
    """How many times their size a model's weights take in 16 bits, where they are packed in a form that is read here."""
    return GROWTH.get(stored_as(source, revision) or "", 1.0)


def weights_gb(source: str, revision: str | None = None) -> float:
    """The size of a model's weights in GB. Raises ModelError when there are none, or no such model."""
    return sum(shard_sizes(source, revision).values()) / GB


def shard_sizes(source: str, revision: str | None = None) -> dict[str, int]:
    """The safetensors files that a model is loaded from, and their bytes. Raises ModelError when there are none, or no such model."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    elif is_hub_id(source):
        ask_for("model", source)
        with model_errors(source):
            info = persistently(partial(hub_api().model_info, source, revision=revision, files_metadata=True))
            sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    else:
        raise ModelError(
            f"The model folder {source} does not exist.",
            "Give a Hub id such as `unsloth/mistral-7b-bnb-4bit`, or a folder.",
        )
    found = {name: size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name}
    weights = {name: size for name, size in found.items() if name.startswith("model")} or found  # not a second form
    if "config.json" not in sizes or not weights:
        raise ModelError(
            f"{source} is no model in the transformers format with safetensors weights.",
            "Give one that has config.json and *.safetensors.",
        )
    return weights


def refuse_without_gpu(settings: Settings) -> None:
    """Raises ModelError for a model that would take days without a GPU, where there is none."""
    if settings.model == "demo" or gpu_name() or (is_offline() and is_hub_id(settings.model)):
        return
    size = weights_gb(settings.model, settings.revision)
    if size > CPU_LIMIT_GB:
        raise ModelError(
            f"{settings.model} has {size:.1f} GB of weights, and there is no GPU to train it on.",
            "On Colab choose Runtime > Change runtime type > T4 GPU and Run all again; elsewhere use a machine with an NVIDIA GPU, or a smaller model.",
        )
