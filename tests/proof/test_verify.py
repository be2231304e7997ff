"""A right GGUF passes; a wrong one fails with what differs, and is not published."""

import json
import re
import shutil
import sys

import numpy
import pytest
from safetensors.torch import load_file, save_file
from support.commands import made_once
from support.official import converted
from support.tiny_models import tiny_adapter, tiny_model

from autosloth.child_process import Ended
from autosloth.demo import demo_base
from autosloth.errors import HubError, ModelError, VerifyError
from autosloth.export import gguf, llama
from autosloth.notebook.live import summary_lines
from autosloth.proof import behaviour, rounding
from autosloth.proof import tensors as weights
from autosloth.proof.behaviour import compare_behaviour, compare_distributions
from autosloth.proof.reference import load_to_answer
from autosloth.proof.tally import Tally, allowed, conclude, is_seen
from autosloth.proof.tokens import STRINGS, judge
from autosloth.proof.verdict import LIMITS, cure, find_failures, proof_rows, show_proof, verdict, weight_rows, worst_of
from autosloth.proof.verify import prove, verify_file, verify_gguf
from autosloth.publish.card import render_card
from autosloth.publish.folder import write_card
from autosloth.publish.hub import refuse_unverified
from autosloth.run import Run, file_sizes, read_json


def test_the_exported_file_is_proven(finished):
    proof = read_json(finished / "facts.json")["verify"]
    (file,) = proof["files"]
    assert proof["passed"] and proof["token_mismatches"] == 0 and proof["failures"] == []
    assert proof["mean_kl"] < 0.01 and proof["top1"] > 0.95 and proof["positions"] >= 200 and proof["texts"] > 60
    assert file["bos"] == file["bos_trained"] == 1 and file["eos"] is True and file["template"] is True
    assert file["weights"]["form"] == "whole" and file["weights"]["tensors"] == 39
    assert abs(file["weights"]["adapter_share"] - 1) < 0.01 and file["weights"]["mean_error"] < 0.01
    assert len(file["answers"]) == 4 and all(answer["same"] for answer in file["answers"])
    told = json.loads((finished / "verify" / "short-Q8_0.weights.json").read_text())
    assert len(told) == 39 and all(0 <= tensor["excess"] <= 1 for tensor in told)


class Scores:
    """As much of llama.cpp's model as the distributions are read from."""

    def __init__(self, scores):
        self.scores = scores

    def reset(self):
        pass

    def eval(self, ids):
        pass


def parted(nats, positions=20):
    """Logits of two tokens at each position, the first ahead by so many nats."""
    return numpy.tile([nats / 2, -nats / 2], (positions, 1))


@pytest.mark.parametrize(
    "trained, file, agreement",
    [
        (0.05, -0.05, 1.0),  # ties that a rounding of 0.00125 nats turns
        (1.0, -1.0, 0.0),  # another opinion
        (0.001, -0.001, 1.0),  # as good as equal
        (0.25, -0.001, 1.0),
        (0.3, -0.3, 0.0),  # more than Q8_0's limit of 0.01 nats makes of a tie
    ],
)
def test_positions_disagree_beyond_what_the_divergence_makes_of_a_tie(trained, file, agreement):
    logprobs = parted(trained) - numpy.logaddexp(trained / 2, -trained / 2)
    found = compare_distributions(Scores(parted(file)), [[0] * 20], logprobs, 0.01)
    assert found["positions"] == 20 and found["top1"] == agreement
    assert found["mean_kl"] == pytest.approx((trained - file) ** 2 / 8, rel=0.2)


