"""The run folder: a stage tells its own time, and what it waited for besides."""

from autosloth import run as runs
from autosloth.run import Run, read_json, stage, waiting_for
from autosloth.settings import SFTSettings


def test_what_a_stage_waits_for_is_not_its_own_time(tmp_path, capsys, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: seconds[0])

    def work(span):
        seconds[0] += span

    @stage("busy")
    def busy(run):
        work(3)
        with waiting_for("llama.cpp to compile"):
            work(240)
        work(4)

    @stage("idle")
    def idle(run):
        work(1)

    run = Run.create(SFTSettings(model="demo", dataset="demo", storage=str(tmp_path)))
    busy(run)
    idle(run)
    said = capsys.readouterr().out.splitlines()
    assert said == ["busy: done in 7.0 s, besides 4 min for llama.cpp to compile", "idle: done in 1.0 s"]
    assert read_json(run.path(".done", "busy.json"))["seconds"] == 7
