"""The model itself: its tokenizer, loading, precision, the LoRA adapter. The only file that imports unsloth."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from ..distributed import processes
from ..errors import ModelError
from ..hardware import first_gpu
from ..hub_client import model_errors
from ..output import hush_libraries, say
from ..retries import downloaded
from ..run import cache_dir
from ..settings import Settings
from ..values import shown
from ..weights import (
    parts_of,
    refuse_incomplete,
    refuse_untold,
    shard_names,
    tied_weights,
    whole_blocks,
    without_numbers,
)
from .adapter import adapter_config, adapter_shapes, fill, fitting, refuse_elsewhere, starting_adapter
from .base import TOKENIZER_FILES, growth, is_quantized, model_source, small_files
from .repair import repair_tokenizer
from .residual import STARTS, keep_start
from .targets import ALL, Targets, as_pattern, last, layer_counts, layers_line, tables_of, targets_of
from .template import template_for

SHAPE = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "ensure_weight_tying",
)  # of an adapter


def start_engine() -> Any:
    """Import unsloth, before trl, transformers and peft, which it patches; hold down its side effects.

    Without these, Unsloth 2026.10 compiles into the working directory, pings a statistics repository at
    each load, and may call apt-get in its own exports.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled_cache"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
    # Else only the first process's weights are real before FSDP shares them out, and by then they are measured.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    hush_libraries()
    with without_cpu_notices():
        import unsloth
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    return unsloth


@contextlib.contextmanager
def without_cpu_notices() -> Iterator[None]:
    """Keep back what Unsloth 2026.10 prints of its CPU backend; that there is no GPU is said with the precision."""
    with contextlib.redirect_stdout(io.StringIO()) if first_gpu() is None else contextlib.nullcontext():
        yield


def choose_precision(settings: Settings) -> tuple[str, str]:
    """The name of the torch dtype to train in, and the reason for it. Raises ModelError for bfloat16 on a GPU without it."""
    import torch

    if not torch.cuda.is_available():
        return "float32", "no GPU"
    name, has_bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision == "bfloat16" and not has_bf16:
        raise ModelError(f"`precision` is bfloat16, which {name} does not have.", "Set `precision: auto`.")
    if settings.precision != "auto":
        return settings.precision, "as set"
    return ("bfloat16", f"{name} has bf16") if has_bf16 else ("float16", f"{name} has no bf16")


def load_tokenizer(settings: Settings, kept: Path | None = None, tools: bool = False) -> Any:
    """The base model's tokenizer with the chat template of the run. Raises ModelError.

    kept: the file that the template of the run stands in, if it is settled already; tools: whether rows have tools, for which some
    models bring a template of its own.
    """
    start_engine()
    from transformers import AutoTokenizer

    source = model_source(settings)
    with model_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(small_files(source, settings.revision), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        ends = tokenizer.convert_ids_to_tokens(configured_ends(settings)[:1])
        tokenizer.eos_token = next((token for token in ends if token), None)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {source} has no fast form or no end token.",
            "Choose a model whose repository has a tokenizer.json.",
        )
    settled = kept is not None and kept.is_file()
    tokenizer.chat_template = kept.read_text(encoding="utf-8") if settled else template_for(tokenizer, settings, tools)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def end_ids(tokenizer: Any, settings: Settings) -> set[int]:
    """The ids that end an answer: the tokenizer's end token and those that the model's files tell."""
    return {tokenizer.eos_token_id, *configured_ends(settings)}


def configured_ends(settings: Settings) -> list[int]:
    """The ids of end tokens in the model's generation_config.json and config.json."""
    configs = [model_config(settings, name) for name in ("generation_config.json", "config.json")]
    told = [config.get("eos_token_id") for config in (*configs, configs[1].get("text_config") or {})]
    every = [end for ends in told for end in (ends if isinstance(ends, list) else [ends])]
    return list(dict.fromkeys(end for end in every if isinstance(end, int)))


def context_length(settings: Settings) -> int | None:
    """How many tokens the model takes at once, by its config.json; None where that does not tell."""
    config = model_config(settings, "config.json")
    return (config.get("text_config") or config).get("max_position_embeddings")


def embedding_rows(settings: Settings) -> int | None:
    """For how many token ids the model has embeddings, by its config.json."""
    config = model_config(settings, "config.json")
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def tokens_without_embedding(settings: Settings) -> list[str]:
    """The tokens of the model's tokenizer whose ids lie beyond its embeddings, by tokenizer.json and config.json."""
    rows, told = embedding_rows(settings), model_config(settings, "tokenizer.json")
    vocabulary = (told.get("model") or {}).get("vocab") or {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in told.get("added_tokens") or []}
    return [token for token, i in sorted(ids.items(), key=lambda pair: pair[1]) if rows is not None and i >= rows]


