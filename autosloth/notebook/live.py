"""What a notebook or a terminal shows of a run: the training as it goes, answers before and after, the summary; each number with its unit and limit."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..distributed import processes
from ..hardware import GB, gpu_energy_wh, peak_ram_gb, peak_vram_gb
from ..output import (
    counted,
    duration,
    interval,
    or_nothing,
    plus_minus,
    readable,
    render_html,
    say,
    show,
    size_in_words,
)
from ..run import STAGES, Run, refuse_lost_facts
from .runtime import front_end_attached

LINES_PER_RUN = 20  # where nobody watches
SECONDS_PER_FRAME = 1.0
POINTS = 200  # of the curve


def memory_line() -> str:
    """Memory in use beside what there is, for example `6.3 of 14.7 GB VRAM, 4.1 of 12.7 GB RAM`."""
    import psutil
    import torch

    ram = f"{psutil.Process().memory_info().rss / GB:.1f} of {psutil.virtual_memory().total / GB:.1f} GB RAM"
    if not torch.cuda.is_available():
        return ram
    free, total = torch.cuda.mem_get_info()
    return f"{(total - free) / GB:.1f} of {total / GB:.1f} GB VRAM, {ram}"


class Interruption:
    """While it lasts, the stop button (or Ctrl-C) asks for an end after the step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruption:
        self.before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("train: stopping after this step, with a checkpoint; interrupt again to stop at once")


def progress_callback(interruption: Interruption) -> Any:
    """A trainer callback that shows the training, keeps the seconds (without those of measuring) and energy spent and the peaks of memory in the trainer's log, over resumes too, and ends it when asked to."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spent = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
            self.started, self.first_step = time.perf_counter() - spent, state.global_step
            self.resumed_at, self.drawn_at, self.panel = time.perf_counter(), 0.0, None
            self.energy = energy_since(state.log_history)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if interruption.asked:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "eval_seconds" in logs:
                self.started += logs["eval_seconds"]  # in which nothing was trained
            if "loss" not in logs:
                return
            elapsed = time.perf_counter() - self.started
            memory = {"peak_ram_gb": peak_ram_gb(), "peak_vram_gb": peak_vram_gb()}
            state.log_history[-1] |= {"seconds": round(elapsed, 2), "energy_wh": self.energy(), **memory}
            done, total = state.global_step, state.max_steps
            pace = (time.perf_counter() - self.resumed_at) / (done - self.first_step)
            parts = [f"loss {float(logs['loss']):.4f}", preference_line(logs), held_out_now(state.log_history)]
            told = ", ".join(filter(None, parts))
            text = (
                f"train: step {done} of {total}, {told}, about {duration(pace * (total - done))} left, {memory_line()}"
            )
            if not front_end_attached():
                if done * LINES_PER_RUN // total > (done - 1) * LINES_PER_RUN // total:
                    say(text)
            elif done == total or interruption.asked or time.perf_counter() - self.drawn_at > SECONDS_PER_FRAME:
                self.drawn_at = time.perf_counter()
                self.panel = redraw(
                    self.panel, text, panel_html(state.log_history, total, elapsed, pace * (total - done))
                )

    return Progress()


def energy_since(log: list[dict[str, Any]]) -> Callable[[], float | None]:
    """A function that tells the watt-hours of a training that goes on from this log; None where a part of them was not counted, or several GPUs train."""
    before = next((entry.get("energy_wh") for entry in reversed(log) if "seconds" in entry), 0.0)
    start = gpu_energy_wh() if processes() == 1 else None

    def spent() -> float | None:
        now = None if before is None or start is None else gpu_energy_wh()
        return None if now is None else round(before + now - start, 3)

    return spent


def preference_line(logs: dict[str, Any]) -> str:
    """How well a step of DPO tells the answers apart: the margin of their implicit rewards, and the accuracy on pairs."""
    if "rewards/margins" not in logs:
        return ""
    margin = float(logs["rewards/margins"])  # 0 before the first step, when every pair is a tie and TRL's accuracy 0
    return f"margin {margin:z.3f}" + (f", accuracy {float(logs['rewards/accuracies']):.0%}" if margin else "")


def held_out_losses(log: list[dict[str, Any]]) -> list[list[float]]:
    """[step, loss] of each measurement of held-out rows on the way, by a trainer's log.

    >>> held_out_losses([{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5, "eval_seconds": 0.1}, {"step": 2, "eval_loss": 1.4}])
    [[2, 1.5]]
    """
    return [[entry["step"], float(entry["eval_loss"])] for entry in log if "eval_seconds" in entry]


def held_out_now(log: list[dict[str, Any]]) -> str:
    """The held-out loss that was measured last, and the lowest where that is another."""
    losses = held_out_losses(log)
    if not losses:
        return ""
    (step, lowest), (_, last) = min(losses, key=lambda entry: entry[1]), losses[-1]
    return f"held-out loss {last:.4f}" + ("" if lowest == last else f" (lowest {lowest:.4f}, after step {step})")


def redraw(panel: Any, text: str, html: str) -> Any:
    """Show a panel, or what has become of it in the same place; gives its handle."""
    from IPython.display import display

    bundle = {"text/plain": text, "text/html": html}
    if panel is None:
        return display(bundle, raw=True, display_id=True)
    panel.update(bundle, raw=True)
    return panel


def panel_html(log: list[dict[str, Any]], total: int, elapsed: float, left: float) -> str:
    """The state of a training: bar, loss with its curve, time and memory. Its size does not grow with the run's length."""
    steps = [entry for entry in log if "loss" in entry]
    losses = [(entry["step"], float(entry["loss"])) for entry in steps]
    done, loss = losses[-1]
    return render_html(
        "notebook/templates/panel.html.j2", done=done, total=total, loss=loss, first=losses[0][1], curve=curve(losses, total, held_out_losses(log)),
        preference=", ".join(filter(None, [preference_line(steps[-1]), held_out_now(log)])), elapsed=duration(elapsed), left=duration(left), memory=memory_line(),
    )  # fmt: skip


