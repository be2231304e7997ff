"""What newer.py says of Colab's list, of that list changed, and of what is no list; the index is played on loopback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from replica import newer
from support.index_server import IndexServer
from support.pins import ON_COLAB, pinned

HERE = Path(__file__).parent
COLAB = {
    name: (one["version"], one["requires"])
    for name, one in json.loads((HERE / "colab-2026-08-19.json").read_text())["packages"].items()
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs newer.py on these packages, which the index has too; returns (exit status, output, paths asked for)."""
    monkeypatch.setenv("AUTOSLOTH_CACHE", str(tmp_path / "cache"))

    def run(packages, *options, bare=(), more=""):
        listed = tmp_path / "colab.txt"
        listed.write_text("".join(f"{name}=={version}\n" for name, (version, _) in packages.items()) + more)
        public = {name: (version.partition("+")[0], required) for name, (version, required) in packages.items()}
        with IndexServer(public, bare) as index:
            monkeypatch.setattr(newer, "INDEX", index.url)
            status = newer.main([str(listed), *options])
        return status, capsys.readouterr().out, index.asked

    return run


def test_on_colab_as_it_was_nothing_breaks(run):
    status, said, _ = run(COLAB)
    assert status == 0
    assert said.splitlines() == [
        f"{len(COLAB)} packages under Python 3.13.",
        "Pins that the image has by itself, as new or newer:",
        "  annotated-doc: the pin is 0.0.5, the image has 0.0.5",
        "  safetensors: the pin is 0.8.0, the image has 0.8.0",
        "  typer: the pin is 0.27.1, the image has 0.27.1",
        "Known and accepted in tests/support/pins.py: 3. Nothing else breaks.",
    ]


def test_a_list_cut_short_lacks_what_stood_below(run):
    status, said, _ = run({name: entry for name, entry in COLAB.items() if name < "torch"})
    assert status == 1
    assert "Missing in the image, or refused:\n" in said
    assert "  peft 0.21.2 wants torch>=1.13.0, the image has none\n" in said
    assert "  traitlets" not in said.replace("autosloth 0 wants traitlets, the image has none", "")
    assert "Nothing else breaks" not in said


def test_what_an_image_has_too_old_or_too_new_is_named(run):
    moved = {"numpy": ("1.16.0", []), "fsspec": ("2027.1.0", []), "gcsfs": ("2027.1.0", ["fsspec==2027.1.0"])}
    status, said, _ = run(COLAB | moved)
    assert status == 1
    assert "  transformers 5.17.0 wants numpy>=1.17, the image has 1.16.0\n" in said
    assert "  datasets 4.8.5 wants fsspec<=2026.2.0,>=2023.1.0, the image has 2027.1.0\n" in said


def test_a_neighbour_is_named_only_if_it_was_whole(run):
    whole = ("1.0", ["transformers<5.16"])
    status, said, _ = run(COLAB | {"neighbour": whole, "broken-before": ("1.0", ["transformers<5"])})
    assert status == 1
    assert "Whole in the image, broken by a pin:\n  neighbour 1.0 wants transformers<5.16, the pin is 5.17.0\n" in said
    assert "broken-before" not in said


def test_pins_that_turn_the_image_back_are_named(run):
    status, said, _ = run(COLAB | {"msgspec": ("99.0", [])})
    assert status == 0
    assert f"  msgspec: the pin is {pinned(ON_COLAB)['msgspec'][0]}, the image has 99.0\n" in said


def test_a_python_that_a_pin_or_autosloth_refuses_breaks(run):
    status, said, _ = run(COLAB, "--python", "3.14")
    assert status == 1
    assert "Not for Python 3.14:\n" in said
    assert "  autosloth wants Python >=3.11,<3.14\n" in said


def test_what_the_index_does_not_have_is_counted(run):
    # A build of Colab's own is looked up by its public version; of an address only the file's name is known, of git nothing.
    more = (
        "own @ https://colab.example/own-1.2-py3-none-any.whl#sha256=00\ngit @ git+https://colab.example/git@0f0755b\n"
    )
    status, said, asked = run(COLAB, more=more)
    assert status == 0
    assert "Not looked at, as the index has no wheel of them: 2\n  git, own\n" in said
    assert said.startswith(f"{len(COLAB) + 1} packages")
    assert "/files/torch/torch-2.11.0-py3-none-any.whl.metadata" in asked


def test_the_metadata_is_read_out_of_the_wheel_where_none_is_beside(run):
    status, said, asked = run(COLAB | {"neighbour": ("1.0", ["transformers<5.16"])}, bare={"neighbour"})
    assert status == 1
    assert "  neighbour 1.0 wants transformers<5.16" in said
    assert "/files/neighbour/neighbour-1.0-py3-none-any.whl" in asked


def test_a_second_run_asks_for_nothing(run):
    first, second = run(COLAB), run(COLAB)
    assert first[2] and second == (*first[:2], [])


def test_the_extract_is_the_part_that_autosloth_meets(run, tmp_path):
    stray = {"stray": ("1.0", ["numpy>=1"]), "near": ("1.0", ["peft<1", "stray"])}
    run(COLAB | stray, "--write", str(tmp_path / "out.json"))
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["lists"], written["python"]) == (["colab.txt"], "3.13")
    found = {name: (one["version"], one["requires"]) for name, one in written["packages"].items()}
    assert found == COLAB | {"near": ("1.0", ["peft<1"])}


def test_of_several_lists_the_later_go_before(run, tmp_path):
    changes = tmp_path / "changes.txt"
    changes.write_text("# what another image changes\nsafetensors==0.7.0  # older\n")
    _, said, _ = run(COLAB, str(changes))
    assert "safetensors: the pin" not in said


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "{} cannot be read: No such file or directory."),
        ("# nothing\n\n", "{} lists no package."),
        ("torch==2.11.0\n<html>\n", "{} is no list as `pip freeze` writes it: line 2 is '<html>'."),
        ("torch>=2\n", "{} is no list as `pip freeze` writes it: line 1 is 'torch>=2'."),
    ],
)
def test_what_is_no_list_is_refused_in_one_sentence(content, sentence, tmp_path, capsys):
    path = tmp_path / "colab.txt"
    if content is not None:
        path.write_text(content)
    assert newer.main([str(path)]) == 2
    assert capsys.readouterr().err == sentence.format(path) + "\n"


def test_it_runs_as_a_script_of_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "newer.py", "missing.txt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "missing.txt cannot be read: No such file or directory.\n")
