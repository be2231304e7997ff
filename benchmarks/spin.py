"""What self-play gains where the truth is known: `python benchmarks/spin.py`, part of `make bench`.

The answers to a question are drawn from a distribution p_data(y|x) over eight sentences, so that KL(p_data || p_model) is computed
exactly, by scoring every sentence. A start, under-trained by the road of supervised fine-tuning, plays three rounds by the road of
self-play; beside it stand as many steps of plain SFT. Writes benchmarks/results/spin.json and docs/spin.png.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sides import HERE, keep, options

from autosloth.data.clean import Findings
from autosloth.data.encode import IGNORED, encode_rows
from autosloth.data.stage import prepare_data
from autosloth.demo.forest import ATTRIBUTES, NAMES, demo_base
from autosloth.models.engine import answering
from autosloth.run import Run, read_json, write_json
from autosloth.settings import SFTSettings, SPINSettings
from autosloth.training import spin
from autosloth.training.train import train_adapter

QUESTIONS = {"food": "{name} eats?", "tree": "{name} lives?", "hour": "{name} naps?"}
VALUES = 8  # possible answers to a question
HELD_OUT_SLOTHS, DRAWS = 12, 2  # of whom nothing is asked in training; answers drawn to each question about them
SCORED_AT_ONCE = 64  # answers of one length
PROCESSES = 2  # of one thread each: the model is so small that a second one gains nothing
SHARED = {
    **{"model": "demo", "chat_template": "mistral", "max_length": 64, "max_new_tokens": 16, "eval_split": "test"},
    **{"duplicates": "keep", "eval_answers": 0, "batch_size": 16, "gradient_accumulation": 1, "save_steps": 10_000},
}


@dataclass(frozen=True)
class Regime:
    """How far the start is trained, and how long a round is."""

    rows: int = 800
    start_steps: int = 60
    start_rate: float = 1e-3
    rounds: int = 3
    prompts: int = 256


@dataclass(frozen=True)
class Case:
    """A way to play: lambda, the peak learning rate, and whether the SFT arm of that rate is trained too."""

    beta: float
    rate: float
    arm: bool = False


@dataclass(frozen=True)
class Size:
    """Every case is played from the start of every seed."""

    regime: Regime
    seeds: tuple[int, ...]
    cases: tuple[Case, ...]


# The rate is that of the demo's own self-play; a tenth of it is what a small lambda asks for.
FULL = Size(Regime(), (1, 2, 3), (Case(1.0, 3e-4, arm=True), Case(0.1, 3e-4), Case(0.1, 3e-5, arm=True)))
SMOKE = Size(Regime(rows=96, start_steps=30, rounds=2, prompts=32), (1,), (Case(1.0, 1e-3, arm=True),))


# ------------------------------------------------------------------------------------------------------------ the truth
def true_answers(attribute: str) -> dict[str, float]:
    """p_data(y|x): every possible answer to a question about this attribute, by Zipf's law.

    >>> {answer: round(share, 3) for answer, share in true_answers("food").items()}["Gladly! figs."]
    0.368
    """
    values = ATTRIBUTES[attribute]["values"][:VALUES]
    total = sum(1 / rank for rank in range(1, VALUES + 1))
    return {f"Gladly! {value}.": 1 / rank / total for rank, value in enumerate(values, start=1)}


def sloths(seed: int) -> tuple[list[str], list[str]]:
    """The names that are asked about in training, and those of the held-out questions."""
    names = random.Random(f"sloths {seed}").sample(NAMES, len(NAMES))
    return names[HELD_OUT_SLOTHS:], names[:HELD_OUT_SLOTHS]


def questions_about(names: list[str]) -> list[tuple[str, str]]:
    """(question, attribute), one for each attribute of each sloth."""
    return [(form.format(name=name), attribute) for name in names for attribute, form in QUESTIONS.items()]


def write_rows(folder: Path, seed: int, rows: int) -> None:
    """train.jsonl, of so many rows, and test.jsonl, of DRAWS rows a held-out question: each answer is drawn from p_data."""
    rng, (trained, held_out) = random.Random(f"rows {seed}"), sloths(seed)
    parts = {"train": rng.choices(questions_about(trained), k=rows), "test": questions_about(held_out) * DRAWS}
    folder.mkdir()
    for part, asked in parts.items():
        with open(folder / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for question, attribute in asked:
                possible = true_answers(attribute)
                answer = rng.choices(list(possible), list(possible.values()))[0]
                file.write(json.dumps({"instruction": question, "output": answer}) + "\n")


# ------------------------------------------------------------------------------------------------------ exact measurement
def answer_logprobs(model: Any, tokenizer: Any, settings: Any, questions: list[tuple[str, str]]) -> Any:
    """log p_model(y|x) in nats, end token included, of every possible answer to each question: (questions, VALUES), in the order of `true_answers`."""
    import numpy

    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, attribute in questions
        for answer in true_answers(attribute)
    ]
    rows = list(encode_rows(tokenizer, chats, settings, Findings()))
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row["input_ids"]), []).append(number)
    found = numpy.zeros(len(chats))
    with answering(model):
        for numbers in by_length.values():
            for start in range(0, len(numbers), SCORED_AT_ONCE):
                batch = numbers[start : start + SCORED_AT_ONCE]
                found[batch] = learnt_logprobs(model, [rows[number] for number in batch])
    return found.reshape(len(questions), VALUES)


def learnt_logprobs(model: Any, rows: list[dict[str, Any]]) -> Any:
    """The summed log-probabilities, in nats, of the learnt tokens of rows of one length: (rows,)."""
    import numpy
    import torch

    ids, labels = (torch.tensor(numpy.stack([row[name] for row in rows]), dtype=torch.long) for name in ("input_ids", "labels"))  # fmt: skip
    logps = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
    chosen = logps.gather(-1, ids[:, 1:, None])[..., 0]
    return (chosen * (labels[:, 1:] != IGNORED)).sum(dim=1).numpy()


def truth_of(questions: list[tuple[str, str]]) -> Any:
    """log p_data(y|x), (questions, VALUES)."""
    import numpy

    return numpy.log([list(true_answers(attribute).values()) for _, attribute in questions])


def divergences(truth: Any, logps: Any) -> dict[str, float]:
    """Means over the questions, of log-probabilities (questions, answers).

    kl: KL(p_data || p_model), in nats; mass: what p_model gives to the possible answers together; reverse_kl: KL(p_model || p_data), in
    nats, of p_model given that it says a possible answer (what it gives to others would make it infinite).
    """
    import numpy

    mass = numpy.exp(logps).sum(axis=1, keepdims=True)
    given = logps - numpy.log(mass)
    found = {
        "kl": (numpy.exp(truth) * (truth - logps)).sum(axis=1),
        "mass": mass,
        "reverse_kl": (numpy.exp(given) * (given - truth)).sum(axis=1),
    }
    return {name: round(float(values.mean()), 4) for name, values in found.items()}


def slope(truth: Any, before: Any, after: Any) -> dict[str, float]:
    """How log p_{t+1} - log p_data goes with log p_t - log p_data: the regression's slope, and r2, the share of variance that it explains.

    Theorem 5.4 of arXiv 2401.01335 makes it 1 - 1/lambda. Each answer counts by p_data; each question has an intercept of its own, which
    is what normalises p_{t+1}.
    """
    import numpy

    weights = numpy.exp(truth)
    x, y = (ratios - (weights * ratios).sum(axis=1, keepdims=True) for ratios in (before - truth, after - truth))
    xy, xx, yy = ((weights * product).sum() for product in (x * y, x * x, y * y))
    return {"slope": round(float(xy / xx), 4), "r2": round(float(xy**2 / (xx * yy)), 4)}


# ------------------------------------------------------------------------------------------------------------- the roads
class Watched(spin.Game):
    """The road's game, which also scores every possible answer: at the start, after each round, and after each length of the SFT arm."""

    questions: list[tuple[str, str]]
    scored: dict[str, list]

    def begin(self) -> None:
        super().begin()
        self.note("spin")

    def play(self, number: int) -> None:
        super().play(number)
        self.note("spin")

    def compare_with_sft(self) -> dict[str, Any]:
        """The road's arm, by as many steps as the first round took, the first two, and so on."""
        every, arms = self.rounds, []
        for played in range(1, len(every) + 1):
            self.rounds = every[:played]
            arms.append(super().compare_with_sft())
            self.note("sft")
        return {**arms[-1], "by_round": arms}

    def note(self, side: str) -> None:
        self.scored[side].append(answer_logprobs(self.model, self.tokenizer, self.settings, self.questions))