def curve(losses: list[tuple[int, float]], total: int, held_out: Sequence[Sequence[float]] = ()) -> dict[str, Any]:
    """The loss over the steps as the points of SVG lines in a box of 600 x 120, raw, smoothed and held out, and the ends of its axis.

    At most POINTS points; smoothed is a running mean with the weight 0.9 on the past, corrected for its start (as Adam does).
    """
    smoothed, mean = [], 0.0
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    for number, (step, loss) in enumerate(finite, start=1):
        mean = 0.9 * mean + 0.1 * loss
        smoothed.append((step, mean / (1 - 0.9**number)))
    shown = [loss for _, loss in (*finite, *held_out)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)

    def points(line: Sequence[Sequence[float]]) -> str:
        kept = line[::-1][:: -(-len(line) // POINTS) or 1][::-1]
        return " ".join(
            f"{600 * step / total:.1f},{115 - 110 * (loss - low) / (high - low or 1):.1f}" for step, loss in kept
        )

    return {"raw": points(finite), "smoothed": points(smoothed), "held_out": points(held_out), "low": low, "high": high}


def show_answers(run: Run) -> None:
    """Held-out questions with the base's answers and the trained model's, side by side."""
    before, after = (run.facts["eval"][when].get("samples", []) for when in ("before", "after"))
    rows = [{**old, "before": old["answer"], "after": new["answer"]} for old, new in zip(before, after, strict=True)]
    if not rows:
        return
    parts = ("question", "before", "after", "expected")
    text = "\n".join(f"{part:>9} | {or_nothing(row[part])}" for row in rows for part in parts)
    show(text, render_html("notebook/templates/answers.html.j2", rows=rows))


def summary(run: Run) -> None:
    """Print what the run measured and where its files are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{run.settings.run_name}", show_header=False, title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_lines(run):
        table.add_row(name, Text(value))
    Console(width=None if sys.stdout.isatty() else 110).print("", table)


def summary_lines(run: Run) -> list[tuple[str, str]]:
    """(name, value) of each line of the summary, from facts.json: what is measured so far, and at last what failed or is not done. Raises SettingsError where facts of a finished stage are lost."""
    facts = run.facts
    for name in STAGES:
        refuse_lost_facts(run, name)
    lines = [("run folder", str(run.folder))]
    if "data" in facts:
        told = f"{facts['data']['train_rows']} to train on, {facts['data']['eval_rows']} held out"
        lines.append(("pairs" if run.settings.road == "dpo" else "rows", told))
    if "before" in facts.get("eval", {}):
        lines += measured_lines(run)
    for score in facts.get("scores", []):
        told = f"{score['metric']} {interval(score['base'])} of the base, {interval(score['tuned'])} tuned, {interval(score['difference'], signed=True)} difference"
        lines.append((f"score on {score['file']}", told))
    for each in facts.get("benchmarks", []):
        told = f"{each['metric']} {plus_minus(each['base'])} of the base, {plus_minus(each['tuned'])} tuned ({each['filter']}, lm-eval)"
        lines.append((each["task"], told.replace("none, ", "")))
    if "steps" in facts.get("train", {}):
        lines.append(("training", f"{counted(facts['train']['steps'], 'step')} in {duration(facts['train']['seconds'])}, {facts['train']['tokens_per_second']:.0f} tokens per second, {memory_facts(facts)}"))  # fmt: skip
    lines += kept_lines(facts)
    if run.lost("train"):
        lines.append(("adapter", missing_line(run, "train", run.lost("train")[0])))
    if "export" in facts:
        lines += exported_lines(run)
    gone, kept = (
        run.lost("card"),
        run.path("README.md"),
    )  # of a run in before/ the card is kept, and not what is published
    if gone and kept.is_file():
        lines.append(("card", str(kept)))
    elif "card" in facts:
        lines.append(("publish folder", missing_line(run, "card", gone[0]) if gone else str(run.path("publish"))))
    if "export" in facts:
        lines += talk_lines(run)
    if "publish" in facts:
        lines.append(("on the Hub", ", ".join(facts["publish"]["repos"]) or "no (publish_to_hub is off)"))
    return lines + undone_lines(run)


def measured_lines(run: Run) -> list[tuple[str, str]]:
    """What the held-out rows tell of the model, before training and, once that has ended, after it."""
    facts = run.facts
    before, after = facts["eval"]["before"], facts["eval"].get("after")
    if after is None:
        return [("held-out loss", f"{before['loss']:.4f} before training")]
    lines = [held_out_line(before, after, facts["data"]["eval_rows"])]
    if after["loss"] > before["loss"]:
        lines.append(("WARNING", "the held-out loss rose: the model was better before it was trained; lower `learning_rate` or the number of steps"))  # fmt: skip
    if "reward_accuracy" in after:
        lines += preference_lines(before, after)
    lines += [round_line(played) for played in facts.get("rounds", [])]
    if reason := (facts.get("rounds") or [{}])[-1].get("stopped"):
        lines.append(("no further round", reason))
    if arm := facts.get("sft_arm"):
        lines.append(("plain SFT", f"held-out loss {arm['nll']:.4f} after {counted(arm['steps'], 'step')} from the start, for comparison"))  # fmt: skip
    if "elsewhere" in before and "elsewhere" in after:
        lines.append(("elsewhere", elsewhere_line(before["elsewhere"], after["elsewhere"])))
    if "exact_match" in after:
        longest = after.get("max_new_tokens", run.settings.max_new_tokens)
        cut = f"; {after['answers_cut']} cut at {longest} tokens" if after["answers_cut"] else ""
        gained = facts["eval"].get("gained") or {}
        exact = gained.get("name") == "exact"
        sides = told_of(gained) if exact else f"{before['exact_match']:.1%} before, {after['exact_match']:.1%} after"
        lines.append(("task accuracy", f"{sides} (exact match of {counted(after['answers_compared'], 'held-out answer')}{cut})"))  # fmt: skip
        if gained and not exact:
            lines.append(("score", f"{told_of(gained)} ({gained['name']} of {gained['scored']} of {counted(gained['answers'], 'answer')})"))  # fmt: skip
        lines.append(("sample question", after["samples"][0]["question"]))
        for when in ("before", "after"):
            lines.append((f"answer {when}", or_nothing(facts["eval"][when]["samples"][0]["answer"])))
    return lines


def told_of(gained: dict[str, Any]) -> str:
    """What the answers are worth before and after, and how sure the difference is."""
    few = ", too few for a sure interval" if gained["few"] else ""
    return f"{interval(gained['before'])} before, {interval(gained['after'])} after, {interval(gained['difference'], signed=True)} difference{few}"


def elsewhere_line(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What the training cost outside of its task.

    >>> elsewhere_line({"perplexity": 12.3, "tokens": 1100}, {"perplexity": 13.0, "tokens": 1100})
    'perplexity 12.3 before, 13.0 after on a fixed text outside of the task (1100 tokens): 6 % more'
    """
    change = round(100 * (after["perplexity"] / before["perplexity"] - 1))
    told = f"{abs(change)} % {'more' if change > 0 else 'less'}" if change else "as before"
    figures = f"perplexity {readable(before['perplexity'])} before, {readable(after['perplexity'])} after"
    return f"{figures} on a fixed text outside of the task ({after['tokens']} tokens): {told}"


def kept_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Which step's weights are the adapter, by which held-out losses, and what measuring these took."""
    train = facts.get("train", {})
    if not train.get("held_out"):
        return []
    kept, seconds, unit = train["kept"], train["measuring_seconds"], "pair" if "rewards" in train else "row"
    step, lowest = min(train["held_out"], key=lambda entry: entry[1])
    why = f", which had the lowest held-out loss, {kept['loss']:.4f}" if kept["rule"] == "best" else ""
    if kept["rule"] == "last" and step != kept["step"]:
        why = f"; those of step {step} had a lower held-out loss, {lowest:.4f} ({train['held_out'][-1][1]:.4f} after the last)"
    share = f"measured {counted(len(train['held_out']), 'time')} on {counted(train['measuring']['rows'], unit)}, in {seconds / (train['seconds'] + seconds):.1%} of the time"
    lines = [("weights kept", f"those of step {kept['step']} of {train['steps']}{why} ({share})")]
    if stopped := train.get("stopped"):
        lines.append(("stopped early", f"after step {train['steps']} of {stopped['of']}: the held-out loss had not fallen for {counted(stopped['patience'], 'measurement')}"))  # fmt: skip
    return lines


def exported_lines(run: Run) -> list[tuple[str, str]]:
    """The GGUF files as they are on the disk, and their proof."""
    files, proof, lines = run.facts["export"]["gguf"], run.facts.get("verify", {}), []
    lost = lost_files(run)
    for file in files:
        gone = file["path"] in lost
        lines.append(("GGUF", missing_line(run, "gguf", file["path"]) if gone else file_line(run, file)))
    if run.failure("verify"):
        return lines + ([("verification", proof_line(proof))] if proof.get("passed") is False else [])
    if run.mark("verify") is None:
        return [*lines, ("verification", f"not done of these files: {run.command('verify')} does it")]
    if proof["passed"] is not None or proof.get("no_verdict"):
        there = [file for file in files if file["path"] not in lost]
        altered = [file for file in there if run.path(file["path"]).stat().st_size != file["bytes"]]
        of = "of files that are missing now: " if lost else "of a file that is another one now: " if altered else ""
        lines.append(("verification", f"{of}{proof_line(proof)}"))
        if proof["passed"] is not False and not altered:
            lines.append(("which means", proof.get("no_verdict") or run.settings.passed_means()))
    return lines


def lost_files(run: Run) -> list[str]:
    """The GGUF files of the run that are not there any more."""
    return [file["path"] for file in run.facts["export"]["gguf"] if not run.path(file["path"]).is_file()]


def undone_lines(run: Run) -> list[tuple[str, str]]:
    """Which stages of the road failed, with the reason and what to do, and which are not done."""
    undone = [name for name in STAGES if run.mark(name) is None]
    failed = {name: failure for name in undone if (failure := run.failure(name))}
    lines = [(f"{name} failed", str(failure)) for name, failure in failed.items()]
    if left := [name for name in undone if name not in failed]:
        how = "" if failed else f"; {run.command('train')} goes on"
        lines.append(("not done", f"{', '.join(left)}{how}"))
    return lines


def file_line(run: Run, file: dict[str, Any]) -> str:
    """A GGUF file as it is on the disk."""
    path = run.path(file["path"])
    size = path.stat().st_size
    changed = (
        f", not the {size_in_words(file['bytes'])} that were proven: {run.command('verify')} tells"
        if size != file["bytes"]
        else ""
    )
    return f"{path}, {size_in_words(size)}{changed}"


def talk_lines(run: Run) -> list[tuple[str, str]]:
    """How to talk to the first GGUF of the run, a whole model if there is one, where none is lost and none failed its proof."""
    files = run.facts["export"]["gguf"]
    if not files or lost_files(run) or run.failure("verify") or run.facts.get("verify", {}).get("passed") is False:
        return []
    models = [file["path"] for file in files if file["type"] != "ADAPTER"]
    if not models:
        alone = shlex.quote(str(run.path(files[0]["path"])))
        return [("use it", f"llama-cli -m BASE.gguf --lora {alone}, on a GGUF of the base; more in the card")]
    name = run.settings.run_name.lower()  # which Ollama wants
    ollama = f"ollama create {name} -f {shlex.quote(str(run.path('gguf', 'Modelfile')))} && ollama run {name}"
    cards = [path for path in (run.path("publish", "README.md"), run.path("README.md")) if path.is_file()]
    more = f"; more in the card, {cards[0]}" if cards else ""
    talk = f"autosloth chat {shlex.quote(str(run.folder))}"
    return [
        ("talk to it", talk),
        ("with Ollama", ollama),
        ("in Python", f"llama_cpp.Llama({str(run.path(models[0]))!r}){more}"),
    ]


def missing_line(run: Run, stage: str, name: str) -> str:
    """A file that a stage left and that is not there any more."""
    return f"{run.path(name)} is missing: {run.command(stage)} makes it again"


def proof_line(proof: dict[str, Any]) -> str:
    """The proof of all files in a line."""
    told = []
    if proof["texts"]:
        told.append(f"{proof['token_mismatches']} of {proof['texts']} texts tokenised differently")
    if proof["mean_kl"] is not None:
        told.append(
            f"mean KL {proof['mean_kl']:.2g} nats, top-1 {proof['top1']:.1%}, over {proof['positions']} positions"
        )
    tensors = sum(file["weights"]["tensors"] for file in proof.get("files", []))
    told.append(counted(tensors, "tensor") + " compared" + ("" if proof["texts"] else ", no tokens, no answers"))
    verdict = {True: "passed", False: "NOT passed", None: "no verdict"}[proof["passed"]]
    return f"{verdict}: {', '.join(told)}"


def held_out_line(before: dict[str, Any], after: dict[str, Any], rows: int) -> tuple[str, str]:
    """The loss on what was held out; that of answers has a unit, that of preferences has none."""
    what = counted(rows, "pair") if "reward_accuracy" in after else f"nats per token, {counted(rows, 'row')}"
    return "held-out loss", f"{before['loss']:.4f} before, {after['loss']:.4f} after ({what})"


def round_line(played: dict[str, Any]) -> tuple[str, str]:
    """A round of self-play."""
    now = played["eval"]
    told = f"held-out loss {now['nll']:.4f}, accuracy on pairs {now['reward_accuracy']:.1%}, margin {now['reward_margin']:z.3f}"
    return (
        f"round {played['round'] + 1}",
        f"{told}, {now['mean_length']:.1f} tokens an answer, {counted(played['generated']['pairs'], 'pair')}",
    )


def preference_lines(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str]]:
    """What DPO changed, on the held-out pairs."""
    return [
        (
            "reward accuracy",
            f"{before['reward_accuracy']:.1%} before, {after['reward_accuracy']:.1%} after; the better answer is the likelier one in {before['prefers_chosen']:.1%}, then {after['prefers_chosen']:.1%}",
        ),
        ("reward margin", f"{before['reward_margin']:z.3f} before, {after['reward_margin']:z.3f} after"),
        (
            "log-probabilities",
            f"better answers {before['chosen_logp']:.1f} before, {after['chosen_logp']:.1f} after; worse ones {before['rejected_logp']:.1f}, then {after['rejected_logp']:.1f} (nats an answer)",
        ),
        ("KL to the start", f"{after['kl']:.3g} nats per token"),
    ]


def memory_facts(facts: dict[str, Any]) -> str:
    """Peak memory beside what there is."""
    train, machine = facts["train"], facts["hardware"]
    vram = f"{train['peak_vram_gb']} of {machine['vram_gb']} GB VRAM, " if machine["gpu"] else ""
    return f"{vram}{train['peak_ram_gb']} of {machine['ram_gb']} GB RAM at most"
