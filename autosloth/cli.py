"""The commands: `autosloth sft`, `dpo`, `spin`, `check`, `export`, `verify`, `card`, `publish`, `show`, `chat`, `serve`. Exit codes: 0 done, 1 a named problem, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .errors import INTERRUPTED, AutoSlothError, Interrupted
from .run import Run, lock, storage_errors
from .settings import DPOSettings, Settings, SFTSettings, SPINSettings
from .values import in_words, parse_value, shown

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model, prove its GGUF, publish both.",
)
check_app = typer.Typer(no_args_is_help=True, help="Find every problem that can be known before training.")
app.add_typer(check_app, name="check")

File = Annotated[
    Path | None, typer.Argument(metavar="[SETTINGS.yaml]", help="Settings in YAML or JSON; without it the defaults.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be given several times.")
]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/my-run.")]


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


def settings_help(road: type[Settings]) -> str:
    """Every setting of a road with its default, its one-line help and what it takes, and the other sets of defaults, from the declaration."""
    schema = road.model_json_schema()["properties"]
    lines = []
    for name, field in road.model_fields.items():
        default = field.get_default(call_default_factory=True)
        told = "from model and dataset" if name == "run_name" else shown(default)
        takes = in_words(schema[name])
        lines.append(f"{name} ({told}): {field.description}" + (f" Takes {takes}." if takes else ""))
    for name, values in road.other_defaults().items():
        told = ", ".join(f"{field} {shown(value)}" for field, value in values.items())
        lines.append(f"With `{name}` the defaults are: {told}.")
    return escape("Settings, with their defaults:\n\n" + "\n\n".join(lines))  # a list is no markup


def load_settings(road: type[Settings], path: Path | None, pairs: list[str] | None) -> Settings:
    """The settings of a file and of `--set`; a pair without `=` is wrong usage."""
    overrides = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r} has no `=`; write --set key=value.", param_hint="--set")
        overrides[key.strip()] = parse_value(value)
    return road.load(path, overrides=overrides)


@app.command(epilog=settings_help(SFTSettings))
def sft(settings: File = None, set: Set = None) -> None:
    """Supervised fine-tuning, all of it: check, data, train, export, verify, card, publish. Run again, it goes on where it stood."""
    from .roads import follow

    follow(load_settings(SFTSettings, settings, set))


@app.command(epilog=settings_help(DPOSettings))
def dpo(settings: File = None, set: Set = None) -> None:
    """Preference tuning, all of it: check, data, train, export, verify, card, publish. Run again, it goes on where it stood."""
    from .roads import follow

    follow(load_settings(DPOSettings, settings, set))


@app.command(epilog=settings_help(SPINSettings))
def spin(settings: File = None, set: Set = None) -> None:
    """Self-play fine-tuning, all of it: check, data, rounds, export, verify, card, publish. Run again, it goes on where it stood."""
    from .roads import follow

    follow(load_settings(SPINSettings, settings, set))


@check_app.command("sft")
def check_sft(settings: File = None, set: Set = None) -> None:
    """Find every problem of a supervised run that can be known before training; exit code 1 if there is any."""
    check_alone(load_settings(SFTSettings, settings, set))


@check_app.command("dpo")
def check_dpo(settings: File = None, set: Set = None) -> None:
    """Find every problem of a preference run that can be known before training; exit code 1 if there is any."""
    check_alone(load_settings(DPOSettings, settings, set))


@check_app.command("spin")
def check_spin(settings: File = None, set: Set = None) -> None:
    """Find every problem of a self-play run that can be known before training; exit code 1 if there is any."""
    check_alone(load_settings(SPINSettings, settings, set))


def check_alone(settings: Settings) -> None:
    """Check, and say how the rows would be read. Raises Problems."""
    from .check import check
    from .data import report_readings

    report_readings(check(settings))


@app.command()
def export(run: Folder) -> None:
    """Write the merged model, if the settings ask for it, and the GGUF of a finished training again."""
    from .roads import EXPORT

    redo(run, *EXPORT)


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(metavar="RUN|FILE.gguf", help="A run folder, or any GGUF file.")],
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
        app()
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
