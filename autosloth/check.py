"""Every problem that can be known before training, all at once."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .data import FORMS_OF, Findings, look_through, look_up, prepare_data, recognise_columns, refuse_full_disk
from .errors import AutoSlothError, ExportError, ModelError, StorageError
from .export import (
    adapter_alone,
    refuse_unconvertible,
    refuse_unknown_architecture,
    refuse_unreadable,
    size_in_bases,
)
from .hardware import GB
from .hub_client import is_offline
from .hub_copy import check_copy
from .models import (
    adapter_config,
    check_memory,
    check_template,
    growth,
    is_quantized,
    layers_line,
    model_source,
    planned_layers,
    refuse_without_gpu,
    refuse_without_vllm,
    shard_sizes,
    sixteen_bit_model,
    small_files,
    starting_adapter,
    stored_as,
    tokens_without_embedding,
    weights_gb,
)
from .notebook import DRIVE, drive_folder, place
from .output import say, show_box
from .proof import compare_weights
from .publish import refuse_foreign_token
from .run import changes, existing_parent
from .settings import ROADS, Settings
from .training import check_trackers
from .values import is_hub_id
from .weights import SPARE_GB, cache_folder, same_disk


class Problems(AutoSlothError):
    """Several problems at once, each in its two sentences."""

    def __init__(self, problems: list[AutoSlothError]):
        self.problems = problems
        super().__init__("\n".join(f"{problem.what}\n  {problem.todo}" for problem in problems))


def check(settings: Settings, setting_up: bool = False) -> Findings:
    """Look for every problem that can be known before training; setting_up: a GPU may come later. What was found in rows on this disk. Raises Problems."""
    found = Findings()
    checks: list[Callable[[Settings], object]] = [
        check_run,
        check_storage,
        partial(check_dataset, found=found),
        check_model,
        check_tokenizer,
        check_original,
        check_memory,
        check_template,
        starting_adapter,
    ]
    problems = []
    for look in [
        *checks,
        check_architecture,
        check_layers,
        check_vocabulary,
        check_publishing,
        check_trackers,
        partial(check_gpu, setting_up=setting_up),
    ]:
        try:
            look(settings)
        except AutoSlothError as problem:
            problems.append(problem)
    problems = list({problem.what: problem for problem in problems}.values())
    if problems:
        raise Problems(problems)
    rows = "pairs" if settings.road != "sft" else "packed rows" if settings.packing else "rows"
    say(
        f"check: no problem found; a step learns from {settings.rows_per_step} {rows} (`batch_size` {settings.batch_size}, `gradient_accumulation` {settings.gradient_accumulation})"
    )
    return found


def main(request: dict[str, Any]) -> dict[str, list]:
    """For a process of its own, beside the form: what `check` says, a line each, and the problems, in two sentences each.

    request: the `road`, and the `values` of its settings.
    """
    said, problems = io.StringIO(), []
    with contextlib.redirect_stdout(said):
        try:
            check(ROADS[request["road"]](**request["values"]))
        except Problems as error:
            problems = error.problems
        except AutoSlothError as error:
            problems = [error]
    return {"said": said.getvalue().splitlines(), "problems": [[problem.what, problem.todo] for problem in problems]}


def check_run(settings: Settings) -> None:
    """Whether the run folder is free for these settings; says what changed of the run that is there. Raises SettingsError, StorageError."""
    if told := changes(settings, prepare_data):
        say(told)


def check_storage(settings: Settings) -> None:
    """Whether files can be made where the run folder will be. Raises StorageError."""
    if place() == "colab" and settings.folder.is_relative_to(DRIVE) and drive_folder() is None:
        raise StorageError(
            f"`storage` is {settings.storage}, and Google Drive is not mounted.",
            "Run the form cell again and give leave, or set `storage` to `runs`, which lasts as long as this runtime.",
        )
    above, todo = existing_parent(settings.folder), "Set `storage` to a folder that you may write to."
    if not above.is_dir():
        raise StorageError(f"The run folder {settings.folder} cannot be made: {above} is a file.", todo)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise StorageError(f"The run folder {settings.folder} cannot be made ({error.strerror}).", todo) from None


def check_dataset(settings: Settings, found: Findings) -> None:
    """Whether the dataset is there, recognised and enough to be split; of a Hub dataset no row is fetched. Raises DataError, StorageError."""
    refuse_full_disk(settings)
    on_hub = [settings.of_part(part) for part in settings.parts if is_hub_id(part["path"])]
    for alone in on_hub:
        if columns := look_up(alone):
            recognise_columns(columns, alone.columns, alone.dataset, FORMS_OF[alone.road])
    if local := [part for part in settings.parts if not is_hub_id(part["path"])]:
        here = settings if not on_hub else settings.model_copy(update={"dataset": local})
        look_through(here, found, alone=not on_hub)


def check_model(settings: Settings) -> None:
    """Whether the model is there, and the disk is enough to export it. Raises ModelError, StorageError."""
    if settings.model == "demo" or (is_offline() and is_hub_id(settings.model)):
        return
    check_disk(settings)


def check_original(settings: Settings) -> None:
    """Whether the weights that the adapter will be merged into are there, in a form that is read here; in a folder, by their headers too. Raises ModelError, ExportError."""
    name = settings.sixteen_bit_model or settings.model
    asked = settings.quantizations or settings.merged
    if not asked or name == "demo" or (is_offline() and is_hub_id(name)):
        return
    revision = None if settings.sixteen_bit_model else settings.revision
    try:
        weights_gb(name, revision)
    except ModelError:
        if not settings.sixteen_bit_model:
            return  # of which `check_model` tells
        raise
    if not is_quantized(name, revision):
        refuse_unreadable(name)
    elif settings.sixteen_bit_model:
        raise ModelError(
            f"The weights of {name} are stored as {stored_as(name)}, which is not unpacked here.",
            "Name a 16-bit model as `sixteen_bit_model`.",
        )


def check_architecture(settings: Settings) -> None:
    """Whether llama.cpp's converter takes the model, when a GGUF is asked for; of a model that cannot be read `check_model` tells. Raises ExportError."""
    if not settings.quantizations or settings.model == "demo" or (is_offline() and is_hub_id(settings.model)):
        return
    with contextlib.suppress(ModelError):
        weights_gb(settings.model, settings.revision)
        config = small_files(model_source(settings), settings.revision) / "config.json"
        if config.is_file():
            refuse_unknown_architecture(json.loads(config.read_text(encoding="utf-8")), settings.model)
            if settings.quantizations != ["adapter"]:
                check_tokenizer(settings)
                refuse_unconvertible(settings)


