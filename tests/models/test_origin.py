"""Where a model comes from is read from cards and files, on a Hub on loopback and on this disk; what none tells is unknown."""

import json
import subprocess
import sys

import pytest
from support.hub_server import HubServer

from autosloth.models.origin import Told, card_data, find_origin, languages_of, license_of, origin_of
from autosloth.run import Run
from autosloth.settings import SFTSettings

FIND = "import json, sys; from autosloth.models.origin import find_origin; from autosloth.settings import SFTSettings; print(json.dumps(find_origin(SFTSettings(**json.loads(sys.argv[1])))))"
LLAMA, QUANTIZED = "unsloth/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"
CONFIG = json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}).encode()
CARD = b"---\nlicense: llama3.2\nlanguage:\n- en\n- de\nlicense_link: LICENSE.txt\n---\n# Llama\n"


def found(home, repos, **settings):
    """What is found on a Hub that holds these {(kind, id): files, or None for one that is gated}."""
    with HubServer() as hub:
        for (kind, name), files in repos.items():
            hub.add_repo(kind, name, files or {"README.md": CARD}, gated=files is None)
        command = [sys.executable, "-c", FIND, json.dumps({"dataset": "demo", **settings})]
        said = subprocess.run(command, env=hub.env(home), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_the_licence_is_that_of_the_16_bit_original_with_its_own_text_and_languages(tmp_path):
    told = found(
        tmp_path,
        {
            ("model", QUANTIZED): {"config.json": CONFIG, "README.md": b"---\nlicense: mit\n---\n"},
            ("model", LLAMA): {"README.md": CARD, "LICENSE.txt": b"..."},
            ("dataset", "team/fragen"): {"README.md": b"---\nlicense: cc-by-4.0\nlanguage: de\n---\n"},
            ("dataset", "team/svar"): {"README.md": b"---\nlanguage: no\n---\n"},
        },
        model=QUANTIZED,
        dataset=[{"path": "team/fragen"}, {"path": "team/svar"}],
    )
    assert told["original"] == LLAMA and told["license"] == "llama3.2" and told["license_from"] == LLAMA
    assert told["license_link"] == f"https://huggingface.co/{LLAMA}/blob/main/LICENSE.txt"
    assert told["language"] == ["en", "de", "no"] and told["model_type"] == "llama"
    assert [part["license"] for part in told["datasets"]] == ["cc-by-4.0", None]
    assert told["away"] == [] and told["gated"] is None


def test_of_an_original_that_may_not_be_read_its_copy_tells_and_the_terms_are_linked(tmp_path):
    told = found(tmp_path, {("model", QUANTIZED): {"config.json": CONFIG, "README.md": CARD}, ("model", LLAMA): None}, model=QUANTIZED)  # fmt: skip
    assert told["original"] == LLAMA and told["license_from"] == QUANTIZED
    assert told["gated"] == f"https://huggingface.co/{LLAMA}" and told["away"] == [LLAMA]


def test_without_a_card_the_licence_is_unknown_but_its_file_is_linked(tmp_path):
    told = found(tmp_path, {("model", "team/base"): {"config.json": b"{}", "LICENSE": b"..."}}, model="team/base")
    assert (told["license"], told["license_from"]) == (None, None)
    assert told["license_link"] == "https://huggingface.co/team/base/blob/main/LICENSE"


def test_a_hub_that_is_away_is_no_failure(tmp_path):
    told = found(tmp_path, {}, model="team/base", dataset="team/questions")
    assert told["license"] is None and told["away"] == ["team/base", "team/questions"]


def test_a_folder_tells_of_itself_and_has_no_name_on_the_hub(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\n")
    told = find_origin(SFTSettings(model=str(tmp_path), dataset="demo"))
    assert told["original"] is None and told["license_link"] is None and told["model_type"] == "qwen3"
    assert (told["license"], told["license_name"]) == ("other", "house")


def test_a_card_that_is_no_yaml_tells_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert find_origin(SFTSettings(model=str(tmp_path), dataset="demo"))["license"] is None


@pytest.mark.parametrize(
    "card, expected",
    [
        ({"license": "mit"}, ("mit", None, None)),
        ({"license": ["mit"]}, ("mit", None, None)),
        ({"license": "MIT"}, ("mit", None, None)),
        ({"license": "openmdw-1.1"}, ("openmdw-1.1", None, None)),
        ({"license": ["mit", "apache-2.0"]}, ("other", "mit-apache-2.0", None)),
        ({"license": "gpl-2.0-or-later"}, ("other", "gpl-2.0-or-later", None)),
        ({"license": "mit\n---\n# x"}, ("other", "mit-x", None)),
        ({"license": 7}, ("other", "7", None)),
        ({"license": True}, ("other", "true", None)),
        ({"license": [["mit"], {"a": "b"}]}, ("other", "mit-a-b", None)),
        ({"license": "x" * 4000}, ("other", "x" * 60, None)),
        ({"license": "other", "license_name": "Our Own"}, ("other", "our-own", None)),
        ({"license": []}, (None, None, None)),
        ({"license": "mit", "license_link": 7}, ("mit", None, None)),
        ({"license": "mit", "license_link": "https://a.b/c\n---"}, ("mit", None, None)),
        ({"license_link": "https://a.b/c"}, (None, None, "https://a.b/c")),
    ],
)
def test_a_licence_is_what_the_card_says(card, expected):
    told = license_of(Told("team/base", card))
    assert (told["license"], told["license_name"], told["license_link"]) == expected


def test_what_was_found_is_kept_and_asked_again_only_where_the_hub_was_away(tmp_path, monkeypatch):
    run = Run.create(SFTSettings(model="team/base", dataset="team/questions", run_name="my-run", storage=str(tmp_path)))
    answers = [{"away": ["team/base"], "license": None}, {"away": [], "license": "mit"}, {"away": ["team/base"]}]
    answers = [dict.fromkeys(("license_name", "license_link", "original", "model_type")) | {"language": [], **told} for told in answers]  # fmt: skip
    monkeypatch.setattr("autosloth.models.origin.find_origin", lambda settings, known: answers.pop(0))
    assert [card_data(run)["license"] for _ in range(3)] == ["other", "mit", "mit"] and len(answers) == 1


@pytest.mark.parametrize(
    "card, expected",
    [
        ({"language": ["en", "EN", "de", False, "English", "en-US", 7, {"a": 1}]}, ["en", "de", "no"]),
        ({"language": False}, ["no"]),
        ({"languages": "fr"}, ["fr"]),
        ({}, []),
    ],
)
def test_languages_are_codes(card, expected):
    assert languages_of(card) == expected


@pytest.mark.parametrize("readme", [b"---\na: " + 3000 * b"[" + b"\n---\n", b"---\n- a\n---\n", b"---\na: \xff\n---\n"])
@pytest.mark.parametrize(
    "config", [b"[]", b"null", b"{", b"\xff", b'{"model_type": []}', b'{"quantization_config": [1]}', 3000 * b"["]
)
def test_a_broken_card_or_config_tells_nothing(tmp_path, readme, config):
    (tmp_path / "README.md").write_bytes(readme)
    (tmp_path / "config.json").write_bytes(config)
    told = find_origin(SFTSettings(model=str(tmp_path), dataset="demo"))
    assert told["license"] is None and told["model_type"] is None and told["away"] == []


def test_a_base_that_is_gone_tells_nothing(tmp_path):
    settings = SFTSettings(model=str(tmp_path / "gone"), dataset="demo")
    assert find_origin(settings)["original"] is None and find_origin(settings, [])["license"] is None


def test_a_card_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n")
    assert find_origin(SFTSettings(model=str(tmp_path), dataset="demo"))["license"] == "mit"


def test_a_folder_with_a_name_like_a_repository_s_is_none_even_where_it_is_not_seen(tmp_path, monkeypatch):
    for name in ("base", "team/rows"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = Run.create(SFTSettings(model="base", dataset="team/rows", run_name="my-run", storage=str(tmp_path / "runs")))
    assert origin_of(run)["on_hub"] == []
    monkeypatch.chdir(tmp_path / "team")
    run.record("origin", away=["something"])  # so it is asked again
    data = card_data(run)
    assert data["datasets"] is None and data["base_model"] is None
