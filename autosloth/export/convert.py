"""The conversion process: llama.cpp's own converter decides what a GGUF holds, `quantize` fills in the weights.

Run by `run_apart`. The converter decides metadata, vocabulary, names, shapes, types and which row goes where; of large
tensors it only sees shapes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import runpy
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from ..errors import ExportError
from ..hardware import GB, peak_ram_gb
from ..output import last_words
from ..weights import Adapter, Packed, Plain, Shards, shard_by_shard
from .converter import converter_class, unpacked, with_older_names
from .llama import listening
from .merge import merged_config
from .quantize import Filler, Place, Weight, Whole
from .selection import choose_rows, find_weights

CONVERTED = (
    "auto",
    "f32",
    "bf16",
    "f16",
    "q8_0",
)  # what the converter makes; the others are mixtures that llama.cpp chooses
NOT_IN_AN_ADAPTER_FILE = ("use_dora", "alpha_pattern", "lora_bias", "rank_pattern")  # the last only with rsLoRA

CARD = "README.md"  # where the converter looks for whose model it is

UNKNOWN_TOKENIZER = (
    "llama.cpp makes no GGUF of this model: it does not know how its tokenizer splits a text.",
    "Set `quantizations: []` to train it without a GGUF, or choose another model.",
)


@dataclass
class Plan:
    """A GGUF file whose head is written: its tensors, by name, each with its type (ggml's number) and first byte."""

    path: Path
    writer: Any
    size: int = 0
    tensors: dict[str, tuple[Any, int, int]] = field(default_factory=dict)


def main(request: dict[str, Any]) -> dict[str, float]:
    """Make the files of a request {converter, source, adapter, name, files: {type: path}}, or only their heads if `heads`; the peak memory in GB. Raises ExportError, with no sentence lost, and what the converter raises."""
    memory = watch_memory()
    files = {kind: Path(path) for kind, path in request["files"].items()}
    if "adapter" in files:
        convert_adapter(request, files.pop("adapter"))  # before the seams of `Converter` are in place
    if files:
        convert_model(request, files)
    return {"peak_ram_gb": peak_ram_gb(), "peak_anonymous_gb": memory()}


def convert_model(request: dict[str, Any], files: dict[str, Path]) -> None:
    """Make files of the merged model. Raises ExportError."""
    source = Path(request["source"])
    adapter = Adapter.read(Path(request["adapter"]), source) if request["adapter"] else Adapter()
    if adapter.untied:
        untie(source / "config.json")
    shards = Shards(source)
    converter = Converter(Path(request["converter"]), adapter, shards)
    converter_class(source)
    plans = [converter.plan(request, kind, path) for kind, path in files.items() if kind in CONVERTED]
    if mixtures := {kind: path for kind, path in files.items() if kind not in CONVERTED}:
        plans += converter.plan_mixtures(request, mixtures)
    if request.get("heads"):
        for plan in plans:
            os.truncate(plan.path, plan.size)  # a hole in place of the tensors, which takes no room
        return refuse_other_vocabulary(plans[0], source)
    refuse_small_disk(plans, shards.to_free(plans[0].path.parent))
    fill(plans, shards)


def refuse_other_vocabulary(plan: Plan, source: Path) -> None:
    """Raises ExportError where the converter took a byte-level tokenizer that it does not know for one of SentencePiece's kind, as it does for some models of Llama's class."""
    model = plan.writer.kv_data[0]["tokenizer.ggml.model"].value
    told = json.loads((source / "tokenizer.json").read_text(encoding="utf-8")) if (source / "tokenizer.json").is_file() else {}  # fmt: skip
    if model == "llama" and "ByteLevel" in json.dumps(told.get("decoder")):
        raise ExportError(*UNKNOWN_TOKENIZER)


def untie(config: Path) -> None:
    """Let a config.json, in place of the link that it is, tell that embeddings and head are two weights."""
    known = json.loads(config.read_text(encoding="utf-8"))
    config.unlink()
    config.write_text(json.dumps(merged_config(known, known.get("dtype") or known.get("torch_dtype"), untied=True)))


def convert_adapter(request: dict[str, Any], path: Path) -> None:
    """Make a GGUF of the adapter alone, in float16, by llama.cpp's converter for adapters. Raises ExportError when such a file cannot hold it.

    It knows one scale for all, alpha / r (arXiv 2106.09685); that of rsLoRA, alpha / sqrt(r) (arXiv 2312.03732), is told as another alpha.
    """
    source = Path(request["adapter"])
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    stable = config.get("use_rslora")
    if held := [name for name in NOT_IN_AN_ADAPTER_FILE if config.get(name) and (stable or name != "rank_pattern")]:
        raise ExportError(
            f"A GGUF of the adapter alone cannot hold {', '.join(held)}.",
            "Take `adapter` out of `quantizations`; the whole model can.",
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, request["name"])
        folder.mkdir()
        (folder / "adapter_model.safetensors").symlink_to((source / "adapter_model.safetensors").resolve())
        if Path(request["source"], CARD).is_file():
            shutil.copyfile(Path(request["source"], CARD), folder / CARD)
        alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if stable else 1)
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}), encoding="utf-8")
        options = ["--base", request["source"], "--outtype", "f16", "--outfile", str(path)]
        with model_as_converted(request["converter"], Path(request["source"])):
            run_script(Path(request["converter"], "convert_lora_to_gguf.py"), [*options, str(folder)])


