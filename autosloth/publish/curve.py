"""The training as a picture: its loss step by step, with the held-out loss before, on the way and after; of preference pairs the margin too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..run import Run

INK, GREEN, AMBER = "#1f2933", "#2f7d4f", "#c2410c"
CURVE = "loss.png"


def has_curve(run: Run) -> bool:
    """Whether the facts hold the losses of more than one step."""
    return len(run.facts.get("train", {}).get("losses", [])) > 1


def draw_curve(run: Run, path: Path) -> bool:
    """Write the picture as PNG; False, and no file, where there are no steps to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not has_curve(run):
        return False
    facts, road = run.facts, run.settings.road
    rewards = road == "dpo" and "rewards" in facts["train"]
    figure = Figure(figsize=(7, 2.8), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2) if rewards else [figure.subplots()]
    draw_losses(axes[0], facts, road)
    if rewards:
        draw_rewards(axes[1], facts)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9, colors=INK)
        each.set_xlabel("optimizer step", fontsize=9, color=INK)
        each.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path)
    return True


def draw_losses(axes: Any, facts: dict[str, Any], road: str) -> None:
    """The training loss by step, of self-play a line for each round; beside it the held-out loss, where it is of the same kind (that of self-play is in rounds.png)."""
    first = 1
    for losses in by_round(facts["train"]["losses"]):
        label = {"label": "training" if road != "spin" else "training, by round"} if first == 1 else {}
        axes.plot(range(first, first + len(losses)), losses, color=GREEN, linewidth=1.2, **label)
        first += len(losses)
    if road != "spin":
        draw_held_out(axes, facts["train"])
        draw_points(axes, [facts["eval"][when]["loss"] for when in ("before", "after")], facts["train"])
    unit = ", nats per token" if road == "sft" else " of the pairs"
    axes.set_title(f"loss{unit}", fontsize=10, color=INK, loc="left")


def draw_rewards(axes: Any, facts: dict[str, Any]) -> None:
    """How far the better answers' implicit rewards are above the worse ones', by step, and on the held-out pairs."""
    rewards = facts["train"]["rewards"]
    axes.plot(range(1, len(rewards) + 1), [row[3] for row in rewards], color=GREEN, linewidth=1.2, label="training")
    draw_points(axes, [facts["eval"][when]["reward_margin"] for when in ("before", "after")], facts["train"])
    axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title("margin of the rewards", fontsize=10, color=INK, loc="left")


def draw_points(axes: Any, held_out: list[float], train: dict[str, Any]) -> None:
    """What was measured on all held-out rows before the first step, and with the weights that were kept, at their step."""
    last, step = train["steps"], train.get("kept", {}).get("step", train["steps"])
    label = "held out, before and after" if step == last else f"held out, before and with the weights of step {step}"
    axes.plot([0, step], held_out, "o", color=AMBER, markersize=6, label=label)


def draw_held_out(axes: Any, train: dict[str, Any]) -> None:
    """The held-out loss as it was measured on the way, on some rows."""
    if held_out := train.get("held_out"):
        axes.plot(
            *zip(*held_out, strict=True), ".-", color=AMBER, linewidth=1, markersize=4, label="held out, on the way"
        )


def by_round(losses: list[list[float]]) -> list[list[float]]:
    """Losses that come as [step, loss], parted where the steps begin anew.

    >>> by_round([[1, 0.7], [2, 0.6], [1, 0.7]])
    [[0.7, 0.6], [0.7]]
    """
    rounds: list[list[list[float]]] = []
    for entry in losses:
        if not rounds or entry[0] <= rounds[-1][-1][0]:
            rounds.append([])
        rounds[-1].append(entry)
    return [[loss for _, loss in entries] for entries in rounds]
