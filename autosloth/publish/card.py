"""The model card as Markdown, filled from settings.json and facts.json and nothing else."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from ..models import GGUF_TAGS, HUB, card_data, layers_line, on_hub, origin_of
from ..output import counted, duration, interval, or_nothing, plus_minus, readable, size_in_words
from ..proof import proof_rows
from ..run import Run, known_hash, read_json
from ..score import IN_WORDS, asked, named
from ..values import is_address, is_hub_id, last_part, public_address
from .curve import has_curve
from .kept import marked
from .plain import in_code, in_line, in_sample
from .repositories import Kind, repo_id
from .scores import held_out_results
from .settings_file import base_commit, dataset_commits

YOUR_NAME = "your-name"  # stands for an owner that is not known
ANY_QUESTION = "Hello!"
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` takes, from its default on


def render_card(run: Run, kind: Kind = "both") -> str:
    """The card as Markdown with its front matter, between the marks of `keep_theirs`.

    kind: `model` for the repository of the model, before and after the GGUF files are proven; `gguf` for theirs; `both` where all is in one.
    """
    return marked(front_matter(run, kind), card_text(run, kind))


def card_text(run: Run, kind: Kind) -> str:
    """The card without its front matter."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "counted": counted,
        "or_nothing": or_nothing,
        "size": size_in_words,
        "duration": duration,
        "interval": interval,
        "plus_minus": plus_minus,
        "named": named,
        "asked": asked,
    }
    environment.filters |= {"readable": readable, "in_line": in_line, "in_code": in_code, "in_sample": in_sample}
    origin = origin_of(run)
    template = environment.get_template("gguf_card.md.j2" if kind == "gguf" else "card.md.j2")
    return template.render(kind=kind, **about_run(run, origin), **about_base(run, origin), **about_files(run, kind))


def about_run(run: Run, origin: dict[str, Any]) -> dict[str, Any]:
    """What a card tells of the training and its data."""
    settings, facts = run.settings, run.facts
    return {
        "settings": settings,
        "facts": facts,
        "dataset": " and ".join(linked_dataset(part["path"], origin) for part in settings.parts),
        "start": settings.adapter
        and public_name(settings.adapter, "the demo's adapter of both manners", is_hub_id(settings.adapter)),
        "base_commit": base_commit(run),
        "dataset_commits": dataset_commits(run),
        "layers": layers_line(facts["train"].get("layers", {})),
        "batch": batch_line(run),
        "curve": has_curve(run),
        "samples": paired_samples(facts["eval"]) if settings.card_rows else [],
        "example": facts.get("example", {}) if settings.card_rows else {},
        "question": short_question(facts["eval"]) if settings.card_rows else ANY_QUESTION,
        "local_data": [last_part(part["path"]) for part in settings.parts if is_local(part["path"], origin)],
        "home": home_address(),
        "scores": of_this_adapter(run, "scores"),
        "benchmarks": of_this_adapter(run, "benchmarks"),
        "scored_by": IN_WORDS,
        "start_of_rounds": read_json(run.path("rounds", "start.json")).get("eval"),
    }


def of_this_adapter(run: Run, name: str) -> list[dict[str, Any]]:
    """What `autosloth score` measured of the adapter that is there now."""
    adapter, measured = run.path("adapter", "adapter_model.safetensors"), run.facts.get(name, [])
    return [each for each in measured if each["adapter"] == known_hash(adapter)] if adapter.is_file() else []


def about_base(run: Run, origin: dict[str, Any]) -> dict[str, Any]:
    """What a card tells of the base, by its 16-bit original: name, licence, whether it can be loaded by name, and the copy that was loaded instead."""
    settings = run.settings
    loaded = settings.model if on_hub(origin, settings.model) else None
    name = origin["original"] or public_name(settings.model, "AutoSloth's tiny demo base", bool(loaded))
    return {
        "origin": origin,
        "base": name,
        "base_linked": linked(name) if origin["original"] else name,
        "loaded": loaded,
        "copy": loaded if loaded and loaded != origin["original"] else None,
        "license": license_line(origin),
    }


