"""Where a model comes from: its 16-bit original, licence and languages, as the base's and the datasets' own cards and files tell them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AutoSlothError, ModelError
from ..hub_client import Kind, hub_api, reading
from ..run import Run
from ..settings import Settings
from ..values import is_hub_id
from .base import model_source, sixteen_bit_model, small_files

HUB = "https://huggingface.co"
PATIENCE = 20  # seconds for an answer of the Hub: nothing hangs on it
LICENSE_FILE = re.compile(r"licen[cs]e(\.(md|txt|pdf))?", re.IGNORECASE)
TAGS = ["autosloth", "transformers", "text-generation-inference", "unsloth", "trl"]
GGUF_TAGS = ["gguf", "llama-cpp"]


@dataclass
class Told:
    """What a repository or a folder tells of itself: its name on the Hub, the front matter of its card, its files, whether its terms must be agreed to. away: it could not be asked."""

    name: str | None
    card: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    gated: bool = False
    away: bool = False

    def page(self, file: str = "") -> str | None:
        """The address of its page on the Hub, or of one of its files; None for a folder on this disk."""
        return f"{HUB}/{self.name}{f'/blob/main/{file}' if file else ''}" if self.name else None


def origin_of(run: Run) -> dict[str, Any]:
    """Where the model of a run comes from, as `find_origin` tells it; found once and kept in the facts, as the Hub may be away later."""
    settings = run.settings
    asked = [settings.model, settings.revision, settings.sixteen_bit_model, settings.dataset_name]
    known = run.facts.get("origin", {})
    if known.get("asked") == asked and not known["away"]:
        return known
    found = {"asked": asked, **find_origin(settings)}
    if known.get("asked") == asked and len(found["away"]) >= len(known["away"]):
        return known
    run.record("origin", **found)
    return found


def find_origin(settings: Settings) -> dict[str, Any]:
    """What the cards tell, the 16-bit original's before that of the model that was loaded; nothing is guessed, and nothing fails.

    original: its Hub id, None where it has none; license, license_name, license_link: None where no card tells it, and license_from, whose
    card does; gated: the page of terms that have to be agreed to; language: of the base and of the datasets; model_type: of config.json;
    datasets: {id, license} of each that is on the Hub; away: what could not be asked.
    """
    bases = [look_up("model", name, settings) for name in base_names(settings)]
    datasets = [look_up("dataset", part["path"], settings) for part in settings.parts if is_hub_id(part["path"])]
    spoken = next(filter(None, (languages_of(told.card) for told in bases)), [])
    licensed = next((told for told in bases if told.card.get("license")), bases[0] if bases else Told(None))
    return {
        "original": next((told.name for told in bases if told.name), None),
        **license_of(licensed),
        "gated": next((told.page() for told in bases if told.gated), None),
        "language": list(dict.fromkeys([*spoken, *(name for told in datasets for name in languages_of(told.card))])),
        "model_type": model_type(settings),
        "datasets": [{"id": told.name, "license": license_of(told)["license"]} for told in datasets],
        "away": [told.name for told in (*bases, *datasets) if told.away],
    }


def base_names(settings: Settings) -> list[str]:
    """The 16-bit original and the model that was loaded, by Hub id or folder; the embedded base has no card."""
    if settings.model == "demo" and not settings.sixteen_bit_model:
        return []
    try:
        original = sixteen_bit_model(settings)[0]
    except ModelError:
        original = settings.model
    return list(dict.fromkeys([original, model_source(settings)]))


def look_up(kind: Kind, name: str, settings: Settings) -> Told:
    """What a model or dataset tells of itself, on this disk or on the Hub; of one that cannot be asked, what an earlier download left."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    folder = Path(name).expanduser()
    if folder.is_dir():
        return Told(None, front_matter(folder / "README.md"), [path.name for path in folder.iterdir()])
    revision = settings.revision if name == settings.model else None
    told = Told(name)
    try:
        with reading(kind, name):
            info = hub_api().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE)
            told.files, told.gated = [file.rfilename for file in info.siblings or []], bool(info.gated)
            told.card = info.card_data.to_dict() if info.card_data else {}
            if not told.card and "README.md" in told.files:
                told.card = front_matter(Path(hf_hub_download(name, "README.md", repo_type=kind, revision=revision)))
    except AutoSlothError:
        told.away = True
        left = try_to_load_from_cache(name, "README.md", repo_type=kind, revision=revision)
        told.card = front_matter(Path(left)) if isinstance(left, str) else {}
    return told


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML on top of a card; nothing where there is no card, or none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return (path.is_file() and metadata_load(path)) or {}
    except (ValueError, yaml.YAMLError):
        return {}


def license_of(told: Told) -> dict[str, str | None]:
    """The licence that a card names, with its text: linked by the card, or a file beside it."""
    named = told.card.get("license")
    several = isinstance(named, list) and len(named) > 1
    text = told.card.get("license_link") or next(filter(LICENSE_FILE.fullmatch, told.files), None)
    if text and not str(text).startswith("https://"):
        text = told.page(str(text))
    return {
        "license": "other" if several else named[0] if isinstance(named, list) and named else named or None,
        "license_name": ", ".join(map(str, named)) if several else told.card.get("license_name"),
        "license_link": text or (told.page() if told.gated else None),
        "license_from": told.name if named else None,
    }


def languages_of(card: dict[str, Any]) -> list[str]:
    """The languages that a card names; YAML takes Norwegian's `no` for false."""
    named = card.get("language") or card.get("languages")
    named = ["no"] if card.get("language") is False else named if isinstance(named, list) else [named] if named else []
    return ["no" if name is False else str(name) for name in named]


def model_type(settings: Settings) -> str | None:
    """The kind of model that config.json names, such as `llama`."""
    try:
        config = small_files(model_source(settings), settings.revision) / "config.json"
        return json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ModelError, FileNotFoundError):
        return None


def card_data(run: Run) -> dict[str, Any]:
    """What every card of a run and its GGUF files say alike, as the Hub's front matter: licence, languages, 16-bit original, datasets, task, tags."""
    told, train = origin_of(run), run.facts.get("train", {})
    tags = [*TAGS, "lora", *(["qlora"] if train.get("four_bit") else []), run.settings.road]
    return {
        "license": told["license"] or "other",
        "license_name": told["license_name"] if told["license"] else "unknown",
        "license_link": told["license_link"],
        "language": told["language"] or None,
        "base_model": told["original"],
        "datasets": [part["path"] for part in run.settings.parts if is_hub_id(part["path"])] or None,
        "pipeline_tag": "text-generation",
        "tags": [*tags, *([told["model_type"]] if told["model_type"] else []), "conversational"],
    }
