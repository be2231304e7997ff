"""What the roads share and where DPO has other defaults; its profile suits them to the GPU."""

import pytest

from autosloth import settings
from autosloth.errors import SettingsError
from autosloth.run import Run, read_json
from autosloth.settings import ROADS, DPOSettings, SFTSettings


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """gpu(name, mebibytes): a driver that names this GPU, or none."""

    def put(name=None, memory=0):
        settings.fitting_profile.cache_clear()
        if name:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{name}, {memory}'\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin")

    yield put
    settings.fitting_profile.cache_clear()


@pytest.mark.parametrize(
    "name, memory, profile, length, reason",
    [
        (None, 0, "t4", 512, "no GPU is here yet"),
        ("Tesla T4", 15360, "t4", 512, "Tesla T4 with 16 GB"),
        ("NVIDIA L4", 23034, "t4", 512, "NVIDIA L4 with 24 GB"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100", 1024, "NVIDIA A100-SXM4-40GB with 43 GB"),
    ],
)
def test_the_profile_follows_the_gpu_and_says_why(gpu, name, memory, profile, length, reason):
    gpu(name, memory)
    chosen = DPOSettings()
    assert (chosen.batch_size, chosen.max_length, chosen.precision) == ("auto", length, "auto")
    assert chosen.rows_per_step == 16
    (said,) = chosen.reasons()
    assert said.startswith(f"profile: {profile} ({reason}") and f"max_length {length}, " in said


def test_a_profile_that_is_named_counts_on_any_gpu_and_what_is_set_counts_more(gpu):
    gpu("NVIDIA A100-SXM4-40GB", 40960)
    chosen = DPOSettings(profile="t4", max_length=700)
    assert (chosen.rows_per_step, chosen.max_length, chosen.precision) == (16, 700, "float16")
    assert DPOSettings(profile="a100").precision == "bfloat16"


def test_a_run_keeps_what_it_was_given_when_it_goes_on_elsewhere(gpu, tmp_path):
    gpu("NVIDIA A100-SXM4-40GB", 40960)
    run = Run.create(DPOSettings(storage=str(tmp_path)))
    settings.fitting_profile.cache_clear()
    (tmp_path / "nvidia-smi").unlink()
    assert Run.open(run.folder).settings == run.settings and run.settings.max_length == 1024


def test_only_the_reference_dataset_brings_its_own_splits():
    assert (DPOSettings().split, DPOSettings().eval_split) == ("train_prefs", "test_prefs")
    mine = DPOSettings(dataset="mine.jsonl")
    assert (mine.split, mine.eval_split) == ("train", None)
    assert DPOSettings(split="test_prefs[:9]").split == "test_prefs[:9]"


def test_a_run_folder_knows_its_road_and_refuses_the_other(tmp_path):
    for road in ROADS.values():
        run = Run.create(road(model="demo", dataset="demo", storage=str(tmp_path)))
        opened = Run.open(run.folder)
        assert type(opened.settings) is road and opened.settings == run.settings
        assert road.load(run.folder / "settings.json") == run.settings
    with pytest.raises(SettingsError, match=r"settings are of `autosloth spin`.*Use `autosloth spin` for them"):
        SFTSettings.load(run.folder / "settings.json")
    content = read_json(run.folder / "settings.json") | {"road": "ppo"}
    (run.folder / "settings.json").write_text(str(content).replace("'", '"').replace("None", "null").replace("True", "true").replace("False", "false"))  # fmt: skip
    with pytest.raises(SettingsError, match="of a run of `autosloth ppo`"):
        Run.open(run.folder)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"label_smoothing": 0.1}, "label_smoothing counts for `loss: robust` only"),
        ({"label_smoothing": 0.1}, "Correct that in the settings."),
        ({"loss": "kto"}, "'sigmoid', 'hinge', 'ipo', 'robust', 'sppo_hard' or 'apo_zero'"),
        ({"beta": 0}, "greater than 0"),
        ({"profile": "h100"}, "'auto', 'a100' or 't4'"),
        ({"columns": {"a": "completion"}}, "'rejected' or 'ignore'"),
        ({"packing": True}, "`packing` is a setting of `autosloth sft`, not of `autosloth dpo`"),
        ({"precision": "int8"}, "'auto', 'bfloat16', 'float16' or 'float32'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(SettingsError) as error:
        DPOSettings.load(values)
    assert message in str(error.value), str(error.value)


def test_what_both_roads_have_is_declared_once():
    shared = set(settings.Settings.model_fields)
    assert shared < set(SFTSettings.model_fields) and shared < set(DPOSettings.model_fields)
    changed = {name for name in shared if DPOSettings.model_fields[name].default != SFTSettings.model_fields[name].default}  # fmt: skip
    assert {"model", "dataset", "lora_r", "learning_rate", "gradient_accumulation"} <= changed
    for name in shared - {"columns"}:
        assert DPOSettings.model_fields[name].description == SFTSettings.model_fields[name].description
