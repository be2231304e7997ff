"""Pairs become a prompt and two answers in token ids, whatever the chat template; those that do not fit are counted."""

import json

import pytest
from support.chats import TEMPLATES, chat
from support.rows import encode_pairs, load_rows

from autosloth.data.clean import Findings
from autosloth.data.preview import show_preview
from autosloth.data.stage import prepare_data
from autosloth.errors import DataError
from autosloth.models.template import encode_prompt
from autosloth.run import Run
from autosloth.settings import DPOSettings

DPO = DPOSettings(model="demo", dataset="demo", adapter=None, max_length=1024)


def pair(prompt, chosen, rejected):
    return {name: chat(*said)["messages"] for name, said in {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items()}  # fmt: skip


PAIRS = {
    "one turn": pair(["u:What does Mila eat?"], ["a:Figs, I think."], ["a:Who cares? Figs!"]),
    "several turns": pair(["u:One?", "a:Uno.", "u:Zwölf? 十二?"], ["a:Doce 😀."], ["a:Doc\ne."]),
    "an answer begins like the other": pair(["u:Say Uno."], ["a:Uno."], ["a:Uno. Dos."]),
    "system prompt": pair(["s:Be brief.", "u:One?"], ["a:Uno."], ["a:Why?"]),
}


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_is_the_prompt_of_generation_and_two_answers_with_their_end(tokenizer, name, which):
    tokenizer.chat_template, end = TEMPLATES[name]
    if which == "system prompt" and name in ("Gemma", "Mistral"):
        pytest.skip("this template refuses system prompts")
    (row,) = encode_pairs(tokenizer, [PAIRS[which]], DPO, Findings())
    assert row["prompt_ids"].tolist() == encode_prompt(tokenizer, PAIRS[which]["prompt"])
    for side in ("chosen", "rejected"):
        thought = "<think>\n\n</think>\n\n" if name == "Qwen 3" else ""
        answer = PAIRS[which][side][0]["content"]
        assert tokenizer.decode(row[f"{side}_ids"]).strip() == thought + answer + end
    assert row["input_ids"].tolist() == [*row["prompt_ids"], *row["chosen_ids"]]


def words(prompt, chosen, rejected):
    return pair(["u:" + "word " * prompt], ["a:" + "word " * chosen], ["a:" + "other " * rejected])


@pytest.mark.parametrize(
    "row, values, reason",
    [
        (words(60, 1, 1), {}, "prompt_beyond_max_length"),
        (words(1, 60, 1), {"long_rows": "drop"}, "longer_than_max_length"),
        (pair(["u:a"], ["a:" + "word " * 60 + "x"], ["a:" + "word " * 60 + "y"]), {}, "equal_when_cut"),
        (pair(["u:1", "a:call", "t:2"], ["a:x"], ["a:y"]), {}, "turn_left_out_by_template"),
    ],
)
def test_a_pair_that_does_not_fit_is_left_out_and_counted(engine, base, row, values, reason):
    from autosloth.models.engine import load_tokenizer

    settings, found = DPO.model_copy(update={"max_length": 40, **values}), Findings()
    made = load_tokenizer(settings)
    assert len(encode_pairs(made, [row, words(1, 1, 1)], settings, found)) == 1
    assert +found.dropped == {reason: 1}


def test_long_answers_are_cut_to_what_the_trainer_takes(engine, base):
    from autosloth.models.engine import load_tokenizer

    settings, found = DPO.model_copy(update={"max_length": 40}), Findings()
    (row,) = encode_pairs(load_tokenizer(settings), [words(1, 60, 3)], settings, found)
    assert found.truncated == 1 and len(row["prompt_ids"]) + len(row["chosen_ids"]) == 40 > len(row["rejected_ids"]) + len(row["prompt_ids"])  # fmt: skip


def test_what_a_template_says_against_pairs_is_kept(tokenizer):
    tokenizer.chat_template, found = "{{ raise_exception('never') }}", Findings()
    assert encode_pairs(tokenizer, [PAIRS["one turn"] | {"number": 3}], DPO, found) == []
    assert found.refused.listed() == [("never", 1, "rows 3")] and found.dropped["refused_by_template"] == 1


def loaded(tmp_path, rows, **values):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Findings()
    settings = DPOSettings.load({"model": "demo", "dataset": str(tmp_path / "rows.jsonl"), "adapter": None, **values})
    return *load_rows(settings, found), found


def test_pairs_that_teach_nothing_are_counted_and_no_prompt_is_in_both_parts(tmp_path):
    good = [{"prompt": f"{n % 15}?", "chosen": f"{n}", "rejected": f"not {n}"} for n in range(30)]
    bad = [{"prompt": "x", "chosen": "same", "rejected": "same"}, {"prompt": "", "chosen": "a", "rejected": "b"}]
    train, held_out, found = loaded(tmp_path, [*good, *bad, good[0]], eval_fraction=0.2)
    assert (
        found.dropped["equal_answers"] == 1 and found.dropped["empty_question"] == 1 and found.dropped["duplicate"] == 1
    )
    prompts = [{json.dumps(row["prompt"]) for row in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1] and len(held_out) == 6
    assert len(train) + len(held_out) + sum(found.dropped.values()) == found.read == 33


@pytest.mark.parametrize(
    "row, what, todo",
    [
        ({"question": "a", "answer": "b"}, "one answer each, and no pairs", "AutoSloth-SFT takes them"),
        ({"messages": [{"role": "user", "content": "a"}]}, "one answer each", "AutoSloth-SFT takes them"),
        ({"prompt": "a", "completion": "b", "label": False}, "as KTO takes them", "Correct them"),
        ({"chosen": "One day", "rejected": "Next day"}, "without a prompt", "say with `columns`"),
        ({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "c"}]}, "answers to different prompts", "Correct them"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_named_in_two_sentences(tmp_path, row, what, todo):
    with pytest.raises(DataError) as error:
        loaded(tmp_path, [row, row])
    assert what in error.value.what and todo in error.value.todo


def test_columns_of_other_names_are_mapped(tmp_path):
    rows = [{"frage": f"{n}?", "gut": f"{n}", "schlecht": "?"} for n in range(4)]
    train, held_out, _ = loaded(tmp_path, rows, columns={"frage": "prompt", "gut": "chosen", "schlecht": "rejected"})
    assert {row["chosen"][0]["content"] for row in train + held_out} == {"0", "1", "2", "3"}


def test_the_preview_tells_both_answers_apart(engine, base, tmp_path, capsys):
    run = Run.create(DPO.model_copy(update={"storage": str(tmp_path)}))
    prepare_data(run)
    capsys.readouterr()
    show_preview(run)
    page, said = run.path("data", "preview.html").read_text(), capsys.readouterr().out
    assert '<span class="chosen">Gl' in page and '<span class="rejected">U' in page and "pairs to train on" in page
    assert "  chosen   | Gladly!" in said and "  rejected | Ugh, not again!" in said
    facts = run.facts["data"]
    train = run.rows("train")
    assert facts["train_tokens"] == sum(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in train
    )
    assert facts["learnt_tokens"] == sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in train)


def test_real_pairs_are_prepared(engine, base, real_data, tmp_path):
    settings = {"model": "demo", "dataset": str(real_data("dpo_en_demo.json")), "storage": str(tmp_path), "adapter": None, "max_length": 16384}  # fmt: skip
    run = Run.create(DPOSettings.load(settings))
    prepare_data(run)
    facts = run.facts["data"]
    assert facts["read"] == 300 == facts["kept"] + sum(facts["dropped"].values()) and facts["kept"] >= 295
