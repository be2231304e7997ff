"""A right GGUF passes; a wrong one fails with what differs, and is not published."""

import json

import pytest

from autosloth import gguf
from autosloth.errors import VerifyError
from autosloth.hub import HubError, refuse_unverified
from autosloth.run import Run, read_json
from autosloth.verify import compare, verify_gguf


def test_the_exported_file_is_proven(finished):
    proof = read_json(finished / "facts.json")["verify"]
    assert proof["passed"] and proof["token_mismatches"] == 0 and proof["failures"] == []
    assert proof["mean_kl"] < 0.01 and proof["top1"] > 0.95 and proof["positions"] >= 200
    assert proof["bos"] == proof["bos_trained"] == 1 and proof["eos"] is True


def spoiled(run_folder, spoil):
    """The proof of the file that is exported after `spoil` changed the adapter folder."""
    run = Run.open(run_folder)
    spoil(run_folder / "adapter")
    gguf.write_gguf.again(run)
    return compare(next((run_folder / "gguf").glob("*.gguf")), run_folder / "reference")


def without_adapter(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)


def with_halved_scale(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 8}))


def without_sentencepiece_scores(folder):
    (folder / "tokenizer.model").unlink()


def with_another_template(folder):
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.parametrize(
    "spoil, failure",
    [
        (without_adapter, "mean KL"),
        (with_halved_scale, "mean KL"),
        (without_sentencepiece_scores, "become other tokens than in training"),
        (with_another_template, "become other tokens than in training"),
    ],
)
def test_a_file_that_answers_otherwise_fails_with_what_differs(copied, spoil, failure):
    proof = spoiled(copied, spoil)
    assert not proof["passed"] and any(failure in phrase for phrase in proof["failures"])


def test_a_file_that_never_ends_its_answer_fails(copied):
    path = copied / "reference" / "rows.json"
    known = json.loads(path.read_text())
    unlikely = 0  # <unk>: the file will not say it
    for answer in known["answers"]:
        answer["answer"][-1] = unlikely
    path.write_text(json.dumps(known | {"ends": [unlikely]}))
    proof = compare(next((copied / "gguf").glob("*.gguf")), copied / "reference")
    assert (
        proof["eos"] is False
        and "an answer that the trained model ends goes on without an end token" in proof["failures"]
    )


def test_a_failed_proof_stops_the_road_and_blocks_publishing_unless_told_otherwise(copied):
    without_adapter(copied / "adapter")
    run = Run.open(copied)
    gguf.write_gguf.again(run)
    with pytest.raises(VerifyError, match=r"does not answer like the trained model: mean KL is"):
        verify_gguf(run)
    assert run.facts["verify"]["passed"] is False and run.mark("verify") is None
    with pytest.raises(HubError, match="not passed its verification"):
        refuse_unverified(run)
    run.settings = run.settings.model_copy(update={"publish_unverified": True})
    verify_gguf(run)
    refuse_unverified(run)
    assert run.mark("verify")


def test_a_damaged_file_is_a_named_problem(copied, cli):
    path = next((copied / "gguf").glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:1000])
    result = cli("verify", copied)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "cannot be read" in result.stderr