# ------------------------------------------------------------------------------------------------- weights, by seeded faults
def make_tiny(folder):
    """base/, adapter/, and by llama.cpp's converter plain.gguf of the base and right.gguf of PEFT's merge."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_model("llama", folder / "base")
    adapter = tiny_adapter(base, folder / "adapter")
    shutil.copytree(base, folder / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder / "merged")
    converted(
        (base, folder / "plain.gguf", "q8_0"),
        (folder / "merged", folder / "right.gguf", "q8_0"),
        (folder / "merged", folder / "right-f16.gguf", "f16"),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, worker_id, engine):
    """A tiny Llama with an adapter, and files of both (see make_tiny). Not to be changed."""
    return made_once(tmp_path_factory, worker_id, "tiny", make_tiny)


@pytest.fixture
def compared(tiny, monkeypatch):
    """compared(file, rows=None, adapter=True) -> the figures of a file's weights, found in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def compare(file, rows=None, adapter=tiny / "adapter"):
        request = {"converter": str(llama.fetch_converter()), "file": str(file), "source": str(tiny / "base")}
        return weights.main(request | {"adapter": adapter and str(adapter), "told": None, "rows": rows})

    return compare


FORMS = pytest.mark.parametrize("rows", [None, 16], ids=["every weight", "a sample of rows"])


@FORMS
@pytest.mark.parametrize("name, error", [("right", 0.0065), ("right-f16", 0.0004)])
def test_the_converters_own_file_of_pefts_merge_passes(compared, tiny, rows, name, error):
    found = compared(tiny / f"{name}.gguf", rows)
    assert found["failures"] == [] and found["tensors"] == 21 and 0 < found["mean_error"] < error
    assert abs(found["adapter_share"] - 1) < 0.02


@FORMS
def test_a_file_without_the_adapter_fails(compared, tiny, rows):
    found = compared(tiny / "plain.gguf", rows)
    assert len(found["failures"]) == 14 and all("of what the adapter does, not 1" in each for each in found["failures"])
    assert abs(found["adapter_share"]) < 0.02


@FORMS
def test_an_adapter_too_small_to_be_seen_has_no_share_and_no_verdict(compared, tiny, tmp_path, rows):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * (1e-9 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}, path)
    found = compared(tiny / "plain.gguf", rows, tmp_path / "adapter")
    assert found["failures"] == [] and found["adapter_share"] is None and found["adapter_unseen"]
    file = {"file": "x.gguf", "type": "Q8_0", "weights": found | {"form": "whole"}, "failures": []}
    file["passed"] = verdict(file)
    worst = worst_of([file])
    assert file["passed"] is None and worst["passed"] is None and "less than Q8_0 rounds them" in worst["no_verdict"]
    assert ("share of the adapter's change that is in the weights", "not to be seen: the change is smaller than what Q8_0 rounds", "-") in proof_rows(file)  # fmt: skip
    assert worst_of([file, file | {"passed": False, "failures": ["wrong"]}])["passed"] is False
    assert not compared(tiny / "right.gguf", rows)["adapter_unseen"]


@FORMS
def test_an_adapter_at_half_its_scale_fails(compared, tiny, tmp_path, rows):
    shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 32}))
    found = compared(tiny / "right.gguf", rows, tmp_path / "adapter")
    assert len(found["failures"]) == 14 and found["adapter_share"] == pytest.approx(0.5, abs=0.02)


def test_an_adapter_that_drowns_in_each_tensor_is_looked_for_in_all_of_them():
    each = dict(kind="Q4_K", values=10_000, square_error=100.0, square_change=0.25, largest=1.0, sum=1.0)
    missing = [Tally(f"blk.{n}.x", overlap=-0.25, **each) for n in range(100)]
    assert not any(is_seen([tally]) for tally in missing) and not any(tally.failure for tally in missing)
    found = conclude(missing, [], [])
    assert found["adapter_share"] == 0 and found["wrong_tensors"] == 0 and found["adapter_share_within"] == pytest.approx(0.22)  # fmt: skip
    assert found["failures"] == ["the tensors together hold 0.00 of what the adapter does, not 1"]
    there = conclude([Tally(f"blk.{n}.x", overlap=-0.25 * 0.2, **each) for n in range(100)], [], [])
    assert there["failures"] == [] and there["adapter_share"] == pytest.approx(0.8)
    row = next(row for row in weight_rows({"weights": there | {"form": "whole"}}) if row[0].startswith("share"))
    assert row[1:] == ("0.800", "0.78 to 1.22")


def with_swapped_tensors(data):
    first, second = data["blk.0.ffn_gate.weight"], data["blk.1.ffn_gate.weight"]
    first[:], second[:] = second.copy(), first.copy()


