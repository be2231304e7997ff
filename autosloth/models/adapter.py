"""The adapter that training starts from: a run's, a folder's, one from the Hub, or the demo's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..demo import demo_adapter
from ..errors import ModelError
from ..hub_client import model_errors
from ..retries import downloaded
from ..settings import Settings
from ..values import is_hub_id
from ..weights import PLAIN, unusual_entries
from .base import QUANTIZED_NAME, TOKENIZER_FILES, model_source
from .targets import blocks_of, kept_whole, last, reached, tables_of

FILES = ["adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES, "*.jinja"]
WHAT_TO_GIVE = (
    "Give the run folder of an AutoSloth-SFT, a folder with adapter_config.json, or the Hub id of a LoRA adapter."
)
AGAIN = "Download it again, or save it again with PEFT."
ANOTHER = "Start from one without, or merge this one into its base with PEFT and set `model` to the result."
NAME = "default"  # of the adapter in PEFT's model
UNTOLD = {"r": 8, "lora_alpha": 8}  # what PEFT takes where a config does not say
# Architectures of tied embeddings whose GGUF has no tensor for a head of its own (MODEL_TENSORS of llama.cpp's gguf-py).
HEADLESS = {
    "BitNetForCausalLM", "BitnetForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM",
    "Gemma2ForCausalLM", "GemmaForCausalLM", "Lfm2MoeForCausalLM", "OpenELMForCausalLM",
}  # fmt: skip


def starting_adapter(settings: Settings) -> Path | None:
    """The folder of the adapter that the settings name, fetched or trained if need be; None where they name none. Raises ModelError."""
    if settings.adapter is None:
        return None
    folder = adapter_folder(settings.adapter)
    refuse_unfit(folder, settings)
    return folder


def adapter_folder(name: str) -> Path:
    """The folder of the adapter of this name: a folder or run on this disk, a Hub id, or the demo's. Raises ModelError."""
    return demo_or_local(name) or fetched(name)


def demo_or_local(name: str) -> Path | None:
    """The adapter's folder on this disk; None for a Hub id. Raises ModelError for a folder without one."""
    if name == "demo":
        return demo_adapter()
    if is_hub_id(name):
        return None
    folder = Path(name).expanduser()
    found = next((place for place in (folder / "adapter", folder) if (place / FILES[0]).is_file()), None)
    if found is None:
        missing = "holds no adapter" if folder.is_dir() else "does not exist"
        raise ModelError(f"The adapter folder {name} {missing}.", WHAT_TO_GIVE)
    return found


def fetched(name: str) -> Path:
    """The folder of an adapter on the Hub. Raises ModelError."""
    from huggingface_hub import snapshot_download

    try:
        with model_errors(name):
            folder = Path(downloaded(partial(snapshot_download, name, allow_patterns=FILES)))
    except ModelError as problem:
        if not Path(name).parent.is_dir():
            raise
        raise ModelError(
            f"There is no adapter folder {name} here, nor one on the Hub: {problem.what}", WHAT_TO_GIVE
        ) from None
    if not all((folder / file).is_file() for file in FILES[:2]):
        raise ModelError(f"{name} is no adapter: it has no {FILES[0]} with {FILES[1]}.", WHAT_TO_GIVE)
    return folder


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's description of an adapter. Raises ModelError where it cannot be read."""
    path = folder / FILES[0]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"The adapter's {path} is no JSON that describes one.", AGAIN)
    return UNTOLD | config


def adapter_shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's weights, by the header of their file. Raises ModelError where it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / FILES[1], "np") as file:
            keys = file.keys()
            return {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except FileNotFoundError:
        raise ModelError(f"The adapter {name} has no {FILES[1]}.", AGAIN) from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"The weights of the adapter {name} cannot be read ({error}).", AGAIN) from None


def refuse_unfit(folder: Path, settings: Settings) -> None:
    """Raises ModelError for an adapter of another base, of a kind that is not trained further here, or of broken files."""
    config, base = adapter_config(folder), model_source(settings)
    trained_on = config.get("base_model_name_or_path")
    if not trained_on or not isinstance(trained_on, str):
        raise ModelError(
            f"The adapter {settings.adapter} does not say on which base it was trained.",
            f"Write the base's name as `base_model_name_or_path` into its {FILES[0]}.",
        )
    if plain_name(trained_on) != plain_name(base):
        raise ModelError(
            f"The adapter {settings.adapter} was trained on {trained_on}, and `model` is {settings.model}.",
            "Set `model` to the base that the adapter was trained on.",
        )
    kind = unusual_entries(config, PLAIN) if config.get("peft_type") == "LORA" else [str(config.get("peft_type"))]
    if kind:
        raise ModelError(
            f"The adapter {settings.adapter} is no plain LoRA ({', '.join(kind)}).",
            "Start from one that is, or merge this one into its base with PEFT and set `model` to the result.",
        )
    adapter_shapes(folder, str(settings.adapter))


