"""Every tensor of a GGUF, compared with the merged tensor that it stands for, one at a time.

What a tensor should hold is what llama.cpp's own converter makes of the merged weights in float32: its graph of lazy
tensors is evaluated here, with the base's weights put under it, and what the file holds is read by gguf-py. Of what wrote
the file only the sums of the adapter (lora.py) are used, which are PEFT's, and what unpacks a base (stored.py). `main` runs in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

from ..child_process import run_apart
from ..errors import VerifyError
from ..export import converter_class, fetch_converter, unpacked, untie
from ..weights import TOLD, Adapter, Shards, shard_by_shard
from .graph import Graph, Weight
from .tally import BFLOAT16, NO_NUMBER, Tally, allowed, conclude

WHOLE_UP_TO = 2e9  # bytes of the base: beyond, ROWS of each tensor are compared, which takes seconds instead of minutes
ROWS, SEED = 64, 0  # of each tensor, drawn anew for each from one seed


def compare_weights(file: Path, source: Path, adapter: Path | None, told: Path | None = None) -> dict[str, Any]:
    """Hold a GGUF against the model in `source` (links to weights, config, tokenizer) with the adapter merged in, in a process of its own.

    Returns `form` (whole, or rows: ROWS of each tensor), `whole_model` (not an adapter alone), `architectures` (the file's, and that
    of the model), `tensors`, `wrong_tensors`, `wrong_values`, `types`, `values`, `max_error` and `mean_error` (of the worst tensor, relative to its
    largest weight and to its mean size), `worst`, `adapter_share` (None where there is none, or where it is `adapter_unseen`),
    `adapter_share_within` (how far from 1 it may be), `failures`. told: a file for the figures of each tensor. Raises VerifyError when the converter cannot
    read the model.
    """
    whole = sum(path.stat().st_size for path in source.glob("*.safetensors")) <= WHOLE_UP_TO
    request = {"converter": fetch_converter(), "file": file, "source": source, "adapter": adapter, "told": told}
    request |= {"rows": None if whole else ROWS}
    ended = run_apart("autosloth.proof.tensors", request, online=(source / TOLD).is_file())
    if ended.status:
        raise VerifyError(
            f"The weights of {file.name} could not be compared ({ended.reason}).",
            f"Check that {source} is the model that the file was made of.",
        )
    if reason := ended.answer.get("unreadable"):
        raise VerifyError(f"{file.name} cannot be read as a GGUF ({reason}).", "Make it again with `autosloth export`.")
    return {"form": "whole" if whole else "rows", **ended.answer}


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The figures of `compare_weights`, found in this process. Raises ExportError when the adapter does not fit the model."""
    sys.path[:0] = [request["converter"], os.path.join(request["converter"], "gguf-py")]
    source = Path(request["source"])
    adapter = Adapter.read(Path(request["adapter"]), source) if request["adapter"] else Adapter()
    try:
        file = read_gguf(request["file"])
    except (ValueError, IndexError, OverflowError, KeyError) as error:  # gguf-py checks little of what it reads
        return {"unreadable": f"{type(error).__name__}: {error}"}
    shards = Shards(source)
    model = Converted(source, adapter, shards)
    low_rank = file.fields["general.type"].contents() == "adapter" if "general.type" in file.fields else False
    scale = file.fields["adapter.lora.alpha"].contents() if low_rank else None
    compare = partial(compare_product, scale=scale) if low_rank else compare_tensor
    held, tallies, missing = {tensor.name: tensor for tensor in file.tensors}, [], []
    for name, graph in in_turn(dict(model.tensors()), shards):
        parts = [held.pop(part, None) for part in ([f"{name}.lora_a", f"{name}.lora_b"] if low_rank else [name])]
        if all(part is not None for part in parts):
            tallies.append(compare(name, *parts, graph, request["rows"]))
        elif graph.changed or not low_rank:
            missing.append(name)
    if request["told"]:
        Path(request["told"]).write_text(json.dumps([tally.facts() for tally in tallies], indent=1), encoding="utf-8")
    values = [] if low_rank else model.other_values(file)
    others = [f"{name} is missing" for name in missing] + [f"{name} is not of this model" for name in sorted(held)]
    named = file.fields["general.architecture"].contents() if "general.architecture" in file.fields else "none"
    return {
        "whole_model": not low_rank,
        "architectures": [named, model.model.gguf_writer.arch],
        **conclude(tallies, others, values),
    }


def in_turn(graphs: dict[str, Graph], shards: Shards) -> Iterator[tuple[str, Graph]]:
    """The tensors in the order of the shards that they are made of, each of which is given back when it was used."""
    import torch

    needs = {name: set[str]().union(*(weight.paths for weight in graph.weights)) for name, graph in graphs.items()}
    with torch.inference_mode():
        for names, used in shard_by_shard(needs):
            yield from ((name, graphs.pop(name)) for name in names)
            for shard in used:
                shards.drop(shard)


def read_gguf(path: str, mode: str = "r") -> Any:
    """The head of a GGUF and where its tensors are, by gguf-py's reader, but for its lists: it takes 17 s for a vocabulary of 128,000."""
    import numpy
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = int(self._get(orig_offs, numpy.uint32)[0]), int(self._get(orig_offs + 4, numpy.uint64)[0])
            end, content = orig_offs + 12, memoryview(self.data)
            if kind == GGUFValueType.STRING:
                for _ in range(count):
                    end += 8 + int.from_bytes(content[end : end + 8], "little")
            else:
                end += count * numpy.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
            return end - orig_offs, [], [], [GGUFValueType.ARRAY]

    return Reader(path, mode)