def with_another_permutation(data):
    """Rotary halves in Hugging Face's order, as a converter that forgot to permute would leave them."""
    rows = data["blk.1.attn_q.weight"]
    heads = rows.reshape(4, 8, 2, -1)
    rows[:] = heads.swapaxes(1, 2).reshape(rows.shape).copy()


def with_one_tensor_of_the_base(data):
    data["blk.1.attn_v.weight"][:] = data["plain"]["blk.1.attn_v.weight"]


def with_a_scale_that_is_off(data):
    data["blk.0.attn_norm.weight"][:] *= 1.01


def with_a_number_that_is_none(data):
    data["output_norm.weight"][3] = float("nan")


def tensors_of(path, mode="r"):
    """{name: the tensor's bytes or numbers} of a GGUF file, to be changed in place."""
    return {tensor.name: tensor.data for tensor in weights.read_gguf(path, mode).tensors}


@FORMS
@pytest.mark.parametrize(
    "spoil, wrong",
    [
        (with_swapped_tensors, ["blk.0.ffn_gate.weight", "blk.1.ffn_gate.weight"]),
        (with_another_permutation, ["blk.1.attn_q.weight"]),
        (with_one_tensor_of_the_base, ["blk.1.attn_v.weight"]),
        (with_a_scale_that_is_off, ["blk.0.attn_norm.weight"]),
        (with_a_number_that_is_none, ["output_norm.weight"]),
    ],
)
def test_a_fault_in_one_place_is_found_there(compared, tiny, tmp_path, rows, spoil, wrong):
    compared(tiny / "right.gguf", rows)  # gguf-py can be imported from now on
    shutil.copyfile(tiny / "right.gguf", tmp_path / "wrong.gguf")
    spoil(tensors_of(tmp_path / "wrong.gguf", "r+") | {"plain": tensors_of(tiny / "plain.gguf")})
    found = compared(tmp_path / "wrong.gguf", rows)["failures"]
    assert [each.split()[0] for each in found] == wrong


def test_another_shape_of_the_model_is_found(compared, tiny, tmp_path):
    content = (tiny / "right.gguf").read_bytes()
    key = b"llama.rope.freq_base"
    at = content.index(key) + len(key) + 4
    import struct

    (tmp_path / "wrong.gguf").write_bytes(content[:at] + struct.pack("<f", 5e5) + content[at + 4 :])
    assert compared(tmp_path / "wrong.gguf")["failures"] == ["llama.rope.freq_base is 500000.0, not 10000.0"]
    row = ("values of the model's shape", "llama.rope.freq_base is 500000.0, not 10000.0", "as in the model")
    assert row in weight_rows({"weights": compared(tmp_path / "wrong.gguf") | {"form": "whole"}})


def test_a_type_without_a_rule_is_refused():
    import numpy

    with pytest.raises(VerifyError, match="IQ1_S"):
        allowed("IQ1_S", numpy.ones((1, 256), numpy.float32))


# --------------------------------------------------------------------------------------------------------- tokens and answers
@pytest.fixture(scope="module")
def opened(finished):
    """llama.cpp with the finished run's file, and what is known of the trained model."""
    model = llama.llama_cpp().Llama(str(next((finished / "gguf").glob("*.gguf"))), vocab_only=True, verbose=False)
    yield model, read_json(finished / "reference" / "rows.json")
    model.close()


def test_every_kind_of_text_and_every_special_token_is_tokenised(opened):

    model, known = opened
    texts = [row["text"] for row in known["strings"]]
    assert len(STRINGS) >= 40 and set(STRINGS) < set(texts) and {"<s>", "</s>", "<unk>"} < set(texts)
    assert all(judge(model, row["text"], row["input_ids"]) == "same" for row in known["strings"])


def test_only_a_missing_composition_is_tolerated(opened):
    """The ids of a tokenizer that composes characters are those of the composed text, and no others."""
    model, _ = opened
    composed, apart = "caf\u00e9", "cafe\u0301"
    ids = {text: model.tokenize(text.encode(), add_bos=False, special=True) for text in (composed, apart)}
    assert ids[composed] != ids[apart]
    assert judge(model, apart, ids[apart]) == "same" and judge(model, apart, ids[composed]) == "normalised"
    assert judge(model, composed, ids[apart]) == "other" and judge(model, apart, ids[composed][:-1]) == "other"