def check_layers(settings: Settings) -> None:
    """Whether LoRA reaches the layers that the settings ask for; says which these are. Raises ModelError."""
    if settings.model == "demo" or (is_offline() and any(map(is_hub_id, filter(None, (settings.model, settings.adapter))))):  # fmt: skip
        return
    try:
        weights_gb(settings.model, settings.revision)
        starting_adapter(settings)
    except ModelError:
        return  # which is told already
    alone = "adapter" in settings.quantizations
    with tempfile.TemporaryDirectory(prefix="autosloth-") as folder:
        layers = planned_layers(settings, Path(folder) if alone else None)
        say(f"check: LoRA trains {layers_line(layers)}")
        if alone:
            refuse_adapter_alone(settings, layers, Path(folder))


def refuse_adapter_alone(settings: Settings, layers: dict[str, dict[str, int]], stand_in: Path) -> None:
    """Raises ExportError for an adapter that a GGUF of its own cannot hold; layers, stand_in: as `planned_layers` tells and makes them."""
    shape = adapter_config(starting_adapter(settings)) if settings.adapter else {"use_dora": settings.use_dora}
    held = [
        *(["DoRA"] if shape.get("use_dora") else []),
        *(kind for kind, count in layers.items() if count.get("whole")),
        *(kind for kind, count in layers.items() if count["trained"] and "experts." in kind and "shared" not in kind),
    ]
    if held:
        raise ExportError(
            f"A GGUF of the adapter alone cannot hold {held[0]}.",
            "Take `adapter` out of `quantizations`; the whole model can.",
        )
    with adapter_alone(settings, stand_in) as made:
        if made and (wrong := compare_weights(*made, stand_in)["failures"]):
            raise ExportError(
                f"llama.cpp's converter makes another adapter for {settings.model} than it is given ({wrong[0]}).",
                "Take `adapter` out of `quantizations`; a GGUF of the whole model can be made.",
            )