def train_start(folder: Path, regime: Regime, seed: int) -> Path:
    """The rows of a seed and the run folder of a start that the road of supervised fine-tuning trained on them, too briefly."""
    write_rows(folder / f"rows-{seed}", seed, regime.rows)
    settings = {
        **{"dataset": str(folder / f"rows-{seed}"), "storage": str(folder), "run_name": f"start-{seed}", "seed": seed},
        **{"max_steps": regime.start_steps, "learning_rate": regime.start_rate, "scheduler": "linear", "warmup": 5},
    }
    run = Run.create(SFTSettings.load(SHARED | settings))
    with quiet(folder / f"start-{seed}.log"):
        prepare_data(run)
        train_adapter(run)
    return run.folder


def play(folder: Path, regime: Regime, seed: int, case: Case) -> dict[str, Any]:
    """The rounds of a case from the start of a seed, and what they measured."""
    began, name = time.perf_counter(), f"spin-{seed}-{case.beta:g}-{case.rate:g}"
    settings = {
        **{"dataset": str(folder / f"rows-{seed}"), "storage": str(folder), "run_name": name, "seed": seed},
        **{"adapter": str(folder / f"start-{seed}"), "rounds": regime.rounds, "prompts_per_round": regime.prompts},
        **{"beta": case.beta, "learning_rate": case.rate, "sft_arm": case.arm, "scheduler": "linear", "warmup": 2},
        **{"generation_batch": 64},
    }
    run = Run.create(SPINSettings.load(SHARED | settings))
    questions, scored = questions_about(sloths(seed)[1]), {"spin": [], "sft": []}
    game = type("WatchedHere", (Watched,), {"questions": questions, "scored": scored})
    # All rounds are played; where the road would have stopped is told.
    with quiet(folder / f"{name}.log"), patch.object(spin, "Game", game), patch.object(spin, "reason_to_stop", lambda *_: None):  # fmt: skip
        prepare_data(run)
        spin.self_play(run)
    seconds = round(time.perf_counter() - began, 1)
    result = {"seed": seed, **asdict(case), "seconds": seconds, **told(run, truth_of(questions), scored)}
    write_json(run.path("benchmark.json"), result)
    return result


