"""The card says what was measured, and nothing that is not in settings.json and facts.json."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from autosloth.publish.card import render_card
from autosloth.run import Run, write_json
from autosloth.settings import SFTSettings

EXPECTED = Path(__file__).parent / "card.md"

FACTS = {
    "data": {
        "read": 1000,
        "kept": 990,
        "dropped": {"empty_answer": 10},
        "changed": {"unanswered_end_cut": 2},
        "revision": "58647b0413913f451837831e1807a6cfa8ada804",
        "train_rows": 940,
        "eval_rows": 50,
        "truncated": 3,
        "train_tokens": 90000,
        "learnt_tokens": 40000,
    },
    "hardware": {"gpu": "Tesla T4", "vram_gb": 15.8, "cpu": "x86_64", "cores": 2, "ram_gb": 13.6},
    "versions": {"python": "3.13.1", "autosloth": "0.1.0", "unsloth": "2026.10.9"},
    "eval": {
        "before": {
            "loss": 1.5,
            "perplexity": 4.482,
            "exact_match": 0.0,
            "answers_compared": 8,
            "samples": [{"question": "Who?", "expected": "Mila", "answer": "```\n| what"}],
        },
        "after": {
            "loss": 1.0,
            "perplexity": 2.718,
            "exact_match": 0.5,
            "answers_cut": 2,
            "answers_compared": 8,
            "samples": [{"question": "Who?", "expected": "Mila", "answer": "Mila"}],
        },
    },
    "train": {
        **{
            "steps": 60,
            "epochs": 0.511,
            "seconds": 900.5,
            "first_loss": 1.61,
            "last_loss": 0.98,
            "tokens": 45000,
            "tokens_per_second": 50.0,
            "peak_vram_gb": 9.1,
            "layers": {"self_attn.q_proj": {"trained": 32, "of": 32}, "lm_head": {"trained": 0, "of": 1}},
        },
        **{
            "peak_ram_gb": 6.2,
            "trainable_parameters": 41943040,
            "precision": "float16",
            "lora_r": 16,
            "lora_alpha": 16,
            "four_bit": True,
            "optimizer": "adamw_8bit",
        },
    },
    "export": {
        "gguf": [
            {
                "path": "gguf/my-run-Q8_0.gguf",
                "type": "Q8_0",
                "bytes": 7_700_000_000,
                "seconds": 172.0,
                "peak_ram_gb": 3.5,
            }
        ]
    },
    "verify": {
        "passed": True,
        "failures": [],
        "files": [
            {
                "file": "my-run-Q8_0.gguf",
                "type": "Q8_0",
                "weights": {
                    "form": "rows",
                    "tensors": 291,
                    "mean_error": 0.0057,
                    "adapter_share": 0.9996,
                    "adapter_share_within": 0.1,
                    "failures": [],
                },
                "texts": 116,
                "token_mismatches": 0,
                "tolerated": 2,
                "tolerated_because": "llama.cpp does not compose characters (Unicode NFC) as this tokenizer does",
                "template": True,
                "positions": 256,
                "mean_kl": 0.021,
                "max_kl": 0.31,
                "top1": 0.93,
                "tie": 0.41,
                "bos": 1,
                "bos_trained": 1,
                "eos": True,
                "answers": [{"question": "Who\nis it?", "trained": "Mila", "file": "", "same": False}],
                "limits": {"mean_kl": 0.1, "top1": 0.85},
            }
        ],
    },
}


@pytest.fixture
def run(tmp_path):
    run = Run.create(SFTSettings(run_name="my-run", storage=str(tmp_path)))
    write_json(run.path("facts.json"), FACTS)
    return run


def test_the_card_is_the_expected_one(run):
    """After a wanted change: write what this test prints to tests/data/card.md."""
    assert render_card(run) == EXPECTED.read_text()


def test_the_card_tells_the_batch_that_fitted_and_how_many_processes_took_part(run):
    fitted = {"batch_size": 1, "gradient_accumulation": 8, "processes": 2, "rows_per_step": 16}
    write_json(run.path("facts.json"), FACTS | {"train": FACTS["train"] | fitted})
    assert " of up to 16 rows (1 x 8 x 2 processes), " in render_card(run)


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
    assert card["base_model"] == "unsloth/mistral-7b-bnb-4bit" and card["base_model_relation"] == "adapter"
    assert card["datasets"] == ["yahma/alpaca-cleaned"] and card["library_name"] == "peft"
    assert {"unsloth", "trl", "sft", "gguf"} <= set(card["tags"])


def test_local_names_and_paths_stay_out_of_the_card(finished):
    text = (finished / "publish" / "README.md").read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in matter and "datasets" not in matter
    assert str(Path.home()) not in text and str(finished.parent) not in text


def test_the_lines_for_the_file_on_this_disk_answer(finished):
    text = (finished / "publish" / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if 'Llama("short-Q8_0.gguf"' in block)
    said = subprocess.run([sys.executable, "-c", code], cwd=finished / "publish", capture_output=True, text=True)
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
    assert "Measured on 1 row held out" in card and "warm-up 1 step |" in card and " 1 epoch |" in card


def test_a_failed_proof_is_said(run):
    write_json(
        run.path("facts.json"),
        FACTS | {"verify": FACTS["verify"] | {"passed": False, "failures": ["mean KL is 3 nats, above 0.1"]}},
    )
    card = render_card(run)
    assert "**Not passed: mean KL is 3 nats, above 0.1.**" in card
    assert "ollama" not in card.lower() and "llama_cpp" not in card  # nobody is told how to use it


def test_the_publish_folder_holds_the_model_the_gguf_and_the_card(finished):
    names = {path.name for path in (finished / "publish").iterdir()}
    assert names >= {
        "README.md",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "short-Q8_0.gguf",
        "Modelfile",
    }
    assert (finished / "publish" / "README.md").stat().st_mtime >= max(
        path.stat().st_mtime for path in (finished / "publish").iterdir()
    )


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
