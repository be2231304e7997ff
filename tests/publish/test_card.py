"""The card says what was measured, and nothing that is not in settings.json and facts.json."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.cards import CARDS, FACTS, GOLDEN, card_of, run_of

from autosloth.publish.card import front_matter, render_card
from autosloth.publish.kept import keep_theirs
from autosloth.run import Run, write_json


@pytest.fixture
def run(tmp_path):
    return run_of("sft-adapter", tmp_path)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_card_is_the_expected_one(name, tmp_path):
    """After a wanted change: `(cd tests && python -m support.cards)`."""
    assert card_of(name, tmp_path) == (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GOLDEN)
def test_the_hub_s_own_classes_read_every_card(name):
    card = ModelCard((CARDS / f"{name}.md").read_text(encoding="utf-8"))
    assert card.data.license and card.data.base_model and card.data.pipeline_tag == "text-generation"
    results = card.data.eval_results or []
    assert {result.metric_type for result in results} >= (set() if name == "gguf" else {"loss", "exact_match"})
    assert len(card.data.tags) == len(set(card.data.tags)) and "None" not in card.text


@pytest.mark.parametrize(
    "kind, settings, base, relation",
    [
        ("both", {}, "unsloth/mistral-7b", "adapter"),
        ("both", {"merged": True}, "unsloth/mistral-7b", "finetune"),
        ("model", {"merged": True}, "unsloth/mistral-7b", "finetune"),
        ("gguf", {}, "unsloth/mistral-7b", None),
        ("gguf", {"repo": "mila/my-run"}, "mila/my-run", "quantized"),
    ],
)
def test_the_base_is_the_16_bit_original_or_the_model_s_own_repository(run, kind, settings, base, relation):
    run.settings = run.settings.model_copy(update=settings)
    matter = front_matter(run, kind)
    assert (matter["base_model"], matter.get("base_model_relation")) == (base, relation)
    assert ("gguf" in matter["tags"]) == (kind != "model")


def test_a_licence_that_no_card_names_is_unknown_and_what_the_hub_did_not_answer_is_said(run):
    assert front_matter(run)["license"] == "apache-2.0" and "license_name" not in front_matter(run)
    run.record("origin", license=None)
    matter = front_matter(run)
    assert matter["license"] == "other" and "license_name" not in matter
    assert "**License of the base:** unknown, as no card of the base names one" in render_card(run)
    run.record("origin", away=["unsloth/mistral-7b"])
    assert "**License of the base:** unknown, as its card could not be read" in render_card(run)


def test_another_licence_in_a_person_s_front_matter_is_not_contradicted(run):
    theirs = keep_theirs(render_card(run), render_card(run).replace("license: apache-2.0", "license: cc-by-nc-4.0"))
    text = theirs.split("---\n", 2)[2]
    assert "license: cc-by-nc-4.0" in theirs and "**License of the base:** apache-2.0" in text
    assert not re.search(r"^(- \*\*)?Licen[cs]e:", text, re.MULTILINE)


def test_each_file_is_told_with_its_figures_and_how_to_choose_it(tmp_path):
    text = card_of("three-files", tmp_path)
    assert "| `my-run-Q4_K_M.gguf` | Q4_K_M, 2 matrices as Q5_0 | 4.4 GB | 0.064 | 88.3% |\n" in text
    assert "| `my-run-ADAPTER.gguf` | ADAPTER | 84.0 MB | - | - |\n" in text
    assert "for another file of the table write its type in that place (`Q4_K_M`)" in text


def test_a_perplexity_that_is_large_is_rounded(tmp_path):
    assert "| perplexity | over 1,000,000 | 8,960 |" in card_of("three-files", tmp_path)


def test_energy_and_the_example_are_absent_where_there_are_none(run):
    text = render_card(run)
    assert "| energy | 14.2 Wh," in text and "## Prompt format" in text
    train = {name: fact for name, fact in FACTS["train"].items() if name != "energy_wh"}
    write_json(run.path("facts.json"), FACTS | {"train": train, "example": {"prompt": None, "answer": None}})
    text = render_card(run)
    assert "| energy |" not in text and "## Prompt format" not in text


def test_the_card_tells_the_batch_that_fitted_and_how_many_processes_took_part(run):
    fitted = {"batch_size": 1, "gradient_accumulation": 8, "processes": 2, "rows_per_step": 16}
    write_json(run.path("facts.json"), FACTS | {"train": FACTS["train"] | fitted})
    assert "| up to 16 rows a step (1 x 8 x 2 processes), " in render_card(run)


def test_the_card_tells_the_date_at_which_the_template_is_held(run):
    assert "| date |" not in render_card(run)
    write_json(run.path("facts.json"), FACTS | {"data": FACTS["data"] | {"date": "2026-11-27"}})
    assert "in training, in the proof and in these files it is 2026-11-27 |" in render_card(run)


def test_the_card_tells_what_of_a_multimodal_base_was_not_trained_and_what_was_trained_whole(run):
    assert "too: only its text part" not in render_card(run)
    layers = FACTS["train"]["layers"] | {"lm_head": {"trained": 0, "of": 1, "whole": 1}}
    run.record("train", not_trained=["pictures", "sounds"], use_dora=True, layers=layers)
    text = render_card(run)
    assert "The base takes pictures and sounds too: only its text part was trained, and the GGUF files hold that part alone." in text  # fmt: skip
    assert ", DoRA |" in text and "; trained whole: lm_head 1 |" in text


def test_the_front_matter_is_what_the_hub_reads(run):
    card = ModelCard(render_card(run)).data.to_dict()
    assert card["base_model"] == "unsloth/mistral-7b" and card["base_model_relation"] == "adapter"
    assert card["datasets"] == ["yahma/alpaca-cleaned"] and card["library_name"] == "peft"
    assert {"unsloth", "trl", "sft", "gguf"} <= set(card["tags"])


def test_local_names_and_paths_stay_out_of_the_card(finished):
    text = (finished / "publish" / "README.md").read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in matter and "datasets" not in matter
    assert str(Path.home()) not in text and str(finished.parent) not in text


def test_a_finished_run_shows_a_row_as_the_model_reads_it_its_curve_and_what_runs_it_again(finished):
    text = (finished / "publish" / "README.md").read_text()
    assert "    <s>### Instruction:\n" in text and "](loss.png)" in text and "(settings.yaml)" in text
    assert {"loss.png", "settings.yaml"} <= {path.name for path in (finished / "publish").iterdir()}
    assert Run.open(finished).facts["origin"]["license"] is None  # the embedded base has no card


def test_the_lines_for_the_file_on_this_disk_answer(finished):
    text = (finished / "publish-GGUF" / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if 'Llama("short-Q8_0.gguf"' in block)
    said = subprocess.run([sys.executable, "-c", code], cwd=finished / "publish-GGUF", capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.strip(), said.stderr
    assert "`ollama create short -f Modelfile`" in text


def test_where_nothing_can_be_proven_there_is_no_verdict(run):
    reason = "the training changed the weights by less than Q8_0 rounds them"
    facts = FACTS | {"verify": FACTS["verify"] | {"passed": None, "no_verdict": reason}}
    facts["data"] = facts["data"] | {"eval_rows": 1}
    facts["train"] = facts["train"] | {"warmup_steps": 1, "epochs": 1.0}
    write_json(run.path("facts.json"), facts)
    card = render_card(run)
    assert f"**No verdict: {reason}.**" in card and "Passed:" not in card
    assert "Measured on 1 row held out" in card and "warm-up 1 step |" in card and " (1 epoch) |" in card


def test_a_failed_proof_is_said(run):
    write_json(
        run.path("facts.json"),
        FACTS | {"verify": FACTS["verify"] | {"passed": False, "failures": ["mean KL is 3 nats, above 0.1"]}},
    )
    card = render_card(run)
    assert "**Not passed: mean KL is 3 nats, above 0.1.**" in card
    assert "ollama" not in card.lower() and "llama_cpp" not in card  # nobody is told how to use it


def test_the_publish_folders_hold_the_model_its_adapter_and_the_files_each_its_card_last(finished):
    model, gguf = (finished / name for name in ("publish", "publish-GGUF"))
    names = {path.relative_to(model).as_posix() for path in model.rglob("*")}
    tokenizer = {"tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    assert names >= {"README.md", "model.safetensors", "config.json", "loss.png", "settings.yaml"} | tokenizer
    assert (
        names >= {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} and "short-Q8_0.gguf" not in names
    )
    assert {path.name for path in gguf.iterdir()} == {"README.md", "short-Q8_0.gguf", "Modelfile"}
    for folder in model, gguf:
        written = {path: path.stat().st_mtime for path in folder.iterdir() if path.is_file()}
        assert written[folder / "README.md"] == max(written.values())


def test_a_published_adapter_does_not_say_where_its_base_lay(copied, base):
    from autosloth.export.merge import write_merged
    from autosloth.publish.folder import write_card

    run = Run.open(copied)
    run.settings = run.settings.model_copy(update={"merged": False})
    write_merged(run)
    write_card(run)
    published = (copied / "publish" / "adapter_config.json").read_text()
    assert str(base) not in published and f'"base_model_name_or_path": "{base.name}"' in published
    assert str(base) in (copied / "adapter" / "adapter_config.json").read_text()


def test_a_file_of_the_same_size_with_another_content_is_not_taken_for_the_proven_one(copied):
    from autosloth.errors import StorageError
    from autosloth.publish.folder import write_card

    run, (path,) = Run.open(copied), (copied / "gguf").glob("*.gguf")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # publish/ holds the same file by another name
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is not the file that was proven"):
        write_card.again(run)
    assert (copied / "publish" / "README.md").is_file()