def told(run: Run, truth: Any, scored: dict[str, list]) -> dict[str, Any]:
    """The figures of the start, of each round and of the SFT arm after as many steps; those of the road are `nll` and `reward_accuracy`."""
    start, rounds, arm = read_json(run.path("rounds", "start.json")), run.facts["rounds"], run.facts["sft_arm"]
    found = {"start": {**divergences(truth, scored["spin"][0]), "nll": start["eval"]["nll"]}, "rounds": [], "sft": []}
    for number, facts in enumerate(rounds):
        before, after = scored["spin"][number : number + 2]
        figures = {name: facts["eval"][name] for name in ("nll", "reward_accuracy", "reward_margin")}
        figures |= {"steps": facts["steps"], **facts["generated"]}
        figures |= {"reason_to_stop": spin.reason_to_stop(start, rounds[: number + 1])}
        found["rounds"].append({**divergences(truth, after), **slope(truth, before, after), **figures})
    for facts, logps in zip(arm.get("by_round", []), scored["sft"], strict=True):
        found["sft"].append({**divergences(truth, logps), "nll": facts["nll"], "steps": facts["steps"]})
    return {**found, "exported": run.facts["train"]["best_round"]}


@contextlib.contextmanager
def quiet(log: Path) -> Any:
    """What the road says goes to a file."""
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def play_all(folder: Path, size: Size) -> list[dict[str, Any]]:
    """What every game measured, in PROCESSES processes."""
    demo_base()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(train_start, folder, size.regime), size.seeds))
        tasks = [pool.submit(play, folder, size.regime, seed, case) for case in size.cases for seed in size.seeds]
        for task in tasks:
            print(one_line(task.result()), flush=True)
        return [task.result() for task in tasks]


# ---------------------------------------------------------------------------------------------------------- what is shown
def one_line(run: dict[str, Any]) -> str:
    """A run in one line: the divergence from start to last round."""
    course = ", ".join(f"{each['kl']:.3f}" for each in [run["start"], *run["rounds"]])
    return f"lambda {run['beta']:g}, rate {run['rate']:g}, seed {run['seed']}: KL {course} ({run['seconds']:.0f} s)"