def about_files(run: Run, kind: Kind) -> dict[str, Any]:
    """What a card tells of the files beside it: which weights, where the adapter is, which GGUF files there are and how they were proven."""
    settings, facts = run.settings, run.facts
    gguf, proof = facts.get("export", {}).get("gguf", []), facts.get("verify", {})
    whole_models, alone = parted(
        [] if proof.get("passed") is False else gguf
    )  # nobody is told how to use one that failed
    repo = repository(run)
    merged = settings.merged and (kind != "model" or facts.get("merge", {}).get("path") is not None)
    rank = next((rank for rank in VLLM_RANKS if rank >= facts["train"].get("saved_r", facts["train"]["lora_r"])), None)
    return {
        "repo": repo,
        "owner": owner_of(repo),
        "gguf_repo": repo if kind == "both" else gguf_repository(repo),
        "merged": merged,  # the weights at the top of the repository
        "adapter_folder": "adapter" if settings.merged and kind != "gguf" else None,
        "vllm_rank": None if facts["train"].get("use_dora") or settings.modules_to_save else rank,
        "gguf": gguf if kind != "model" else [],
        "elsewhere": verdict(run) if kind == "model" else None,
        "gguf_rows": [gguf_row(file, proof.get("files", [])) for file in gguf],
        "held_against": held_against(gguf),
        "whole_models": whole_models,
        "alone": alone,
        "proofs": [{**file, "rows": proof_rows(file), "answers": settings.card_rows and file.get("answers")} for file in proof.get("files", [])],
        "verdict": verdict(run),
    }  # fmt: skip


def verdict(run: Run) -> str | None:
    """What the proof of the GGUF files says, in a line; None where there is no proof yet, or no file."""
    proof = run.facts.get("verify", {})
    if not run.settings.quantizations or "passed" not in proof:
        return None
    if proof["passed"]:
        return f"Passed: {run.settings.passed_means()}."
    return f"**No verdict: {proof['no_verdict']}.**" if proof.get("no_verdict") else f"**Not passed: {'; '.join(proof['failures'])}.**"  # fmt: skip


