"""The model card as Markdown, filled from settings.json and facts.json and nothing else."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from ..models import layers_line
from ..output import counted, or_nothing, size_in_words
from ..proof import proof_rows
from ..run import Run, read_json
from ..values import is_hub_id
from .repositories import repo_id

TAGS = ["autosloth", "unsloth", "trl", "lora"]


def render_card(run: Run, kind: str = "both") -> str:
    """The model card as Markdown with its front matter."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    settings, facts = run.settings, run.facts
    gguf = facts.get("export", {}).get("gguf", []) if kind != "model" else []
    failed = facts.get("verify", {}).get("passed") is False
    whole_models, alone = parted([] if failed else gguf)  # nobody is told how to use a file that failed its proof
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"counted": counted, "or_nothing": or_nothing, "size": size_in_words}
    return environment.get_template("card.md.j2").render(
        front_matter=front_matter(run),
        settings=settings,
        facts=facts,
        model=public_name(settings.model, "AutoSloth's tiny demo base"),
        dataset=" and ".join(public_name(part["path"], "AutoSloth's demo questions") for part in settings.parts),
        start=settings.adapter and public_name(settings.adapter, "the demo's adapter of both manners"),
        loads_by_name=settings.merged or is_hub_id(settings.model),
        question=short_question(facts["eval"]),
        repo=repo_id(settings) if settings.publish_to_hub else planned_repo(run),
        layers=layers_line(facts["train"].get("layers", {})),
        gguf=gguf,
        held_against=held_against(gguf),
        whole_models=whole_models,
        alone=alone,
        proofs=[{**proof, "rows": proof_rows(proof)} for proof in facts.get("verify", {}).get("files", [])],
        passed_means=settings.passed_means(),
        samples=paired_samples(facts["eval"]),
        home=home_address(),
        start_of_rounds=read_json(run.path("rounds", "start.json")).get("eval"),
    )


def parted(files: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """GGUF files that hold a whole model, and those of an adapter alone."""
    alone = [file for file in files if file["type"] == "ADAPTER"]
    return [file for file in files if file not in alone], alone


def held_against(files: list[dict[str, Any]]) -> str:
    """What GGUF files were compared with, as the end of a sentence."""
    models, alone = parted(files)
    adapter = "the trained adapter, matrix by matrix, and not run"
    if not models:
        return f"was held against {adapter}"
    verb = "were" if len(models) > 1 else "was"
    return f"{verb} held against the trained model itself" + (
        f"; the adapter's file against {adapter}" if alone else ""
    )


def front_matter(run: Run) -> str:
    """The YAML block that the Hub reads (huggingface.co/docs/hub/model-cards); local names are left out of it."""
    from huggingface_hub import ModelCardData

    settings = run.settings
    data = ModelCardData(
        base_model=settings.model if is_hub_id(settings.model) else None,
        datasets=[part["path"] for part in settings.parts if is_hub_id(part["path"])] or None,
        library_name="transformers" if settings.merged else "peft",
        pipeline_tag="text-generation",
        tags=[*TAGS, settings.road, *(["gguf"] if settings.quantizations else [])],
        model_name=settings.run_name,
        **({"base_model_relation": "finetune" if settings.merged else "adapter"} if is_hub_id(settings.model) else {}),
    )
    return data.to_yaml()


def planned_repo(run: Run) -> str:
    """The repository as far as it is known without a token: where it was published, or would be."""
    published = run.facts.get("publish", {}).get("repos")
    name = published[0] if published else run.settings.repo or run.settings.run_name
    return name if "/" in name else f"your-name/{name}"


def short_question(evaluation: dict[str, Any]) -> str:
    """A held-out question that fits into a line of code, to try the model with."""
    questions = [sample["question"] for sample in evaluation["after"].get("samples", [])]
    fitting = [question for question in questions if len(question) <= 60 and question.isascii()]
    return next((question for question in fitting if not set(question) & set('"\\\n')), "Hello!")


def public_name(name: str, demo: str) -> str:
    """A model or dataset as the card names it: the id, or of a path only its last part."""
    if name == "demo":
        return demo
    return name if is_hub_id(name) else Path(name.partition("?")[0]).name


def paired_samples(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """Each held-out sample with the answer before and after training."""
    before, after = (evaluation[when].get("samples", []) for when in ("before", "after"))
    return [
        {**late, "before": early["answer"], "after": late["answer"]} for early, late in zip(before, after, strict=True)
    ]


def home_address() -> str:
    """Where the project lives, from pyproject.toml; empty until a release has set it."""
    urls = metadata("autosloth").get_all("Project-URL") or []
    return next((url.split(", ", 1)[1] for url in urls if url.startswith("Home, ")), "")