def spoil_template(known):
    known["template"] += " "


def spoil_ids(known):
    known["strings"][7]["input_ids"][-1] += 1


def spoil_bos(known):
    known["answers"][0]["prompt"] = known["answers"][0]["prompt"][:1] + known["answers"][0]["prompt"]


def never_ending(known):
    for answer in known["answers"]:
        answer["answer"][-1] = 0  # <unk>, which the file will not say
    known["ends"] = [0]


@pytest.mark.parametrize(
    "spoil, failure",
    [
        (spoil_template, "the chat template in the file is another one, or missing"),
        (spoil_ids, "1 of 187 texts become other tokens than in training ('Hello world')"),
        (spoil_bos, "a prompt has 1 BOS, 2 in training"),
        (never_ending, "an answer that the trained model ends goes on without an end token"),
    ],
)
@pytest.mark.parametrize("short", [False, True], ids=["full", "short"])
def test_what_the_file_says_otherwise_is_named(finished, spoil, failure, short):
    known = read_json(finished / "reference" / "rows.json")
    spoil(known)
    file = next((finished / "gguf").glob("*.gguf"))
    facts = read_json(finished / "facts.json")["verify"]["files"][0]
    facts |= compare_behaviour(file, known, finished / "reference" / "logprobs.npy", short, 0.01)
    assert failure in find_failures(facts) and facts["positions"] == (48 if short else 256)
    assert cure(find_failures(facts))


# --------------------------------------------------------------------------------------------------------- the stage and the command
def without_adapter(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    still = {name: tensor * 0 for name, tensor in load_file(path).items()}
    save_file(still, path, metadata={"format": "pt"})  # as PEFT does: a file of another size would be refused


def test_a_failed_proof_stops_the_road_and_blocks_publishing_unless_told_otherwise(copied, capsys, cli):
    shutil.copytree(copied / "adapter", copied / "kept")
    without_adapter(copied / "adapter")
    run, mark = Run.open(copied), copied / ".done" / "train.json"
    told = mark.read_text()
    mark.write_text(json.dumps(json.loads(told) | {"hashes": {}}))  # else the adapter would be refused as another one
    gguf.write_gguf.again(run)
    mark.write_text(told)
    shutil.rmtree(copied / "adapter")
    (copied / "kept").rename(copied / "adapter")
    with pytest.raises(VerifyError, match=r"holds 0.00 of what the adapter does.* mean KL is .*Export again"):
        verify_gguf(run)
    assert run.facts["verify"]["passed"] is False and run.mark("verify") is None
    with pytest.raises(HubError, match="not passed its verification"):
        refuse_unverified(run)
    card = cli("card", copied)
    assert (
        card.returncode == 1 and "The stage `verify` of" in card.stderr and "failed: The GGUF does not" in card.stderr
    )
    assert "Run `autosloth verify" not in card.stderr and "Export again" in card.stderr
    shown = " ".join(cli("show", copied).stdout.split())
    assert "held-out loss" in shown and "verification NOT passed: " in shown and "talk to it" not in shown
    assert "verify failed The GGUF does not answer like the trained model: " in shown
    assert shown.endswith("not done card, publish"), shown
    run.settings = run.settings.model_copy(update={"publish_unverified": True})
    capsys.readouterr()
    verify_gguf(run)
    refuse_unverified(run)
    assert run.mark("verify") and run.failure("verify") is None
    said = capsys.readouterr().out
    assert (
        "set `publish_unverified" not in said
        and "It goes on all the same, because `publish_unverified` is set." in said
    )


def test_of_an_adapter_alone_it_is_said_what_is_proven_and_what_is_not(copied, capsys):
    run = Run.open(copied)
    run.settings = run.settings.model_copy(update={"quantizations": ["adapter"]})
    gguf.write_gguf(run)
    verify_gguf(run)
    said = " ".join(capsys.readouterr().out.split())
    assert "not compared: they are the base file's" in said and "is the trained model" not in said
    assert "verify: passed: the adapter's file holds what was trained, matrix by matrix; it was not run" in said
    card = render_card(run)
    assert "was held against the trained adapter, matrix by matrix, and not run:" in card
    assert "the GGUF is the trained model" not in card and "trained model itself" not in card
    assert "llama-cli -m BASE.gguf --lora short-ADAPTER.gguf" in card and "ADAPTER ./short-ADAPTER.gguf" in card
    write_card(run)
    lines = dict(summary_lines(run))
    assert lines["use it"].startswith("llama-cli -m BASE.gguf --lora ") and "talk to it" not in lines
    assert lines["verification"].endswith(" compared, no tokens, no answers") and "not run" in lines["which means"]


def test_a_damaged_file_is_a_named_problem(copied, cli):
    path = next((copied / "gguf").glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:1000])
    result = cli("verify", copied)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "cannot be read" in result.stderr