def model_config(settings: Settings, name: str) -> dict[str, Any]:
    """A JSON file of the model; empty where there is none."""
    path = small_files(model_source(settings), settings.revision) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save_tokenizer(tokenizer: Any, settings: Settings, folder: Path) -> list[str]:
    """Write the tokenizer as its author published it, with our chat template, and what is missing for the GGUF put back, which is named.

    `save_pretrained` of transformers 5 drops some of it (see repair.py), so the original files are copied over its own.
    """
    source = small_files(model_source(settings), settings.revision)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    repaired = repair_tokenizer(folder, tokenizer)
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    return repaired


def load_model(settings: Settings) -> Any:
    """The base model, in 4 bit where asked for and possible, with a LoRA adapter to train: a fresh one on the layers that the settings say, or the one to start from.

    Raises ModelError.
    """
    unsloth = start_engine()
    import torch
    from safetensors.torch import load_file

    source, (dtype, reason), start = model_source(settings), choose_precision(settings), starting_adapter(settings)
    say(f"precision: {dtype} ({reason})")
    with (
        model_errors(source),
        without_cpu_notices(),
        class_of_config(small_files(source, settings.revision), settings.model),
        whole_blocks(),
    ):
        load = partial(
            unsloth.FastLanguageModel.from_pretrained,
            source,
            revision=settings.revision,
            max_seq_length=settings.max_length,
            dtype=getattr(torch, dtype),
            load_in_4bit=settings.load_in_4bit,
            trust_remote_code=False,
            **when_packed(settings),
            **with_vllm(settings),
        )
        model, _ = load() if Path(source).is_dir() else downloaded(load)
    refuse_untold(small_files(source, settings.revision), settings.model)  # of the Hub's, which are here only now
    if model.base_model is model and hasattr(model, "model"):  # Llama 4's text model names another part
        model.base_model_prefix = "model"  # which TRL's loss asks for
    shape = lora_shape(model, settings, start)
    kind = "default" if start else getattr(settings, "init_lora_weights", "default")
    if loaded_generally():
        shape["target_modules"] = as_pattern(shape["target_modules"])
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        **shape,
        init_lora_weights=STARTS[kind],
        lora_dropout=settings.lora_dropout,
        bias="none",
        use_gradient_checkpointing="unsloth" if torch.cuda.is_available() else False,
        random_state=settings.seed,
        max_seq_length=settings.max_length,
    )
    if kind != "default":
        keep_start(model)
    if start:
        refuse_elsewhere(model, settings)
        fill(model, load_file(start / "adapter_model.safetensors"), settings)
    say(f"adapter: LoRA on {layers_line(layer_counts(model))}")
    # Unsloth sets it on a GPU; beside max_new_tokens transformers then warns at each call.
    model.generation_config.max_length = None
    return model


def loaded_generally() -> bool:
    """Whether Unsloth's GPU loader took the last model by its class for all families (FastBaseModel), not by one for Llama's and near ones.

    That leaves out of a list of names all layers whose path does not tell attention or MLP, as those of LFM 2's convolutions and of Mamba
    do not; a pattern it takes as it is (unsloth 2026.10, models/vision.py).
    """
    return os.environ.get("UNSLOTH_USE_NEW_MODEL") == "1"


@contextlib.contextmanager
def class_of_config(folder: Path, model: str) -> Iterator[None]:
    """Let Unsloth's CPU backend load the class that a config.json names: of a multimodal wrapper AutoModelForCausalLM knows none, or that of its text part alone. Raises ModelError."""
    import transformers

    named = text_class(folder, model)
    taken = named is not None and first_gpu() is None
    with mock.patch.object(transformers, "AutoModelForCausalLM", named) if taken else contextlib.nullcontext():
        yield


