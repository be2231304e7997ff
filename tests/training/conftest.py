"""Trainings of a few steps, without the road around them."""

import functools

import pytest
from support.small_memory import small_memory

from autosloth.data.stage import prepare_data
from autosloth.notebook.live import Interruption, progress_callback
from autosloth.run import Run
from autosloth.settings import DPOSettings, SFTSettings
from autosloth.training import dpo, train

ROADS = {"sft": (SFTSettings, train.make_trainer), "dpo": (DPOSettings, dpo.make_trainer)}
ROADS["uneven"] = ROADS["dpo"]  # on pairs of which some are many times as long as others


@pytest.fixture(scope="module")
def rows_of(engine, base, tmp_path_factory):
    """A function from a road to a few of the demo's rows for it."""

    @functools.cache
    def prepared(road):
        run = Run.create(ROADS[road][0](model="demo", dataset="demo", storage=str(tmp_path_factory.mktemp(road))))
        prepare_data(run)
        rows = run.rows("train").select(range(64))
        return rows.map(longer, with_indices=True) if road == "uneven" else rows

    return prepared


def longer(pair, number):
    """A pair whose better answer is up to nine times as long."""
    return {"chosen_ids": pair["chosen_ids"] * (1 + (number * 5) % 9)}


@pytest.fixture
def training(rows_of, tmp_path):
    """training("name", rows=, from_step=, **settings) -> (run, trainer) of a few steps; rows: how many the memory holds, from a step on."""

    def start(name, rows=1000, from_step=0, road="sft", **values):
        few = {"max_steps": 4, "save_steps": 2, "storage": str(tmp_path), "run_name": name, "warmup": 1}
        settings, make = ROADS[road]
        run = Run.create(settings(model="demo", dataset="demo", **{**few, **values}))
        model, tokenizer = train.load_model(run.settings), train.load_tokenizer(run.settings)
        trainer = make(run, model, tokenizer, rows_of(road), rows_of(road), [progress_callback(Interruption())])
        small_memory(trainer, rows, from_step)
        train.go_on(run, trainer)
        return run, trainer

    start.storage = tmp_path
    return start
