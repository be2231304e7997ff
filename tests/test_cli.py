"""Exit codes and sentences: 0 done, 1 a named problem and never a traceback, 2 wrong usage, 130 interrupted."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from support.commands import DEMO, SHORT, called_here, command_line, sets
from support.locks import released
from support.patience import HUNG, until

from autosloth import run as runs
from autosloth.check import Problems, check
from autosloth.errors import SettingsError, StorageError
from autosloth.export import write_gguf
from autosloth.notebook import summary
from autosloth.proof import verify_gguf
from autosloth.publish import write_card
from autosloth.run import Run, clear_before, lock, read_json, set_aside, storage_errors, write_json
from autosloth.settings import ROADS, SFTSettings
from autosloth.values import flag


def rows(path, pairs):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    return path


@pytest.fixture
def good(tmp_path):
    """Settings of a run that would work, on a small file."""
    return {
        "model": "demo",
        "dataset": rows(tmp_path / "rows.jsonl", [(f"{i}?", f"{i}!") for i in range(20)]),
        "storage": tmp_path / "runs",
    }


@pytest.mark.parametrize(
    "spoil, what, todo",
    [
        (lambda folder: {"dataset": folder / "none.jsonl"}, "none.jsonl does not exist.", "Check the path"),
        (
            lambda folder: {"dataset": rows(folder / "empty.jsonl", [])},
            "empty.jsonl is empty.",
            "Give one with at least two rows.",
        ),
        (
            lambda folder: {"dataset": rows(folder / "one.jsonl", [("a", "")])},
            "1 with an empty answer (rows 1)",
            "Correct them",
        ),
        (lambda folder: {"columns": "{frage: prompt}"}, "`columns` names frage", "It has: question, answer."),
        (lambda folder: {"model": folder / "no-model"}, "no-model does not exist.", "Give a Hub id"),
        (lambda folder: {"sixteen_bit_model": folder / "nope"}, "nope does not exist.", "Give a Hub id"),
        (lambda folder: {"model": folder}, "is no model in the transformers format", "Give one that has"),
        (
            lambda folder: {"storage": folder / "rows.jsonl" / "runs"},
            "rows.jsonl is a file.",
            "Set `storage` to a folder that you may write to.",
        ),
        (
            lambda folder: {"storage": "/proc/runs"},
            "cannot be made",
            "Set `storage` to a folder that you may write to.",
        ),
        (
            lambda folder: {
                "max_length": 16,
                "dataset": rows(folder / "long.jsonl", [(f"{n} word " * 50, "a") for n in range(9)]),
            },
            "0 to learn from, 0 to measure with",
            "Raise `max_length`",
        ),
        (lambda folder: {"batch_size": 0}, "`batch_size` is 0", "Correct `batch_size`"),
        (lambda folder: {"lernrate": 1}, "`lernrate` is not a setting", "The settings are:"),
    ],
)
def test_bad_input_ends_with_two_sentences_before_a_model_is_loaded(good, tmp_path, spoil, what, todo):
    result = command_line("sft", *sets(**good | spoil(tmp_path)))
    assert result.returncode == 1
    assert what in result.stderr and todo in result.stderr
    assert "Traceback" not in result.stdout + result.stderr and "precision:" not in result.stdout


def test_check_names_every_problem_at_once(tmp_path, base):
    settings = SFTSettings.load(
        {"model": str(tmp_path / "m"), "dataset": str(tmp_path / "d.csv"), "storage": "/proc/x"}
    )
    with pytest.raises(Problems) as error:
        check(settings)
    assert len(error.value.problems) == 3 and all(problem.todo for problem in error.value.problems)


def test_check_passes_on_good_settings_and_leaves_nothing_behind(good, base):
    result = command_line("check", "sft", *sets(**good))
    assert result.returncode == 0 and result.stdout.splitlines() == [
        "check: no problem found; a step learns from 16 rows (`batch_size` 16, `gradient_accumulation` 1)",
        f"data: {good['dataset']} read as prompt (question as prompt, answer as completion)",
    ]
    assert not good["storage"].exists()


def test_a_disk_that_is_too_small_is_named_before_training(good, base, monkeypatch):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 10_000_000})
    )
    with pytest.raises(Problems, match=r"needs about 0\.5 GB of disk, and 0\.0 GB are free"):
        check(
            SFTSettings.load(
                {**good, "model": str(base), "dataset": str(good["dataset"]), "storage": str(good["storage"])}
            )
        )


def test_a_full_disk_that_a_library_tells_of_is_named_too(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(StorageError, match="No space is left for"), storage_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_besides_that_of_the_run_is_named_by_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "on_one_disk", lambda *paths: False)
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "hub" / "blob"))
    with (
        pytest.raises(StorageError, match=f"No space is left for {tmp_path} .*HF_HOME"),
        storage_errors(tmp_path / "r"),
    ):
        raise full


def test_a_disk_that_fills_up_is_a_named_problem(tmp_path, base):
    """A run on a disk of 1 MB, mounted in a namespace of its own."""
    enough = "mount -t tmpfs -o size=1m tmpfs /mnt && "
    probe = subprocess.run(["unshare", "--mount", "sh", "-c", enough + "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("a small disk cannot be mounted here")
    code = (
        "from autosloth.run import Run\nfrom autosloth.settings import ROADS, SFTSettings\nfrom autosloth.cli import fail\n"
        "from autosloth.errors import AutoSlothError\nfrom autosloth.data.stage import prepare_data\n"
        "run = Run.create(SFTSettings(model='demo', dataset='demo', storage='/mnt'))\nopen('/mnt/filler', 'wb', buffering=0).write(b'0' * 2_000_000)\n"
        "try:\n    prepare_data(run)\nexcept AutoSlothError as error:\n    fail(error.what, error.todo)\n"
    )
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", enough + f'"{sys.executable}" -c "$0"', code], capture_output=True, text=True
    )
    assert (
        result.returncode == 1 and "No space is left" in result.stderr and "finished stages are kept" in result.stderr
    ), result.stderr


@pytest.mark.parametrize(
    "arguments", [["sft", "--set", "seed"], ["sft", "--nonsense"], ["dance"], ["check", "dance"], ["verify"]]
)
def test_wrong_usage_ends_with_2(arguments):
    assert command_line(*arguments).returncode == 2


@pytest.mark.parametrize("command", ["export", "verify", "card", "publish", "show"])
def test_a_folder_that_is_no_run_is_named(tmp_path, command):
    result = command_line(command, tmp_path)
    assert result.returncode == 1 and "is not a run folder" in result.stderr and "Traceback" not in result.stderr


def test_a_stage_whose_input_is_missing_says_which(tmp_path):
    run = released(Run.create(SFTSettings(model="demo", dataset="demo", storage=str(tmp_path))))
    result = command_line("export", run.folder)
    assert result.returncode == 1 and "The stage `train`" in result.stderr and "autosloth sft" in result.stderr


@pytest.mark.parametrize(
    "stage, line", [("export", "gguf: done in"), ("verify", "verify: passed"), ("card", "card: done in")]
)
def test_one_stage_can_be_run_again(copied, stage, line):
    result = command_line(stage, copied)
    assert result.returncode == 0 and line in result.stdout, result.stderr


def test_a_run_folder_that_another_process_works_in_is_refused(copied, base):
    lock(copied)
    result = command_line("sft", *sets(**DEMO, storage=copied.parent))
    assert result.returncode == 1 and "Another process is working in" in result.stderr


def test_card_and_show_tell_the_settings_that_the_files_were_made_with(copied):
    """Not those of a run that was not yet begun anew; and of settings that no stage was begun with there is no card."""
    old = Run.open(copied).settings
    released(Run.create(old.model_copy(update={"storage": str(copied.parent), "seed": 77, "max_new_tokens": 5})))
    assert command_line("card", copied).returncode == 0
    assert "| seed | 3407 |" in (copied / "publish" / "README.md").read_text()
    facts = read_json(copied / "facts.json")
    facts["eval"]["after"]["answers_cut"] = 3
    write_json(copied / "facts.json", facts)
    Run(copied, old.model_copy(update={"max_new_tokens": 5})).write_settings()
    assert "3cutat24tokens" in shown(copied)
    with pytest.raises(SettingsError, match=r"The stage `data` of .* was done with other settings \(seed\)"):
        write_card(Run(copied, old.model_copy(update={"seed": 77})))


@pytest.mark.parametrize("content", ["null", "[]", '{"train": {"st', "a folder", b"\xff"])
@pytest.mark.parametrize("name", ["settings.json", "facts.json", ".done/train.json", ".done/begun/data.json"])
def test_a_damaged_file_of_a_run_is_a_named_problem_and_stays(copied, name, content):
    path = copied / name
    path.unlink()
    if content == "a folder":
        path.mkdir()
        (path / "mine").touch()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = SFTSettings.load(DEMO | {"storage": str(copied.parent)})
    with pytest.raises(StorageError, match=f"{name} is (damaged|a folder)") as error:
        summary(Run.open(copied)), write_card(Run.create(settings))
    assert "Move it away and run" in error.value.todo and path.exists()


@pytest.mark.parametrize("name", ["reference/rows.json", "reference/logprobs.npy", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])  # fmt: skip
def test_a_file_that_was_cut_short_is_a_named_problem(copied, name):
    with (copied / name).open("rb+") as file:
        file.truncate(100)
    for again in (write_gguf.again, verify_gguf.again, write_card.again):
        with pytest.raises(
            StorageError, match=f"{name} has 100 bytes, and had .*`train` was done.*Run `autosloth sft "
        ):
            again(Run.open(copied))


def test_damaged_facts_are_a_named_problem(copied):
    (copied / "facts.json").write_text("{")
    result = command_line("show", copied)
    assert result.returncode == 1 and "facts.json is damaged" in result.stderr


@pytest.mark.parametrize("name, told, stage", [("eval", {}, "train"), ("train", [], "train"), ("data", {}, "data"), ("export", {"gguf": [{}]}, "gguf"), ("verify", {}, "verify"), ("publish", {}, "publish")])  # fmt: skip
def test_facts_that_were_lost_are_named_with_what_measures_them_again(copied, name, told, stage):
    run = Run.open(copied)
    write_json(copied / "facts.json", run.facts | {name: told})
    readers = [summary, *([write_card.again] if stage != "publish" else [])]
    for reader in readers:
        with pytest.raises(SettingsError, match=rf"facts\.json: {name}\S* is missing, which the stage `{stage}` wrote") as error:  # fmt: skip
            reader(run)
        assert error.value.todo == f"Run {run.command(stage)}: it is made again."


@pytest.mark.slow
@pytest.mark.parametrize("road, fixture", [("sft", "finished"), ("dpo", "preferred"), ("spin", "played")])
def test_a_road_whose_facts_were_lost_measures_them_again(request, tmp_path, road, fixture):
    done = shutil.copytree(request.getfixturevalue(fixture), tmp_path / "short", copy_function=shutil.copyfile)
    whole = Run.open(done).facts
    write_json(done / "facts.json", whole | {"train": [], "eval": {"before": {}}, "sft_start": 1})
    again = command_line(road, done / "settings.json", "--set", f"storage={tmp_path}")
    assert again.returncode == 0, again.stderr
    now = Run.open(done).facts
    assert now["eval"] == whole["eval"] and now["train"].keys() == whole["train"].keys() and now["verify"]["passed"]
    assert all(now["train"][name] == whole["train"][name] for name in ("steps", "losses"))
    assert now.get("rounds") == whole.get("rounds") and not Run.open(done).path("before").exists()


def test_show_prints_what_was_measured(finished):
    result = command_line("show", finished)
    for name in (
        "run folder",
        "held-out loss",
        "task accuracy",
        "sample question",
        "answer before",
        "answer after",
        "GGUF",
        "verification",
        "which means",
        "publish folder",
        "talk to it",
    ):
        assert name in result.stdout, name
    assert "how good that model is, the held-out figures tell" in " ".join(result.stdout.split())
    talk = f"ollama create short -f {finished}/gguf/Modelfile && ollama run short"
    assert talk.replace(" ", "") in "".join(result.stdout.split())


def test_nonsense_of_the_toy_base_on_other_rows_is_told_from_a_wrong_file(copied):
    settings = json.loads((copied / "settings.json").read_text())
    (copied / "settings.json").write_text(json.dumps(settings | {"dataset": "rows.jsonl"}))
    assert "whichmeanstheGGUFisthetrainedmodel,withinitstype'srounding;thatmodelisthedemo'stoy" in shown(copied)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("road", ROADS)
def test_help_tells_each_option_in_its_group_and_which_defaults_go_together(road, columns):
    said = called_here([road, "--help"], {"COLUMNS": str(columns)}).stdout
    assert max(map(len, said.splitlines())) <= columns
    panels = dict(re.findall(r"^╭─ (\w+) ─+╮\n(.*?)^╰", said, re.S | re.M))
    assert list(panels) == ["Arguments", "Options", "Model", "Data", "Training", "Export", "Publish"]
    words = {group: " ".join(re.sub(r"^│ .{30}|│$", "", panel, flags=re.M).split()) for group, panel in panels.items()}
    for name, field in ROADS[road].model_fields.items():
        group = field.json_schema_extra["group"]
        assert re.search(rf"^│ {flag(name)}( |$)", panels[group], re.M), name
        assert " ".join(field.description.split()) in words[group], name
    assert "Dropout in the adapter; 0 is fastest. Takes 0 to below 1. [default: 0.0]" in words["Model"]
    assert "Takes drop or refuse. [default: drop]" in words["Data"] and "Takes or empty" not in said
    told = " ".join(said.split())
    for brought, values in ROADS[road].other_defaults().items():
        assert f"With `{brought}` the defaults are: {next(iter(values))} {next(iter(values.values()))}" in told


def option_words(**values):
    """Settings as their options."""
    return [word for name, value in values.items() for word in (flag(name), str(value))]


def settings_told(*arguments, road="sft", **environment):
    """The settings that the command line makes of these arguments, by the file that `init` prints."""
    result = called_here(["init", road, *arguments], environment)
    assert result.returncode == 0, result.stderr
    return ROADS[road].load(yaml.safe_load(result.stdout))


def test_every_setting_is_an_option():
    """What is typed is read: text as it stands, even where YAML would take it for a number; lists in each form; mappings; flags."""
    given = {
        "seed": 5,
        "learning_rate": 1e-4,
        "batch_size": 4,
        "run_name": "2024",
        "revision": "1234567",
        "split": "no",
    }
    settings = settings_told(*option_words(**given), "--merged", "--no-card-rows")
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.merged and not settings.card_rows
    for words in (["q8_0,q4_k_m"], ["q8_0", "q4_k_m"], ["[q8_0, q4_k_m]"], ["Q8_0, q4_k_m,q8_0"]):
        typed = [part for word in words for part in ("--quantizations", word)]
        assert settings_told(*typed).quantizations == ["q8_0", "q4_k_m"], words
    lists = settings_told(
        *("--dataset", "a,b.jsonl", "--dataset", "{path: c, share: 0.5}", "--target-modules", "q_proj,v_proj"),
        *("--quantizations", "[]", "--columns", "{frage: prompt}", "--columns", "{antwort: completion}"),
        *("--chat-template", "{{ x }} # y"),
    )
    assert lists.dataset == [{"path": "a,b.jsonl"}, {"path": "c", "share": 0.5}]
    assert (lists.target_modules, lists.quantizations) == (["q_proj", "v_proj"], [])
    assert lists.columns == {"frage": "prompt", "antwort": "completion"} and lists.chat_template == "{{ x }} # y"
    for one in (["--dataset", "{path: c, share: 0.5}"], ["--set", "dataset={path: c, share: 0.5}"]):
        assert settings_told(*one).dataset == [{"path": "c", "share": 0.5}]


def test_an_option_goes_before_the_environment_and_that_before_the_file(tmp_path):
    (tmp_path / "s.yaml").write_text("seed: 1\nepochs: 2\nmerged: true\nrepo: from-the-file\n")
    settings = settings_told(tmp_path / "s.yaml", "--seed", "3", "--no-merged", AUTOSLOTH_SEED="2", AUTOSLOTH_EPOCHS="5", AUTOSLOTH_RUN_NAME="2024")  # fmt: skip
    told = (settings.seed, settings.merged, settings.epochs, settings.repo, settings.run_name)
    assert told == (3, False, 5.0, "from-the-file", "2024")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning-rate", "abc"], '`learning_rate` is "abc", but it should be a number. Correct `learning_rate` in `--learning-rate`.'),
        (["--batch-size", "many"], "it should be a whole number, or auto. Correct `batch_size` in `--batch-size`."),
        (["--columns", "frage"], "it should be a mapping, such as {a: b}. Correct `columns` in `--columns`."),
        (["--quantizations", "q8_0,q9"], '`quantizations` is "q9", but it should be'),
        (["--dataset", "{path: a, shar: 1}"], "a dataset of several takes `path`, `share`, `split` and `columns`. Correct `dataset` in `--dataset`."),
        (["--set", "seed=x"], "Correct `seed` in `--set seed=...`."),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(arguments, said):
    result = called_here(["check", "sft", *arguments], {})
    assert result.returncode == 1 and said in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


def test_wrong_options_are_wrong_usage_and_the_nearest_is_named():
    for road in ROADS:
        unknown = called_here([road, "--learnig-rate", "1"], {})
        assert unknown.returncode == 2 and "--learning-rate" in unknown.stderr
    twice = called_here(["sft", "--seed", "1", "--set", "seed=2"], {})
    assert twice.returncode == 2 and "`seed` is given by `--set` too; give it once." in " ".join(twice.stderr.split())
    assert called_here(["dpo", "--packing"], {}).returncode == 2  # which is of SFT


def completed(words, shell="bash", **environment):
    """What a shell is offered behind these words, by its own protocol."""
    protocol = {
        "bash": {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
        "fish": {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    said = called_here([], {"_AUTOSLOTH_COMPLETE": f"complete_{shell}", **protocol, **environment}).stdout
    return said.strip().splitlines()


def test_a_shell_completes_options_choices_runs_and_files(tmp_path):
    assert "init" in completed("autosloth ") and completed("autosloth sft --quan") == ["--quantizations"]
    assert completed("autosloth check dpo --precision fl") == ["float16", "float32"]
    assert completed("autosloth sft --quantizations q8_0,q4") == ["q8_0,q4_k_m", "q8_0,q4_k_s"]
    assert completed("autosloth sft --model unsloth/zephyr") == []
    assert completed("autosloth dpo --model unsloth/zephyr") == ["unsloth/zephyr-sft-bnb-4bit"]
    assert "demo" in completed("autosloth spin --dataset ")
    assert completed("autosloth score runs/x --metric r") == ["regex", "rouge"]
    assert completed("autosloth sft --set learning") == ["learning_rate="]
    named = completed("autosloth sft --", "fish")
    assert len(named) > len(SFTSettings.model_fields) and all(re.match(r"--[\w-]+\t\S", line) for line in named)
    for name in ("mine.yaml", "rows.csv"):
        (tmp_path / name).touch()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "settings.json").write_text("{}")
    assert completed("autosloth show ", AUTOSLOTH_STORAGE=str(tmp_path)) == [str(tmp_path / "short")]
    assert completed(f"autosloth sft {tmp_path}/") == [f"{tmp_path}/mine.yaml", f"{tmp_path}/short/"]


def test_bash_completes_by_the_script_that_it_is_given(tmp_path):
    script = command_line("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    (tmp_path / "autosloth").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m autosloth "$@"\n')
    (tmp_path / "autosloth").chmod(0o755)
    typed = (
        "COMP_WORDS=(autosloth check sft --quan); COMP_CWORD=3; _autosloth_completion autosloth; echo ${COMPREPLY[@]}"
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    said = subprocess.run(["bash", "-c", f"{script}\n{typed}"], capture_output=True, text=True, env=os.environ | {"PATH": path})  # fmt: skip
    assert said.stdout == "--quantizations\n", said.stderr


@pytest.mark.parametrize("road", ROADS)
def test_init_prints_every_setting_and_loads_as_the_defaults(road, tmp_path):
    printed = called_here(["init", road], {})
    assert printed.returncode == 0 and not printed.stderr
    (tmp_path / "s.yaml").write_text(printed.stdout)
    live, every = yaml.safe_load(printed.stdout), yaml.safe_load(re.sub("^#(?! )", "", printed.stdout, flags=re.M))
    assert set(every) == set(ROADS[road].model_fields) and {"model", "dataset"} <= set(live) < set(every)
    for values in (live, every):
        assert ROADS[road].load(values) == ROADS[road].load()
    for brought, others in ROADS[road].other_defaults().items():  # set in the file later, they bring all along
        name, value = brought.split(": ")
        later = ROADS[road].load(live | {name: value})
        assert {name: getattr(later, name) for name in others} == others, brought
    for field in ROADS[road].model_fields.values():
        assert " ".join(field.description.split()) in " ".join(printed.stdout.replace("\n# ", " ").split())


@pytest.mark.parametrize("road", ROADS)
def test_what_init_prints_can_be_checked(road, tmp_path, base):
    given = {"model": "demo", "dataset": "demo", "storage": tmp_path / "runs", "seed": 5}
    (tmp_path / "s.yaml").write_text(called_here(["init", road, *option_words(**given)], {}).stdout)
    settings = ROADS[road].load(tmp_path / "s.yaml")
    assert settings == ROADS[road].load({name: str(value) for name, value in given.items()})
    assert command_line("check", road, tmp_path / "s.yaml").returncode == 0


def test_runs_are_listed_with_where_they_stand(copied):
    storage = copied.parent
    assert "No runs in" in command_line("runs", storage / "none").stdout
    assert command_line("runs", copied / "facts.json").returncode == 1
    (storage / "damaged").mkdir()
    (storage / "damaged" / "settings.json").write_text("{")
    (storage / "foreign").mkdir()
    long = "a-run-of-a-name-" * 5 + "long"
    begun = released(Run.create(SFTSettings(model="demo", dataset="demo", storage=str(storage), run_name=long)))
    os.utime(copied / "facts.json", (2**31, 2**31))  # the newest
    listed = command_line("runs", storage, "--json")
    short, other = json.loads(listed.stdout)
    eval = Run.open(copied).facts["eval"]
    assert short == {
        **{"run": str(copied), "road": "sft", "model": "demo", "dataset": "demo", "proven": True, "published": []},
        **{"loss_before": eval["before"]["loss"], "loss_after": eval["after"]["loss"], "state": "finished"},
    }
    assert (other["run"], other["state"], other["proven"]) == (str(begun.folder), "next: data", None)
    assert "damaged/settings.json is damaged" in listed.stderr and "foreign is not a run folder" in listed.stderr
    for columns in ("50", "80", "120"):  # nothing is cut, by variable too
        table = called_here(["runs"], {"COLUMNS": columns, "AUTOSLOTH_STORAGE": str(storage)}).stdout
        assert max(map(len, table.splitlines())) <= int(columns)
        first_column = "".join(line[: line.rstrip().find("  ", 3)].strip() for line in table.splitlines())
        assert long in re.sub(r"\s", "", first_column), table
        assert table.index("short") < table.index("a-run") and "finished" in table


def test_a_run_that_is_at_work_and_one_that_failed_are_told(copied):
    (copied / ".done" / "verify.json").unlink()
    write_json(copied / ".done" / "failed" / "verify.json", {"what": "It broke.", "todo": "Mend it."})
    assert json.loads(called_here(["runs", copied.parent, "--json"], {}).stdout)[0]["state"] == "failed: verify"
    lock(copied)
    assert json.loads(called_here(["runs", copied.parent, "--json"], {}).stdout)[0]["state"] == "running: verify"


def shown(folder):
    """What `show` prints, without spaces: a path is broken where the line ends."""
    return "".join(command_line("show", folder).stdout.split())


def test_a_deleted_file_is_named_with_the_command_that_makes_it_again(copied):
    (copied / "gguf" / "short-Q8_0.gguf").unlink()
    said = shown(copied)
    assert f"short-Q8_0.ggufismissing:`autoslothexport{copied}`makesitagain" in said
    assert "offilesthataremissingnow:passed:" in said
    for command in ("verify", "card"):
        result = command_line(command, copied)
        assert result.returncode == 1 and "short-Q8_0.gguf is missing" in result.stderr, command
        assert f"Run `autosloth export {copied}`: it is made again." in result.stderr


def test_a_file_of_another_size_is_not_shown_as_the_one_that_was_proven(copied):
    with (copied / "gguf" / "short-Q8_0.gguf").open("ab") as file:
        file.write(b"x" * 100_000)
    assert f"MBthatwereproven:`autoslothverify{copied}`tells" in shown(copied)


def test_nobody_is_invited_to_talk_to_a_file_that_failed_its_proof(copied):
    facts = read_json(copied / "facts.json")
    write_json(copied / "facts.json", facts | {"verify": facts["verify"] | {"passed": False}})
    said = shown(copied)
    assert "NOTpassed" in said and "talktoit" not in said and "inPython" not in said


def test_of_a_run_before_the_card_that_was_kept_is_shown(copied):
    run = Run.open(copied)
    set_aside(run, ["data"])
    clear_before(run)
    (aside,) = (copied / "before").iterdir()
    said = shown(aside)
    assert f"card{aside}/README.md" in said and "publish" not in said.replace("publish_to_hub", "")
    assert f"GGUF{aside}/gguf/short-Q8_0.ggufismissing:`autoslothexport{aside}`makesitagain" in said


def test_publishing_waits_for_no_other_process(copied):
    lock(copied)
    result = command_line("publish", copied)
    assert result.returncode == 1 and "Another process is working in" in result.stderr


@pytest.mark.slow
def test_a_file_that_is_made_again_is_not_proven_yet(copied):
    assert command_line("export", copied).returncode == 0
    assert f"notdoneofthesefiles:`autoslothverify{copied}`doesit" in shown(copied)
    for command in ("card", "publish"):
        result = command_line(command, copied)
        assert result.returncode == 1 and f"autosloth verify {copied}" in result.stderr, result.stderr
    assert command_line("verify", copied).returncode == command_line("card", copied).returncode == 0


def test_a_file_of_another_size_reaches_no_card(copied):
    (copied / "gguf" / "short-Q8_0.gguf").write_bytes(b"")
    result = command_line("card", copied)
    assert result.returncode == 1 and "has 0 bytes, and had" in result.stderr
    assert (copied / "publish" / "README.md").is_file()


def test_without_its_adapter_a_run_says_so(copied):
    shutil.rmtree(copied / "adapter")
    assert (
        f"adapter_config.jsonismissing:`autoslothsft{copied}/settings.json--setstorage={copied.parent}--setrun_name=short`makesitagain"
        in shown(copied)
    )
    for command in ("export", "verify", "card"):
        result = command_line(command, copied)
        assert result.returncode == 1 and "adapter_config.json is missing" in result.stderr, command
        assert (
            f"Run `autosloth sft {copied}/settings.json --set storage={copied.parent} --set run_name=short`"
            in result.stderr
        )


def test_what_other_settings_change_of_a_finished_run_is_told_beforehand(copied):
    other = command_line("check", "dpo", *sets(**DEMO, storage=copied.parent))
    assert other.returncode == 1 and f"{copied} holds a training of another road: sft, not dpo." in other.stderr
    assert "for example `short-2`" in other.stderr
    changed = command_line("check", "sft", *sets(**DEMO, storage=copied.parent, learning_rate=1e-3))
    again = "learning_rate 0.002 -> 0.001: train, publish_adapter, merge, gguf, verify, card, publish again; what is there goes to"
    assert changed.returncode == 0 and f"run: {again} {copied}/before" in changed.stdout
    same = command_line("check", "sft", *sets(**DEMO, storage=copied.parent))
    assert same.returncode == 0 and "again" not in same.stdout


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(tmp_path, base):
    arguments = ["sft", *sets(**SHORT | {"max_steps": 2000}, storage=tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "autosloth", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoint = tmp_path / "short" / "checkpoints" / "checkpoint-20"
    until(lambda: checkpoint.exists() or process.poll() is not None, checkpoint)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=HUNG)
    assert process.returncode == 130 and "with a checkpoint" in errors and "Traceback" not in errors, said + errors
    step = int(re.search(r"after step (\d+) of 2000", errors)[1])
    assert (tmp_path / "short" / "checkpoints" / f"checkpoint-{step}").is_dir()


def test_an_interrupt_while_the_commands_are_imported_ends_in_the_same_way(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    result = command_line("show", tmp_path, PYTHONPATH=paths)
    said = "\nInterrupted. The same command goes on from the last checkpoint.\n"
    assert (result.returncode, result.stdout, result.stderr) == (130, "", said)


def test_the_version_is_told():
    result = command_line("--version")
    assert (result.returncode, result.stdout) == (0, f"autosloth {version('autosloth')}\n")


def test_import_is_instant():
    """No heavy library is imported with the package and its commands."""
    code = "import sys, autosloth.cli; print([name for name in ('torch', 'transformers', 'datasets', 'unsloth', 'numpy') if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent).stdout
        == "[]\n"
    )
