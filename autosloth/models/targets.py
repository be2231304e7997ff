"""Which layers LoRA trains: the linear layers and the experts in the blocks of the text part, found in the model itself."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from typing import Any, NamedTuple

from ..errors import ModelError
from ..weights import WRAPPERS

ALL, ATTENTION = "all-linear", "attention"  # what `target_modules` may be besides a list of names
ROUTER = re.compile(r"router|(^|\.)gate$", re.IGNORECASE)
NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Targets(NamedTuple):
    """What PEFT's LoraConfig takes: modules by their last names, or by a pattern where these would reach further; parameters that hold experts.

    names: of all that these are.
    """

    modules: list[str] | str
    parameters: list[str] | None  # None where the model has no such
    names: set[str]


def targets_of(model: Any, asked: str | list[str]) -> Targets:
    """The layers of a model that are to be trained: `all-linear`, `attention`, or those of these names. Raises ModelError for a name that none has."""
    linear, experts = trainable_layers(model)
    routed = bool(experts)
    if asked == ATTENTION:
        linear, experts = [name for name in linear if "attention" in about(model, name)], []
    elif asked != ALL:
        refuse_unknown(asked, [in_block(name) for name in linear + experts])
        linear, experts = ([name for name in names if is_named(in_block(name), asked)] for names in (linear, experts))
    if not linear and not experts:
        raise ModelError("No layer of the model can be trained by LoRA as `target_modules` says.", "Set `target_modules: all-linear`.")  # fmt: skip
    renamed = taken_for_experts(model, linear)
    linear = [name for name in linear if name not in renamed or model.get_submodule(name).weight.is_floating_point()]
    renamed = [name for name in renamed if name in linear]  # as parameters, which cannot be packed in 4 bit
    modules = covering([name for name in linear if name not in renamed], [name for name, _ in model.named_modules()])
    parameters = [*experts, *(f"{name}.weight" for name in renamed)]
    held = sorted({in_block(name) for name in parameters}) if routed or renamed else None
    return Targets(modules, held, {*linear, *experts})


def is_named(layer: str, asked: list[str]) -> bool:
    """Whether a layer is asked for, by the end of its name in its block.

    >>> is_named("mlp.experts.down_proj", ["down_proj"]), is_named("mlp.down_proj", ["experts.down_proj"])
    (True, False)
    """
    return any(f".{layer}".endswith(f".{name}") for name in asked)


def refuse_unknown(asked: list[str], layers: list[str]) -> None:
    """Raises ModelError where a name of `target_modules` is that of no layer that LoRA may train."""
    unknown = [name for name in asked if not any(is_named(layer, [name]) for layer in layers)]
    if not unknown:
        return
    todo = f"Its layers are {', '.join(dict.fromkeys(layers))}; the end of a name is enough."
    if whole := [name for name in unknown if name in ("lm_head", "embed_tokens")]:
        todo = f"Name {' and '.join(whole)} in `modules_to_save`, which trains them whole. {todo}"
    elif shorthand := [name for name in unknown if name in (ALL, ATTENTION)]:
        todo = f"`{shorthand[0]}` stands alone, without brackets. {todo}"
    elif any("," in name for name in unknown):
        todo = f"Give several names as a list, such as [q_proj, v_proj]. {todo}"
    elif any(ROUTER.search(name) for name in unknown):
        todo = f"Routers are not trained. {todo}"
    raise ModelError(
        f"`target_modules` names {', '.join(unknown)}, and the model has no such layer that LoRA could train.", todo
    )


def taken_for_experts(model: Any, linear: list[str]) -> list[str]:
    """The layers of these that PEFT 0.20 takes for experts by their names, and leaves untrained, where a family's experts were once called so.

    As parameters they are told apart. It does so with every adapter that it loads, so an adapter that names them is of no use to anyone.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = {last(name) for name in linear}
    config = LoraConfig(target_modules=sorted(names))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two that belong together is not asked for
        config.target_modules = set()
    return [name for name in linear if last(name) not in config.target_modules]


