"""The run folder: settings, facts (all that was measured), one mark for each finished stage. Stages meet here and nowhere else."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .distributed import first, of_first, part
from .errors import AutoSlothError, Interrupted, SettingsError, StorageError
from .hardware import GB
from .hub_copy import bring_back, keep
from .output import duration, say
from .settings import ROADS, Settings

STAGES = (
    "data",
    "train",
    "publish_adapter",
    "merge",
    "gguf",
    "verify",
    "card",
    "publish",
)  # of every road, in their order
COPIED = ("data", "train")  # stages whose end the copy on the Hub is to have
LISTS = ("rounds", "scores", "benchmarks")  # of the facts, which are mappings else
GGUF_FOLDER = "publish-GGUF"  # what goes into the repository of the GGUF files
# There only after a training began.
TRAINED = ("adapter", "checkpoints", "rounds", "merged", "gguf", "publish", GGUF_FOLDER)
LONGEST_NAME = 95  # characters of a run's name
TENSORBOARD = "tensorboard"  # what it shows of the training
# What a training and the stages after it leave; whatever else lies there is the user's. Of these what can be made again from the adapter.
FOLLOWS = (*TRAINED, "reference", "verify", TENSORBOARD)
REMADE = tuple(name for name in FOLLOWS if name not in ("adapter", "reference", TENSORBOARD))
UNCLEARED = ".uncleared"  # in a run before: what can be made again is still there
HUSK = {"settings.json", "facts.json", ".done", UNCLEARED}  # all that a run before has where nothing was moved there
BEFORE = "before"  # of a run folder: where what was trained there goes when it is trained anew
MOVING = ".moving.json"  # in a run: what is being moved to before/, until all of it is there
HALF_WRITTEN = ".partial"  # the end of a temporary file's or folder's name, which a kill leaves behind
MARKED = ("fingerprint", "result", "settings", "files")  # what the mark of a finished stage tells
BEGUN = ("fingerprint", "settings", "after", "number")  # what is kept of a stage that was begun
HASHED = ("data", "adapter", "reference", "merged")  # of what a stage leaves: what others build on and no proof reads
# How a full disk is told: by the system and safetensors; by torch 2.13's writer of archives, in two ways.
FULL = ("No space left on device", "iostream error", "unexpected pos ")
LOCKS: dict[Path, FileLock] = {}  # held until the process ends

_waits: dict[str, float] = {}  # what the stage at work waited for -> seconds


def cache_dir() -> Path:
    """Where things that every run may share are kept (demo base, converter): $AUTOSLOTH_CACHE or ~/.cache/autosloth."""
    return Path(os.environ.get("AUTOSLOTH_CACHE") or Path.home() / ".cache" / "autosloth")


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=HALF_WRITTEN)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_text` for JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def fingerprint(content: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache
def _hashed(path: Path, size: int, changed: int) -> str:
    return file_hash(path)


def known_hash(path: Path) -> str:
    """`file_hash`, which a process reads once of a file that stays as it is."""
    told = path.stat()
    return _hashed(path, told.st_size, told.st_mtime_ns)


class Run:
    """The run folder and what is in it; see the contract in the README for the names. Of several processes the first writes the facts."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings

    @classmethod
    def create(cls, settings: Settings) -> Run:
        """Make the run folder, or take the one that is there (see `changes`). Raises SettingsError, StorageError.

        settings.json tells what lies in the folder: a stage that begins writes it, and here it is written where there is none.
        """
        run = cls(settings.folder, settings)
        if not first():
            return run
        if settings.hub_checkpoints:
            with storage_errors(run.folder):
                run.folder.mkdir(parents=True, exist_ok=True)
                lock(run.folder)
                bring_back(settings)
        changes(settings)
        with storage_errors(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            lock(run.folder)
            for left in [*run.folder.rglob(f".*{HALF_WRITTEN}")]:
                remove(left)
            move_aside(run)
            if not read_json(run.path("settings.json")):
                run.write_settings()
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run folder that is there already. Raises SettingsError when it is none."""
        folder = Path(folder).expanduser()
        path = folder / "settings.json"
        if not (values := read_json(path)):
            raise SettingsError(
                f"{folder} is not a run folder: it has no settings.json.",
                "Give the folder that the run printed, for example runs/my-run.",
            )
        road = ROADS.get(values.get("road", "sft"))
        if road is None:
            raise SettingsError(
                f"{path} is of a run of `autosloth {values['road']}`, which this AutoSloth does not know.",
                "Install the version that made it, or a newer one.",
            )
        return cls(folder, road.from_values(values, str(path)))

    def write_settings(self) -> None:
        """Write settings.json."""
        write_json(self.path("settings.json"), {"road": self.settings.road, **self.settings.model_dump()})

    def path(self, *parts: str) -> Path:
        """A path in the run folder."""
        return self.folder.joinpath(*parts)

    @property
    def is_trained(self) -> bool:
        """Whether there is a training here, finished or not."""
        return any(self.path(name).is_dir() and any(self.path(name).iterdir()) for name in TRAINED)

    @property
    def facts(self) -> dict[str, Any]:
        """Everything measured so far, by stage; what is there in another form (a list in place of a mapping) was not measured."""
        told = read_json(self.path("facts.json"))
        return {name: value for name, value in told.items() if isinstance(value, list if name in LISTS else dict)}

    def record(self, stage: str, **facts: Any) -> None:
        """Add measured facts under a stage's name; facts already there stay unless named again."""
        self._write_facts(lambda every: every | {stage: {**every.get(stage, {}), **facts}})

    def put(self, name: str, facts: list[dict[str, Any]]) -> None:
        """Keep a list of measured facts under this name, in place of the one that was there."""
        self._write_facts(lambda every: every | {name: facts})

    def forget(self, *stages: str) -> None:
        """Drop the facts of stages that are about to be measured anew."""
        self._write_facts(lambda every: {key: value for key, value in every.items() if key not in stages})

    def _write_facts(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        if first():
            write_json(self.path("facts.json"), change(self.facts))

    def mark(self, stage: str) -> dict[str, Any] | None:
        """The mark of a finished stage, or None."""
        return read_json(self.path(".done", f"{stage}.json"), MARKED) or None

    def failure(self, stage: str) -> AutoSlothError | None:
        """What a stage failed with when it was run last; None where it did not fail."""
        told = read_json(failure_note(self, stage), ("what", "todo"))
        return AutoSlothError(told["what"], told["todo"]) if told and self.mark(stage) is None else None

    def lost(self, stage: str) -> list[str]:
        """The files of a finished stage that are not there any more, by their path in the run, and its facts, such as `facts.json: eval.before.loss`."""
        files = [name for name in (self.mark(stage) or {}).get("files", {}) if not self.path(name).is_file()]
        return files + [f"facts.json: {name}" for name in self.lost_facts(stage)]

    def lost_facts(self, stage: str) -> list[str]:
        """The names of what a finished stage measured that facts.json does not tell any more, or in another form."""
        now = names_in(self.facts)
        return [name for name, form in (self.mark(stage) or {}).get("facts", {}).items() if now.get(name) != form]

    def command(self, stage: str) -> str:
        """The command that makes again what a stage left."""
        own = {"merge": "export", "gguf": "export", "verify": "verify", "card": "card"}.get(stage)
        words = [own, self.folder] if own else [self.settings.road, self.path("settings.json")]
        if not own and self.settings.folder.resolve() != self.folder.resolve():  # it was moved, or lies in before/
            words += ["--set", f"storage={self.folder.parent}", "--set", f"run_name={self.folder.name}"]
        return f"`autosloth {shlex.join(map(str, words))}`"

    def begun(self) -> dict[str, dict[str, Any]]:
        """By stage, in the order in which they were first begun: `settings` that it was last begun with, and the stages that come before it (`after`)."""
        told = {path.stem: read_json(path, BEGUN) for path in self.path(".done", "begun").glob("*.json")}
        return dict(sorted(told.items(), key=lambda item: item[1]["number"]))

    def rows(self, name: str) -> Any:
        """The rows of data/<name>.parquet as a `datasets.Dataset`: `messages`, `input_ids`, `labels`."""
        from datasets import Dataset

        return Dataset.from_parquet(str(self.path("data", f"{name}.parquet")), keep_in_memory=True)

    def fresh(self, name: str) -> Path:
        """An empty folder of this name in the run."""
        remove(out_of_the_way(self.path(name)))
        self.path(name).mkdir(parents=True)
        return self.path(name)

    @contextlib.contextmanager
    def replaced(self, name: str) -> Iterator[Path]:
        """An empty folder, which takes the place of the one of this name when the block has ended: until then, and if it fails, that one stays."""
        new = self.fresh(f".{name}{HALF_WRITTEN}")
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        old = out_of_the_way(self.path(name))
        new.rename(self.path(name))
        remove(old)


def names_in(facts: Any, above: str = "") -> dict[str, str]:
    """The names in facts, nested, with the form of what each tells; of a list how long it is, and the names that all of its entries have.

    >>> names_in({"eval": {"before": {"loss": 2.5}}, "rounds": [{"steps": 3, "stopped": "no gain"}, {"steps": 2}]})
    {'eval': 'dict', 'eval.before': 'dict', 'eval.before.loss': 'number', 'rounds': '2 in a list', 'rounds.*': 'dict', 'rounds.*.steps': 'number'}
    """
    form = "number" if type(facts) in (int, float) else f"{len(facts)} in a list" if isinstance(facts, list) else type(facts).__name__  # fmt: skip
    found = {above: form} if above else {}
    if isinstance(facts, dict):
        for name, value in facts.items():
            found |= names_in(value, f"{above}.{name}" if above else name)
    if isinstance(facts, list) and facts:
        first, *others = (names_in(each, f"{above}.*").items() for each in facts)
        found |= {name: form for name, form in first if all((name, form) in other for other in others)}
    return found


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        return shutil.rmtree(path)
    path.unlink(missing_ok=True)


def out_of_the_way(path: Path) -> Path:
    """Rename what is there, if anything is, to a name that the next start clears, so that a kill leaves no half of it; the new path."""
    old = path.with_name(f".{path.name}-old{HALF_WRITTEN}")
    remove(old)
    if path.exists() or path.is_symlink():
        os.replace(path, old)
    return old


def move(path: Path, to: Path) -> None:
    """Move a folder, to another disk too. Killed and done again it ends the same: a copy gets its name when it is whole."""
    if not to.exists():
        try:
            os.rename(path, to)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy = to.with_name(f".{to.name}{HALF_WRITTEN}")
            remove(copy)
            shutil.copytree(path, copy, copy_function=copy_through)
            os.replace(copy, to)
    remove(path)


def copy_through(source: str, target: str) -> None:
    """Copy a file; it is on the disk when this returns, as far as the disk tells the truth."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def lock(folder: Path) -> None:
    """Keep the run folder for this process until it ends. Raises StorageError when another one has it."""
    held = LOCKS.setdefault(folder.resolve(), FileLock(folder / ".lock"))
    try:
        held.is_locked or held.acquire(timeout=0)
    except Timeout:
        raise StorageError(
            f"Another process is working in {folder}.", "Wait for it, stop it, or choose another `run_name`."
        ) from None


def read_json(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON file's mapping; empty when there is no such file. Raises StorageError when it is damaged, or lacks a name that is needed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError, IsADirectoryError):
        content = None
    if not isinstance(content, dict) or not set(needed) <= content.keys():
        raise StorageError(
            f"{path} is {'a folder' if path.is_dir() else 'damaged'}.",
            "Move it away and run `autosloth sft`, `dpo` or `spin` again with the settings of the run: what it told is written anew.",
        )
    return content


class storage_errors:
    """Turn an error of the disk in the block into a StorageError that says what to do."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, AutoSlothError):
            return
        number, name = getattr(error, "errno", None), getattr(error, "filename", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in FULL):
            place = existing_parent(Path(name)) if isinstance(name, str) and name else self.folder
            place = self.folder if on_one_disk(place, self.folder) else place
            free = shutil.disk_usage(existing_parent(place)).free / GB
            raise StorageError(
                f"No space is left for {place} ({free:.1f} GB free).",
                "Free some space or set `storage` (TMPDIR for temporary files, HF_HOME for what is downloaded) to another disk, then run again: finished stages are kept.",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StorageError(
                f"{getattr(error, 'filename', None) or self.folder} cannot be written ({os.strerror(number)}).",
                "Make it writable, or set `storage` (or HF_HOME for what is downloaded) to a folder that is.",
            ) from error


def on_one_disk(*paths: Path) -> bool:
    """Whether these paths, or what there is of them, lie on the same disk."""
    return len({existing_parent(path).stat().st_dev for path in paths}) == 1


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def changes(settings: Settings, *stages: Callable) -> str | None:
    """What changed of the run that is in the folder of these settings, and what is done again for it; None where nothing is.

    stages: those whose inputs, such as the content of local files, are looked at too. Raises SettingsError when a training of another road, model or dataset is there: it is another run.
    """
    run, now = Run(settings.folder, settings), json.loads(json.dumps(settings.model_dump() | {"road": settings.road}))
    begun, old = run.begun(), {"road": read_json(settings.folder / "settings.json").get("road", settings.road)}
    for each in begun.values():
        old |= each["settings"]
    changed = {name: value for name, value in old.items() if now.get(name) != value}
    refuse_other_run(run, changed, now)
    if not run.is_trained:
        return None
    told = [f"{name} {value} -> {now[name]}" for name, value in changed.items()]
    inputs = {stage.stage: stage.inputs for stage in stages}
    again: list[str] = []
    anew: set[str] = set()  # of other settings or inputs: a training is set aside for it
    others: set[str] = set()  # those that leave other files, which others follow from
    for name, each in begun.items():  # in the order of the road
        if "inputs" in each and name in inputs and fingerprint(inputs[name](run)) != each["inputs"]:
            told.append(f"the content of what `{name}` reads changed")
            anew.add(name)
        if changed.keys() & each["settings"].keys() or anew & set(each["after"]):
            anew.add(name)
        elif lost := run.lost(name):
            told.append(f"{lost[0]} is missing")
        if name in anew or lost_or_follows(run, name, each, others):
            again.append(name)
            others |= {name} if name in anew or not each.get("steady") else set()
    if not again:
        return None
    kept = f"; what is there goes to {run.path(BEFORE)}, where its adapter, figures and card stay" if "train" in anew else ""  # fmt: skip
    return f"run: {', '.join(told)}: {', '.join(again)} again{kept}"


def refuse_other_run(run: Run, changed: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises SettingsError where the folder holds a training of another road, model or dataset, or is the adapter that is to be trained further.

    changed: the settings that were others, with what they were; now: all settings as they are.
    """
    free = f"Set `run_name` to a name that is free, for example `{free_name(run.folder)}`."
    if run.is_trained and (other := [name for name in ("road", "model", "dataset") if name in changed]):
        was, wanted = changed[other[0]], now[other[0]]
        raise SettingsError(f"{run.folder} holds a training of another {other[0]}: {was}, not {wanted}.", free)
    adapter = run.settings.adapter
    if adapter and Path(adapter).expanduser().resolve() in [run.folder.resolve(), run.path("adapter").resolve()]:
        raise SettingsError(f"`adapter` is {adapter}, the run that is to be trained: it would be moved away before it is read.", free)  # fmt: skip


def lost_or_follows(run: Run, name: str, begun: dict[str, Any], others: set[str]) -> bool:
    """Whether a finished stage has lost files, or follows from one that leaves others."""
    return bool(run.lost(name) or others & set(begun["after"]))


def free_name(folder: Path) -> str:
    """A run name beside this one that no folder has, and that is short enough to be taken."""
    names = (f"{folder.name[: LONGEST_NAME - len(f'-{n}')]}-{n}" for n in itertools.count(2))
    return next(name for name in names if not folder.with_name(name).exists())


def set_aside(run: Run, after: Iterable[str]) -> None:
    """Move all that followed from these stages into a run folder of its own, before/<time>, which `clear_before` makes small."""
    settings = read_json(run.path("settings.json"))
    for each in run.begun().values():
        settings |= each["settings"]
    name = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S-%f")
    write_json(run.path(MOVING), {"to": name, "settings": settings, "after": list(after)})
    move_aside(run)


def move_aside(run: Run) -> None:
    """Do what `set_aside` has noted, or the rest of it after a kill."""
    if not (noted := read_json(run.path(MOVING), ("to", "settings", "after"))):
        return
    aside, after = run.path(BEFORE, noted["to"]), noted["after"]
    if not aside.exists():
        half = aside.with_name(f".{aside.name}{HALF_WRITTEN}")
        remove(half)
        write_json(half / "settings.json", noted["settings"])
        write_json(half / "facts.json", run.facts)
        run.path(".done").mkdir(exist_ok=True)  # somebody may have deleted it
        shutil.copytree(run.path(".done"), half / ".done")
        (half / UNCLEARED).touch()
        os.replace(half, aside)
    for path in (run.path(name) for name in FOLLOWS):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
        elif path.exists():
            move(path, aside / path.name)
    run.forget(*run.facts.keys() - set(after))
    for path in run.path(".done").rglob("*.json"):
        if path.stem not in after:
            path.unlink()
    run.path(MOVING).unlink()
    say(f"run: what was here is in {aside}")


def clear_before(run: Run) -> None:
    """Delete what can be made again of the runs before, once, now that this one is whole; their adapters, facts and cards stay.

    What a stage made there since is the user's: `begin_stage` takes the note away that it is to be cleared.
    """
    for folder in (note.parent for note in run.path(BEFORE).glob(f"*/{UNCLEARED}")):
        if (folder / "publish" / "README.md").is_file():
            (folder / "publish" / "README.md").rename(folder / "README.md")
        for name in REMADE if (folder / ".done" / "train.json").is_file() else ():  # else the adapter is not whole
            remove(out_of_the_way(folder / name))
        if {path.name for path in folder.iterdir()} == HUSK:
            remove(out_of_the_way(folder))
        else:
            (folder / UNCLEARED).unlink()


def stage(
    name: str,
    reads: Iterable[str] = (),
    after: Iterable[str] = (),
    inputs: Callable[[Run], Any] | None = None,
    result: Callable[[Run], Any] | None = None,
    facts: Iterable[str] = (),
    outputs: Iterable[str] = (),
    scratch: Iterable[str] = (),
    prepares: Callable[[Run], Any] | None = None,
    together: bool = False,
    sets_aside: bool = False,
    replaces: bool = False,
) -> Callable:
    """Decorate `f(run)` so that it is skipped when it is done already.

    reads: the settings that change its result; after: the stages whose results it reads; inputs: what
    else it reads, as anything JSON can hold. The mark, written last, carries a fingerprint of all three.
    result: what tells one result from another; without it every new one makes later stages run again.
    facts, outputs (files or folders): what the stage leaves in the run, without which it is not done, every name in the facts too; scratch: what it works in.
    prepares: work that can fail and touches nothing of the run, done before anything is dropped; what it gives is handed to f.
    All three are dropped when it starts anew from other inputs; sets_aside: a training, and what followed from it, is not, but kept (`set_aside`);
    replaces: outputs stay until f has put whole new ones in their place (`Run.replaced`).
    together: of several processes all take part, once the first has begun it; a stage without it is the first's alone.
    """

    def decorate(function: Callable[[Run], None]) -> Callable[[Run], None]:
        def again(run: Run) -> None:
            """Run the stage even when it is done."""
            if not first():
                return function(run) if of_first(lambda: True) else part()
            with storage_errors(run.folder):
                wanted = stage_fingerprint(run, name, reads, after, inputs)
                _waits.clear()
                started, earlier = time.perf_counter(), run.mark(name)
                try:
                    made = [prepares(run)] if prepares else []
                    more = {"inputs": fingerprint(inputs(run) if inputs else None), "steady": result is not None}
                    begin_stage(run, name, wanted, reads, after, facts, scratch if replaces else [*outputs, *scratch], sets_aside, more)  # fmt: skip
                    if together:
                        of_first(lambda: True)
                    function(run, *made)
                except Exception as error:
                    note_failure(run, name, error)
                    raise
                except KeyboardInterrupt:
                    todo = "Run the same again: finished stages are skipped, and a training goes on from its last checkpoint."
                    raise Interrupted(f"Stopped in the stage `{name}`.", todo) from None
                mark = {"fingerprint": wanted, "result": fingerprint(result(run) if result else time.time_ns())}
                if result is None or (earlier and earlier["result"] != mark["result"]):
                    void_followers(run, name)
                end_stage(run, name, mark, reads, facts, outputs, time.perf_counter() - started)

        @functools.wraps(function)
        def run_stage(run: Run) -> None:
            if not first():
                return again(run)
            with storage_errors(run.folder):
                mark, wanted = run.mark(name), stage_fingerprint(run, name, reads, after, inputs)
                whole = mark and mark["files"] == file_sizes(run, outputs) and not run.lost_facts(name)
                whole = whole and not altered(run, name, HASHED)
                if whole and mark["fingerprint"] == wanted:
                    if together:
                        of_first(lambda: False)
                        part()
                    return say(f"{name}: done already, skipped")
            again(run)

        run_stage.again, run_stage.together, run_stage.stage, run_stage.inputs = again, together, name, inputs
        return run_stage

    return decorate


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """The seconds in the block are not counted as the stage's own: it says besides how long it waited, and for what."""
    started = time.perf_counter()
    try:
        yield
    finally:
        _waits[what] = _waits.get(what, 0.0) + time.perf_counter() - started


def stage_fingerprint(
    run: Run, name: str, reads: Iterable[str], after: Iterable[str], inputs: Callable[[Run], Any] | None
) -> str:
    """What a stage would read now, hashed. Raises SettingsError when a stage that it needs is not done, or its files are gone.

    A setting that the AutoSloth did not have by which the stage was begun tells nothing while it is at its default: what was done stays done.
    """
    before = {}
    for earlier in after:
        mark = run.mark(earlier)
        if mark is None:
            raise not_finished(run, earlier)
        refuse_lost(run, earlier, run.lost(earlier))
        refuse_altered(run, earlier)
        before[earlier] = mark["result"]
    for earlier in all_before(run, after):
        refuse_lost_facts(run, earlier)
    refuse_other_settings(run, after)
    more, begun = inputs(run) if inputs else None, run.begun().get(name, {})
    now_set, fields = chosen_settings(run, reads), type(run.settings).model_fields
    known = begun.get("settings", now_set)
    new = [each for each in now_set if each not in known and now_set[each] == fields[each].get_default(call_default_factory=True)]  # fmt: skip
    of_then = fingerprint([{each: value for each, value in now_set.items() if each not in new}, before, more])
    return of_then if of_then == begun.get("fingerprint") else fingerprint([now_set, before, more])


def refuse_lost(run: Run, stage: str, lost: list[str]) -> None:
    """Raises SettingsError where any of what a stage left is lost."""
    if lost:
        raise SettingsError(
            f"{run.path(lost[0])} is missing, which the stage `{stage}` wrote.",
            f"Run {run.command(stage)}: it is made again.",
        )


def refuse_lost_facts(run: Run, stage: str) -> None:
    """Raises SettingsError where facts.json does not tell any more what a finished stage measured: who reads it would fail, or be told something else."""
    refuse_lost(run, stage, [f"facts.json: {name}" for name in run.lost_facts(stage)])


def all_before(run: Run, stages: Iterable[str]) -> list[str]:
    """These stages, and those that came before any of them."""
    begun, found = run.begun(), [*stages]
    for earlier in found:  # which grows
        found += [name for name in begun.get(earlier, {"after": []})["after"] if name not in found]
    return found


def not_finished(run: Run, stage: str) -> SettingsError:
    """What to tell where a stage is needed that is not done: why it failed, if it did."""
    if failed := run.failure(stage):
        return SettingsError(f"The stage `{stage}` of {run.folder} failed: {failed.what}", failed.todo)
    return SettingsError(f"The stage `{stage}` of {run.folder} is not finished.", f"Run {run.command(stage)} first.")


def note_failure(run: Run, stage: str, error: Exception) -> None:
    """Keep what a stage failed with, for `show` and for the stages that need it; not where one that was done stays as it was."""
    if isinstance(error, Interrupted) or run.mark(stage) is not None:
        return
    told = (
        error
        if isinstance(error, AutoSlothError)
        else AutoSlothError(
            f"An unexpected {type(error).__name__}.", "Run it again; if it fails again, please report it."
        )
    )
    with contextlib.suppress(OSError):  # a full disk may be what it failed with
        write_json(failure_note(run, stage), {"what": told.what, "todo": told.todo})


def failure_note(run: Run, stage: str) -> Path:
    """Where `note_failure` keeps what it is told."""
    return run.path(".done", "failed", f"{stage}.json")


def refuse_altered(run: Run, stage: str, kinds: Iterable[str] = HASHED) -> None:
    """Raises StorageError when a file of these kinds that a stage left is another one now: not the one that was measured."""
    if found := altered(run, stage, kinds):
        raise StorageError(
            f"{run.path(found[0])} {found[1]} when the stage `{stage}` was done: it is another file.",
            f"Run {run.command(stage)}: it is made again.",
        )


def altered(run: Run, stage: str, kinds: Iterable[str]) -> tuple[str, str] | None:
    """The first file of these kinds that is not as a stage left it, by its path in the run, and how: cut, or with other bytes, which a disk that lost some gives as zeros."""
    mark = run.mark(stage) or {"files": {}}
    for name, size in mark["files"].items():
        path, known = run.path(name), mark.get("hashes", {}).get(name)
        if Path(name).parts[0] not in kinds:
            continue
        now = path.stat().st_size if path.is_file() else 0
        if now != size:
            return name, f"has {now:,} bytes, and had {size:,}"
        if known and known_hash(path) != known:
            return name, "has another content than"
    return None


def refuse_other_settings(run: Run, stages: Iterable[str]) -> None:
    """Raises SettingsError when one of these stages, or one that came before it, was done with other settings than the run has now."""
    begun = run.begun()
    for earlier in all_before(run, stages):
        told = begun.get(earlier, {"settings": {}})["settings"]
        now_set = json.loads(json.dumps(chosen_settings(run, told)))
        if changed := [field for field, value in told.items() if now_set.get(field) != value]:
            raise SettingsError(
                f"The stage `{earlier}` of {run.folder} was done with other settings ({', '.join(changed)}).",
                f"Run `autosloth {run.settings.road}` to the end, or set them back.",
            )


def chosen_settings(run: Run, names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names, as far as this road has them."""
    return {name: getattr(run.settings, name) for name in names if name in type(run.settings).model_fields}


def file_sizes(run: Run, outputs: Iterable[str]) -> dict[str, int]:
    """These files of the run, and those in these folders, by their path in it, in bytes."""
    found = (path for output in outputs for path in (run.path(output), *sorted(run.path(output).rglob("*"))))
    return {path.relative_to(run.folder).as_posix(): path.stat().st_size for path in found if path.is_file()}


def begin_stage(
    run: Run, name: str, wanted: str, reads: Iterable[str], after: Iterable[str], facts: Iterable[str], outputs: Iterable[str], sets_aside: bool, more: dict[str, Any]
) -> None:  # fmt: skip
    """Take back the old mark, and what the stage left when it was begun with other inputs."""
    same = run.begun().get(name, {}).get("fingerprint") == wanted
    if sets_aside and not same and run.is_trained:
        set_aside(run, after)
    run.write_settings()
    if lost := run.lost_facts(name):
        say(f"{name}: `facts.json` does not tell {lost[0]} any more: it is measured again")
        run.forget(*{fact.partition(".")[0] for fact in lost})  # else the rest would pass for measured
    run.path(UNCLEARED).unlink(missing_ok=True)
    run.path(".done", f"{name}.json").unlink(missing_ok=True)
    failure_note(run, name).unlink(missing_ok=True)
    if same:
        return
    run.forget(*facts)
    for path in map(run.path, outputs):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    begun = run.begun()
    number = begun.get(name, {}).get("number", len(begun))
    told = {
        "fingerprint": wanted,
        "settings": chosen_settings(run, reads),
        "after": list(after),
        "number": number,
        **more,
    }
    write_json(run.path(".done", "begun", f"{name}.json"), told)


def void_followers(run: Run, name: str) -> None:
    """Take back the marks of the stages that read what this one has made anew: what they tell is of what was there before."""
    void, begun = [name], run.begun()
    for each, told in begun.items():  # in the order of the road
        if set(told["after"]) & set(void):
            void.append(each)
            run.path(".done", f"{each}.json").unlink(missing_ok=True)
            failure_note(run, each).unlink(missing_ok=True)


def end_stage(
    run: Run,
    name: str,
    mark: dict[str, Any],
    reads: Iterable[str],
    facts: Iterable[str],
    outputs: Iterable[str],
    seconds: float,
) -> None:
    """Write the mark: with what the stage was done, what it left and measured, its own seconds, and when."""
    waited = ", ".join(f"{duration(span)} for {what}" for what, span in _waits.items())
    seconds -= sum(_waits.values())
    mark |= {"seconds": round(seconds, 2), "settings": chosen_settings(run, reads), "files": file_sizes(run, outputs)}
    mark["hashes"] = {name: known_hash(run.path(name)) for name in mark["files"] if Path(name).parts[0] in HASHED}
    mark["facts"] = names_in({fact: told for fact, told in run.facts.items() if fact in {name, *facts}})
    write_json(run.path(".done", f"{name}.json"), mark | {"finished": now()})
    say(f"{name}: done in {seconds:.1f} s" + (f", besides {waited}" if waited else ""))
    if name in COPIED:
        keep(run.settings, wait=True)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
