"""llama.cpp's converter as a library, once its folder is on the path: which class converts a model, its tensors kept lazy, and what is packed in a base unpacked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..weights import Packed, model_headers, without_packing

OLDER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}


def converter_class(source: Path) -> Any:
    """The converter's class for a model, told to leave out the blocks that predict further tokens where the files hold none: transformers saves none."""
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    stay_lazy()
    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(source, False), ModelType.TEXT))
    kind.no_mtp = kind.supports_mtp_export and not looks_ahead(source)
    return kind


def looks_ahead(source: Path) -> bool:
    """Whether a model's files hold blocks for multi-token prediction: under that name, or behind the last block that config.json counts."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    blocks = config.get("text_config", config).get("num_hidden_layers", math.inf)
    names = (name for header in model_headers(source).values() for name in header)
    found = (re.match(r"(?:model\.|language_model\.)*(?:(mtp)\.|layers\.(\d+)\.)", name) for name in names)
    return any(match[1] or int(match[2]) >= blocks for match in found if match)


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the names of Granite 4's layers that the converter knows; transformers 5 writes others."""
    if config.get("model_type") != "granitemoehybrid" or "layer_types" not in config:
        return config
    return config | {"layer_types": [OLDER_NAMES.get(name, name) for name in config["layer_types"]]}


def unpacked(model: Any, tensors: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The weights that a converter of llama.cpp found, by its names, with those that the files hold packed as lazy tensors that are made of a `Packed`.

    Told nothing of how they are packed, it takes them for 16-bit weights, and neither unpacks them itself nor keeps them as they are.
    """
    import torch
    from conversion.base import LazyTorchTensor

    def lazy(packed: Packed) -> Any:
        meta = LazyTorchTensor.meta_with_dtype_and_shape(getattr(torch, packed.dtype), packed.shape)
        return LazyTorchTensor(meta=meta, args=(packed,), func=type(packed).whole)

    entries = {name: entry for header in model_headers(model.dir_model).values() for name, entry in header.items()}
    if not any("packed" in entry for entry in entries.values()):
        return tensors
    model.hparams = without_packing(model.hparams)
    made: dict[str, Callable[[], Any]] = {}
    for name, entry in entries.items():
        read = partial(lazy, entry["packed"]) if "packed" in entry else None
        kept = model.filter_tensors((name, read))
        if kept and (read or kept[0] in tensors):
            made[kept[0]] = read or tensors[kept[0]]
    return made


def stay_lazy() -> None:
    """Let the converter's lazy tensors stay so where it changes a part of one in place (Falcon H1) or moves one to another device (Gemma 3n).

    It would evaluate them at once, all in memory together, and what they are made of could not be told any more.
    """
    import torch
    from conversion.base import LazyTorchTensor

    def put(tensor: Any, key: Any, value: Any) -> None:
        before = LazyTorchTensor(
            **{name: getattr(tensor, f"_{name}") for name in ("meta", "data", "args", "kwargs", "func")}
        )
        instead(value, tensor, before)
        tensor._data, tensor._args, tensor._kwargs, tensor._func = None, (before, key, value), {}, with_part

    def to(tensor: Any, *given: Any, **named: Any) -> Any:
        return (
            tensor
            if named.keys() == {"device"} and not given
            else LazyTorchTensor._wrap_fn(torch.Tensor.to, use_self=tensor)(*given, **named)
        )

    LazyTorchTensor.__setitem__, LazyTorchTensor.to = put, to


def with_part(tensor: Any, key: Any, value: Any) -> Any:
    """A copy of a tensor with another part."""
    changed = tensor.clone()
    changed[key] = value
    return changed


def instead(node: Any, old: Any, new: Any) -> None:
    """Let a lazy tensor be made of another one than it was, which is about to be made of it."""
    import gguf

    def other(part: Any) -> Any:
        if part is not old:
            instead(part, old, new)
        return new if part is old else part

    if isinstance(node, gguf.LazyBase):
        node._args = gguf.LazyBase._recurse_apply(node._args, other)
