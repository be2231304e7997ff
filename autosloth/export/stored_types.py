"""The types that the matrices of a GGUF have in truth: llama.cpp packs rows in blocks, and takes another type where a row is no multiple of one.

The head is read here by itself (ggml/docs/gguf.md): gguf-py is not in this process, and takes its time over a large vocabulary.
"""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .quantize import ggml

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


def stored_otherwise(path: Path, kind: str) -> str:
    """Which matrices of a file of this kind (such as q4_k_m) have another type than it is named for, in words; empty where none has."""
    block = 256 if "_k" in kind else 32 if kind == "q8_0" else 1
    matrices = [(shape[0], of) for shape, of in tensors_of(path) if len(shape) > 1 and of != "F32"]
    other = Counter(of for width, of in matrices if width % block)
    if not other:
        return ""
    types = " and ".join(f"{count} as {of}" for of, count in other.most_common())
    told = f"{other.total()} of {len(matrices)} matrices have rows that are no multiple of {block}"
    return f"named {kind.upper()}, but {told} and are stored otherwise, {types}"


def tensors_of(path: Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """(shape, the length of a row first; type) of each tensor of a GGUF."""
    with path.open("rb") as file:
        _, _, tensors, values = take(file, "4sIQQ")
        for _ in range(values):
            skip_text(file)
            skip_value(file, *take(file, "I"))
        for _ in range(tensors):
            skip_text(file)
            shape = take(file, f"{take(file, 'I')[0]}Q")
            number, _ = take(file, "IQ")
            yield shape, type_name(number)


def take(file: BinaryIO, form: str) -> tuple[Any, ...]:
    """The next values of a file, by struct's letters."""
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def skip_text(file: BinaryIO) -> None:
    """Go behind a text."""
    file.seek(take(file, "Q")[0], 1)


def skip_value(file: BinaryIO, kind: int) -> None:
    """Go behind a value of this kind."""
    if kind == TEXT:
        return skip_text(file)
    if kind != LIST:
        file.seek(struct.calcsize(f"<{NUMBERS[kind]}"), 1)
        return None
    inner, count = take(file, "IQ")
    if inner in NUMBERS:
        file.seek(count * struct.calcsize(f"<{NUMBERS[inner]}"), 1)
        return None
    for _ in range(count):
        skip_value(file, inner)
    return None


def type_name(number: int) -> str:
    """What a ggml type is called, such as Q4_K."""
    name = ggml().ggml_type_name
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    return name(number).decode().upper()
