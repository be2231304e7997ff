"""The adapter that training starts from: a run's, a folder's, one from the Hub, or the demo's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..demo import demo_adapter
from ..errors import ModelError
from ..hub_client import model_errors
from ..settings import Settings
from ..values import is_hub_id
from ..weights import PLAIN, unusual_entries
from .base import QUANTIZED_NAME, TOKENIZER_FILES, model_source

FILES = ["adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES, "*.jinja"]
WHAT_TO_GIVE = (
    "Give the run folder of an AutoSloth-SFT, a folder with adapter_config.json, or the Hub id of a LoRA adapter."
)


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
            folder = Path(snapshot_download(name, allow_patterns=FILES))
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
    """PEFT's description of an adapter."""
    return json.loads((folder / FILES[0]).read_text(encoding="utf-8"))


def refuse_unfit(folder: Path, settings: Settings) -> None:
    """Raises ModelError for an adapter of another base, or of a kind that is not trained further here."""
    config, base = adapter_config(folder), model_source(settings)
    if plain_name(config["base_model_name_or_path"]) != plain_name(base):
        raise ModelError(
            f"The adapter {settings.adapter} was trained on {config['base_model_name_or_path']}, and `model` is {settings.model}.",
            "Set `model` to the base that the adapter was trained on.",
        )
    kind = unusual_entries(config, PLAIN) if config.get("peft_type") == "LORA" else [config.get("peft_type")]
    if kind:
        raise ModelError(
            f"The adapter {settings.adapter} is no plain LoRA ({', '.join(kind)}).",
            "Start from one that is, or merge this one into its base with PEFT and set `model` to the result.",
        )


def plain_name(name: str) -> str:
    """The last part of a model's name, the same for a base and its 4-bit form.

    >>> plain_name("unsloth/Mistral-7b-bnb-4bit")
    'mistral-7b'
    """
    return QUANTIZED_NAME.sub("", name.rstrip("/").rsplit("/", 1)[-1]).lower()
