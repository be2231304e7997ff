"""The GGUF files, by llama.cpp's own converter. The adapter is merged while weights are read: no merged copy on disk or in memory."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ..child_process import Ended, run_apart
from ..errors import ExportError
from ..models import CHAT_TEMPLATES, export_base
from ..output import say, size_in_words
from ..run import HALF_WRITTEN, Run, stage, write_text
from ..weights import TOLD
from .llama import fetch_converter, llama_cpp
from .merge import tokenizer_of
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
        export_base(run.settings, "gguf", writes=size_in_bases(kinds)) as base,
        tempfile.TemporaryDirectory(dir=folder, prefix=".source-") as temporary,
    ):
        source = Path(temporary, run.settings.run_name)  # the converter writes the folder's name into the file
        lay_source(source, base, run.path("adapter"))
        llama_cpp()  # whose quantiser does the packing
        made = convert(run, source, files)
        if kinds != ["adapter"]:
            write_text(folder / "Modelfile", modelfile(run, base, made[0]["path"]))
    return made


def size_in_bases(kinds: list[str]) -> float:
    """About how large these files will be together, in sizes of the 16-bit base."""
    return sum(GGUF_BITS[kind] for kind in kinds) / 16


def memory(file: dict[str, Any]) -> str:
    """The peak memory of a conversion in words."""
    known = file["peak_anonymous_gb"]
    return f"{file['peak_ram_gb']:.2f} GB of RAM" + ("" if known is None else f" ({known:.2f} GB without mapped files)")


def convert(run: Run, source: Path, files: dict[str, Path]) -> list[dict[str, Any]]:
    """Make the files {type: path} in a process of its own.

    All come out of one pass over the base, so that they share `seconds` and the peaks: `peak_ram_gb` is the most that
    the process had in memory, mapped libraries and all, `peak_anonymous_gb` what of it no file backs. A file gets its
    name when all are whole. Returns the facts of each. Raises ExportError.
    """
    converter, started = fetch_converter(), time.perf_counter()
    request = {"converter": converter, "source": source, "adapter": run.path("adapter")}
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


def half_written(path: Path) -> Path:
    """What a file is called while it is written: whatever ends the process, that is no GGUF's name."""
    return path.with_name(f".{path.name}{HALF_WRITTEN}")


def unknown_error(ended: Ended) -> tuple[str, str]:
    """What to tell when the converting process ended without a word for us."""
    return (
        f"The conversion to GGUF failed ({ended.reason}).",
        "Check that llama.cpp knows this architecture; the adapter is safe in adapter/, and `quantizations: []` finishes without a GGUF.",
    )


def lay_source(folder: Path, base: Path, adapter: Path) -> None:
    """A folder as the converter wants it: weights and config of the base (links), tokenizer of the adapter."""
    folder.mkdir()
    for path in [
        *base.glob("*.safetensors"),
        *base.glob("*.index.json"),
        base / "config.json",
        base / "generation_config.json",
        base / TOLD,
    ]:
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    for path in tokenizer_of(adapter):
        (folder / path.name).symlink_to(path.resolve())


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
