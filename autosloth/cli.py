"""The commands: `autosloth sft`, `dpo`, `spin`, `check`, `init`, `export`, `verify`, `card`, `publish`, `show`, `score`, `runs`, `chat`, `serve`. Exit codes: 0 done, 1 a named problem, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated

import typer

from .commands import (
    RoadCommand,
    commented,
    complete_runs,
    folder_of_runs,
    listed,
    other_defaults_help,
    show_runs,
    with_settings,
)
from .errors import INTERRUPTED, AutoSlothError, Interrupted
from .run import Run, lock, storage_errors
from .settings import ROADS, Settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model, prove its GGUF, publish both.",
)
check_app = typer.Typer(no_args_is_help=True, help="Find every problem that can be known before training.")
app.add_typer(check_app, name="check")
init_app = typer.Typer(no_args_is_help=True, help="Print a commented file of settings to begin with.")
app.add_typer(init_app, name="init")

Folder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, for example runs/my-run.", autocompletion=complete_runs),
]
TOLD = {"sft": ("train", "Supervised"), "dpo": ("train", "Preference"), "spin": ("rounds", "Self-play")}


def print_version(asked: bool) -> None:
    """`--version`."""
    if asked:
        print(f"autosloth {installed('autosloth')}")
        raise typer.Exit


@app.callback()
def with_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""


def follow_road(settings: Settings) -> None:
    """A whole road."""
    from .roads import follow

    follow(settings)


def check_alone(settings: Settings) -> None:
    """Check, and say how the rows would be read. Raises Problems."""
    from .check import check
    from .data import report_readings
    from .output import say

    for reason in settings.reasons():
        say(reason)
    report_readings(check(settings))


def print_commented(settings: Settings) -> None:
    """A file of settings to begin with."""
    print(commented(settings), end="")


for road in ROADS.values():
    trained, what = TOLD[road.road]
    for group, act, help in (
        (app, follow_road, f"{what} fine-tuning, all of it: check, data, {trained}, export, verify, card, publish. Run again, it goes on where it stood."),
        (check_app, check_alone, f"Find every problem of a {what.lower()} run that can be known before training; exit code 1 if there is any."),
        (init_app, print_commented, f"Print settings of a {what.lower()} run, each with its help: `autosloth init {road.road} > settings.yaml`."),
    ):  # fmt: skip
        add = group.command(road.road, cls=RoadCommand, help=help, epilog=other_defaults_help(road))
        add(with_settings(road, act))


@app.command()
def export(run: Folder) -> None:
    """Write the merged model, if the settings ask for it, and the GGUF of a finished training again."""
    from .roads import EXPORT

    redo(run, *EXPORT)


@app.command()
def verify(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN|FILE.gguf", autocompletion=complete_runs, help="A run folder, or any GGUF file."),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that FILE.gguf should be: a folder or a Hub id.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="The LoRA adapter that is in FILE.gguf: a folder, a run or a Hub id.")
    ] = None,
) -> None:
    """Prove again that a run's GGUF files are the trained model; or that any GGUF is the model that you name. Exit code 1 if not."""
    from .proof import verify_file, verify_gguf

    if against is None:
        if target.is_file() or adapter:
            raise typer.BadParameter(
                "A GGUF file is held against a model: add --against MODEL.", param_hint="--against"
            )
        return redo(target, verify_gguf)
    verify_file(target, against, adapter)


@app.command()
def card(run: Folder) -> None:
    """Fill the publish folder and write the card again."""
    from .publish import write_card

    redo(run, write_card)


@app.command()
def publish(run: Folder) -> None:
    """Upload the publish folder now, whatever `publish_to_hub` says."""
    from .publish import publish as upload
    from .publish import refuse_foreign_token, refuse_unverified, write_card

    kept = locked(run)
    opened = Run(kept.folder, kept.settings.model_copy(update={"publish_to_hub": True}))
    refuse_unverified(opened)
    refuse_foreign_token(opened.settings)
    try:
        write_card(opened)
        upload.again(opened)
    finally:
        kept.write_settings()  # that of the run stay as they were


@app.command()
def show(run: Folder) -> None:
    """Print what a run measured and where its files are."""
    from .notebook import summary

    summary(Run.open(run))


def complete_metrics() -> list[str]:
    """The metrics of `score`."""
    from .score import METRICS

    return [*METRICS]