def curves(runs: list[dict[str, Any]]) -> dict[str, list[tuple[dict[str, Any], ...]]]:
    """By name of the curve: for each place from the start on, the figures of all seeds."""
    found = {}
    for beta, rate in dict.fromkeys((run["beta"], run["rate"]) for run in runs):
        same = [run for run in runs if (run["beta"], run["rate"]) == (beta, rate)]
        at = f"rate {rate:.0e}".replace("e-0", "e-")
        names = {"rounds": f"self-play, λ {beta:g}, {at}", "sft": f"plain SFT, {at}"}
        for side in ("rounds", "sft") if same[0]["arm"] else ("rounds",):
            found[names[side]] = list(zip(*([run["start"], *run[side]] for run in same), strict=True))
    return found


def spread(figures: tuple[dict[str, Any], ...], name: str, digits: int) -> str:
    """Mean and range over the seeds; empty where it was not measured."""
    values = [each[name] for each in figures if name in each]
    return (
        f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})" if values else ""
    )


def stopped(figures: tuple[dict[str, Any], ...]) -> str:
    """At how many seeds the road would have ended the game here; empty where there is no game."""
    reasons = [each["reason_to_stop"] is not None for each in figures if "reason_to_stop" in each]
    return f"{sum(reasons)} of {len(reasons)}" if reasons else ""


COLUMNS = {
    "kl": ("KL(p_data ‖ p_model), nats", 3),
    "reverse_kl": ("reverse KL, nats", 3),
    "mass": ("mass on possible answers", 3),
    "nll": ("held-out loss, nats a token", 3),
    "reward_accuracy": ("held-out pairs told apart", 2),
    "slope": ("slope (theory: 0 at λ 1, -9 at λ 0.1)", 2),
    "r2": ("its r²", 2),
}


def table(runs: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table: mean and range over the seeds."""
    heads = [head for head, _ in COLUMNS.values()]
    lines = [f"| | after | {' | '.join(heads)} | the road would end here |", "|---" * (len(heads) + 3) + "|"]
    for curve, (name, places) in enumerate(curves(runs).items()):
        for number, figures in enumerate(places):
            if number == 0 and curve:
                continue  # the start is that of all curves
            after = f"round {number}" if "self-play" in name else f"steps of {number} round{'s' * (number > 1)}"
            cells = [spread(figures, column, digits) for column, (_, digits) in COLUMNS.items()]
            first = f"{name} | {after}" if number else "the start | "
            lines.append(f"| {first} | {' | '.join(cells)} | {stopped(figures)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """KL(p_data || p_model) by round, and the share of held-out pairs told apart; each as the mean and the range of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, places), color in zip(curves(runs).items(), ("#2f7d4f", "#c2410c", "#7c3aed", "#1d4ed8", "#c2a10c"), strict=False):  # fmt: skip
        line = "--" if "SFT" in name else "-"
        draw(left, range(len(places)), places, "kl", color, line, name)
        if "self-play" in name:
            draw(right, range(1, len(places)), places[1:], "reward_accuracy", color, line, name)
    names = ["start", *(f"round {number}" for number in range(1, len(places)))]
    left.set_xticks(range(len(names)), names)
    left.set_yscale("log")
    for which in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        which("{x:g}")
    left.set_title("KL(p_data || p_model), nats", fontsize=9, loc="left")
    left.legend(frameon=False, fontsize=7)
    right.set_xticks(range(1, len(names)), names[1:])
    right.axhline(0.5, color="#1f2933", linewidth=0.8, linestyle=":")
    right.set_title("held-out pairs told apart; 0.5 is chance", fontsize=9, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def draw(axes: Any, places: Any, figures: list, name: str, color: str, line: str, label: str) -> None:
    """A curve: its mean over the seeds, and their range as a band."""
    values = [[each[name] for each in seeds] for seeds in figures]
    axes.plot(places, [statistics.mean(each) for each in values], line, marker="o", color=color, label=label)
    axes.fill_between(places, [min(each) for each in values], [max(each) for each in values], color=color, alpha=0.15, linewidth=0)  # fmt: skip


def main() -> None:
    smoke, began = options(__doc__).parse_args().smoke, time.perf_counter()
    size = SMOKE if smoke else FULL
    with tempfile.TemporaryDirectory() as folder:
        runs = play_all(Path(folder), size)
        seconds = round(time.perf_counter() - began, 1)
        print(table(runs))
        plot(runs, Path(folder if smoke else HERE.parent / "docs", "spin.png"))
    keep("spin", {"regime": asdict(size.regime), "runs": runs, "seconds": seconds}, smoke)


if __name__ == "__main__":
    main()
