"""A run that is killed before any change of a file ends, started again, as one that was never disturbed."""

import errno
import itertools
import os
import random
import select
import shutil
import signal
import subprocess
import sys

import pytest
from support.kills import Lives, held_by, killed_at, survive
from support.patience import HUNG
from support.toy_road import NEVER_ENDS, follow, gguf, settings_of

from autosloth.errors import Interrupted
from autosloth.run import Run
from autosloth.training import checkpoints

NEVER = 10**9


def first(folder):
    follow(settings_of(folder))


def anew(folder):
    follow(settings_of(folder, learning_rate=1e-4))


def other_rows(folder):
    (folder / "d.json").write_text("others")
    follow(settings_of(folder))


def other_file(folder):
    follow(settings_of(folder, quantizations=["f16"]))


def file_again(folder):
    gguf.again(Run.create(settings_of(folder)))
    follow(settings_of(folder))


def broken_off(folder):
    try:
        follow(settings_of(folder, learning_rate=NEVER_ENDS))
    except Interrupted:
        return


ROADS = {  # what was done before, and what is then killed
    "the first time": ([], first),
    "trained anew": ([first], anew),
    "of other rows": ([first], other_rows),
    "to another file": ([first], other_file),
    "the file again": ([first], file_again),
    "after one that was broken off": ([first, broken_off], anew),
    "back to what it was": ([first, anew], first),
}


def prepared(tmp_path, earlier):
    """The folder to work in, and a copy of it after this earlier work."""
    folder, kept = tmp_path / "here", tmp_path / "kept"
    folder.mkdir()
    for work in earlier:
        killed_at(NEVER, lambda work=work: work(folder))
    shutil.copytree(folder, kept)
    return folder, kept


def restore(folder, kept):
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)


@pytest.mark.parametrize("road", [road if road == "trained anew" else pytest.param(road, marks=pytest.mark.slow) for road in ROADS])  # fmt: skip
@pytest.mark.kill
def test_killed_before_any_change_it_ends_as_if_it_was_not(tmp_path, road, record_property):
    earlier, work = ROADS[road]
    folder, kept = prepared(tmp_path, earlier)
    killed_at(NEVER, lambda: work(folder))
    wanted = held_by(folder / "mine")
    for change in itertools.count():
        restore(folder, kept)
        if not killed_at(change, lambda: work(folder)):
            break
        killed_at(NEVER, lambda: work(folder))
        assert held_by(folder / "mine") == wanted, f"killed before change {change}"
    assert change > 50
    record_property("tried", change)


@pytest.mark.slow
@pytest.mark.kill
def test_killed_again_and_again_it_ends_as_if_it_was_not(tmp_path, record_property):
    folder, kept = prepared(tmp_path, [first])
    killed_at(NEVER, lambda: anew(folder))
    wanted, draw = held_by(folder / "mine"), random.Random(1)
    for _ in range(12):
        restore(folder, kept)
        changes = [draw.randrange(90) for _ in range(6)]
        for change in changes:
            killed_at(change, lambda: anew(folder))
        killed_at(NEVER, lambda: anew(folder))
        assert held_by(folder / "mine") == wanted, changes
    record_property("tried", 12 * 6)


@pytest.mark.slow
@pytest.mark.kill
def test_killed_while_it_is_trained_anew_and_set_back_nothing_is_mixed_up_or_lost(tmp_path, record_property):
    folder, kept = prepared(tmp_path, [first])
    for change in itertools.count():
        restore(folder, kept)
        ended = not killed_at(change, lambda: anew(folder))
        killed_at(NEVER, lambda: first(folder))
        runs = [Run.open(path.parent) for path in folder.glob("mine/**/settings.json")]
        trained = {run.path("adapter", "weights").read_text(): run for run in runs if run.mark("train")}
        assert set(trained) >= {"0.001"}, change
        for rate, run in trained.items():
            assert run.settings.learning_rate == run.facts["train"]["rate"] == float(rate), change
        now = Run.open(folder / "mine")
        assert now.path("adapter", "weights").read_text() == now.path("gguf", "file").read_text() == "0.001", change
        if ended:
            break
    record_property("tried", change)


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        (path / name).write_text(f"{name} of step {step}")
    return path


@pytest.mark.parametrize("far", [False, True], ids=["beside", "on another disk"])
@pytest.mark.kill
def test_killed_while_a_checkpoint_is_kept_all_that_are_there_are_whole(tmp_path, monkeypatch, far, record_property):
    def rename(old, new):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if far:
        monkeypatch.setattr("os.rename", rename)
    for change in itertools.count():
        kept = tmp_path / str(change) / "kept"
        for step in (8, 20):
            checkpoints.keep(checkpoint(tmp_path / str(change), step), kept, 2)
        newest = checkpoint(tmp_path / str(change), 100)
        killed = killed_at(change, lambda newest=newest, kept=kept: checkpoints.keep(newest, kept, 2))
        there = checkpoints.numbered(kept)
        assert [checkpoints.damage(path) for path in there] == [None] * len(there) and len(there) > 1
        if not killed:
            break
    assert [path.name for path in there] == ["checkpoint-20", "checkpoint-100"] and change > 5
    record_property("tried", change)


ENDLESS = """
import threading

def main(request):
    with open(request["pipe"], "w") as pipe:
        pipe.write("here")
        pipe.flush()
        threading.Event().wait()
"""


def test_what_was_started_apart_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    os.mkfifo(tmp_path / "pipe")
    code = f"from autosloth.child_process import run_apart; run_apart('endless', {{'pipe': {str(tmp_path / 'pipe')!r}}}, online=False)"
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    with open(tmp_path / "pipe", "rb", buffering=0) as pipe:
        assert pipe.read(4) == b"here"
        parent.kill()
        assert select.select([pipe], [], [], HUNG)[0] and pipe.read() == b""  # nobody can write to it any more
    assert parent.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("road, kills, processes", [("spin", 12, 1), ("dpo", 12, 1), ("sft", 30, 1), ("sft", 12, 2)])
@pytest.mark.kill
def test_killed_at_random_instants_a_road_ends_as_if_it_was_not(
    base, tmp_path, road, kills, processes, record_property
):
    with Lives() as live:
        found = survive(live, tmp_path / "runs", road, kills, seed=kills + processes, processes=processes)
    print(road, processes, found)
    record_property("tried", found["tried"])
    record_property("survived", found["survived"] if not found["differences"] else 0)
    assert not found["differences"] and found["survived"] == found["tried"] == kills