@app.command()
def score(
    run: Folder,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Questions and answers: a file, a folder, an address or a Hub id."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Of such a file: exact, contains, regex (the file's answer is the pattern), number (the last one of an answer), json (equal values) or rouge (ROUGE-L F1).",
            autocompletion=complete_metrics,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer to it in tokens; without it as the run's setting says.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tasks of lm-eval instead, between commas: gsm8k,arc_easy or a YAML file."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of each task the first so many questions.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask a task's questions in the template that was trained.")
    ] = False,
) -> None:
    """Compare the tuned model with its base: their answers to a file's questions, or on tasks of lm-eval. `autosloth card RUN` puts it into the card."""
    from .score import METRICS, score_tasks
    from .score import score as compare

    if (data is None) == (tasks is None):
        raise typer.BadParameter("give one of them.", param_hint="--data / --tasks")
    if data is None:
        for name, value in (("--metric", metric), ("--max-new-tokens", max_new_tokens)):
            if value is not None:
                raise typer.BadParameter("it is for `--data`; tasks bring their own.", param_hint=name)
        return score_tasks(locked(run), [name.strip() for name in tasks.split(",")], limit, chat_template)
    for name, value in (("--limit", limit), ("--chat-template", chat_template)):
        if value:
            raise typer.BadParameter("it is for `--tasks`.", param_hint=name)
    metric = metric and metric.lower()
    if metric not in METRICS:
        raise typer.BadParameter(f"{'it is missing' if metric is None else f'it is {metric!r}'}; give {', '.join(METRICS)}.", param_hint="--metric")  # fmt: skip
    compare(locked(run), data, metric, max_new_tokens)


@app.command()
def runs(
    storage: Annotated[
        Path | None,
        typer.Argument(help="The folder that holds the run folders; without it that of the setting `storage`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: a list in JSON.")] = False,
) -> None:
    """List the runs of a folder, the newest first: what came of each, and where it stands."""
    folder = (storage or folder_of_runs()).expanduser()
    rows, problems = listed(folder)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif rows:
        show_runs(rows)
    else:
        print(f"No runs in {folder} yet: `autosloth sft` begins one, `autosloth runs FOLDER` looks elsewhere.")
    for problem in problems:
        print(f"autosloth: {problem}", file=sys.stderr)


@app.command()
def chat(
    run: Folder,
    base: Annotated[bool, typer.Option("--base", help="Let the model before the training answer too.")] = False,
    system: Annotated[str, typer.Option(metavar="TEXT", help="A system prompt.")] = "",
    temperature: Annotated[float, typer.Option(min=0, max=5, help="0 takes the likeliest token, 1 samples.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="The same seed gives the same answers.")] = 0,
) -> None:
    """Talk to the proven GGUF of a run. A line is a question; /help tells the rest."""
    from .chat import Sampling
    from .chat import chat as talk

    if temperature != temperature:  # NaN, which no bound holds back
        raise typer.BadParameter("it is no number.", param_hint="--temperature")
    talk(Run.open(run), Sampling(temperature, seed), base, system)


@app.command()
def serve(run: Folder, port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1.")] = 8000) -> None:
    """Print the line that starts an OpenAI-compatible server on the GGUF of a run, for this machine alone."""
    from .chat import serve as tell

    tell(Run.open(run), port)


def redo(folder: Path, *stages: object) -> None:
    """Run stages of a run folder whether or not they are done."""
    run = locked(folder)
    for stage in stages:
        stage.again(run)


def locked(folder: Path) -> Run:
    """A run folder that is there, kept for this process."""
    run = Run.open(folder)
    with storage_errors(run.folder):
        lock(run.folder)
    return run


def main() -> None:
    """The commands, and how they end."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # the converter is a process forked off after tokenisers ran
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # threads that spin while waiting slow each other on shared cores
    try:
        app(prog_name="autosloth")  # as its completion is called, `python -m autosloth` too
    except Interrupted as error:
        print(f"\nautosloth: {error.what}\n  {error.todo}", file=sys.stderr)
        sys.exit(130)
    except AutoSlothError as error:
        fail(error.what, error.todo)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            print(f"\n{INTERRUPTED}", file=sys.stderr)
        raise
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="autosloth-error-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        fail(
            f"An unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            f"Finished stages are kept; please report it with {log.name}.",
        )


def fail(what: str, todo: str) -> None:
    """Say what is wrong and what to do, and end with exit code 1."""
    print(f"autosloth: {what}" + (f"\n  {todo}" if todo else ""), file=sys.stderr)
    sys.exit(1)