class Converted:
    """What llama.cpp's converter makes of a model with an adapter in it: nothing is evaluated or written yet."""

    def __init__(self, source: Path, adapter: Adapter, shards: Shards):
        import gguf
        import torch
        from conversion.base import ModelBase

        if adapter.untied:
            untie(source / "config.json")
        index = ModelBase.index_tensors

        def known(model: Any, *given: Any, **named: Any) -> dict[str, Callable[[], Any]]:
            return known_weights(model, unpacked(model, index(model, *given, **named)), adapter, shards)

        with torch.inference_mode(), mock.patch.object(ModelBase, "index_tensors", known):
            model = converter_class(source)(source, gguf.LlamaFileType.ALL_F32, Path(os.devnull))
        self.model = getattr(model, "impl", model)  # Mistral 3's hands all on to another converter

    def tensors(self) -> Iterator[tuple[str, Graph]]:
        """(name in the GGUF, how it is made) of each tensor."""
        import torch

        made: list[tuple[str, Any]] = []
        self.model.gguf_writer.add_tensor = lambda name, data, **_: made.append((name, data))
        with torch.inference_mode():
            self.model.prepare_tensors()
            for name, data in made:
                yield name, Graph(data)

    def other_values(self, file: Any) -> list[str]:
        """What of the model's shape (heads, rotary base, ...) stands otherwise in the file, in words; lists are not compared."""
        self.model.set_gguf_parameters()
        writer, wrong = self.model.gguf_writer, []
        for key, value in writer.kv_data[0].items():
            field = file.fields.get(key)
            if key.startswith(f"{writer.arch}.") and field is not None and field.data:
                found, wanted = field.contents(), value.value
                same = math.isclose(found, wanted, rel_tol=1e-6) if isinstance(wanted, float) else found == wanted
                wrong += [] if same else [f"{key} is {found}, not {wanted}"]
        return wrong


def known_weights(
    model: Any, tensors: dict[str, Callable[[], Any]], adapter: Adapter, shards: Shards
) -> dict[str, Callable[[], Any]]:
    """The converter's weights, each a lazy tensor that is made of a `Weight`: it knows the adapter, and the adapter's name for it."""

    def converters(name: str) -> str:
        kept = model.filter_tensors((name, lambda: None))
        return kept[0] if kept else name

    for name, shared in adapter.untied.items():  # the base has one weight where training made two
        tensors.setdefault(converters(name), tensors[converters(shared)])
    names = {converters(name): name for name in adapter.names}
    adapter.refuse_left_over({names[name] for name in tensors.keys() & names.keys()})

    def weight(name: str, read: Callable[[], Any]) -> Any:
        lazy = read()
        found = Weight(name, read, tuple(lazy.shape), lazy._args[0], adapter, shards)
        meta = lazy._meta.float() if lazy.dtype.is_floating_point else lazy._meta
        return type(lazy)(meta=meta, args=(found,), func=Weight.merged)

    return {name: (lambda name=name, read=read: weight(names.get(name, name), read)) for name, read in tensors.items()}


def unpack(tensor: Any, rows: Any) -> Any:
    """These rows of a tensor of the file, float32 (rows, columns)."""
    from gguf.quants import dequantize

    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    return dequantize(data[rows], tensor.tensor_type).astype("float32", copy=False)


def drawn(name: str, height: int, rows: int | None) -> Any:
    """The numbers of the rows of a tensor to compare, in order; None for all."""
    import numpy

    if rows is None or height <= rows:
        return None
    return numpy.sort(numpy.random.default_rng([SEED, crc32(name.encode())]).choice(height, rows, replace=False))


def compare_tensor(name: str, tensor: Any, graph: Graph, rows: int | None) -> Tally:
    """The figures of one tensor; one of another shape is all wrong."""
    import numpy

    tally, shape = Tally(name, tensor.tensor_type.name), tuple(graph.lazy.shape)
    if tuple(int(length) for length in reversed(tensor.shape)) != shape:
        tally.excess, tally.values = NO_NUMBER, 1
        return tally
    numbers = numpy.arange(math.prod(shape[:-1]))
    for chosen, base, merged in graph.parts(drawn(name, len(numbers), rows)):
        figures = base, merged, unpack(tensor, chosen), allowed(tally.kind, merged)
        if len(shape) == 3 and graph.changed:
            tally.add_stack(numbers[chosen] // shape[1], *figures)
        else:
            tally.add(*figures)
    return tally


def compare_product(name: str, a: Any, b: Any, graph: Graph, rows: int | None, scale: float) -> Tally:
    """The figures of (alpha / r) B A of an adapter's file, against what the adapter does to the tensor; one of another shape is all wrong."""
    tally, right = Tally(name, b.tensor_type.name), unpack(a, slice(None))
    if (math.prod(b.shape[1:]), right.shape[1]) != (math.prod(graph.lazy.shape[:-1]), graph.lazy.shape[-1]):
        tally.excess, tally.values = NO_NUMBER, 1
        return tally
    scale /= len(right)
    for chosen, base, merged in graph.parts(drawn(name, math.prod(graph.lazy.shape[:-1]), rows)):
        left, change = unpack(b, chosen), merged - base
        rounding = scale * (abs(left) @ abs(right)) * 2.0**-9 + BFLOAT16 * abs(merged) + 2.0**-24
        tally.add(0 * change, change, scale * (left @ right), rounding)
    return tally