def trainable_layers(model: Any) -> tuple[list[str], list[str]]:
    """The names of the linear layers in the blocks of the text part, and of the parameters there that each hold the matrices of all experts.

    Left out are routers, which choose the experts, gates of one number, and layers whose weights the code of their block reads past them,
    as Mamba's fused kernels do: an adapter there would be passed by, and never trained.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    modules, blocks = dict(model.named_modules()), blocks_of(model)
    inside = {name: module for name, module in modules.items() if name.startswith(f"{blocks}.")}
    linear = [
        name
        for name, module in inside.items()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and not is_router(name, module)
        and last(name) not in read_past(type(modules[name.rpartition(".")[0]]))
    ]
    experts = [
        f"{name}.{parameter}"
        for name, module in inside.items()
        for parameter, weight in module.named_parameters(recurse=False)
        if "experts" in name and len(shape_of_stack(weight)) == 3
    ]
    return linear, experts


def shape_of_stack(weight: Any) -> tuple[int, ...]:
    """The shape of a parameter as the model's code means it: Unsloth's GPU loader packs stacks of experts in 4 bit, and notes theirs."""
    return tuple(getattr(weight, "_original_shape", weight.shape))


def blocks_of(model: Any) -> str:
    """The name of the list of blocks of the text part, `model.layers` say; the adapter's wrapping does not count."""
    import torch

    lists = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))
    return bare(next(name for name, module in model.named_modules() if module is blocks))


def tables_of(model: Any) -> list[str]:
    """The names of the embeddings and of the head, in this order; the adapter's wrapping does not count."""
    named = [(bare(name), module) for name, module in model.named_modules()]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [next(name for name, module in named if module is end) for end in ends if end is not None]


def is_router(name: str, layer: Any) -> bool:
    """Whether a linear layer decides where a token goes, or how much of it."""
    return bool(ROUTER.search(name) or ROUTER.search(type(layer).__name__)) or getattr(layer, "out_features", 0) == 1


@functools.cache
def read_past(kind: type) -> set[str]:
    """The layers of a module of this class whose weights its code reads itself, beside asking for their type or place.

    Unsloth's compiled classes on a GPU have their methods beside them, as functions `<class>_<method>`.

    >>> import torch
    >>> read_past(torch.nn.Linear)
    set()
    """
    beside = [each for name, each in vars(inspect.getmodule(kind)).items() if name.startswith(f"{kind.__name__}_")]
    source = ""
    for code in (kind, *beside):
        with contextlib.suppress(OSError, TypeError):
            source += inspect.getsource(code)
    return set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data_ptr))", source))


def about(model: Any, name: str) -> str:
    """The names and the class that tell what a layer belongs to, in small letters."""
    parent = name.rpartition(".")[0]
    return f"{parent} {type(model.get_submodule(parent)).__name__}".lower().replace("attn", "attention")


def covering(names: list[str], modules: list[str]) -> list[str] | str:
    """The last names of these modules where they are those of no others, else a pattern that fits them alone.

    >>> covering(["a.0.q", "a.0.k"], ["a", "a.0", "a.0.q", "a.0.k"])
    ['k', 'q']
    >>> covering(["text.0.q", "text.1.q"], ["eye.0.q", "text.0.q", "text.1.q"])
    '(.*\\\\.)?(text)\\\\.\\\\d+\\\\.(q)'
    """
    ends = sorted({last(name) for name in names})
    if sum(last(module) in ends for module in modules) == len(names):
        return ends
    blocks = sorted({re.escape(NUMBER.split(name, maxsplit=1)[0]) for name in names})
    inner = sorted({re.escape(in_block(name)) for name in names})
    return rf"(.*\.)?({'|'.join(blocks)})\.\d+\.({'|'.join(inner)})"


