"""The GGUF files, by llama.cpp's own converter. The adapter is merged while weights are read: no merged copy on disk or in memory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..child_process import Ended, run_apart
from ..errors import ExportError
from ..models import (
    CHAT_TEMPLATES,
    GGUF_TAGS,
    card_data,
    export_base,
    export_headers,
    model_source,
    small_files,
    starting_adapter,
)
from ..output import say, size_in_words
from ..run import HALF_WRITTEN, Run, cache_dir, fingerprint, known_hash, stage, write_text
from ..settings import Settings
from ..weights import INDEX, TOLD, read_header, shard_names
from .convert import CARD, UNKNOWN_TOKENIZER
from .converter import with_older_names
from .llama import LLAMA_CPP_PYTHON, fetch_converter, llama_cpp
from .merge import base_of, tokenizer_of
from .stored_types import stored_otherwise

# glibc keeps the memory of a block for the next one; by itself it would give each back to the system, and fault it in anew.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 26)}
# Bits a weight of a 7B model in each type of GGUF; an adapter is counted as the largest that people train.
GGUF_BITS = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.8, "q5_k_s": 5.6}
GGUF_BITS |= {"q4_k_m": 4.9, "q4_k_s": 4.7, "q3_k_m": 4.0, "adapter": 0.4}
SAMPLING = {  # transformers' name: Ollama's
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "repetition_penalty": "repeat_penalty",
}


@stage(
    "gguf",
    reads=("quantizations", "sixteen_bit_model"),
    after=("train",),
    facts=("export",),
    outputs=("gguf",),
    replaces=True,
)
def write_gguf(run: Run) -> None:
    """Write gguf/<run name>-<TYPE>.gguf for each type asked for, and a Modelfile for Ollama. Raises ExportError."""
    made, kinds = [], sorted(run.settings.quantizations, key=lambda kind: kind == "adapter")  # last: it is no model
    with run.replaced("gguf") as folder:
        if kinds:
            made = gguf_files(run, kinds, folder)
    for file in made:
        size = size_in_words(file["bytes"])
        say(f"gguf: {file['path']}, {size} in {file['seconds']:.1f} s, peak memory {memory(file)}")
        if file["stored"]:
            say(f"gguf: {Path(file['path']).name} is {file['stored']}")
    run.record("export", gguf=made)


def gguf_files(run: Run, kinds: list[str], folder: Path) -> list[dict[str, Any]]:
    """Make the files of these types, and the Modelfile, in an empty folder; the facts of each. Raises ExportError."""
    files = {kind: folder / f"{run.settings.run_name}-{kind.upper()}.gguf" for kind in kinds}
    with (
        export_base(run.settings, "gguf", size_in_bases(kinds), base_of(run)) as base,
        tempfile.TemporaryDirectory(dir=folder, prefix=".source-") as temporary,
    ):
        source = Path(temporary, run.settings.run_name)  # the converter writes the folder's name into the file
        lay_source(source, base, run.path("adapter"))
        write_text(source / CARD, card_for_converter(run))
        llama_cpp()  # whose quantiser does the packing
        made = convert(run, source, files, run.path("adapter"))
        if kinds != ["adapter"]:
            write_text(folder / "Modelfile", modelfile(run, base, made[0]["path"]))
    return made


def card_for_converter(run: Run) -> str:
    """The front matter of a card, from which the converter takes a file's `general.*`: licence, base, datasets, tags, languages (gguf-py's metadata.py)."""
    from huggingface_hub import ModelCardData

    data = card_data(run)
    data |= {"model_name": run.settings.run_name, "tags": data["tags"] + GGUF_TAGS}
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n"


def size_in_bases(kinds: list[str]) -> float:
    """About how large these files will be together, in sizes of the 16-bit base."""
    return sum(GGUF_BITS[kind] for kind in kinds) / 16


def memory(file: dict[str, Any]) -> str:
    """The peak memory of a conversion in words."""
    known = file["peak_anonymous_gb"]
    return f"{file['peak_ram_gb']:.2f} GB of RAM" + ("" if known is None else f" ({known:.2f} GB without mapped files)")


def gguf_before(run: Run, kind: str) -> Path:
    """A GGUF of this type of the model as it was before the training, kept in the cache for the next time. Raises ExportError, ModelError."""
    start = starting_adapter(run.settings)
    small = [*tokenizer_of(run.path("adapter")), *([start / "adapter_model.safetensors"] if start else [])]
    told = [base_of(run), run.settings.model, run.settings.sixteen_bit_model, *map(known_hash, small)]
    file = cache_dir() / f"before-llama.cpp-{LLAMA_CPP_PYTHON}" / f"{fingerprint(told)}-{kind.upper()}.gguf"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        export_base(run.settings, writes=size_in_bases([kind]), trained=base_of(run)) as base,
        tempfile.TemporaryDirectory(dir=file.parent, prefix=".source-") as temporary,
    ):
        source = Path(temporary, "before")
        lay_source(source, base, run.path("adapter"))  # whose tokenizer makes the prompts
        llama_cpp()
        convert(run, source, {kind: file}, start)
    return file


def convert(run: Run, source: Path, files: dict[str, Path], adapter: Path | None) -> list[dict[str, Any]]:
    """Make the files {type: path} of a base with an adapter, if there is one, in a process of its own.

    All come out of one pass over the base, so that they share `seconds` and the peaks: `peak_ram_gb` is the most that
    the process had in memory, mapped libraries and all, `peak_anonymous_gb` what of it no file backs. A file gets its
    name when all are whole. Returns the facts of each. Raises ExportError.
    """
    converter, started = fetch_converter(), time.perf_counter()
    request = {"converter": converter, "source": source, "adapter": adapter}
    request |= {"name": run.settings.run_name, "files": {kind: half_written(path) for kind, path in files.items()}}
    try:
        ended = run_apart("autosloth.export.convert", request, online=(source / TOLD).is_file(), **HEAP)
        told = ended.answer
        if ended.status or not told:
            raise ExportError(*told.get("error") or unknown_error(ended))
        for path in files.values():
            os.replace(half_written(path), path)
    finally:
        for path in files.values():
            half_written(path).unlink(missing_ok=True)
    told["seconds"] = round(time.perf_counter() - started, 2)
    return [
        {
            "path": f"gguf/{path.name}",
            "type": kind.upper(),
            "bytes": path.stat().st_size,
            "stored": stored_otherwise(path, kind),
            **told,
        }
        for kind, path in files.items()
    ]


def refuse_unconvertible(settings: Settings) -> None:
    """Raises ExportError where llama.cpp's converter does not take the model or its tokenizer: it makes the head of a GGUF, for which the headers of the weights are enough.

    What it took is remembered, by its config, headers and tokenizer. Of files that are missing others tell.
    """
    with export_headers(settings) as base, tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "model")
        lay_source(source, base, small_files(model_source(settings), settings.revision))
        if not all((source / name).is_file() for name in shard_names(source)):
            return
        headers = [read_header(source / name) for name in shard_names(source)]
        small = [path.read_bytes().hex() for path in sorted(source.iterdir()) if path.suffix != ".safetensors"]
        told = fingerprint([str(fetch_converter()), headers, small])
        taken = cache_dir() / f"taken-by-llama.cpp-{LLAMA_CPP_PYTHON}" / told
        if taken.is_file():
            return
        make_heads(settings.model, source, None, {"q8_0": Path(temporary, "head.gguf")})
        taken.parent.mkdir(parents=True, exist_ok=True)
        taken.touch()


def head_of(settings: Settings, adapter: Path, folder: Path) -> Path:
    """A GGUF of the base with an adapter, written to a new folder, with a hole in place of its weights. Raises ExportError.

    adapter: a folder with its tokenizer. Each of its matrices has to find its place.
    """
    folder.mkdir()
    source, head = folder / "model", folder / "head.gguf"
    with export_headers(settings) as base:
        lay_source(source, base, adapter)
        make_heads(settings.model, source, adapter, {"q8_0": head})
    return head


def make_heads(model: str, source: Path, adapter: Path | None, files: dict[str, Path]) -> None:
    """Make files {type: path} without weights in a process of its own. Raises ExportError where the converter does not take the model."""
    request = {"converter": fetch_converter(), "source": source, "adapter": adapter, "name": "head", "heads": True}
    ended = run_apart("autosloth.export.convert", request | {"files": files}, online=False)
    if ended.status:
        raise ExportError(*refusal(model, ended))


@contextlib.contextmanager
def adapter_alone(settings: Settings, adapter: Path) -> Iterator[tuple[Path, Path] | None]:
    """A GGUF of an adapter that fits the model, and the folder that it was made from, where weights may be holes; None where files are missing, of which others tell.

    Raises ExportError where llama.cpp's converter for adapters does not take it: it cannot do to the two halves of a matrix all that is done to a matrix.
    """
    with export_headers(settings) as base, tempfile.TemporaryDirectory() as temporary:
        source, file = Path(temporary, "model"), Path(temporary, "adapter.gguf")
        lay_source(source, base, small_files(model_source(settings), settings.revision))
        if not all((source / name).is_file() for name in shard_names(source)):
            yield None
            return
        request = {"converter": fetch_converter(), "source": source, "adapter": adapter, "name": "adapter"}
        ended = run_apart("autosloth.export.convert", request | {"files": {"adapter": file}}, online=False)
        if ended.status:
            raise ExportError(*refusal_alone(settings.model, ended))
        yield file, source


def refusal(model: str, ended: Ended) -> tuple[str, str]:
    """What to tell where the converter does not take a model."""
    if "error" in ended.answer:
        return tuple(ended.answer["error"])
    if "pre-tokenizer" in ended.reason:
        return UNKNOWN_TOKENIZER
    todo = "Set `quantizations: []` to train it without a GGUF, or choose another model."
    return f"llama.cpp makes no GGUF of {model}: its converter ends with {ended.reason.rstrip('.')}.", todo


def refusal_alone(model: str, ended: Ended) -> tuple[str, str]:
    """What to tell where the converter for adapters does not take one."""
    if "error" in ended.answer:
        return tuple(ended.answer["error"])
    todo = "Take `adapter` out of `quantizations`; a GGUF of the whole model can be made."
    return (
        f"llama.cpp makes no GGUF of an adapter of {model} alone: its converter ends with {ended.reason.rstrip('.')}.",
        todo,
    )


def half_written(path: Path) -> Path:
    """What a file is called while it is written: whatever ends the process, that is no GGUF's name."""
    return path.with_name(f".{path.name}{HALF_WRITTEN}")