def test_any_file_is_held_against_any_model(tiny, cli):
    right = cli("verify", tiny / "right.gguf", "--against", tiny / "base", "--adapter", tiny / "adapter")
    assert right.returncode == 0, right.stderr
    assert "right.gguf (Q8_0): passed" in right.stdout and "0 of 21 (every weight" in right.stdout
    wrong = cli("verify", tiny / "right.gguf", "--against", tiny / "base")
    assert wrong.returncode == 1 and "NOT passed" in wrong.stdout
    assert "right.gguf is not" in wrong.stderr and "Traceback" not in wrong.stderr
    assert "14 of 21 tensors are wrong" in wrong.stderr
    assert "If a trained adapter is in the file, name it with `--adapter`. If not: export again" in wrong.stderr


def test_the_adapter_that_was_named_may_be_another_one(tiny, tmp_path):
    other = shutil.copytree(tiny / "adapter", tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    turned = {name: weight.flip(0) if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(turned, other / "adapter_model.safetensors")
    with pytest.raises(VerifyError, match=f"is not {tiny / 'base'} with the adapter {other}: ") as error:
        verify_file(tiny / "right.gguf", str(tiny / "base"), str(other))
    assert error.value.todo.startswith(f"Name the adapter that is in the file, if it is another than {other}")


def test_a_file_of_another_architecture_is_told_in_a_sentence(tiny, tmp_path, cli):
    other = tiny_model("qwen3", tmp_path / "other", steps=0)
    result = cli("verify", tiny / "right.gguf", "--against", other)
    told = "it is of another architecture: that of the file is llama, that of the model qwen3; 2"
    assert result.returncode == 1 and told in result.stderr and "--adapter" not in result.stderr
    wrong, tensors = map(int, re.search(r"(\d+) of (\d+) tensors are wrong", result.stderr).groups())
    assert wrong <= tensors and "Name the model that the file was made of" in result.stderr


def test_an_empty_answer_is_shown_as_such(capsys):
    weights_of = {"form": "whole", "tensors": 1, "wrong_tensors": 0, "failures": [], "mean_error": 0, "adapter_share": None}  # fmt: skip
    answers = [{"question": "Who?", "trained": "", "file": "", "same": True}]
    show_proof({"file": "x", "type": "F16", "weights": weights_of, "answers": answers, "passed": True, "seconds": 1, "failures": []})  # fmt: skip
    assert "   model | (nothing)\n    file | (nothing)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, code, what",
    [
        (["none.gguf", "--against", "demo"], 1, "There is no file none.gguf"),
        ([__file__], 2, "add --against MODEL"),
    ],
)
def test_what_cannot_be_compared_is_said(cli, arguments, code, what):
    result = cli("verify", *arguments)
    said = " ".join(result.stderr.replace("│", " ").split())  # a usage error comes in a box, its lines broken
    assert result.returncode == code and what in said and "Traceback" not in said


def without_sentencepiece_scores(folder):
    from sentencepiece import sentencepiece_model_pb2 as format

    model = format.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        piece.score = 0.0
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def with_another_template(folder):
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, failure",
    [
        (without_sentencepiece_scores, "become other tokens than in training"),
        (with_another_template, "the chat template in the file is another one"),
    ],
)
def test_a_file_converted_from_spoiled_files_fails_with_what_differs(copied, spoil, failure):
    run = Run.open(copied)
    spoil(copied / "adapter")
    (copied / ".done" / "train.json").write_text(
        json.dumps(run.mark("train") | {"files": file_sizes(run, ("adapter", "reference")), "hashes": {}})
    )
    gguf.write_gguf.again(run)
    file = next((copied / "gguf").glob("*.gguf"))
    from autosloth.models.base import model_files, model_source

    proof = prove(file, copied / "reference", model_files(model_source(run.settings)), copied / "adapter")
    assert not proof["passed"] and any(failure in phrase for phrase in proof["failures"])