def parted(files: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """GGUF files that hold a whole model, and those of an adapter alone."""
    alone = [file for file in files if file["type"] == "ADAPTER"]
    return [file for file in files if file not in alone], alone


def gguf_row(file: dict[str, Any], proofs: list[dict[str, Any]]) -> list[str]:
    """A GGUF file as a row of the card's table: name, type, size, and what tells most of its proof, `-` where that was not measured."""
    name = Path(file["path"]).name
    proof = next((proof for proof in proofs if proof["file"] == name), {})
    figures = [f"{proof['mean_kl']:.2g}", f"{proof['top1']:.1%}"] if "mean_kl" in proof else ["-", "-"]
    return [f"`{name}`", ", ".join(filter(None, [file["type"], file.get("stored")])), size_in_words(file["bytes"]), *figures]  # fmt: skip


def held_against(files: list[dict[str, Any]]) -> str:
    """What GGUF files were compared with, as the end of a sentence."""
    models, alone = parted(files)
    adapter = "the trained adapter, matrix by matrix, and not run"
    if not models:
        return f"was held against {adapter}"
    verb = "were" if len(files) > 1 else "was"
    return f"{verb} held against the trained model itself" + (
        f"; the adapter's file against {adapter}" if alone else ""
    )


def front_matter(run: Run, kind: Kind = "both") -> dict[str, Any]:
    """What the Hub reads of a card (huggingface.co/docs/hub/model-cards), checked by its own client; local names are left out of it."""
    from huggingface_hub import ModelCardData

    settings, data, repo = run.settings, card_data(run), repository(run)
    relation = "finetune" if settings.merged else "adapter"
    if kind == "gguf":
        data["base_model"], relation = (repo, "quantized") if owner_of(repo) else (data["base_model"], None)
    in_here = kind == "gguf" or (kind == "both" and settings.quantizations)
    library = "gguf" if kind == "gguf" else "transformers" if settings.merged else "peft"
    return ModelCardData(
        **data | {"tags": data["tags"] + (GGUF_TAGS if in_here else [])},
        base_model_relation=relation if data["base_model"] else None,
        library_name=library,
        model_name=settings.run_name,
        eval_results=held_out_results(run) if kind != "gguf" else None,
    ).to_dict()


def repository(run: Run) -> str:
    """`owner/name` of the model's repository; without a token the owner may not be known."""
    return repo_id(run.settings) if run.settings.publish_to_hub else planned_repo(run)


def planned_repo(run: Run) -> str:
    """The repository as far as it is known without a token: where it was published, or would be."""
    published = run.facts.get("publish", {}).get("repos")
    name = published[0] if published else run.settings.repo or run.settings.run_name
    return name if "/" in name else f"{YOUR_NAME}/{name}"


def gguf_repository(repo: str) -> str:
    """The repository of the GGUF files of a model's."""
    return f"{repo}-GGUF"


def owner_of(repo: str) -> str | None:
    """Whose repository it is, where that is known."""
    owner = repo.partition("/")[0]
    return None if owner == YOUR_NAME else owner


def license_line(origin: dict[str, Any]) -> str:
    """The licence in words: as the base's card names it, with its text and its terms."""
    name, link = origin["license_name"] or origin["license"], origin["license_link"]
    if not origin["license"]:
        text = f"; its repository holds [this text]({link})" if link else ""
        return f"unknown, as {'its card could not be read' if origin['original'] in origin['away'] else 'no card of the base names one'}{text}"
    source = f", as the card of {linked(origin['license_from'])} says" if origin["license_from"] else ", as the base's card says"  # fmt: skip
    terms = f"; its terms have to be agreed to on [its page]({origin['gated']})" if origin["gated"] else ""
    return f"{f'[{name}]({link})' if link else name}{source}{terms}"


def linked(name: str, kind: str = "") -> str:
    """A name on the Hub as a link."""
    return f"[{name}]({HUB}/{kind}{name})"


def linked_dataset(path: str, origin: dict[str, Any]) -> str:
    """A dataset as the card names it, with a link where it is on the Hub."""
    return linked(path, "datasets/") if on_hub(origin, path) else public_name(path, "AutoSloth's demo questions", False)


def batch_line(run: Run) -> str:
    """How many rows a step learns from, and how they come together."""
    settings, train = run.settings, run.facts["train"]
    rows = train.get("batch_size", settings.rows_at_once)
    times = train.get("gradient_accumulation", settings.rows_per_step // settings.rows_at_once)
    processes = train.get("processes", 1)
    noun = "pair" if settings.road != "sft" else "row"
    chosen = ", chosen by `batch_size: auto`" if settings.batch_size == "auto" else ""
    parts = f"{rows} x {times}" + (f" x {processes} processes" if processes > 1 else "")
    return f"up to {counted(rows * times * processes, noun)} a step ({parts}){chosen}"


def short_question(evaluation: dict[str, Any]) -> str:
    """A held-out question that fits into a line of code or of a shell, to try the model with."""
    questions = [sample["question"] for sample in evaluation["after"].get("samples", [])]
    fitting = [question for question in questions if len(question) <= 60 and question.isascii()]
    return next(
        (question for question in fitting if question.isprintable() and not set(question) & set("\"'\\")), ANY_QUESTION
    )


def is_local(dataset: str, origin: dict[str, Any]) -> bool:
    """Whether rows come from a disk, so that only who has them can train again."""
    return dataset != "demo" and not on_hub(origin, dataset) and not is_address(dataset)


def public_name(name: str, demo: str, is_there: bool) -> str:
    """A model or dataset as the card names it: the id of one that is on the Hub, or of a path or address only its last part."""
    if name == "demo":
        return demo
    return name if is_there else in_line(last_part(public_address(name) if is_address(name) else name))


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