def unknown_error(ended: Ended) -> tuple[str, str]:
    """What to tell when the converting process ended without a word for us."""
    return (
        f"The conversion to GGUF failed ({ended.reason}).",
        "The adapter is safe in adapter/. Take `adapter` out of `quantizations` if it is there, for not every model's can be converted alone; `quantizations: []` finishes without a GGUF.",
    )


def lay_source(folder: Path, base: Path, adapter: Path) -> None:
    """A folder as the converter wants it: weights of the base (links) and its config, tokenizer of the adapter."""
    folder.mkdir()
    shards = shard_names(base)
    for path in [
        *(base / name for name in shards),
        *([base / INDEX] if shards != ["model.safetensors"] else []),  # which may be of another form of the weights
        base / "generation_config.json",
        base / TOLD,
    ]:
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    for path in tokenizer_of(adapter):
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(with_older_names(config)), encoding="utf-8")


def modelfile(run: Run, base: Path, path: str) -> str:
    """An Ollama Modelfile: for our own chat templates the same template in Ollama's language, to the letter, else it takes the file's.

    It samples as the base's generation_config.json says, where that says anything, and stops at each end token.
    """
    ends, template = end_texts(run), (run.path("adapter") / "chat_template.jinja").read_text(encoding="utf-8")
    lines = [f"FROM ./{Path(path).name}", f"PARAMETER num_ctx {run.settings.max_length}", *sampling(base)]
    for jinja in CHAT_TEMPLATES.glob("*.jinja"):
        text = jinja.read_text(encoding="utf-8").rstrip("\n")
        if template in (text, text.replace("{{ bos_token or '' }}", "")):  # the latter where the vocabulary has none
            ours = jinja.with_suffix(".ollama").read_text(encoding="utf-8").replace("</s>", ends[0])
            lines.append(f'TEMPLATE """{ours}"""')
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends)]) + "\n"


def end_texts(run: Run) -> list[str]:
    """The texts of the tokens that end an answer, the tokenizer's own first."""
    from tokenizers import Tokenizer

    known = json.loads((run.path("reference") / "rows.json").read_text(encoding="utf-8"))
    file = run.path("adapter") / "tokenizer.json"
    others = map(Tokenizer.from_file(str(file)).id_to_token, known["ends"]) if file.is_file() else []
    return list(dict.fromkeys(filter(None, [known["end"], *others])))


def sampling(base: Path) -> list[str]:
    """How the base wants to be sampled, as lines of a Modelfile."""
    path = base / "generation_config.json"
    wanted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    given = [(ollama, wanted.get(name)) for name, ollama in SAMPLING.items() if wanted.get("do_sample")]
    return [f"PARAMETER {ollama} {value}" for ollama, value in given if value is not None]
