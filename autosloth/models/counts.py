"""What GPU memory depends on in a model of any family, counted in the model itself by the shapes of its weights.

bitsandbytes packs linear layers alone; Unsloth's GPU loader packs the stacks of experts too (unsloth_zoo 2026.10, temporary_patches/moe_utils_bnb4bit.py).
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from .targets import blocks_of, shape_of_stack, targets_of

# What Unsloth's GPU loader keeps in 16 bit where a repository does not say (unsloth_zoo 2026.10, peft_utils.py; models/vision.py for Nemotron H and Gemma 3n).
KEPT = (
    *("lm_head", "multi_modal_projector", "merger", "modality_projection", "mm_projector"),
    *("router", "mlp.gate", "block_sparse_moe.gate", "moe.gate", "mamba"),
    *("audio_tower", "vision_tower", "visual", "vision_embedder", "embed_vision", "embed_audio"),
)
KEPT_OF = {"nemotron_h": ("out_proj",), "gemma3n": ("correction_coefs", "prediction_coefs", "altup_projections", "altup_unembed_projections")}  # fmt: skip
AT_ONCE = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")  # as configs call it
# The text part of a wrapper, as files or the model call it.
INNER = re.compile(r"^(model\.)?language_model\.(model\.)?")


class Counts(NamedTuple):
    """Numbers of a model."""

    narrow: int  # weights that are packed where the model is loaded in 4 bit
    wide: int  # all others
    adapter: int  # in a LoRA adapter of rank 1
    table: int  # of the embeddings
    tied: bool  # whether the head is the embeddings
    block: int  # that the layers of the largest block make of a token
    active: int | None  # weights that work on a token, in a mixture of experts whose config says how many of them do


def counts_of(model: Any, asked: str | list[str], skipped: tuple[str, ...] = ()) -> Counts:
    """The counts of a model, with or without numbers. Raises ModelError where no layer can be trained as `target_modules` asks.

    skipped: what its repository keeps in 16 bit.
    """
    weights = {
        f"{name}.{parameter}".removesuffix(".weight"): (module, shape_of_stack(weight))
        for name, module in model.named_modules()
        for parameter, weight in module.named_parameters(recurse=False)
        if f"{name}.{parameter}" not in model.all_tied_weights_keys
    }
    shapes = {name: shape for name, (_, shape) in weights.items()}
    stacks = {name: shape for name, shape in shapes.items() if "experts" in name and len(shape) == 3}
    linear = {name: shape for name, (module, shape) in weights.items() if is_linear(module) and len(shape) == 2}
    of_kind = (part for kind, parts in KEPT_OF.items() if kind in model_kind(model) for part in parts)
    kept = skipped or (*KEPT, *of_kind)
    packed = {name for name in (*linear, *stacks) if not is_kept(name, kept)}
    narrow, total = (sum(map(math.prod, some)) for some in ([shapes[name] for name in packed], shapes.values()))
    at_once = experts_at_once(model)
    idle = sum(math.prod(shape) * (1 - (at_once or 0) / shape[0]) for shape in stacks.values())
    trained = [shapes[name] for name in targets_of(model, asked).names]
    # A linear layer makes its outputs of a token; an expert also has its inputs, which are brought together for it.
    made = {name: shape[0 if hasattr(weights[name][0], "out_features") else 1] for name, shape in linear.items()}
    made |= {name: (at_once or 0) * sum(shape[1:]) for name, shape in stacks.items()}
    return Counts(
        narrow=narrow,
        wide=total - narrow,
        adapter=sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in trained),
        table=model.get_input_embeddings().weight.numel(),
        tied=bool(model.all_tied_weights_keys),
        block=largest_block(made, f"{blocks_of(model)}."),
        active=round(total - idle) if stacks and at_once else None,
    )


def model_kind(model: Any) -> str:
    """What config.json calls the family of a model, and that of its text part."""
    return f"{model.config.model_type} {model.config.get_text_config().model_type}"


def experts_at_once(model: Any) -> int | None:
    """How many experts work on a token; None where the config does not say."""
    config = model.config.get_text_config()
    return next((number for name in AT_ONCE if isinstance(number := getattr(config, name, None), int) and number), None)


def is_linear(module: Any) -> bool:
    """Whether bitsandbytes packs a module's weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return type(module) is torch.nn.Linear or isinstance(module, Conv1D)


def is_kept(name: str, kept: tuple[str, ...]) -> bool:
    """Whether a layer is in one of these parts of the model, or its name ends as one of theirs.

    >>> is_kept("model.language_model.layers.1.mlp.up_proj", ("language_model.model.layers.1.mlp",))
    True
    """
    name, parts = INNER.sub("model.", name), [INNER.sub("model.", part) for part in kept]
    return any(name.endswith(part) or f".{part}." in f".{name}." for part in parts)


def largest_block(numbers: dict[str, int], blocks: str) -> int:
    """The largest sum of the numbers of one block; by the names of its layers, which begin with `blocks`.

    >>> largest_block({"layers.0.q": 1, "layers.1.q": 2, "layers.1.k": 3, "head": 9}, "layers.")
    5
    """
    sums: dict[str, int] = {}
    for name, number in numbers.items():
        if name.startswith(blocks):
            block = name.removeprefix(blocks).partition(".")[0]
            sums[block] = sums.get(block, 0) + number
    return max(sums.values())
