"""Settings come from defaults, a file, the environment and --set, in this order; what is wrong is named."""

import json

import pytest
import yaml

from autosloth.errors import SettingsError
from autosloth.settings import DPOSettings, SFTSettings, SPINSettings
from autosloth.values import is_hub_id, parse_value


def test_the_defaults_are_the_reference_run():
    settings = SFTSettings()
    assert (settings.model, settings.dataset) == ("unsloth/mistral-7b-bnb-4bit", "yahma/alpaca-cleaned")
    assert (settings.batch_size, settings.rows_per_step, settings.lora_r, settings.max_length) == ("auto", 8, 16, 2048)
    assert settings.load_in_4bit and not settings.publish_to_hub
    assert settings.run_name == "mistral-7b-alpaca-cleaned-sft"


@pytest.mark.parametrize(
    "road, given, passes, at_once",
    [
        (SFTSettings, {"batch_size": 2}, 4, 2),  # the reference run's
        (SFTSettings, {"batch_size": 3}, 2, 3),
        (SFTSettings, {"batch_size": 32}, 1, 32),
        (SFTSettings, {"batch_size": 4, "gradient_accumulation": 4}, 4, 4),
        (SFTSettings, {"gradient_accumulation": 9}, 9, 1),
        (SFTSettings, {"model": "demo", "batch_size": 4}, 4, 4),
        (DPOSettings, {}, 16, 2),
        (DPOSettings, {"batch_size": "auto", "gradient_accumulation": 32}, 32, 2),
        (SPINSettings, {"batch_size": 4}, 4, 4),
        (SPINSettings, {"preset": "paper"}, 8, 8),
        (SPINSettings, {"preset": "paper", "batch_size": 2}, 32, 2),
        (SPINSettings, {"preset": "paper", "batch_size": "auto"}, 64, 2),
        (DPOSettings, {"model": "demo", "batch_size": "auto"}, 16, 2),
        (SFTSettings, {"batch_size": "2"}, 4, 2),
        (SFTSettings, {"batch_size": 4.0}, 2, 4),
        (SFTSettings, {"batch_size": 2, "gradient_accumulation": 8}, 8, 2),
        (SFTSettings, {"model": "demo", "batch_size": "auto", "gradient_accumulation": 8}, 8, 2),
    ],
)
def test_a_step_learns_from_as_many_rows_whatever_the_batch_unless_told_otherwise(road, given, passes, at_once):
    settings = road(**given)
    assert (settings.gradient_accumulation, settings.rows_at_once) == (passes, at_once)
    assert settings.rows_per_step == passes * (1 if settings.batch_size == "auto" else settings.batch_size)
    assert road.load(settings.model_dump()) == settings
    assert road.load(yaml.safe_load(settings.to_yaml(changes_only=True))) == settings


def test_the_batch_is_free_where_it_changes_nothing_but_the_speed():
    assert SFTSettings().is_batch_free and DPOSettings().is_batch_free
    assert not SFTSettings(batch_size=2).is_batch_free and not DPOSettings(sft_weight=0.5).is_batch_free


def test_every_setting_says_what_it_is_for_and_where_it_belongs():
    for name, field in SFTSettings.model_fields.items():
        assert field.description.endswith("."), name
        assert field.json_schema_extra["group"] in {"Model", "Data", "Training", "Export", "Publish"}, name


def test_the_demo_model_brings_defaults_that_suit_it_and_given_values_win():
    settings = SFTSettings.load({"model": "demo", "max_steps": 7})
    assert settings.batch_size == SFTSettings.DEMO_DEFAULTS["batch_size"]
    assert settings.max_steps == 7


@pytest.mark.parametrize("name, write", [("s.yaml", yaml.safe_dump), ("s.json", json.dumps)])
def test_a_file_is_read_and_what_is_written_is_read_back_equal(tmp_path, name, write):
    path = tmp_path / name
    path.write_text(write({"learning_rate": 1e-4, "columns": {"frage": "prompt"}, "quantizations": ["Q8_0"]}))
    settings = SFTSettings.load(path)
    assert (settings.learning_rate, settings.columns, settings.quantizations) == (1e-4, {"frage": "prompt"}, ["q8_0"])
    path.write_text(settings.to_yaml())
    assert SFTSettings.load(path) == settings