def text_class(folder: Path, model: str) -> type | None:
    """The class of transformers that a config.json names; None where transformers has none of that name. Raises ModelError for one that does not continue a text."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None)
    if named is not None and (config.is_encoder_decoder or not named.can_generate()):
        raise ModelError(f"{model} is a {name}, which does not go on from a text.", "Choose a causal language model, one that `text-generation` finds on the Hub.")  # fmt: skip
    return named


def when_packed(settings: Settings) -> dict[str, Any]:
    """What Unsloth needs to know to unpack a base in MXFP4 or FP8, where it is not to be packed in 4 bit: in their own arithmetic there is no backward pass, or another result."""
    packed = growth(model_source(settings), settings.revision) > 1
    return {"load_in_16bit": True} if packed and not settings.load_in_4bit else {}


def with_vllm(settings: Settings) -> dict[str, Any]:
    """What Unsloth needs to know to load vLLM beside the model, in self-play where it is asked for."""
    asked = settings.road == "spin" and settings.fast_inference
    return {"fast_inference": True, "max_lora_rank": max(16, settings.lora_r)} if asked else {}


def lora_shape(model: Any, settings: Settings, start: Path | None) -> dict[str, Any]:
    """Rank, scale, kind and layers of the adapter: as the settings say, or as the adapter to start from has them. Raises ModelError."""
    if start is None:
        refuse_start(settings)
        targets = targets_of(model, settings.target_modules)
        refuse_for_experts(model, targets, settings)
        return {
            "r": settings.lora_r,
            "lora_alpha": settings.lora_alpha,
            "target_modules": targets.modules,
            "target_parameters": targets.parameters,
            "use_rslora": settings.use_rslora,
            "use_dora": settings.use_dora,
            **trained_whole(model, settings.modules_to_save),
        }
    config = adapter_config(start)
    refuse_other_shape(model, settings, config)
    held = config.get("target_parameters")
    refuse_for_experts(model, Targets([], held, {*(held or [])}), settings)
    if (config["r"], config["lora_alpha"]) != (settings.lora_r, settings.lora_alpha):
        say(f"adapter: LoRA rank {config['r']} and alpha {config['lora_alpha']}, as {settings.adapter} has them")
    shape = {name: config[name] for name in SHAPE if config.get(name) is not None}
    shape.setdefault("target_modules", [])
    if config.get("ensure_weight_tying"):
        shape |= trained_whole(model, config.get("modules_to_save") or [])
    return shape


def refuse_other_shape(model: Any, settings: Settings, config: dict[str, Any]) -> None:
    """Raises ModelError where the settings ask for another kind of adapter, or other layers, than the adapter to start from has."""
    other = [
        name
        for name in ("use_rslora", "use_dora", "modules_to_save")
        if getattr(settings, name) and not config.get(name)
    ]
    if settings.target_modules != ALL:
        asked, found = targets_of(model, settings.target_modules), config.get("target_parameters") or []
        if as_pattern(asked.modules) != as_pattern(config.get("target_modules") or []) or {
            *(asked.parameters or [])
        } != {*found}:
            other.append("target_modules")
    if other:
        raise ModelError(
            f"The adapter {settings.adapter} is trained further as it is, and `{other[0]}` asks for another.",
            f"Leave out `{other[0]}`, or start without `adapter`.",
        )


def trained_whole(model: Any, names: list[str]) -> dict[str, Any]:
    """What PEFT needs to know of the modules of these names, which are trained whole; `embed_tokens` and `lm_head` are called otherwise in some families. Embeddings and head that are one weight stay one: many GGUFs have no place for two."""
    if not names:
        return {}
    tables = tables_of(model)
    called = dict(zip(("embed_tokens", "lm_head"), tables, strict=False)) | {last(name): name for name in tables}
    asked = list(dict.fromkeys(called.get(last(name), name) for name in names))
    tied = bool(model.all_tied_weights_keys) and not {*asked}.isdisjoint(tables)
    if tied:  # PEFT ties them by the usual name, whatever the model calls its embeddings
        asked = ["embed_tokens", *(name for name in asked if name not in tables)]
    return {"modules_to_save": asked, "ensure_weight_tying": tied}


def planned_layers(settings: Settings, stand_in: Path | None = None) -> dict[str, dict[str, int]]:
    """How many matrices of each kind the adapter would train, by the model's config alone, as `layer_counts` tells. Raises ModelError.

    stand_in: a folder for an adapter that looks like it, of random numbers.
    """
    start_engine()
    import torch
    from peft import LoraConfig, get_peft_model

    start, folder = starting_adapter(settings), small_files(model_source(settings), settings.revision)
    with model_errors(settings.model):
        text_class(folder, settings.model)
    model = without_numbers(folder)
    refuse_untold(folder, settings.model)
    here = all((folder / name).is_file() for name in shard_names(folder))
    if here and not is_quantized(model_source(settings), settings.revision):
        compare_with_files(model, folder, settings)
    config = LoraConfig(**lora_shape(model, settings, start), task_type="CAUSAL_LM")
    if start is None or takes_experts_apart(model, settings):  # which layers an adapter has of them, loading tells
        model = get_peft_model(model, config)
    else:
        with fitting(settings):
            model = get_peft_model(model, config, low_cpu_mem_usage=True)
        refuse_elsewhere(model, settings)
        shapes = adapter_shapes(start, str(settings.adapter))
        fill(model, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, settings)
    if stand_in:
        save_stand_in(model, stand_in)
    return layer_counts(model)


def save_stand_in(model: Any, folder: Path) -> None:
    """Save an adapter like that of a model without numbers, of random ones, as PEFT would; of rank 1 where all have one rank."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config, random = copy.copy(model.peft_config["default"]), torch.Generator().manual_seed(0)
    small = not config.rank_pattern
    config.r = 1 if small else config.r
    weights = {}
    for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if small and ".lora_A." in name:
            weight = weight[:1]
        elif small and ".lora_B." in name:
            weight = weight[:, :1]
        weights[name] = torch.randn(weight.shape, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)


