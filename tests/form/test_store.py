"""What was chosen in a form is never lost: the settings file, who wins over whom, damaged and outdated files."""

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autosloth.form import store as stores
from autosloth.form.store import Store, fields_of
from autosloth.settings import SFTSettings


@pytest.fixture
def path(tmp_path):
    return tmp_path / "form.yaml"


def opened(path):
    return Store(SFTSettings, path)


def test_without_a_file_it_stands_at_the_defaults_and_writes_none(path):
    assert opened(path).settings == SFTSettings() and not path.exists()


def test_the_file_is_what_the_command_takes(path):
    store = opened(path)
    store.choose("model", "me/base")
    store.choose("columns", {"frage: 1": "prompt"})
    store.choose("learning_rate", 1e-5)
    assert SFTSettings.load(path) == store.settings == SFTSettings(
        model="me/base", columns={"frage: 1": "prompt"}, learning_rate=1e-5
    )  # fmt: skip


VALUES = {
    "batch_size": st.integers(-3, 2000),
    "learning_rate": st.floats(allow_nan=False),
    "model": st.sampled_from(["demo", "me/base", "", "a b", "🦥 # x: y"]),
    "columns": st.dictionaries(st.text(max_size=5), st.sampled_from(["prompt", "completion", "nonsense"]), max_size=2),
    "quantizations": st.sampled_from([[], ["q8_0"], ["q9"]]),
    "private": st.booleans(),
    "revision": st.none() | st.text(max_size=5),
}


@given(st.lists(st.one_of([st.tuples(st.just(name), values) for name, values in VALUES.items()]), max_size=6))
@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_chosen_a_new_session_finds_what_was_right_of_it(tmp_path_factory, choices):
    path = tmp_path_factory.mktemp("store") / "form.yaml"
    store = opened(path)
    for name, value in choices:
        store.choose(name, value)
    again = opened(path)
    assert again.settings == store.settings and not again.problems
    assert again.chosen == {name: value for name, value in store.chosen.items() if name not in store.problems}
    assert len(again.notes) == len(store.problems)


def test_default_then_file_then_environment_then_changed_switch_then_widget(path, monkeypatch):
    path.write_text("seed: 1\nrepo: mine\n")
    assert opened(path).settings.seed == 1
    monkeypatch.setenv("AUTOSLOTH_SEED", "2")
    store = opened(path)
    assert (store.settings.seed, store.settings.repo) == (2, "mine")
    store.switch({"seed": 3})
    assert store.settings.seed == 3
    store.choose("seed", 4)
    assert store.settings.seed == 4
    store.switch({"seed": 3})  # stands as it stood: the widget's value stays
    assert store.settings.seed == 4


def test_a_switch_counts_when_it_stands_otherwise_than_last_time_in_another_session_too(path):
    opened(path).switch({"storage": "runs"})
    assert not path.exists()  # it says what the default says
    opened(path).switch({"storage": "elsewhere"})
    store = opened(path)
    store.switch({"storage": "elsewhere"})
    store.choose("storage", "typed")
    store = opened(path)
    store.switch({"storage": "elsewhere"})
    assert store.settings.storage == "typed"
    store.switch({"storage": "runs"})
    assert store.settings.storage == "runs"


@pytest.mark.parametrize(
    ("text", "kept", "note"),
    [
        ("learning_rate: 5\nseed: 1\n", {"seed": 1}, "learning_rate is 5, but it should be at most 0.1. Its default is used."),
        ("learn_rate: 5\nseed: 1\n", {"seed": 1}, "`learn_rate` is not a setting (did you mean `learning_rate`?). It is left out."),
    ],
)  # fmt: skip
def test_an_outdated_file_falls_back_field_by_field_with_a_note(path, text, kept, note):
    path.write_text(text)
    store = opened(path)
    assert store.chosen == kept and store.settings == SFTSettings(**kept) and store.notes == [note]


@pytest.mark.parametrize(
    ("text", "kept", "note"),
    [
        ("batch_size: [1\nseed: 1\n", {"seed": 1}, "is not valid YAML at line 2. What can be read of it is used; it is kept as form.damaged.yaml."),
        ("seed: 1\ncolumns:\n  frage: prompt\n  antwort: [\nrepo: a\n", {"seed": 1, "repo": "a"}, "is not valid YAML at line 6."),
        ("\x00\xff\ufffd", {}, "is not valid YAML"),
        ("just words", {}, "holds a str, not settings."),
    ],
)  # fmt: skip
def test_a_damaged_file_is_read_as_far_as_it_goes_and_kept(path, text, kept, note):
    path.write_text(text)
    store = opened(path)
    assert store.chosen == kept and store.settings == SFTSettings(**kept) and not store.problems
    assert note in store.notes[0] and path.with_suffix(".damaged.yaml").read_text() == text and not path.exists()


def test_a_file_cut_anywhere_opens(path):
    store = opened(path)
    for name, value in {"model": "me/ü", "columns": {"a": "prompt"}, "seed": 1, "quantizations": []}.items():
        store.choose(name, value)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert not opened(path).problems


def test_a_wrong_value_leaves_the_others_right(path):
    store = opened(path)
    store.choose("batch_size", 0)
    store.choose("seed", 1)
    assert store.settings == SFTSettings(seed=1) and store.shown("batch_size") == 0
    assert store.problems == {"batch_size": "batch_size is 0, but it should be at least 1."}
    store.choose("batch_size", 4)
    assert store.settings == SFTSettings(seed=1, batch_size=4) and not store.problems


def test_the_demo_model_brings_its_defaults_and_what_was_chosen_stays(path):
    store = opened(path)
    store.choose("seed", 1)
    store.choose("model", "demo")
    assert store.shown("max_steps") == 150 and store.shown("seed") == 1
    store.choose("model", "me/base")
    assert store.shown("max_steps") == 60


def test_where_nothing_can_be_written_it_says_so_and_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    store = opened(tmp_path / "file" / "form.yaml")
    store.choose("seed", 1)
    store.choose("seed", 2)
    assert store.settings.seed == 2 and len(store.notes) == 1 and "cannot be written (" in store.notes[0]


def test_on_drive_typing_is_written_once_it_pauses(path, monkeypatch):
    monkeypatch.setattr(stores, "DRIVE", path.parent)
    clocks = []

    class Clock:
        """A timer whose time comes when the test says so."""

        def __init__(self, delay, ring):
            self.delay, self.ring = delay, ring
            clocks.append(self)

        def start(self):
            self.running = True

        def cancel(self):
            self.running = False

    monkeypatch.setattr(stores.threading, "Timer", Clock)
    store = opened(path)
    for letter in range(1, 6):
        store.choose("repo", "mymodel"[:letter])
    assert [clock.running for clock in clocks] == [False] * 4 + [True] and not path.exists()
    clocks[-1].ring()
    assert "repo: mymod\n" in path.read_text() and clocks[-1].delay == stores.DRIVE_DELAY


def test_fields_of_reads_what_stands_by_itself():
    assert fields_of("a: 1\nb:\n- x\n- y\nc: {d: [}\n  e: 2\nf: 'g'\n") == {"a": 1, "b": ["x", "y"], "f": "g"}


def test_a_variable_that_is_no_setting_is_a_problem_in_the_notebook_too(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOSLOTH_MAX_STEP", "3")
    store = Store(SFTSettings, tmp_path / "x.yaml")
    assert "did you mean `AUTOSLOTH_MAX_STEPS`?" in store.problems[""]