def test_only_what_differs_from_the_defaults_is_shown_when_asked_for():
    shown = yaml.safe_load(SFTSettings(lora_r=8).to_yaml(changes_only=True))
    assert shown == {"lora_r": 8}


def test_a_later_source_wins_over_an_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "s.yaml"
    path.write_text("lora_r: 8\nseed: 1\nbatch_size: 3\n")
    monkeypatch.setenv("AUTOSLOTH_SEED", "2")
    monkeypatch.setenv("AUTOSLOTH_BATCH_SIZE", "4")
    settings = SFTSettings.load(path, overrides={"batch_size": 5})
    assert (settings.lora_alpha, settings.lora_r, settings.seed, settings.batch_size) == (16, 8, 2, 5)


@pytest.mark.parametrize(
    "given, wrong, allowed",
    [
        ({"batch_size": 0}, "`batch_size` is 0", "at least 1"),
        ({"batch_size": True}, "`batch_size` is", "a whole number, or auto"),
        ({"batch_size": "alto"}, "`batch_size` is", "a whole number, or auto"),
        ({"learning_rate": "fast"}, '`learning_rate` is "fast"', "it should be a number"),
        ({"scheduler": "zigzag"}, '`scheduler` is "zigzag"', "'linear', 'cosine'"),
        ({"columns": {"a": "b"}}, '`columns.a` is "b"', "'instruction'"),
        ({"quantizations": ["q3"]}, '`quantizations` is "q3"', "'q8_0'"),
        ({"run_name": "a/b"}, '`run_name` is "a/b"', "letters without accents, digits"),
        ({"eval_fraction": 0.9}, "`eval_fraction` is 0.9", "at most 0.5"),
        ({"batchsize": 4}, "`batchsize` is not a setting", "did you mean `batch_size`?"),
        (
            {"rounds": 3, "epoch": 1},
            "`rounds` is a setting of `autosloth spin`, not of `autosloth sft`; `epoch` is not a setting",
            "did you mean `epochs`?",
        ),
        ({"eval_steps": -1}, "`eval_steps` is -1", "at least 0"),
        (
            {"eval_steps": 0, "patience": 2},
            "patience counts measurements of the held-out loss",
            "set eval_steps to `auto` or a number",
        ),
        (
            {"metric": "number", "eval_answers": 0},
            "metric scores held-out answers, and eval_answers is 0",
            "set it to how many",
        ),
        ({"report_to": "tensorbord"}, '`report_to` is "tensorbord"', "'tensorboard', 'trackio', 'wandb' or 'mlflow'"),
        ({"token": "hf_x"}, "`token` is not a setting: settings are kept in files", ""),
    ],
)
def test_an_error_names_the_field_what_was_given_and_what_is_allowed(given, wrong, allowed):
    with pytest.raises(SettingsError) as error:
        SFTSettings.load(given)
    assert wrong in error.value.what and allowed in error.value.what
    assert error.value.todo.endswith(".")


