"""llama.cpp: its converter, downloaded once, and llama-cpp-python, compiled in the background where it is not installed."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..child_process import start_behind
from ..errors import ExportError
from ..output import last_words, say
from ..run import cache_dir, fingerprint, waiting_for

# The converter comes out of the source package of the llama-cpp-python that reads the result, so that both
# agree on the format; the index's own `gguf` package is older and breaks it. requirements-bare.txt pins the same.
LLAMA_CPP_PYTHON = "0.3.36"
SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")
BESIDE_IT = "diskcache==5.6.3"  # the one library that it needs and Colab lacks
# What AutoSloth does not use takes half of the time to compile.
LEAN = f"-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).with_suffix('.cmake')}"

# The least claim to the cores that there is. Beside one busy process on two cores it compiles in 4 minutes and takes nothing, as at 10. Where both are busy, 10 takes
# 9 % of their pace for 14 minutes; 19 takes none and leaves the compiling, of 2 minutes, for when the training is over (benchmarks/compile.py).
NICENESS = 19

_compiling: list[subprocess.Popen] = []  # by this process


def compile_llama_cpp() -> None:
    """Begin to compile llama-cpp-python where it is not installed, behind whatever else runs; `llama_cpp` waits for it."""
    if _compiling or importlib.util.find_spec("llama_cpp"):
        return
    wanted = [f"llama-cpp-python=={LLAMA_CPP_PYTHON}", BESIDE_IT]
    # With -v the compiler's steps are in the log.
    pip = [sys.executable, "-m", "pip", "install", "-v", "--disable-pip-version-check", "--no-deps", *wanted]
    behind, environment = ["nice", "-n", str(NICENESS)], {"CMAKE_ARGS": LEAN, **os.environ}
    log_path().parent.mkdir(parents=True, exist_ok=True)
    with open(log_path(), "w") as log:
        _compiling.append(start_behind([*behind, *pip], environment, log))
    say("llama.cpp: compiling in the background, some minutes on two cores; it is needed after the training")


def llama_cpp() -> Any:
    """The module `llama_cpp`; waits where it is still being compiled. Raises ExportError when that failed."""
    compile_llama_cpp()
    for process in _compiling:
        if process.poll() is None:
            say("llama.cpp: still compiling; waiting for it")
        with waiting_for("llama.cpp to compile"):
            watch(process)
        if process.returncode:
            _compiling.clear()
            raise ExportError(
                f"llama-cpp-python could not be installed ({last_words(log_path().read_text(errors='replace'))}).",
                f"See {log_path()}, mend what it tells (a C++ compiler is needed) and run again; the adapter is safe in adapter/.",
            )
        importlib.invalidate_caches()
    return importlib.import_module("llama_cpp")


def compiled() -> bool:
    """Whether the module `llama_cpp` is there, without waiting for it."""
    importlib.invalidate_caches()
    return all(process.poll() == 0 for process in _compiling) and importlib.util.find_spec("llama_cpp") is not None


def watch(process: subprocess.Popen, every: float = 20) -> None:
    """Wait until the compiler ends, and say meanwhile how far it is; every: seconds."""
    said = ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(every)
            return
        done = re.findall(r"^ *\[(\d+)/(\d+)\] ", log_path().read_text(errors="replace"), re.M)  # ninja's steps
        if done and said != (said := "llama.cpp: step {} of {}".format(*done[-1])):
            say(said)


def log_path() -> Path:
    """What pip says while it compiles."""
    return cache_dir() / "llama-cpp-python.log"


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """What llama.cpp says meanwhile, line by line."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    said: list[str] = []
    listen = llama_cpp.llama_log_callback(lambda level, text, user: said.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(listen, None)
    try:
        yield said
    finally:
        llama_cpp.llama_log_set(llama_log_callback, None)


def fetch_converter() -> Path:
    """The folder with convert_hf_to_gguf.py, fetched by pip once, checked by hash, unpacked to the cache. Raises ExportError."""
    folder = cache_dir() / f"llama.cpp-{LLAMA_CPP_PYTHON}-{fingerprint(CONVERTER_PARTS)[:6]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        waiting_for("downloading the converter"),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converter-") as temporary,
    ):
        unpacked = unpack_converter(fetch_source(Path(temporary)), Path(temporary))
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # somebody else may have been faster
                raise
    return folder


def fetch_source(folder: Path) -> Path:
    """llama-cpp-python's source package, fetched into a folder by pip and checked by hash. Raises ExportError."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={LLAMA_CPP_PYTHON} --hash=sha256:{SOURCE_SHA256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
        "--require-hashes",
        "-r",
        wanted,
        "-d",
        folder,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ExportError(
            f"llama.cpp's converter could not be fetched ({last_words(result.stderr)}).",
            "Check the network and run again; or set `quantizations: []`, which goes without a GGUF.",
        )
    return next(folder.glob("*.tar.gz"))


def known_architectures() -> set[str]:
    """The architectures of text models, as config.json calls them, that the converter knows: its own table, read without importing it. Raises ExportError."""
    tree = ast.parse((fetch_converter() / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    tables = (node for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "TEXT_MODEL_MAP")
    return set(ast.literal_eval(next(tables).value))


UNREADABLE = {
    "NemotronHForCausalLM"
}  # whose GGUF llama.cpp does not read, as the converter makes it beside transformers 5.17


def refuse_unknown_architecture(config: dict[str, Any], model: str) -> None:
    """Raises ExportError when the converter knows none of the architectures that a model's config.json names."""
    parts = (config, config.get("text_config") or {})
    named = [name for part in parts for name in part.get("architectures") or []]
    if not set(named) & (known_architectures() - UNREADABLE):
        reason = "does not read what its converter makes of" if set(named) & UNREADABLE else "does not know"
        raise ExportError(
            f"llama.cpp makes no GGUF of {model}: it {reason} its architecture ({', '.join(named) or 'none is named'}).",
            "Set `quantizations: []` to train it without a GGUF, or choose another model.",
        )


def unpack_converter(archive: Path, folder: Path) -> Path:
    """Take the converter, and no more, out of llama-cpp-python's source package."""
    with tarfile.open(archive) as tar:
        inside = f"{tar.next().name.split('/')[0]}/vendor/llama.cpp/"
        wanted = tuple(inside + part for part in CONVERTER_PARTS)
        tar.extractall(
            folder, members=[member for member in tar.getmembers() if member.name.startswith(wanted)], filter="data"
        )
    return folder / inside
