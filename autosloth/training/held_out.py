"""Held out, while it trains: the loss on held-out rows every so many steps, the weights that had the lowest, an end where it falls no more.

A measurement draws nothing by chance that the training would have drawn, so that what is trained is the same with it and without. What it costs is
counted in tokens beforehand and not by a clock, so that a run that was killed measures as one that was not. Each checkpoint holds the best weights
so far beside its own, so that they are as safe as it is, and travel with it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from ..distributed import first, of_first
from ..notebook import held_out_losses
from ..output import counted, say
from ..run import Run
from ..settings import DPOSettings, SFTSettings
from ..values import AUTO
from .batches import batches
from .checkpoints import fill, trainable, whole
from .measure import held_out_loss

COST = 0.05  # of the training's own work
MOST = 10  # measurements by `auto`
ROWS, FEWEST = (
    32,
    8,
)  # that `auto` measures with at least, and that are taken where the user asks for more measurements than COST allows
BEST = "best.safetensors"  # in a checkpoint: the weights that had the lowest held-out loss up to it


class Plan(NamedTuple):
    """Measured every so many steps and at the last one, on so many rows; not at all where `every` is 0."""

    every: int
    rows: int
    share: float  # of the training's work, as expected


def plan(eval_steps: int | str, steps: int, trained: float, lengths: Any, work: float) -> Plan:
    """How often and with how many rows is measured in a training of so many steps and tokens.

    lengths: of all held-out rows, in tokens; work: what measuring a token takes, as a part of what training on one does.

    >>> plan("auto", 60, 60 * 8 * 100.0, [100] * 200, 1 / 3)
    Plan(every=30, rows=36, share=0.05)
    >>> plan("auto", 60, 60 * 2 * 100.0, [100] * 200, 1 / 3)
    Plan(every=0, rows=0, share=0.0)
    >>> plan(10, 60, 60 * 8 * 100.0, [100] * 200, 1 / 3)
    Plan(every=10, rows=12, share=0.05)
    """
    import numpy

    lengths = numpy.asarray(lengths)

    def cost(times: int, rows: int) -> float:
        return times * float(lengths[spread(rows, len(lengths))].sum()) * work / trained if rows else 0.0

    def fitting(times: int) -> int:
        """As many rows as fit by their mean length, or fewer where the ones that are taken are longer."""
        rows = min(len(lengths), int(COST * trained / (work * times * lengths.mean()) + 1e-9))
        while rows and cost(times, rows) > COST + 1e-9:
            rows -= 1
        return rows

    def of(every: int, rows: int) -> Plan:
        return Plan(every, rows, round(cost(math.ceil(steps / every), rows), 4))

    if eval_steps != AUTO:
        if not eval_steps:
            return Plan(0, 0, 0.0)
        return of(eval_steps, max(fitting(math.ceil(steps / eval_steps)), min(FEWEST, len(lengths))))
    for times in range(min(MOST, steps), 1, -1):  # once, at the end, all rows are measured anyway
        if (rows := fitting(times)) >= min(ROWS, len(lengths)):
            return of(math.ceil(steps / times), rows)
    return Plan(0, 0, 0.0)


def spread(rows: int, of: int) -> list[int]:
    """The places of so many rows, evenly over all of them.

    >>> spread(3, 10)
    [0, 3, 6]
    """
    return [number * of // rows for number in range(rows)]


def work_of(trainer: Any, settings: SFTSettings | DPOSettings) -> float:
    """What measuring a token takes, as a part of what training on one does: forward passes of those of a step, a backward pass of an adapter counting as one.

    A step computes each block once more where its gradients are checkpointed; DPO's reference takes one pass in either, where it was not computed ahead.
    """
    backward = 2 if trainer.args.gradient_checkpointing else 1
    reference = settings.road == "dpo" and not settings.precompute_reference
    return (1 + reference) / (1 + backward + reference)


def lengths_of(rows: Any) -> Any:
    """The tokens of each row that go through the model: of a pair with its prompt for each answer."""
    import pyarrow.compute as compute

    names = [name for name in ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
    lengths = [compute.list_value_length(rows.with_format("arrow")[:][name]) for name in names or ["input_ids"]]
    return sum(column.to_numpy() for column in lengths)


def best_of(losses: list[list[float]]) -> list[float]:
    """[step, loss] of the lowest loss, the first of several.

    >>> best_of([[2, 1.5], [4, 1.2], [6, 1.2]])
    [4, 1.2]
    """
    return min(losses, key=lambda entry: entry[1])


def since_best(losses: list[list[float]]) -> int:
    """How many measurements ago the loss was lowest.

    >>> since_best([[2, 1.5], [4, 1.2], [6, 1.2]])
    1
    """
    return len(losses) - 1 - losses.index(best_of(losses))


class HeldOut:
    """What is measured while a trainer trains, and the weights that are kept by it."""

    def __init__(self, run: Run, trainer: Any):
        self.run, self.settings, self.trainer = run, run.settings, trainer
        self.kept = Path(trainer.args.output_dir)  # where checkpoints come when they are whole
        self.plan, self.rows = Plan(0, 0, 0.0), None
        self.weights: dict[str, Any] | None = None  # the best, whole and on the CPU

    def callback(self) -> Any:
        """The trainer callback that measures."""
        from transformers import TrainerCallback

        held = self

        class Measuring(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                held.begin(state)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if held.is_due(state):
                    held.measure(state)
                    held.end_where_it_falls_no_more(state, control)

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                held.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))

        return Measuring()

    def begin(self, state: Any) -> None:
        """Take up the plan that the run began with, or make it and say it, and the best weights of the checkpoint that the training goes on from."""
        self.plan = self.told() or self.planned(state.max_steps, aloud=True)
        if self.plan.every:
            self.rows = self.trainer.eval_dataset.select(spread(self.plan.rows, len(self.trainer.eval_dataset)))
        self.take_up(state)

    def told(self) -> Plan | None:
        """The plan that the facts tell, if they do."""
        told = of_first(lambda: self.run.facts.get("train", {}).get("measuring"))
        return Plan(*(told[name] for name in Plan._fields)) if told else None

    def planned(self, steps: int, aloud: bool) -> Plan:
        """The plan for so many steps, kept in the facts."""
        held, rows = self.trainer.eval_dataset, self.trainer.train_dataset
        trained = steps * batches(self.trainer)["rows_per_step"] * float(lengths_of(rows).mean())
        made = plan(self.settings.eval_steps, steps, trained, lengths_of(held), work_of(self.trainer, self.settings))
        self.run.record("train", measuring=made._asdict())
        if aloud:
            self.announce(made, len(held))
        return made

    def announce(self, made: Plan, held: int) -> None:
        """Say how often and on how many of the held-out rows is measured, or why not at all."""
        unit = "pair" if self.settings.road == "dpo" else "row"
        if made.every:
            every = "each step" if made.every == 1 else f"every {made.every} steps"
            more = f"; a larger `eval_steps` brings it below {COST:.0%}" if made.share > COST + 1e-4 else ""
            say(
                f"train: the held-out loss is measured {every}, on {made.rows} of {counted(held, unit)} (about {made.share:.1%} of the training's work{more})"
            )
        elif self.settings.eval_steps:
            say(
                f"train: no held-out loss is measured on the way: so short a training pays for no two measurements of {counted(min(ROWS, held), unit)}; the last step is kept{', and `patience` counts for nothing: set `eval_steps` to a number' if self.settings.patience else ''}"
            )

    def take_up(self, state: Any) -> None:
        """Read the best weights from the checkpoint of this step, where it has any."""
        from safetensors.torch import load_file

        path = self.kept / f"checkpoint-{state.global_step}" / BEST
        self.weights = load_file(path) if path.is_file() else None

    def is_due(self, state: Any) -> bool:
        """Whether this step is one that is measured after."""
        step = state.global_step
        return bool(self.plan.every) and (step % self.plan.every == 0 or step >= state.max_steps)

    def measure(self, state: Any) -> None:
        """Measure, log it as transformers does (`eval_loss`), and keep the weights where the loss was never lower."""
        import torch

        started, trainer = time.perf_counter(), self.trainer
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # a DataLoader draws a seed
            trainer._metrics["eval"].clear()
            loss = held_out_loss(trainer, self.rows)
        before = held_out_losses(state.log_history)
        if self.settings.keep == "best" and (not before or loss < best_of(before)[1]):
            self.weights = {name: whole(weight).to("cpu", copy=True) for name, weight in trainable(trainer.model)}
            state.best_metric, state.best_global_step = loss, state.global_step
        due = trainer.control.should_log  # the step's own loss, which comes next
        trainer.log({"eval_loss": loss, "eval_seconds": round(time.perf_counter() - started, 3)})
        trainer.control.should_log = due
        trainer.model.train()  # by which TRL tells which of its figures belong to the step's own log

    def end_where_it_falls_no_more(self, state: Any, control: Any) -> None:
        """Let the trainer stop, with a checkpoint, where the held-out loss has not fallen for `patience` measurements; noted in its log, which a resume reads."""
        losses, patience = held_out_losses(state.log_history), self.settings.patience
        if patience and since_best(losses) >= patience and state.global_step < state.max_steps:
            state.log_history[-1]["stopped"] = state.max_steps
            control.should_save = control.should_training_stop = True
            step, loss = best_of(losses)
            say(
                f"train: stopped after step {state.global_step} of {state.max_steps}: the held-out loss has not fallen for {counted(patience, 'measurement')} (`patience`); it was lowest after step {step}, {loss:.4f}"
            )

    def save(self, checkpoint: Path) -> None:
        """Write the best weights into a checkpoint that is being written."""
        from safetensors.torch import save_file

        if first() and self.weights is not None:
            save_file(self.weights, checkpoint / BEST)

    def restore(self) -> dict[str, Any]:
        """Give the finished model the weights that are to be kept, and tell in facts which these are and what was measured."""
        import torch

        state = self.trainer.state
        if not self.told():  # the training was finished before, and the facts were lost
            self.planned(state.max_steps, aloud=False)
        losses = held_out_losses(state.log_history)
        facts: dict[str, Any] = {"held_out": losses}
        if losses:
            seconds = sum(entry["eval_seconds"] for entry in state.log_history if "eval_seconds" in entry)
            facts["measuring_seconds"] = round(seconds, 2)
        if stopped := next((entry["stopped"] for entry in state.log_history if "stopped" in entry), None):
            facts["stopped"] = {"of": stopped, "patience": self.settings.patience}
        if self.settings.keep == "last" or not losses:
            return facts | {"kept": {"rule": "last", "step": state.global_step}}
        if self.weights is None:  # the training was finished before
            self.take_up(state)
        step, loss = best_of(losses)
        if step != state.global_step:
            with torch.no_grad():
                for name, weight in trainable(self.trainer.model):
                    fill(weight, self.weights[name])
            say(f"train: the weights of step {step} are kept: their held-out loss is the lowest, {loss:.4f} ({losses[-1][1]:.4f} after the last)")  # fmt: skip
        return facts | {"kept": {"rule": "best", "step": step, "loss": loss}}