@contextlib.contextmanager
def fitting(settings: Settings) -> Iterator[None]:
    """Turn what PEFT says of an adapter that does not fit its base into a ModelError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        said = [line.strip() for line in str(error).strip().splitlines()]  # of shapes, the first line says nothing
        raise misfit(settings, (said[1:2] or said or [type(error).__name__])[0].rstrip(".")) from None


def misfit(settings: Settings, reason: str) -> ModelError:
    """That an adapter does not fit its base."""
    return ModelError(
        f"The adapter {settings.adapter} does not fit {settings.model} ({reason}).",
        "Set `model` to the base that the adapter was trained on, or save the adapter again: its config and its weights belong together.",
    )


def fill(model: Any, weights: dict[str, Any], settings: Settings) -> None:
    """Put the weights of an adapter into a model that has its layers; on torch's meta device they have shapes alone.

    Raises ModelError when one does not fit, belongs to the base itself, or is missing: that layer would start afresh.
    """
    from peft import set_peft_model_state_dict

    whole = keys_of_whole(model)
    if own := [key for key in weights if ".lora_" not in key and key not in whole]:
        what = f"The adapter {settings.adapter} holds a weight of the base itself ({own[0]}), which is not trained further here."
        raise ModelError(what, ANOTHER)
    missing = [key for key in whole if key not in weights]
    if not missing:
        meta = any(weight.is_meta for weight in weights.values())
        if not meta:
            refuse_strayed(weights, settings)
        with fitting(settings):
            result = set_peft_model_state_dict(model, weights, low_cpu_mem_usage=meta)
        if result.unexpected_keys:
            raise misfit(settings, result.unexpected_keys[0])
        missing = [key for key in result.missing_keys if NAME in key.split(".")]
    if missing:
        raise ModelError(
            f"The adapter {settings.adapter} lacks {len(missing)} of the weights that its {FILES[0]} tells of ({missing[0].replace(f'.{NAME}', '')}).",
            f"{AGAIN} Its config and its weights belong together.",
        )


def refuse_strayed(weights: dict[str, Any], settings: Settings) -> None:
    """Raises ModelError when some number of an adapter is not finite."""
    if strayed := [key for key, weight in weights.items() if not weight.float().sum().isfinite()]:
        raise ModelError(
            f"The adapter {settings.adapter} holds numbers that are not finite ({strayed[0]}): its training went astray.",
            "Start from one that was saved earlier, or train it again with a smaller `learning_rate`.",
        )


def keys_of_whole(model: Any) -> list[str]:
    """What an adapter's file calls the weights of the modules that are trained whole."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = [(name, each) for name, each in model.named_modules() if isinstance(each, AuxiliaryTrainingWrapper)]
    return [f"{name}.{key}" for name, module in modules for key in module.adapter_state_dict_load_map(NAME)]


def refuse_elsewhere(model: Any, settings: Settings) -> None:
    """Raises ModelError where the adapter of a model has LoRA on embeddings or head, or changes what a GGUF that is asked for has no place for."""
    tables, layers = set(tables_of(model)), reached(model)
    if named := sorted(tables & layers):
        what = f"The adapter {settings.adapter} has LoRA on {last(named[0])}, which is not trained further here."
        raise ModelError(what, ANOTHER)
    if not settings.quantizations:
        return
    whole = kept_whole(model)
    text = blocks_of(model).rpartition(".")[0]
    if outside := sorted(name for name in (layers | whole) - tables if not name.startswith(f"{text}.")):
        part = outside[0].removeprefix("model.").partition(".")[0]
        raise ModelError(
            f"The adapter {settings.adapter} also changes {part}, and a GGUF holds the text part alone.",
            "Set `quantizations: []`, and `merged: true` for the whole model; or start from an adapter on the text alone.",
        )
    apart = whole & tables and model.all_tied_weights_keys and not model.peft_config[NAME].ensure_weight_tying
    if apart and HEADLESS & {*(model.config.architectures or [])}:
        raise ModelError(
            f"The adapter {settings.adapter} makes two weights of embeddings and head, and a GGUF of {settings.model} has a place for one.",
            "Set `quantizations: []`, or start from an adapter that was trained with `ensure_weight_tying`, as those of AutoSloth are.",
        )


def plain_name(name: str) -> str:
    """The last part of a model's name, the same for a base and its 4-bit form.

    >>> plain_name("unsloth/Mistral-7b-bnb-4bit")
    'mistral-7b'
    """
    return QUANTIZED_NAME.sub("", name.rstrip("/").rsplit("/", 1)[-1]).lower()