def test_one_name_is_a_list_of_one(tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text("quantizations: Q4_K_M\nmodules_to_save: lm_head\n")
    monkeypatch.setenv("AUTOSLOTH_TARGET_MODULES", "q_proj")
    settings = SFTSettings.load(tmp_path / "s.yaml")
    assert settings.quantizations == ["q4_k_m"] and settings.modules_to_save == ["lm_head"]
    assert settings.target_modules == ["q_proj"]
    monkeypatch.setenv("AUTOSLOTH_MODULES_TO_SAVE", "embed_tokens")
    settings = SFTSettings.load(tmp_path / "s.yaml", {"quantizations": "adapter"})
    assert settings.quantizations == ["adapter"] and settings.modules_to_save == ["embed_tokens"]
    with pytest.raises(SettingsError, match=r"`quantizations` is \"q9\", but it should be 'q8_0'"):
        SFTSettings.load({"quantizations": "q9"})


@pytest.mark.parametrize(
    "given, read",
    [
        ({"frage": "prompt", "antwort": "completion"}, {"frage": "prompt", "antwort": "completion"}),
        ({"prompt": "frage", "completion": "antwort"}, {"frage": "prompt", "antwort": "completion"}),
        ({"question": "frage", "antwort": "answer"}, {"frage": "prompt", "antwort": "completion"}),
        (
            {"prompt": "text", "text": "completion"},
            {"prompt": "text", "text": "completion"},
        ),  # both are meanings: as it stands
    ],
)
def test_columns_are_taken_either_way_round(given, read):
    assert SFTSettings.load({"columns": given}).columns == read


def test_one_column_has_one_meaning():
    with pytest.raises(SettingsError, match="gives one column two meanings"):
        SFTSettings.load({"columns": {"prompt": "frage", "completion": "frage"}})


@pytest.mark.parametrize("given, wrong", [({"lora_r": "many"}, "a whole number"), ({"merged": "perhaps"}, "true or false"), ({"quantizations": 3}, "a list"), ({"model": 3}, "text"), ({"columns": 3}, "a mapping"), ({"repo": "a/b/c"}, "`name` or `owner/name`"), ({"beta": 0}, "greater than 0")])  # fmt: skip
def test_what_is_allowed_is_told_in_words(given, wrong):
    road = DPOSettings if "beta" in given else SFTSettings
    with pytest.raises(SettingsError, match=f"it should be {wrong}"):
        road.load(given)


def test_an_error_says_where_the_value_came_from(tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text("lora_r: 0\n")
    monkeypatch.setenv("AUTOSLOTH_SEED", "-1")
    with pytest.raises(SettingsError) as error:
        SFTSettings.load(tmp_path / "s.yaml", overrides={"learning_rate": "abc"})
    for place in (f"`lora_r` in {tmp_path}/s.yaml", "`seed` in the environment variable AUTOSLOTH_SEED", "`learning_rate` in `--set learning_rate=...`"):  # fmt: skip
        assert place in error.value.todo


def test_a_misspelt_environment_variable_is_refused(monkeypatch):
    monkeypatch.setenv("AUTOSLOTH_BETA", "0.2")  # of another road
    SFTSettings.load({})
    monkeypatch.setenv("AUTOSLOTH_MODLE", "demo")
    with pytest.raises(SettingsError, match=r"`AUTOSLOTH_MODLE` is not an environment variable of AutoSloth .did you mean `AUTOSLOTH_MODEL`"):  # fmt: skip
        SFTSettings.load({})


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(SettingsError, match=r"`lora_r` is 0.*`seed` is -1"):
        SFTSettings.load({"lora_r": 0, "seed": -1})


@pytest.mark.parametrize(
    "content, what",
    [
        (None, "does not exist"),
        ("batch_size: [", "is not valid YAML at line 1"),
        ("- 1\n", "holds a list, not settings"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_settings_file_is_named(tmp_path, content, what):
    path = tmp_path / "s.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match=what):
        SFTSettings.load(path)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("yahma/alpaca-cleaned", True),
        ("squad", True),
        ("demo", False),
        ("data/rows.jsonl", False),
        ("./rows", False),
        ("/data/rows", False),
        ("~/rows", False),
        ("a/b/c", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(name, expected):
    assert is_hub_id(name) is expected


@pytest.mark.parametrize(
    "given, words",
    [
        ([], "give at least one dataset"),
        ([{"share": 1}], "`dataset.0.path` is missing: give a Hub id or a path"),
        ([{"path": "a", "share": 2}], "`dataset.0.share` is 2, but it should be at most 1"),
        ([{"path": "a", "weight": 2}], "a dataset of several takes `path`, `share`, `split` and `columns`"),
        ("", "it should not be empty"),
        (3, "it should be text"),
    ],
)
def test_a_mixture_that_is_none_is_told_in_words(given, words):
    with pytest.raises(SettingsError) as error:
        SFTSettings.load({"model": "demo", "dataset": given})
    assert words in error.value.what and "[Part]" not in error.value.what


@pytest.mark.parametrize(
    "given, words",
    [
        ({"columns": {"a": {"b": "c"}}}, "`columns.a` is"),
        ({"quantizations": [["q8_0"]]}, "`quantizations"),
        ({"storage": "~nobody-of-this-name/x"}, "there is no such user"),
        ({"dataset": "x" * 300}, "at most 255 bytes"),
        ({"road": "nope"}, "`road` is 'nope'"),
    ],
)
def test_values_of_odd_kinds_are_told_in_words(given, words):
    with pytest.raises(SettingsError) as error:
        SFTSettings.load({"model": "demo"} | given)
    assert words in error.value.what, error.value.what


def test_what_looks_like_a_date_is_text_and_a_name_given_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOSLOTH_RUN_NAME", "2024-02-30")
    assert SFTSettings.load({"model": "demo"}).run_name == "2024-02-30"
    (tmp_path / "twice.yaml").write_text("model: demo\nseed: 1\nseed: 2\n")
    with pytest.raises(SettingsError, match="`seed` stands there twice"):
        SFTSettings.load(tmp_path / "twice.yaml")


@pytest.mark.parametrize(
    "given, meant",
    [
        ({"prompt": "question", "completion": "answer"}, {"question": "prompt", "answer": "completion"}),
        ({"instruction": "question", "output": "answer"}, {"question": "instruction", "answer": "completion"}),
        ({"question": "prompt", "answer": "completion"}, {"question": "prompt", "answer": "completion"}),
        ({"query": "question", "reply": "answer"}, {"query": "prompt", "reply": "completion"}),
        ({"prompt": "title", "completion": "text"}, {"title": "prompt", "text": "completion"}),
        ({"answer": "completion"}, {"answer": "completion"}),
        ({"completion": "answer"}, {"answer": "completion"}),
    ],
)
def test_columns_are_turned_as_a_whole_where_names_are_common_ones(given, meant):
    assert SFTSettings.load({"model": "demo", "columns": given}).columns == meant


def test_an_empty_name_of_a_run_is_made_up():
    assert SFTSettings.load({"model": "demo", "dataset": "demo", "run_name": None, "repo": None}).run_name == "demo-sft"


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_steps: true", '`max_steps` is "true", but it should be a whole number'),
        ("learning_rate: yes", '`learning_rate` is "true", but it should be a number'),
        ("last_beta: on", '`last_beta` is "true", but it should be a number'),
        ("max_steps: 1:30", '`max_steps` is "1:30", but it should be a whole number'),
        ("learning_rate: 1:30.5", '`learning_rate` is "1:30.5", but it should be a number'),
        ("dataset: [{path: a, share: true}]", '`dataset.0.share` is "true", but it should be a number'),
    ],
)
def test_what_is_no_number_is_taken_for_none(tmp_path, text, words):
    (tmp_path / "s.yaml").write_text(f"model: demo\n{text}\n")
    with pytest.raises(SettingsError) as error:
        SPINSettings.load(tmp_path / "s.yaml")
    assert words in error.value.what, error.value.what
    assert SPINSettings.load({"max_steps": "010", "merged": "yes", "stop_early": 0}).max_steps == 10


def test_a_variable_in_small_letters_is_told_as_the_same_one_in_capitals(monkeypatch):
    monkeypatch.setenv("AUTOSLOTH_max_steps", "3")
    with pytest.raises(SettingsError, match="did you mean `AUTOSLOTH_MAX_STEPS`"):
        SFTSettings.load({})


@pytest.mark.parametrize("given", [{"promt": "question"}, {"promt": "frage"}, {"completion": "a", "promt": "question"}])
def test_a_misspelt_meaning_is_not_taken_for_a_column(given):
    other = given["promt"]
    told = rf"`promt` is not a meaning .did you mean `prompt`.*; write {{{other}: prompt}}, or {{promt: prompt}}"
    with pytest.raises(SettingsError, match=told):
        SFTSettings.load({"columns": given})
    for column in ("promt", "inputs", "prompt_2"):
        assert SFTSettings.load({"columns": {column: "prompt"}}).columns == {column: "prompt"}
    assert SFTSettings.load({"columns": {"inputs": "question"}}).columns == {"inputs": "prompt"}


def test_what_counts_for_nothing_is_said():
    idle = SFTSettings(epochs=30, scheduler_cycles=9).reasons()
    assert [line.split(" does not count, as ")[0] for line in idle] == ["epochs: 30", "scheduler_cycles: 9"]
    assert SFTSettings(epochs=30, max_steps=0, scheduler="cosine_with_restarts", scheduler_cycles=9).reasons() == []


def test_a_value_that_holds_itself_is_a_named_problem(tmp_path):
    (tmp_path / "round.yaml").write_text("columns: &a {x: prompt, y: *a}\n")
    with pytest.raises(SettingsError, match=r"round\.yaml holds a value that cannot be read"):
        SFTSettings.load(tmp_path / "round.yaml")
    with pytest.raises(SettingsError, match="`columns` is"):
        SFTSettings.load(overrides={"columns": parse_value("&a {x: prompt, y: *a}")})
