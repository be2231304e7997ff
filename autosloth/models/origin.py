"""Where a model comes from: its 16-bit original, licence and languages, as the base's and the datasets' own cards and files tell them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
ADDRESS = re.compile(r"https?://[^\s<>()|`\\]+")
# What the Hub takes as `license`: the table of docs/hub/repositories-licenses.md in huggingface/hub-docs at 242f4a1 (2026-08-22), which no library ships; another one is
# `other`, with a `license_name`.
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m
    bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0
    cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa
    odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)


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
    found = {"asked": asked, **find_origin(settings, known.get("on_hub") if known.get("asked") == asked else None)}
    if known.get("asked") == asked and len(found["away"]) >= len(known["away"]):
        return known
    run.record("origin", **found)
    return found


def on_hub(origin: dict[str, Any], name: str) -> bool:
    """Whether a model or dataset of the settings is on the Hub, as it was when the training looked: in another folder a name may be no path any more."""
    known = origin.get("on_hub")
    return is_hub_id(name) if known is None else name in known


def find_origin(settings: Settings, known: list[str] | None = None) -> dict[str, Any]:
    """What the cards tell, the 16-bit original's before that of the model that was loaded; nothing is guessed, and nothing fails.

    original: its Hub id, None where it has none; license, license_name, license_link: None where no card tells it, and license_from, whose
    card does; gated: the page of terms that have to be agreed to; language: of the base and of the datasets; model_type: of config.json;
    on_hub: which models and datasets of the settings are there, `known` from an earlier time; datasets: {id, license} of these; away: what could not be asked.
    """
    given = [settings.model, settings.sixteen_bit_model or "", *(part["path"] for part in settings.parts)]
    there = list(filter(is_hub_id, given)) if known is None else known
    source = model_source(settings)
    local = {*given, *([] if settings.model in there else [source])} - set(there)
    config = read_config(settings) if source not in local or Path(source).is_dir() else {}
    bases = [
        told_by_folder(name) if name in local else look_up("model", name, settings)
        for name in base_names(settings, config)
    ]
    datasets = [look_up("dataset", part["path"], settings) for part in settings.parts if part["path"] in there]
    spoken = next(filter(None, (languages_of(told.card) for told in bases)), [])
    licensed = next((told for told in bases if told.card.get("license")), bases[0] if bases else Told(None))
    return {
        "original": next((told.name for told in bases if told.name), None),
        **license_of(licensed),
        "gated": next((told.page() for told in bases if told.gated), None),
        "language": list(dict.fromkeys([*spoken, *(name for told in datasets for name in languages_of(told.card))])),
        "model_type": model_type(config),
        "on_hub": there,
        "datasets": [{"id": told.name, "license": license_in_words(told)} for told in datasets],
        "away": [told.name for told in (*bases, *datasets) if told.away],
    }


def base_names(settings: Settings, config: dict[str, Any]) -> list[str]:
    """The 16-bit original and the model that was loaded, by Hub id or folder; the embedded base has no card."""
    if settings.model == "demo" and not settings.sixteen_bit_model:
        return []
    try:
        original = sixteen_bit_model(settings)[0] if settings.sixteen_bit_model or config else settings.model
    except (ModelError, AttributeError, TypeError):  # the last two: a config of another form than transformers'
        original = settings.model
    return list(dict.fromkeys([original, model_source(settings)]))


def told_by_folder(name: str) -> Told:
    """What a folder on this disk tells of itself; nothing if it is gone."""
    folder = Path(name).expanduser()
    try:
        return Told(None, front_matter(folder / "README.md"), [path.name for path in folder.iterdir()])
    except OSError:
        return Told(None)


def look_up(kind: Kind, name: str, settings: Settings) -> Told:
    """What a model or dataset on the Hub tells of itself; of one that cannot be asked, what an earlier download left."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

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
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        matter = REGEX_YAML_BLOCK.match(path.read_text(encoding="utf-8-sig"))
        read = yaml.safe_load(matter[2]) if matter else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return read if isinstance(read, dict) else {}


def license_of(told: Told) -> dict[str, str | None]:
    """The licence that a card names, as the Hub takes it, with its text: linked by the card, or a file beside it."""
    named = told.card.get("license")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    is_named = named is not None and named not in ("", [], {})
    known = isinstance(named, str) and named.strip().lower() in LICENSES
    own_name = told.card.get("license_name") if known or not is_named else ", ".join(map(str, named)) if isinstance(named, list) else named  # fmt: skip
    return {
        "license": (named.strip().lower() if known else "other") if is_named else None,
        "license_name": slug(own_name),
        "license_link": license_text(told) or (told.page() if told.gated else None),
        "license_from": told.name if is_named else None,
    }


def license_text(told: Told) -> str | None:
    """The address of a licence's text: the one that the card gives, or that of a file."""
    link = told.card.get("license_link")
    if isinstance(link, str) and ADDRESS.fullmatch(link):
        return link
    is_file = isinstance(link, str) and link and ":" not in link
    file = link if is_file else next(filter(LICENSE_FILE.fullmatch, told.files), None)
    return told.page(quote(file)) if file else None


def license_in_words(told: Told) -> str | None:
    """The licence of a dataset: its own name, if it has one."""
    named = license_of(told)
    return named["license"] and (named["license_name"] or named["license"])


def slug(name: Any) -> str | None:
    """A name in the form that the Hub takes for `license_name`.

    >>> slug("Qwen Research"), slug("gpl-2.0-or-later"), slug(None)
    ('qwen-research', 'gpl-2.0-or-later', None)
    """
    words = "" if name is None else re.sub(r"[^a-z0-9.]+", "-", str(name).lower())
    return words[:60].strip("-.") or None


def languages_of(card: dict[str, Any]) -> list[str]:
    """The languages that a card names by the codes that the Hub takes; YAML takes Norwegian's `no` for false."""
    named = card["language"] if card.get("language") is False else card.get("language") or card.get("languages")
    words = ["no" if name is False else str(name).lower() for name in (named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(word for word in words if re.fullmatch("[a-z]{2,3}", word)))


def read_config(settings: Settings) -> dict[str, Any]:
    """The model's config.json; nothing where there is none that can be read."""
    try:
        file = small_files(model_source(settings), settings.revision) / "config.json"
        read = json.loads(file.read_text(encoding="utf-8"))
    except (ModelError, OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def model_type(config: dict[str, Any]) -> str | None:
    """The kind of model that config.json names, such as `llama`."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) and re.fullmatch(r"[\w.-]+", kind) else None


def card_data(run: Run) -> dict[str, Any]:
    """What every card of a run and its GGUF files say alike, as the Hub's front matter: licence, languages, 16-bit original, datasets, task, tags."""
    told, train = origin_of(run), run.facts.get("train", {})
    tags = [*TAGS, "lora", *(["qlora"] if train.get("four_bit") else []), run.settings.road]
    return {
        "license": told["license"] or "other",
        "license_name": told["license_name"],
        "license_link": told["license_link"],
        "language": told["language"] or None,
        "base_model": told["original"],
        "datasets": [part["path"] for part in run.settings.parts if on_hub(told, part["path"])] or None,
        "pipeline_tag": "text-generation",
        "tags": [*tags, *([told["model_type"]] if told["model_type"] else []), "conversational"],
    }
