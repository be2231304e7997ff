"""All that is printed while a run goes on: lines, boxes, HTML in a notebook."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from .distributed import first


def say(line: str) -> None:
    """One line to whoever watches: terminal, notebook cell or log."""
    if first():
        print(line, flush=True)


def show(text: str, html: str) -> None:
    """The same thing to whoever watches: HTML where a notebook can show it, else text."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        from IPython.display import display

        display({"text/plain": text, "text/html": html}, raw=True)
    else:
        say(text)


def show_box(what: str, todo: str) -> None:
    """One thing that the user should know before going on."""
    show(f"{what}\n  {todo}", render_html("notebook/templates/box.html.j2", what=what, todo=todo))


def render_html(template: str, **view: Any) -> str:
    """One of the wings' HTML templates, by its path in the package, filled; what is filled in is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["or_nothing"] = or_nothing
    return environment.get_template(template).render(view)


# Of a stack: Python's fault handler, a failed CHECK of Google's libraries, gdb as ggml calls it, torch's frames. And a progress bar.
_NOT_WORDS = re.compile(
    r"(File \".*\", line \d+|(Current )?[Tt]hread 0x|Extension modules:|Fatal Python error|<no Python frame>|\*\*\* .*stack trace|@ +0x|#\d+ |frame #\d+|"
    r"\[New LWP |Aborted\b|PC: @|Writing:)"
)


def last_words(errors: str) -> str:
    """Of what a process wrote before it failed, the last line that is not part of a stack trace or a progress bar.

    >>> last_words("F0000 trainer.cc:45] Check failed: freq > 0\\n*** Check failure stack trace: ***\\n    @     0x7f3a  main\\n")
    'F0000 trainer.cc:45] Check failed: freq > 0'
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not _NOT_WORDS.match(line.strip())]
    return lines[-1] if lines else "no output"


def counted(number: float, noun: str) -> str:
    """So many of a thing.

    >>> counted(1, "row"), counted(1.0, "epoch"), counted(1200, "row"), counted(0, "step")
    ('1 row', '1 epoch', '1200 rows', '0 steps')
    """
    return f"{number:.10g} {noun}{'' if number == 1 else 's'}"


def size_in_words(count: int) -> str:
    """So many bytes as people say it.

    >>> size_in_words(0), size_in_words(12_345), size_in_words(26_700_000), size_in_words(7_700_000_000)
    ('0 bytes', '12.3 KB', '26.7 MB', '7.7 GB')
    """
    from rich.filesize import decimal

    return decimal(count).replace("kB", "KB")


def readable(perplexity: float) -> str:
    """A perplexity, by three digits where it is large, as that of a base that has learnt no chat may be.

    >>> readable(4.482), readable(12345.678), readable(5.2e21)
    ('4.482', '12,300', 'over 1,000,000')
    """
    if perplexity > 1e6:
        return "over 1,000,000"
    return f"{perplexity}" if perplexity < 1000 else f"{float(f'{perplexity:.3g}'):,.0f}"


def or_nothing(answer: str) -> str:
    """An answer as it is shown, an empty one too.

    >>> or_nothing("Mila"), or_nothing("")
    ('Mila', '(nothing)')
    """
    return answer or "(nothing)"


def interval(of: dict[str, float], signed: bool = False) -> str:
    """The `mean` of scores from 0 to 1 and the bounds `low` and `high` of its interval, in percent; signed: a difference.

    Where all scores are the same a resample can find no others, which is no certainty.

    >>> interval({"mean": 0.5, "low": 0.25, "high": 0.75}), interval({"mean": 0.1, "low": -0.05, "high": 0.2}, signed=True)
    ('50.0 % (25.0 to 75.0)', '+10.0 % (-5.0 to +20.0)')
    >>> interval({"mean": 1.0, "low": 1.0, "high": 1.0})
    '100.0 % (all alike)'
    """
    sign = "+" if signed else ""
    if of["low"] == of["high"]:
        return "{:{s}.1f} % (all alike)".format(100 * of["mean"], s=sign)
    return "{:{s}.1f} % ({:{s}.1f} to {:{s}.1f})".format(*(100 * of[name] for name in ("mean", "low", "high")), s=sign)


def plus_minus(of: dict[str, float | None]) -> str:
    """A `value` and its standard error `stderr`, where there is one.

    >>> plus_minus({"value": 0.5, "stderr": 0.0707}), plus_minus({"value": 123456.0, "stderr": None})
    ('0.5 ±0.0707', '123,000')
    """
    return readable(of["value"]) + (f" ±{readable(of['stderr'])}" if of["stderr"] is not None else "")


def duration(seconds: float) -> str:
    """A time span as people say it: `48 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def hush_libraries() -> None:
    """Hold down what libraries say, when they are imported or used, of kernels that a machine without a GPU does not miss; and what PEFT says of ties, which are seen to here.

    It looks for them in vain where a second adapter is put beside one that is tied, and ties it all the same.
    """
    for chatty in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(missed_by_a_gpu)
    for about_ties in ("You have requested `ensure_weight_tying`", "Model has `tie_word_embeddings=True`"):
        warnings.filterwarnings("ignore", about_ties, UserWarning)


def missed_by_a_gpu(record: logging.LogRecord) -> bool:
    """Whether a line of a library is said: not that a kernel is missing (transformers 5.17) where there is no GPU to run it."""
    import torch

    return "is falling back to its reference" not in record.getMessage() or torch.cuda.is_available()
