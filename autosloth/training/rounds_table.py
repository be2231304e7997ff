"""The rounds of self-play as a table and a small plot, for the notebook, the terminal and the card."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ..output import counted, render_html, show
from ..run import Run, read_json
from .train import peak

INK, GREEN, AMBER = "#1f2933", "#2f7d4f", "#c2410c"


def plot_rounds(facts: dict[str, Any], start: dict[str, Any], path: Path) -> None:
    """Two charts side by side, by round: the held-out loss (nats per token), and the accuracy on held-out pairs; written as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rounds = [played["eval"] for played in facts["rounds"]]
    names = ["start", *(f"round {number}" for number in range(1, len(rounds) + 1))]
    figure = Figure(figsize=(8, 2.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    losses = [start["nll"], *(played["nll"] for played in rounds)]
    left.plot(names, losses, marker="o", color=GREEN, label="self-play")
    if arm := facts.get("sft_arm"):
        left.axhline(arm["nll"], color=AMBER, linestyle="--", label=f"{counted(arm['steps'], 'step')} of plain SFT")
        left.legend(frameon=False, fontsize=8)
    left.set_title("loss of held-out answers, nats per token", fontsize=9, color=INK, loc="left")
    right.bar(names[1:], [100 * played["reward_accuracy"] for played in rounds], color=GREEN, width=0.5)
    right.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    right.set_ylim(0, 100)
    right.set_title("accuracy on held-out pairs, %; 50 is chance", fontsize=9, color=INK, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
    figure.savefig(path)


def show_rounds(run: Run) -> None:
    """Show the rounds that were played: table and plot in a notebook, the table elsewhere."""
    start = read_json(run.path("rounds", "start.json"), ("eval",))["eval"]
    image = base64.b64encode(run.path("rounds", "rounds.png").read_bytes()).decode()
    facts = run.facts
    show(as_text(facts, start), render_html("training/templates/rounds.html.j2", facts=facts, start=start, image=image))


def as_text(facts: dict[str, Any], start: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [f"{'after':>9} | held-out loss (nats per token) | accuracy on pairs | margin | tokens an answer"]
    lines.append(f"{'start':>9} | {start['nll']:30.4f} | {'':17} | {'':6} | {start['mean_length']:.1f}")
    for played in facts["rounds"]:
        now = played["eval"]
        lines.append(f"{'round ' + str(played['round'] + 1):>9} | {now['nll']:30.4f} | {now['reward_accuracy']:17.1%} | {now['reward_margin']:z6.3f} | {now['mean_length']:.1f}")  # fmt: skip
    if arm := facts.get("sft_arm"):
        lines.append(
            f"{'plain SFT':>9} | {arm['nll']:30.4f} | {counted(arm['steps'], 'step')} from the start, for comparison"
        )
    return "\n".join(lines)


def whole_training(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all rounds as those of one training."""
    seconds, tokens = (sum(facts[name] for facts in rounds) for name in ("seconds", "tokens"))
    counted_energy = all("energy_wh" in facts for facts in rounds)
    return {
        "steps": sum(facts["steps"] for facts in rounds),
        "epochs": round(sum(facts["epochs"] for facts in rounds), 3),
        "seconds": round(seconds, 2),
        "first_loss": rounds[0]["first_loss"],
        "last_loss": rounds[-1]["last_loss"],
        "losses": [loss for facts in rounds for loss in facts["losses"]],
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        **({"energy_wh": round(sum(facts["energy_wh"] for facts in rounds), 3)} if counted_energy else {}),
        **rounds[-1]["trained"],
        **{name: peak(None, [facts["trained"] for facts in rounds], name) for name in ("peak_ram_gb", "peak_vram_gb")},
    }


def row_of(facts: dict[str, Any], start: dict[str, Any]) -> str:
    """A round in one line."""
    now = facts["eval"]
    return (
        f"spin: round {facts['round'] + 1}: held-out loss {now['nll']:.4f} nats per token ({start['eval']['nll']:.4f} at the start); accuracy on pairs "
        f"{now['reward_accuracy']:.1%}, margin {now['reward_margin']:z.3f}; {now['mean_length']:.1f} tokens an answer, {now['eos_rate']:.1%} with an end"
    )
