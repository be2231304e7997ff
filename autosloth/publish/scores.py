"""The held-out figures as the Hub's `model-index` (huggingface.co/docs/hub/model-cards): those after the training, of rows that were not learnt."""

from __future__ import annotations

from typing import Any

from ..models import on_hub
from ..output import counted
from ..run import Run
from ..score import IN_WORDS
from .plain import one_line
from .settings_file import public

LOSS = {
    "sft": "loss of the answers (nats per token)",
    "spin": "loss of the answers (nats per token)",
    "dpo": "loss of the pairs",
}
# Of what was measured: the name of the metric on the Hub, and what it is of here.
METRICS = {
    "loss": ("loss", ""),
    "perplexity": ("perplexity", "perplexity of the answers"),
    "reward_accuracy": ("accuracy", "better answers with the higher implicit reward, a tie counting half"),
    "prefers_chosen": ("accuracy", "better answers that are the likelier ones"),
    "reward_margin": ("reward_margin", "margin of the rewards"),
    "exact_match": ("exact_match", "exact match"),
}


def held_out_results(run: Run) -> list[Any] | None:
    """huggingface_hub's EvalResults; None where nothing was measured."""
    from huggingface_hub import EvalResult

    settings, facts = run.settings, run.facts
    measured, parts = figures(facts.get("eval", {})), settings.parts
    origin = facts.get("origin", {})
    names = [one_line(public(part["path"], origin.get("on_hub"))) for part in parts]
    of_hub = len(parts) == 1 and on_hub(origin, names[0])
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=names[0] if of_hub else "held-out",
            dataset_name=f"{' and '.join(names)}, {facts['data']['eval_rows']} rows held out",
            dataset_config=settings.dataset_config if of_hub else None,
            dataset_split=(settings.eval_split or parts[0]["split"]) if of_hub else None,
            dataset_revision=facts["data"].get("revision") if of_hub else None,
            metric_type=kind,
            metric_name=named(key, name, settings.road, measured),
            metric_value=measured[key],
        )
        for key, (kind, name) in {**METRICS, **{key: (key, name) for key, name in IN_WORDS.items()}}.items()
        if measured.get(key) is not None
    ] or None


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured after the training, and the answers' score by its own name where `metric` is another than the exact match."""
    after, gained = measured.get("after", {}), measured.get("gained")
    if not gained or gained["name"] == "exact":
        return after
    return {**after, gained["name"]: gained["after"]["mean"], "scored": gained["scored"]}


def named(key: str, name: str, road: str, measured: dict[str, Any]) -> str:
    """What a metric is called."""
    if key == "exact_match":
        return f"{name} of {counted(measured['answers_compared'], 'greedy answer')}"
    if key in IN_WORDS:
        return f"{name} ({counted(measured['scored'], 'greedy answer')})"
    return name or LOSS[road]