def as_pattern(names: list[str] | str) -> str:
    """The modules whose last names these are, as a pattern; a pattern stays as it is.

    >>> re.fullmatch(as_pattern(["conv.in_proj", "q"]), "layers.0.conv.in_proj") is not None
    True
    >>> re.fullmatch(as_pattern([]), "layers.0.q") is None
    True
    """
    if isinstance(names, str):
        return names
    return rf"(.*\.)?({'|'.join(map(re.escape, sorted(names)))})" if names else "(?!)"


def last(name: str) -> str:
    """The last part of a name."""
    return name.rpartition(".")[2]


def in_block(name: str) -> str:
    """What a layer is called in its block.

    >>> in_block("model.layers.3.self_attn.q_proj")
    'self_attn.q_proj'
    """
    return NUMBER.split(name, maxsplit=1)[1].removeprefix(".")


def bare(name: str) -> str:
    """What a module of a model with an adapter is called in the model without.

    >>> bare("base_model.model.model.layers.0.mlp.experts.base_layer")
    'model.layers.0.mlp.experts'
    """
    return WRAPPERS.sub("", name.removeprefix("base_model.model."))


def reached(model: Any) -> set[str]:
    """The layers, and parameters of experts, that LoRA trains, as they are called in the model without."""
    from peft.tuners.lora import LoraLayer

    layers = [(bare(name), layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return {f"{name}.{getattr(layer, 'parameter_name', 'weight')}".removesuffix(".weight") for name, layer in layers}


def kept_whole(model: Any) -> set[str]:
    """The layers that are trained whole beside LoRA, as they are called in the model without."""
    from peft.utils import ModulesToSaveWrapper

    return {bare(name) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def layer_counts(model: Any, trained: set[str] | None = None) -> dict[str, dict[str, int]]:
    """How many matrices of each kind LoRA has `trained`, of how many (`of`): those of a block by their name in it, others by what they belong to.

    Those that are trained `whole` say so, and embeddings count only there. trained: in place of what a model's own adapter reaches.
    """
    import torch

    whole, trained = kept_whole(model), reached(model) if trained is None else trained
    blocks, told = blocks_of(model), {}
    for path, module in model.named_modules():
        name = bare(path)
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or ".lora_" in path or ".modules_to_save." in path:
                continue
            matrix = name if parameter == "weight" else f"{name}.{parameter}"
            if isinstance(module, torch.nn.Embedding) and matrix not in whole:
                continue
            kind = (
                in_block(matrix)
                if name.startswith(f"{blocks}.")
                else name.removeprefix("model.").removeprefix("language_model.").partition(".")[0]
            )
            counts = told.setdefault(NUMBER.sub("", kind), {"trained": 0, "of": 0})
            counts["of"] += 1
            counts["trained"] += matrix in trained
            if matrix in whole:
                counts["whole"] = counts.get("whole", 0) + 1
    return told


def layers_line(counts: dict[str, dict[str, int]]) -> str:
    """How many matrices of each kind LoRA trains, in words; what is trained whole is not counted among them.

    >>> layers_line({"mlp.up_proj": {"trained": 2, "of": 2}, "lm_head": {"trained": 0, "of": 1}})
    '2 of 3 matrices: mlp.up_proj 2 of 2; not trained: lm_head 1'
    >>> layers_line({"mlp.up_proj": {"trained": 2, "of": 2}, "lm_head": {"trained": 0, "of": 1, "whole": 1}})
    '2 of 2 matrices: mlp.up_proj 2 of 2; trained whole: lm_head 1'
    """
    whole = {kind: count["whole"] for kind, count in counts.items() if count.get("whole")}
    by_lora = {kind: (count["trained"], count["of"]) for kind, count in counts.items() if kind not in whole}
    trained, every = (sum(count[place] for count in by_lora.values()) for place in (0, 1))
    told = f"{trained} of {every} matrices: "
    told += ", ".join(f"{kind} {some} of {of}" for kind, (some, of) in by_lora.items() if some)
    left = {kind: of for kind, (some, of) in by_lora.items() if not some}
    for what, kinds in (("trained whole", whole), ("not trained", left)):
        if kinds:
            told += f"; {what}: " + ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    return told
