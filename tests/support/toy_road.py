"""A road of four small stages, by the run folder's own machinery: what the tests of a run folder follow."""

import errno

from autosloth import run as runs
from autosloth.run import Run, stage
from autosloth.settings import SFTSettings


def content(run):
    file = run.folder.with_name("d.json")
    return file.read_text() if file.is_file() else "nothing"


@stage("data", reads=("model", "dataset"), inputs=content, facts=("data",), outputs=("data/rows",), sets_aside=True)
def data(run):
    run.fresh("data").joinpath("rows").write_text(content(run))
    run.record("data", rows=content(run))


@stage("train", reads=("learning_rate",), after=("data",), facts=("train",), outputs=("adapter",), scratch=("checkpoints",), sets_aside=True)  # fmt: skip
def train(run):
    run.path("checkpoints").mkdir(exist_ok=True)
    run.path("checkpoints", "step").touch()
    if run.settings.learning_rate == NEVER_ENDS:
        raise KeyboardInterrupt
    run.fresh("adapter").joinpath("weights").write_text(str(run.settings.learning_rate))
    run.record("train", rate=run.settings.learning_rate)


@stage("gguf", reads=("quantizations",), after=("train",), facts=("export",), outputs=("gguf",), replaces=True)
def gguf(run):
    with run.replaced("gguf") as folder:
        folder.joinpath("file").write_text(run.path("adapter", "weights").read_text())
        if run.settings.quantizations == ["f16"] and run.path("full").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
    run.record("export", kinds=run.settings.quantizations)


@stage("card", after=("train", "gguf"), outputs=("publish",))
def card(run):
    run.fresh("publish").joinpath("README.md").write_text("a card")
    runs.clear_before(run)


NEVER_ENDS = 0.05


def settings_of(folder, road=SFTSettings, **values):
    return road(**{"model": "m", "dataset": "d.json", "run_name": "mine", "storage": str(folder), "learning_rate": 1e-3} | values)  # fmt: skip


def follow(settings, *stages):
    run = Run.create(settings)
    for each in stages or (data, train, gguf, card):
        each(run)
    return run
