"""Everything that can be known to be wrong before training, all at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .clean import Findings, load_chats
from .errors import AutoSlothError, ModelError, StorageError
from .fetch import ask_for, hub_api, is_offline
from .hub import refuse_foreign_token
from .load import look_up
from .model import WEIGHT_FILES, is_quantized, model_errors, sixteen_bit_model
from .recognise import recognise_columns
from .run import GB, existing_parent, say
from .settings import SFTSettings, is_hub_id

CPU_LIMIT_GB = 3.0  # weights beyond which training without a GPU would take days
Q8_0_SHARE = 34 / 64  # bytes of Q8_0 per byte of 16-bit weights: 32 weights and a scale in 34 bytes
SPARE_GB = 0.5  # checkpoints, data and what else a run leaves


class Problems(AutoSlothError):
    """Several problems at once, each in its two sentences."""

    def __init__(self, problems: list[AutoSlothError]):
        self.problems = problems
        super().__init__("\n".join(f"{problem.what}\n  {problem.todo}" for problem in problems))


def check(settings: SFTSettings) -> None:
    """Look for every problem that can be known before training. Raises Problems."""
    checks: list[Callable[[SFTSettings], object]] = [check_storage, check_dataset, check_model, check_publishing]
    problems = []
    for look in checks:
        try:
            look(settings)
        except AutoSlothError as problem:
            problems.append(problem)
    if problems:
        raise Problems(problems)
    say("check: no problem found")


def check_storage(settings: SFTSettings) -> None:
    """Whether files can be made where the run folder will be. Raises StorageError."""
    above, todo = existing_parent(settings.folder), "Set `storage` to a folder that you may write to."
    if not above.is_dir():
        raise StorageError(f"The run folder {settings.folder} cannot be made: {above} is a file.", todo)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise StorageError(f"The run folder {settings.folder} cannot be made ({error.strerror}).", todo) from None


def check_dataset(settings: SFTSettings) -> None:
    """Whether the dataset is there, recognised and enough to be split; of a Hub dataset no row is fetched. Raises DataError."""
    if not is_hub_id(settings.dataset):
        load_chats(settings, Findings())
    elif columns := look_up(settings):
        recognise_columns(columns, settings.columns, settings.dataset)


def check_model(settings: SFTSettings) -> None:
    """Whether the model is there, the hardware is enough to train it and the disk to export it. Raises ModelError, StorageError."""
    if settings.model == "demo" or (is_offline() and is_hub_id(settings.model)):
        return
    size = weights_gb(settings.model, settings.revision)
    if size > CPU_LIMIT_GB and not shutil.which("nvidia-smi"):
        raise ModelError(
            f"{settings.model} has {size:.1f} GB of weights, and there is no GPU to train it on.",
            "On Colab choose Runtime > Change runtime type > T4 GPU; elsewhere use a machine with an NVIDIA GPU, or a smaller model.",
        )
    check_disk(settings, size)


def weights_gb(source: str, revision: str | None = None) -> float:
    """The size of a model's safetensors files in GB. Raises ModelError when there are none, or no such model."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    elif is_hub_id(source):
        ask_for("model", source)
        with model_errors(source):
            sizes = {
                file.rfilename: file.size or 0
                for file in hub_api().model_info(source, revision=revision, files_metadata=True).siblings
            }
    else:
        raise ModelError(
            f"The model folder {source} does not exist.",
            "Give a Hub id such as `unsloth/mistral-7b-bnb-4bit`, or a folder.",
        )
    weights = [size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name]
    if "config.json" not in sizes or not weights:
        raise ModelError(
            f"{source} is no model in the transformers format with safetensors weights.",
            f"Give one that has {WEIGHT_FILES[2]} and {WEIGHT_FILES[0]}.",
        )
    return sum(weights) / GB


def check_disk(settings: SFTSettings, base_gb: float) -> None:
    """Whether the run folder's disk holds what export will write (the Hub's cache is counted in). Raises StorageError."""
    sixteen, quantized = base_gb, False
    if settings.quantizations or settings.merged:
        quantized = is_quantized(settings.model, settings.revision)
        if quantized or settings.sixteen_bit_model:
            sixteen = weights_gb(sixteen_bit_model(settings)[0])
    download = 0 if Path(settings.model).expanduser().is_dir() else base_gb
    download += sixteen if quantized else 0
    needed = download + sixteen * (Q8_0_SHARE * len(settings.quantizations) + settings.merged) + SPARE_GB
    free = shutil.disk_usage(existing_parent(settings.folder)).free / GB
    if free < needed:
        raise StorageError(
            f"The run needs about {needed:.1f} GB of disk, and {free:.1f} GB are free at {settings.storage}.",
            "Free some space, set `storage` to another disk, or switch `merged` off.",
        )


def check_publishing(settings: SFTSettings) -> None:
    """Whether there is a token that may write, when the run is to be published. Raises HubError."""
    if not settings.publish_to_hub:
        return
    refuse_foreign_token(settings)
