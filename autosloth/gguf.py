"""GGUF by llama.cpp's own converter, the adapter merged into each tensor as it is read: no merged copy on disk or in memory.

Run as `python -m autosloth.gguf CONVERTER BASE ADAPTER OUT TYPE NAME` it is the converting process; its last
line is a JSON object with its peak memory.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .base import export_base
from .errors import ExportError
from .live import peak_ram_gb
from .llama import fetch_converter, last_line
from .merge import Adapter, tokenizer_of
from .run import GB, Run, say, stage, write_text


@stage("gguf", reads=("quantizations", "sixteen_bit_model"), after=("train",), facts=("export",), outputs=("gguf",))
def write_gguf(run: Run) -> None:
    """Write gguf/<run name>-Q8_0.gguf and a Modelfile for Ollama. Raises ExportError."""
    settings, made = run.settings, []
    folder = run.fresh("gguf")
    for kind in settings.quantizations:
        made.append(
            convert(run, export_base(settings, "gguf"), folder / f"{settings.run_name}-{kind.upper()}.gguf", kind)
        )
        say(
            f"gguf: {made[-1]['path']}, {made[-1]['bytes'] / GB:.3f} GB in {made[-1]['seconds']:.1f} s, {made[-1]['peak_ram_gb']:.2f} GB of RAM at most"
        )
        write_text(folder / "Modelfile", modelfile(run, made[-1]["path"]))
    run.record("export", gguf=made)


def convert(run: Run, base: Path, target: Path, kind: str) -> dict[str, object]:
    """Convert in a process of its own; the file gets its name when it is whole. Returns its facts. Raises ExportError."""
    converter, started = fetch_converter(), time.perf_counter()
    partial = target.with_suffix(".partial")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".source-") as temporary:
        folder = Path(temporary, run.settings.run_name)  # the converter writes the folder's name into the file
        lay_source(folder, base, run.path("adapter"))
        command = [
            sys.executable,
            "-m",
            "autosloth.gguf",
            converter,
            folder,
            run.path("adapter"),
            partial,
            kind,
            run.settings.run_name,
        ]
        package = str(Path(__file__).parents[1])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        result = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        )
    if result.returncode:
        partial.unlink(missing_ok=True)
        raise ExportError(
            f"The conversion to GGUF failed ({last_line(result.stderr)}).",
            "Check that llama.cpp knows this architecture; the adapter is safe in adapter/, and `quantizations: []` finishes without a GGUF.",
        )
    os.replace(partial, target)
    peak = json.loads(result.stdout.splitlines()[-1])["peak_ram_gb"]
    return {
        "path": f"gguf/{target.name}",
        "type": kind.upper(),
        "bytes": target.stat().st_size,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_ram_gb": peak,
    }


def lay_source(folder: Path, base: Path, adapter: Path) -> None:
    """A folder as the converter wants it: weights and config of the base (links), tokenizer of the adapter."""
    folder.mkdir()
    for path in [
        *base.glob("*.safetensors"),
        *base.glob("*.index.json"),
        base / "config.json",
        base / "generation_config.json",
    ]:
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    for path in tokenizer_of(adapter):
        (folder / path.name).symlink_to(path.resolve())


def modelfile(run: Run, path: str) -> str:
    """An Ollama Modelfile; for our own chat templates with the same template in Ollama's language, to the letter."""
    end = json.loads((run.path("reference") / "rows.json").read_text(encoding="utf-8"))["end"]
    template = (run.path("adapter") / "chat_template.jinja").read_text(encoding="utf-8")
    lines = [f"FROM ./{Path(path).name}", f"PARAMETER num_ctx {run.settings.max_length}"]
    for jinja in (Path(__file__).parent / "templates" / "chat").glob("*.jinja"):
        if jinja.read_text(encoding="utf-8").rstrip("\n") == template:
            ours = jinja.with_suffix(".ollama").read_text(encoding="utf-8").replace("</s>", end)
            lines += [f'TEMPLATE """{ours}"""', f'PARAMETER stop "{end}"']
    return "\n".join(lines) + "\n"


def run_converter(converter: str, source: str, adapter_folder: str, target: str, kind: str, name: str) -> None:
    """Run llama.cpp's converter in this process, its tensors replaced by merged ones as they are read.

    The converter indexes tensors as functions that give lazy tensors (conversion/base.py, `index_tensors`);
    ours call theirs and add the low-rank product, which is evaluated when the tensor is written.
    """
    sys.path[:0] = [converter, os.path.join(converter, "gguf-py")]
    from conversion.base import LazyTorchTensor, ModelBase

    adapter, index_tensors = Adapter.read(Path(adapter_folder)), ModelBase.index_tensors
    adapter.pairs = {key: tuple(map(LazyTorchTensor.from_eager, pair)) for key, pair in adapter.pairs.items()}
    adapter.replaced = {key: LazyTorchTensor.from_eager(tensor) for key, tensor in adapter.replaced.items()}

    def index_merged(self, *arguments, **options):
        tensors = index_tensors(self, *arguments, **options)
        adapter.refuse_left_over(set(tensors))
        return {
            key: (lambda key=key, read=read: adapter.merged(key, read())) if adapter.changes(key) else read
            for key, read in tensors.items()
        }

    ModelBase.index_tensors = index_merged
    sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", target, "--outtype", kind, "--model-name", name]
    runpy.run_path(os.path.join(converter, "convert_hf_to_gguf.py"), run_name="__main__")
    print(json.dumps({"peak_ram_gb": peak_ram_gb()}))


if __name__ == "__main__":
    run_converter(*sys.argv[1:])