@contextlib.contextmanager
def model_as_converted(converter: str, source: Path) -> Iterator[None]:
    """Let llama.cpp's converter for adapters take a model as the one for models does: no further blocks than the files hold, the class that does the work, the older names of Granite 4's layers.

    It would count blocks that are not there, write the base itself where a class hands all on to another (Mistral 3), and leave the rows of Granite's
    heads where they are: transformers, which reads config.json for it, renames the layers.
    """
    sys.path[:0] = [converter, os.path.join(converter, "gguf-py")]
    import conversion
    import gguf

    kind, read = converter_class(source), conversion.ModelBase.load_hparams
    if "impl" in kind.__annotations__:
        kind = type(kind(source, gguf.LlamaFileType.ALL_F32, Path(os.devnull)).impl)

    def known(*given: Any, **named: Any) -> dict[str, Any]:
        return with_older_names(read(*given, **named))

    with (
        mock.patch.object(conversion, "get_model_class", lambda name: kind),
        mock.patch.object(conversion.ModelBase, "load_hparams", staticmethod(known)),
    ):
        yield


def run_script(script: Path, options: list[str]) -> None:
    """Run a script of llama.cpp in this process."""
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


class Converter:
    """llama.cpp's converter in this process, with weights that are merged as they are read and tensors that are filled in later."""

    def __init__(self, folder: Path, adapter: Adapter, shards: Shards):
        sys.path[:0] = [str(folder), str(folder / "gguf-py")]
        import gguf
        from conversion.base import ModelBase

        self.folder, self.adapter, self.shards, self.plans = folder, adapter, shards, []
        self.index, self.quantize = ModelBase.index_tensors, gguf.quants.quantize
        # The three seams, all looked up when they are called: how weights are found, packed and written.
        ModelBase.index_tensors = lambda model, *given, **named: self.index_merged(
            model, self.index(model, *given, **named)
        )
        gguf.quants.quantize = self.defer
        gguf.GGUFWriter.write_tensors_to_file = lambda writer, **_: self.plans.append(write_head(writer))

    def plan(self, request: dict[str, Any], kind: str, path: Path) -> Plan:
        """Write the head of a file of a type that the converter knows; `auto` is the 16-bit type that suits the base."""
        options = ["--outfile", str(path), "--outtype", kind, "--model-name", request["name"]]
        run_script(self.folder / "convert_hf_to_gguf.py", [request["source"], *options])
        return self.plans.pop()

    def plan_mixtures(self, request: dict[str, Any], files: dict[str, Path]) -> list[Plan]:
        """Write the heads of files whose types llama.cpp chooses tensor by tensor, from a 16-bit file that is nothing but a head."""
        with tempfile.TemporaryDirectory() as temporary:
            template = self.plan(request, "auto", Path(temporary, "head.gguf"))
            os.truncate(template.path, template.size)  # a hole, which takes no room
            return [retype(template, path, *chosen_types(template.path, kind)) for kind, path in files.items()]

    def index_merged(self, model: Any, tensors: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
        """The converter's weights by name, in place of each a `Weight`, and those that training has untied from another.

        The adapter knows them by their names in the base's files, which the converter shortens for some models.
        """
        tensors = unpacked(model, tensors)

        def converted(name: str) -> str:
            kept = model.filter_tensors((name, lambda: None))
            return kept[0] if kept else name

        untied = {converted(name): tensors.get(converted(shared)) for name, shared in self.adapter.untied.items()}
        tensors = {**tensors, **{name: read for name, read in untied.items() if read and name not in tensors}}
        changed = {converted(name): name for name in self.adapter.names}
        self.adapter.refuse_left_over({changed[name] for name in changed.keys() & tensors.keys()})
        return {
            key: (lambda key=key, read=read: self.weight(changed.get(key, key), read()))
            for key, read in tensors.items()
        }

    def weight(self, name: str, lazy: Any) -> Any:
        """A lazy tensor of the converter that knows its place in the base, as one that knows the adapter too."""
        weight = Weight(name, stored_at(lazy), self.adapter, self.shards)
        return type(lazy)(meta=lazy._meta, args=(weight,), func=Weight.whole)

    def defer(self, data: Any, kind: Any) -> Any:
        """In place of the converter's quantiser: of a matrix only the shape is made, and how it comes about is kept."""
        import gguf
        import numpy

        if len(data.shape) < 2:
            return self.quantize(data, kind)
        if isinstance(data, numpy.ndarray):  # made at once, as Gemma 3n's embeddings are
            data = gguf.LazyNumpyTensor.from_eager(data)
        later = gguf.LazyChunkedTensor([], data.shape, numpy.float32).quantize(kind)
        later.graph = data
        return later


def stored_at(lazy: Any) -> Plain | Packed:
    """Where a lazy tensor of the converter, or of `unpacked`, lies in the base's files."""
    found = lazy._args[0]
    if isinstance(found, Packed):
        return found
    place = found.data_range
    return Plain(str(place.filename), place.offset, str(lazy.dtype).removeprefix("torch."), tuple(found.shape))


def write_head(writer: Any) -> Plan:
    """End the head of a file with its list of tensors; where each of them goes."""
    writer.write_ti_data_to_file()
    (file,), (tensors,) = writer.fout, writer.tensors
    writer.write_padding(file, file.tell())
    plan = Plan(Path(file.name), writer, file.tell())
    for name, info in tensors.items():
        plan.tensors[name] = (info.tensor, int(info.dtype), plan.size)
        plan.size += writer.ggml_pad(info.nbytes, writer.data_alignment)
    return plan


def chosen_types(path: Path, kind: str) -> tuple[int, dict[str, Any]]:
    """llama.cpp's number for a mixture such as q4_k_m, and the type that it chooses for each tensor that it packs.

    It tells them in a dry run, a line a tensor. Raises ExportError when it does not know the model.
    """
    import ctypes

    import gguf
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.dry_run = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"), True
    with listening() as said:
        refused = llama_cpp.llama_model_quantize(os.fsencode(path), b"", ctypes.byref(options))
    if refused:
        raise ExportError(
            f"llama.cpp cannot make {kind.upper()} of this model ({last_words(''.join(said))}).",
            "Leave it out of `quantizations`; `q8_0` goes without llama.cpp's choice of types.",
        )
    lines = re.findall(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*-> .*\((\w+)\)$", "".join(said), re.MULTILINE)
    return options.ftype, {name: gguf.GGMLQuantizationType[chosen.upper()] for name, chosen in lines}


def retype(template: Plan, path: Path, file_type: int, types: dict[str, Any]) -> Plan:
    """Write the head of a template again with other types of tensors."""
    import gguf

    writer = gguf.GGUFWriter(None, template.writer.arch, endianess=template.writer.endianess)
    writer.kv_data = [dict(template.writer.kv_data[0])]
    writer.add_file_type(file_type)
    for name, info in template.writer.tensors[0].items():
        kind = types.get(name, info.dtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        bytes_needed = math.prod(info.shape) // block * size
        writer.tensors[0][name] = type(info)(info.shape, kind, bytes_needed, info.tensor)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    plan = write_head(writer)
    writer.close()
    return plan


def refuse_small_disk(plans: list[Plan], to_free: int) -> None:
    """Raises ExportError when the files will not fit, though so many bytes come free; by then only their heads are written."""
    needed = (sum(plan.size for plan in plans) - to_free) / GB
    free = shutil.disk_usage(plans[0].path.parent).free / GB
    if needed > free:
        raise ExportError(
            f"The GGUF takes {needed:.2f} GB, and {free:.2f} GB are free in {plans[0].path.parent}.",
            "Free some space and run again; or set `quantizations: [adapter]`: the adapter alone is small, and llama.cpp puts it on any GGUF of the base.",
        )


def fill(plans: list[Plan], shards: Shards) -> None:
    """Write the tensors behind the heads, each read and merged once for all files, and bring them to the disk."""
    import torch

    torch.set_num_threads(1)  # the blocks take all cores
    for plan in plans:
        plan.writer = None  # which would keep each tensor that was evaluated
    with ExitStack() as stack:
        files = [stack.enter_context(open(plan.path, "r+b")) for plan in plans]
        descriptors = [file.fileno() for file in files]
        for descriptor, plan in zip(descriptors, plans, strict=True):
            os.truncate(descriptor, plan.size)
        needs = {
            name: {path for weight in find_weights(getattr(tensor, "graph", tensor)) for path in weight.stored.paths}
            for name, (tensor, *_) in plans[0].tensors.items()
        }
        with Filler(descriptors) as filler:
            for names, used in shard_by_shard(needs):
                for name in names:
                    fill_tensor(filler, [plan.tensors.pop(name) for plan in plans], files)
                if shards.sizes:
                    filler.wait()
                    for shard in used:
                        shards.drop(shard)
        for descriptor in descriptors:
            os.fsync(descriptor)


def fill_tensor(filler: Filler, tensors: list[tuple[Any, int, int]], files: list[Any]) -> None:
    """One tensor into all files: as the converter wrote it where it was not deferred, else in blocks."""
    tensor = tensors[0][0]
    graph = getattr(tensor, "graph", None)
    if graph is not None:  # whose truth would be its length, for which the converter evaluates it
        places = [Place(file.fileno(), *where[1:]) for where, file in zip(tensors, files, strict=True)]
        return filler.add(choose_rows(graph) or Whole(type(graph).to_eager(graph)), places)
    for (whole, _, offset), file in zip(tensors, files, strict=True):
        file.seek(offset)
        whole.tofile(file)


def watch_memory() -> Callable[[], float | None]:
    """Sample this process's anonymous memory (RssAnon: what no file backs) from now on; the function returns its peak in GB, None off Linux."""
    status, done, most = Path("/proc/self/status"), threading.Event(), [0]
    if not status.exists():
        return lambda: None

    def sample() -> None:
        lines = status.read_text().splitlines()
        most[0] = max(most[0], next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")))

    def keep_sampling() -> None:
        while not done.wait(0.02):
            sample()

    threading.Thread(target=keep_sampling, daemon=True).start()

    def peak() -> float:
        done.set()
        sample()
        return round(most[0] * 1024 / GB, 3)

    return peak