# ------------------------------------------------------------------------------------------- the file, its rounding, or llama.cpp's arithmetic
def prove_again(folder):
    """The proof of the file of a finished run on the demo, with its table."""
    file = next((folder / "gguf").glob("*.gguf"))
    proof = prove(file, folder / "reference", demo_base(), folder / "adapter")
    return proof, {check: (found, limit) for check, found, limit in proof_rows(proof)}


@pytest.mark.slow
def test_a_model_that_minds_the_rounding_is_held_to_the_next_coarser_type(copied, monkeypatch):
    """As if Q8_0 had to be as near as this model is without rounding (4e-7 nats); it is at 4e-4."""
    monkeypatch.setitem(LIMITS, 8, (1e-4, 0.95))
    proof, rows = prove_again(copied)
    assert proof["cause"] == "rounding" and proof["passed"] and proof["limits"]["mean_kl"] == LIMITS[6][0]
    assert proof["unrounded"]["type"] == "F32" and proof["unrounded"]["mean_kl"] < 1e-5 < 1e-4 < proof["mean_kl"]
    assert "it is the rounding of Q8_0" in rows["the same model without rounding (F32)"][0]
    agree = next(check for check in rows if check.startswith("positions whose most likely token agrees"))
    assert rows[agree][1] == "-" and f"one at most {proof['tie']:.2g} nats behind it counts too" in agree
    monkeypatch.setitem(LIMITS, 6, (2e-4, 0.93))
    proof, _ = prove_again(copied)
    assert not proof["passed"] and "above 0.0002" in proof["failures"][0] and "of more bits" in cure(proof["failures"])


def test_what_parts_without_rounding_too_is_llama_cpps_arithmetic(copied):
    """As if transformers had computed something else: the distributions of the reference are moved by one token."""
    path = copied / "reference" / "logprobs.npy"
    numpy.save(path, numpy.roll(numpy.load(path), 1, axis=1))
    proof, rows = prove_again(copied)
    assert proof["cause"] == "arithmetic" and not proof["passed"] and proof["limits"]["mean_kl"] == LIMITS[8][0]
    assert "llama.cpp computes this model otherwise than it was trained" in proof["failures"][0]
    assert "no type of GGUF helps" in cure(proof["failures"]) and "arithmetic" in rows["the same model without rounding (F32)"][0]  # fmt: skip


def test_where_the_user_named_the_base_it_may_be_to_blame(copied):
    """As if it were another than was trained: merged/ and the file would both be wrong, and the proof must not call merged/ right."""
    path = copied / "reference" / "logprobs.npy"
    numpy.save(path, numpy.roll(numpy.load(path), 1, axis=1))
    run = Run.open(copied)
    run.settings = run.settings.model_copy(update={"sixteen_bit_model": str(demo_base())})
    with pytest.raises(VerifyError) as error:
        verify_gguf.__wrapped__(run)
    assert "named as `sixteen_bit_model` answers otherwise than the one that was trained" in error.value.what
    assert "See that `sixteen_bit_model` names the weights" in error.value.todo and "merged/" not in error.value.todo


