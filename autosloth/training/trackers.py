"""Trackers of experiments: what a training logs is also told to TensorBoard, Trackio, Weights & Biases or MLflow, by the callbacks of transformers.

Keys and addresses come from each tracker's own environment variables. A tracker that fails ends no training.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import shlex
from pathlib import Path
from typing import Any

from ..distributed import first
from ..errors import ModelError
from ..notebook import place
from ..output import counted, say
from ..run import TENSORBOARD, Run
from ..settings import Settings
from ..values import is_address, public_address, yaml_text

PROJECT = "autosloth"  # in which a tracker keeps the runs, where its environment variables name no other
FAILURES = 3  # after which a tracker is told nothing more


def check_trackers(settings: Settings) -> None:
    """Whether the trackers are installed, and none would wait for a key; says how TensorBoard is opened. Raises ModelError."""
    missing = [name for name in settings.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"`report_to` names {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            f"Run `pip install {' '.join(missing)}`, or take {'it' if len(missing) == 1 else 'them'} out of `report_to`.",
        )
    if "wandb" in settings.report_to and not has_wandb_key():
        raise ModelError(
            "Weights & Biases has no key here: it would wait for one in the middle of the run.",
            "Set WANDB_API_KEY in the environment, or WANDB_MODE=offline, or run `wandb login`.",
        )
    if "tensorboard" in settings.report_to:
        folder = shlex.quote(str(settings.folder / TENSORBOARD))
        lines = ["%load_ext tensorboard", f"%tensorboard --logdir {folder}"]
        how = " and ".join(f"`{line}`" for line in lines) + " in a cell before the training's" if place() == "colab" else f"`tensorboard --logdir {folder}`"  # fmt: skip
        say(f"check: TensorBoard shows the training by {how}")


def has_wandb_key() -> bool:
    """Whether Weights & Biases finds a key, or needs none."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):  # where `wandb login` keeps it
        try:
            if netrc.netrc(Path(path).expanduser()).authenticators(host.partition(":")[0]):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def trackers(run: Run, trainer: Any) -> list[Any]:
    """A trainer callback for each tracker of the settings, given the run's name and settings; of several processes the first tells."""
    if not (run.settings.report_to and first()):
        return []
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    part = part_of(Path(trainer.args.output_dir), run.folder)
    trainer.args.run_name, trainer.args.project = "-".join(filter(None, (run.settings.run_name, part))), PROJECT
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.setdefault(variable, PROJECT)
    folder = run.path(TENSORBOARD, *filter(None, [part]))
    return [telling(name, INTEGRATION_TO_CALLBACK[name], run.settings, folder) for name in run.settings.report_to]


def part_of(checkpoints: Path, run: Path) -> str:
    """Which training of a run it is that keeps its checkpoints here; empty where there is but one.

    >>> part_of(Path("runs/a/rounds/0/checkpoints"), Path("runs/a")), part_of(Path("runs/a/rounds/sft"), Path("runs/a"))
    ('round-1', 'sft')
    >>> part_of(Path("runs/a/checkpoints"), Path("runs/a"))
    ''
    """
    names = [name for name in checkpoints.relative_to(run).parts if name not in ("rounds", "checkpoints")]
    return "-".join(f"round-{int(name) + 1}" if name.isdigit() else name for name in names)


def telling(name: str, kind: type, settings: Settings, folder: Path) -> Any:
    """A trainer callback that hands what happens on to a tracker's own, while it trains; what fails there is said once and counted.

    What an error says is not shown: it may hold an address with a key in it.
    """
    from transformers import TrainerCallback

    class Telling(TrainerCallback):
        tracker, failures, given_up = None, 0, False

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.failures, self.given_up = 0, False
            self.tell("on_train_begin", args, state, control, **more)
            self.given_up = self.failures > 0  # without a beginning each step would wait for it again

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.tell("on_log", args, state, control, **more)

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.tell("on_save", args, state, control, **more)

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.tell("on_train_end", args, state, control, **more)
            if self.failures > 1:
                say(f"{name}: failed {counted(self.failures, 'time')}; not all of the training is there")
            self.tracker = None

        def tell(self, event: str, args: Any, state: Any, control: Any, **more: Any) -> None:
            if self.given_up or (self.tracker is None and event != "on_train_begin"):
                return
            try:
                if event == "on_train_begin":
                    self.tracker = kind()
                    if name == "tensorboard":
                        continue_curve(self.tracker, folder, state.global_step)
                getattr(self.tracker, event)(args, state, control, **more)
                if event == "on_train_begin":
                    tell_settings(name, self.tracker, settings)
            except Exception as error:  # whatever its client, the network or the disk has
                self.failures += 1
                self.given_up = self.failures >= FAILURES
                if self.failures == 1:
                    say(f"{name}: it was not told what was logged ({type(error).__name__}); the training goes on")

    return Telling()


def continue_curve(tracker: Any, folder: Path, step: int) -> None:
    """Let TensorBoard's callback write where it did before; what a run that was killed told of later steps is left out there."""
    from torch.utils.tensorboard import SummaryWriter

    tracker.logging_dir = str(folder)
    tracker.tb_writer = SummaryWriter(log_dir=str(folder), purge_step=step + 1)


def tell_settings(name: str, tracker: Any, settings: Settings) -> None:
    """Add the settings to what a tracker keeps of the run beside the arguments of the trainer."""
    told = public_settings(settings)
    if name == "tensorboard":
        tracker.tb_writer.add_text("settings", f"```yaml\n{yaml_text(told)}\n```")
    elif name == "wandb":
        tracker._wandb.config.update({"autosloth": told}, allow_val_change=True)
    elif name == "trackio":
        tracker._trackio.config["autosloth"] = told
    elif name == "mlflow":
        tracker._ml_flow.set_tags({f"autosloth.{field}": str(value) for field, value in told.items()})


def public_settings(settings: Settings) -> dict[str, Any]:
    """The settings as a tracker may know them: of an address no user and nothing behind `?`, which may be a key."""

    def public(value: Any) -> Any:
        if isinstance(value, list):
            return [public(each) for each in value]
        if isinstance(value, dict):
            return {field: public(each) for field, each in value.items()}
        return public_address(value) if isinstance(value, str) and is_address(value) else value

    return {"road": settings.road, **public(settings.model_dump())}