def compare_with_files(model: Any, folder: Path, settings: Settings) -> None:
    """Let a model without numbers tell of its ties what its files do. Raises ModelError where they lack a weight."""
    parts = parts_of(model, folder)
    refuse_incomplete(model, folder, parts, settings.model)
    model.all_tied_weights_keys = tied_weights(model, folder, parts)


def takes_experts_apart(model: Any, settings: Settings) -> bool:
    """Whether each expert will be layers of its own: Unsloth's GPU loader does so in 4 bit with those of gpt-oss (unsloth_zoo 2026.10, temporary_patches/gpt_oss.py)."""
    return model.config.model_type == "gpt_oss" and settings.load_in_4bit and first_gpu() is not None


def refuse_start(settings: Settings) -> None:
    """Raises ModelError where an adapter is to start inside a base that cannot do without a part: its files are in few bits, which would round the rest of it, or processes share it."""
    kind = getattr(settings, "init_lora_weights", "default")
    if kind == "default":
        return
    if is_quantized(model_source(settings), settings.revision):
        raise ModelError(
            f"`init_lora_weights` is {kind}, which needs a base in 16 bit, and the files of {settings.model} are in fewer.",
            "Set `model` to its 16-bit original, or `init_lora_weights: default`.",
        )
    if processes() > 1:
        raise ModelError(
            f"`init_lora_weights` is {kind}, which changes the base, and {processes()} processes share it.",
            "Train in one process, or set `init_lora_weights: default`.",
        )


def refuse_for_experts(model: Any, targets: Targets, settings: Settings) -> None:
    """Raises ModelError for settings that PEFT cannot train experts with, where some are to be trained, and where what is trained of them could not be exported."""
    experts = any("experts." in name for name in targets.names)
    if experts and takes_experts_apart(model, settings) and (settings.merged or settings.quantizations):
        raise ModelError(
            f"In 4 bit each expert of {settings.model} is layers of its own, and an adapter on them fits no model in 16 bit.",
            "Set `target_modules: attention`, or `load_in_4bit: false` (a 20B then takes 42 GB), or export nothing: `quantizations: []`.",
        )
    neutral = {"lora_dropout": 0, "use_dora": False, "init_lora_weights": "default"}
    asked = [name for name, value in neutral.items() if getattr(settings, name, value) != value]
    if targets.parameters and asked:
        raise ModelError(
            f"The experts of {settings.model} cannot be trained with `{asked[0]}`.",
            f"Set `{asked[0]}: {shown(neutral[asked[0]])}`, or `target_modules: attention`.",
        )


def compute_blocks_again(model: Any, again: bool) -> None:
    """Let a backward pass compute each block again from its input (gradient checkpointing, arXiv 1604.06174), or keep what it needs of all.

    Unsloth goes back to what it noted of it whenever it trains (2026.10, models/rl.py).
    """
    model._unsloth_gradient_checkpointing = "unsloth" if again else False
    start_engine().FastLanguageModel.for_training(
        model, use_gradient_checkpointing=model._unsloth_gradient_checkpointing
    )


@contextlib.contextmanager
def answering(model: Any) -> Iterator[Any]:
    """The model in Unsloth's inference mode, in the precision of training, and back in training mode afterwards."""
    unsloth = start_engine()
    import torch

    unsloth.FastLanguageModel.for_inference(model)
    dtype = model.get_input_embeddings().weight.dtype  # what it was loaded in, in 4 bit too
    try:
        # no_grad, not inference_mode: what a forward pass caches here is used by training later.
        with torch.no_grad(), torch.autocast("cuda", dtype=dtype, enabled=torch.cuda.is_available()):
            yield model
    finally:
        unsloth.FastLanguageModel.for_training(model)