@pytest.mark.slow
def test_of_a_model_that_was_trained_in_4_bit_the_base_may_be_to_blame(copied):
    known = read_json(copied / "reference" / "rows.json")
    (copied / "reference" / "rows.json").write_text(json.dumps(known | {"quantized": True}))
    path = copied / "reference" / "logprobs.npy"
    numpy.save(path, numpy.roll(numpy.load(path), 1, axis=1))
    proof, rows = prove_again(copied)
    assert proof["cause"] == "base" and not proof["passed"] and "than its 4-bit form" in proof["failures"][0]
    assert "load_in_4bit: false" in cure(proof["failures"]) and "4 bits" in rows["the same model without rounding (F32)"][0]  # fmt: skip


def test_where_the_model_cannot_be_made_without_rounding_the_failure_stays(copied, monkeypatch):
    monkeypatch.setitem(LIMITS, 8, (1e-4, 0.95))
    monkeypatch.setattr(rounding, "fetch_converter", lambda: copied / "none")
    proof, rows = prove_again(copied)
    assert proof["cause"] is None and not proof["passed"] and "not made" in rows["the same model without rounding"][0]


def test_a_file_of_which_something_else_is_wrong_is_not_asked_again(copied):
    known = read_json(copied / "reference" / "rows.json")
    spoil_ids(known)
    (copied / "reference" / "rows.json").write_text(json.dumps(known))
    path = copied / "reference" / "logprobs.npy"
    numpy.save(path, numpy.roll(numpy.load(path), 1, axis=1))
    proof, _ = prove_again(copied)
    assert not proof["passed"] and "cause" not in proof


def test_long_answers_alone_are_looked_at_where_they_end(finished):
    """All answers of a model may be longer than what the file answers itself; its end is looked for behind the shortest that ended."""
    known = read_json(finished / "reference" / "rows.json")
    for answer in known["answers"]:
        answer["answer"] = known["strings"][10]["input_ids"][:1] * 90 + answer["answer"]
    file = next((finished / "gguf").glob("*.gguf"))
    found = compare_behaviour(file, known, finished / "reference" / "logprobs.npy", False, 0.01)
    assert len(found["answers"]) == 1 and found["answers"][0]["ended"] is None and found["eos"] in (True, False)


def test_a_file_that_ends_llama_cpp_is_a_named_problem(finished, monkeypatch):
    monkeypatch.setattr(behaviour, "run_apart", lambda *_, **__: Ended(-6, {}, "ggml.c:1: GGML_ASSERT(x) failed\n"))
    with pytest.raises(VerifyError, match=r"could not run .*ended by signal 6: ggml.c:1: GGML_ASSERT\(x\) failed"):
        behaviour.behaviour_of(next((finished / "gguf").glob("*.gguf")), finished / "reference", False, 0.01)


def test_one_expert_of_many_without_the_adapter_is_named():
    random = numpy.random.default_rng(0)
    base, change = (random.normal(size=(64 * 8, 32)).astype("float32") * scale for scale in (1, 0.2))
    merged, experts = base + change, numpy.arange(64 * 8) // 8
    noise = random.uniform(-1, 1, size=base.shape) * 0.01

    def failure(found):
        whole, stack = Tally("blk.0.ffn_up_exps.weight", "Q8_0"), Tally("blk.0.ffn_up_exps.weight", "Q8_0")
        whole.add(base, merged, found, numpy.ones_like(base))
        stack.add_stack(experts, base, merged, found, numpy.ones_like(base))
        return whole.failure, stack.failure

    assert failure(merged + noise) == (None, None)
    lost = numpy.where(experts[:, None] == 5, base, merged) + noise
    assert failure(lost) == (None, "blk.0.ffn_up_exps.weight, expert 5, holds 0.00 of what the adapter does, not 1")


def test_an_adapter_with_a_matrix_that_the_model_has_no_layer_for_is_refused(tmp_path, engine):
    """PEFT leaves it out with a warning, and the file would be held against the base."""
    from safetensors.torch import load_file, save_file

    base = tiny_model("llama", tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.0.", "text.layers.0."): weight for name, weight in load_file(path).items()}, path)
    with pytest.raises(
        ModelError, match=r"does not fit .*base, which has no layer for \S*text\.layers\.0\S* .*Name the model"
    ):
        load_to_answer(base, adapter)
