"""What the user sees while the trainer works: a line now and then, each number with its unit and its limit."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

from .errors import SettingsError
from .run import GB, Run, say

LINES_PER_RUN = 20


def peak_ram_gb() -> float:
    """The most memory that this process ever held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB, 2)


def peak_vram_gb() -> float | None:
    """The most GPU memory that torch reserved, in GB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_reserved() / GB, 2) if torch.cuda.is_available() else None


def memory_line() -> str:
    """Memory in use beside what there is, for example `6.3 of 14.7 GB VRAM, 4.1 of 12.7 GB RAM`."""
    import psutil
    import torch

    ram = f"{psutil.Process().memory_info().rss / GB:.1f} of {psutil.virtual_memory().total / GB:.1f} GB RAM"
    if not torch.cuda.is_available():
        return ram
    free, total = torch.cuda.mem_get_info()
    return f"{(total - free) / GB:.1f} of {total / GB:.1f} GB VRAM, {ram}"


def progress_callback() -> Any:
    """A trainer callback that prints about LINES_PER_RUN lines and keeps the seconds spent in the trainer's log, over resumes too."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spent = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
            self.started, self.first_step = time.perf_counter() - spent, state.global_step
            self.resumed_at = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            state.log_history[-1]["seconds"] = round(time.perf_counter() - self.started, 2)
            done, total = state.global_step, state.max_steps
            if done * LINES_PER_RUN // total > (done - 1) * LINES_PER_RUN // total:
                pace = (time.perf_counter() - self.resumed_at) / (done - self.first_step)
                say(
                    f"train: step {done} of {total}, loss {float(logs['loss']):.4f}, about {duration(pace * (total - done))} left, {memory_line()}"
                )

    return Progress()


def duration(seconds: float) -> str:
    """A time span as people say it: `48 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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
    """(name, value) of each line of the summary, from facts.json."""
    facts = run.facts
    missing = [name for name in ("data", "eval", "train", "export", "verify", "publish") if name not in facts]
    if missing or "after" not in facts["eval"]:
        raise SettingsError(
            f"The run {run.folder} is not finished: there are no facts of {', '.join(missing) or 'eval'}.",
            f"Run `autosloth {run.settings.road}` with its settings to the end.",
        )
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    lines = [
        ("run folder", str(run.folder)),
        (
            "held-out loss",
            f"{before['loss']:.4f} before, {after['loss']:.4f} after (nats per token, {facts['data']['eval_rows']} rows)",
        ),
    ]
    if "exact_match" in after:
        cut = f"; {after['answers_cut']} cut at {run.settings.max_new_tokens} tokens" if after["answers_cut"] else ""
        lines.append(
            (
                "task accuracy",
                f"{before['exact_match']:.1%} before, {after['exact_match']:.1%} after (exact match of {after['answers_compared']} held-out answers{cut})",
            )
        )
        lines.append(("sample question", after["samples"][0]["question"]))
        lines += [
            (f"answer {when}", facts["eval"][when]["samples"][0]["answer"] or "(nothing)")
            for when in ("before", "after")
        ]
    lines.append(
        (
            "training",
            f"{facts['train']['steps']} steps in {duration(facts['train']['seconds'])}, {facts['train']['tokens_per_second']:.0f} tokens per second, {memory_facts(facts)}",
        )
    )
    for file in facts["export"]["gguf"]:
        lines.append(("GGUF", f"{run.path(file['path'])}, {file['bytes'] / 1e6:.1f} MB"))
    if (proof := facts["verify"])["passed"] is not None:
        verdict = "passed" if proof["passed"] else "NOT passed"
        lines.append(
            (
                "verification",
                f"{verdict}: {proof['token_mismatches']} of {proof['texts']} texts tokenised differently, mean KL {proof['mean_kl']:.2g} nats, top-1 {proof['top1']:.1%}, over {proof['positions']} positions",
            )
        )
    lines.append(("publish folder", str(run.path("publish"))))
    lines.append(("on the Hub", ", ".join(facts["publish"]["repos"]) or "no (publish_to_hub is off)"))
    return lines


def memory_facts(facts: dict[str, Any]) -> str:
    """Peak memory beside what there is."""
    train, machine = facts["train"], facts["hardware"]
    vram = f"{train['peak_vram_gb']} of {machine['vram_gb']} GB VRAM, " if machine["gpu"] else ""
    return f"{vram}{train['peak_ram_gb']} of {machine['ram_gb']} GB RAM at most"