def check_vocabulary(settings: Settings) -> None:
    """Whether the model has an embedding for each of its tokenizer's tokens; says which have none."""
    if settings.model == "demo" or (is_offline() and is_hub_id(settings.model)):
        return
    with contextlib.suppress(ModelError):
        weights_gb(settings.model, settings.revision)
        missing = tokens_without_embedding(settings)
        if not missing:
            return
        say(f"check: {settings.model} has no embedding for {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}: rows that hold one are left out")  # fmt: skip


def check_tokenizer(settings: Settings) -> None:
    """Whether the model has a tokenizer. Raises ModelError."""
    if settings.model == "demo" or (is_offline() and is_hub_id(settings.model)):
        return
    try:
        weights_gb(settings.model, settings.revision)
    except ModelError:
        return  # of which `check_model` tells
    folder = small_files(model_source(settings), settings.revision)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            f"{settings.model} has no tokenizer.",
            "Put the files of the tokenizer that it was trained with beside its weights: tokenizer.json and tokenizer_config.json.",
        )


def check_gpu(settings: Settings, setting_up: bool) -> None:
    """Whether there is a GPU for a model that needs one: if not, said in a box while setting up. Raises ModelError otherwise."""
    try:
        refuse_without_gpu(settings)
        if settings.road == "spin":
            refuse_without_vllm(settings)
    except ModelError as problem:
        if not setting_up:
            raise
        show_box(
            problem.what, f"Checks and data need none and go on. To train: {problem.todo[0].lower()}{problem.todo[1:]}"
        )


def check_disk(settings: Settings) -> None:
    """Whether the disks hold the base, in the Hub's cache, and what export will write, in the run folder. Raises StorageError."""
    fetched, written, together = disk_needed(settings)
    cache, run = cache_folder(), existing_parent(settings.folder)
    if same_disk(cache, run):
        needed = {f"{settings.storage}": (run, together)}
    else:
        needed = {f"{settings.storage}": (run, written), f"{cache}, the Hub's cache,": (cache, fetched)}
    for name, (folder, size) in needed.items():
        size, free = size / GB + SPARE_GB, shutil.disk_usage(folder).free / GB
        if free < size:
            raise StorageError(
                f"The run needs about {size:.1f} GB of disk, and {free:.1f} GB are free at {name}.",
                "Free some space, set `storage` (or HF_HOME for what is downloaded) to another disk, switch `merged` off, or ask for less in `quantizations`: `adapter` is small.",
            )


def disk_needed(settings: Settings) -> tuple[float, float, float]:
    """The most bytes that a run has at once in the Hub's cache, in its folder, and in both, where it is as thrifty as it can.

    Of the 16-bit weights a shard at a time is enough (`streamed`), and what was trained on is deleted on the way if it is that.
    """
    trained = shard_sizes(settings.model, settings.revision)
    fetched = 0 if Path(settings.model).expanduser().is_dir() else sum(trained.values())
    if not settings.quantizations and not settings.merged:
        return fetched, 0, fetched
    source = sixteen_bit_model(settings)[0]
    separate = source != model_source(settings)
    shards = shard_sizes(source) if separate else trained
    written = sum(shards.values()) * growth(source, None if separate else settings.revision)
    written *= size_in_bases(settings.quantizations) + settings.merged
    shard = 0 if Path(source).expanduser().is_dir() else max(shards.values())
    if separate:
        return fetched + shard, written, fetched + shard + written
    return fetched, written, max(fetched, shard + written)


def check_publishing(settings: Settings) -> None:
    """Whether there is a token that may write, when the run is to be published or kept on the Hub, and which of folder and copy goes on. Raises HubError."""
    if not (settings.publish_to_hub or settings.hub_checkpoints):
        return
    refuse_foreign_token(settings)
    check_copy(settings)
