"""Chats become token ids and labels so that exactly the answers are learnt, whatever the chat template."""

import json

import pytest
from support.chats import ASSISTANT, CHATS, NO_SYSTEM, SETTINGS, TEMPLATES, chat
from support.rows import encode_rows

from autosloth.data import stage as data
from autosloth.data.clean import Findings
from autosloth.data.encode import IGNORED
from autosloth.errors import DataError, ModelError
from autosloth.models.engine import load_tokenizer
from autosloth.models.template import encode_prompt, named_template, render_chat
from autosloth.run import Run
from autosloth.settings import SFTSettings


def learnt_texts(tokenizer, row):
    """The stretches of a row that are learnt, decoded."""
    stretches, current = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            current.append(int(token))
        elif current:
            stretches, current = [*stretches, tokenizer.decode(current)], []
    return [*stretches, tokenizer.decode(current)] if current else stretches


@pytest.mark.parametrize("which", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_and_their_end_are_learnt(tokenizer, name, which):
    tokenizer.chat_template, end = TEMPLATES[name]
    if which == "system prompt" and name in ("Gemma", "Mistral"):
        pytest.skip("this template refuses system prompts")
    found = Findings()
    (row,) = encode_rows(tokenizer, [CHATS[which]], SETTINGS, found)
    answers = [turn["content"] + end for turn in CHATS[which]["messages"] if turn["role"] == ASSISTANT]
    if name == "Qwen 3":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
    assert [text.strip() for text in learnt_texts(tokenizer, row)] == answers
    assert found.answers_not_learnt == 0
    prompt = encode_prompt(tokenizer, CHATS[which]["messages"][:-1])
    assert row["input_ids"][: len(prompt)].tolist() == prompt and (row["labels"][: len(prompt)] == IGNORED)[-1]


def test_an_answer_that_cannot_be_found_again_is_counted(tokenizer):
    shouting = "{% for m in messages %}{{ '<|open|>' + m.role + '\n' + (m.content if loop.last or m.role == 'user' else m.content | upper) + '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% endif %}"
    tokenizer.chat_template, found = shouting, Findings()
    (row,) = encode_rows(tokenizer, [CHATS["several turns"]], SETTINGS, found)
    assert learnt_texts(tokenizer, row) == ["Doce 😀 (十二).<|over|>"] and found.answers_not_learnt == 2
    tokenizer.chat_template = shouting.replace(
        "m.content if loop.last or m.role == 'user' else m.content | upper",
        "m.content if m.role == 'user' else m.content | upper",
    )
    assert encode_rows(tokenizer, [CHATS["several turns"]], SETTINGS, found) == []
    assert found.dropped["answer_not_found_in_template"] == 1


def test_rows_that_a_template_refuses_or_does_not_show_whole_are_dropped_and_counted(tokenizer):
    rows = [CHATS["one turn"], CHATS["system prompt"], chat("u:1", "a:call", "t:2", "a:3")]
    found = Findings()
    tokenizer.chat_template = NO_SYSTEM
    assert len(encode_rows(tokenizer, rows, SETTINGS, found)) == 2 and found.dropped["refused_by_template"] == 1
    tokenizer.chat_template = named_template("alpaca")
    assert len(encode_rows(tokenizer, rows, SETTINGS, found)) == 2 and found.dropped["turn_left_out_by_template"] == 1
    assert found.refused.count == {"no system turn, please": 1}
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert encode_rows(tokenizer, [row | {"number": 7} for row in rows[1:]], SETTINGS, found) == []
    assert found.refused.listed()[1:] == [("never", 2, "rows 7, 7")] and found.dropped["refused_by_template"] == 3


def test_tools_and_calls_are_kept_where_the_template_shows_them(tokenizer):
    tokenizer.chat_template = "{% if tools %}{{ 'Tools: ' + (tools | tojson) + '\n' }}{% endif %}{% for m in messages %}{{ '<|open|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}{{ '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% endif %}"
    row = chat("u:1 + 1?", "a:", "t:2", "a:It is 2.")
    row["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    row["tools"] = [{"type": "function", "function": {"name": "add"}}]
    (encoded,) = encode_rows(tokenizer, [row], SETTINGS, Findings())
    assert learnt_texts(tokenizer, encoded) == ['add{"a": 1}<|over|>', "It is 2.<|over|>"]
    assert encoded["text"].removeprefix("<s>").startswith('Tools: [{"type": "function"')


def test_plain_text_is_learnt_whole_with_one_begin_and_one_end(tokenizer):
    rows = [{"messages": [], "text": text} for text in ("Sloths sleep.", "<s>Sloths sleep.</s>")]
    for row in encode_rows(tokenizer, rows, SETTINGS, Findings()):
        assert [text.removeprefix("<s>") for text in learnt_texts(tokenizer, row)] == ["Sloths sleep.</s>"]
        assert row["input_ids"].tolist().count(tokenizer.eos_token_id) == 1


def test_long_rows_are_cut_or_dropped_and_those_whose_answer_lies_beyond_are_always_dropped(engine, base):
    tokenizer = load_tokenizer(SETTINGS)
    rows = [chat("u:" + "word " * n, "a:" + "word " * m) for n, m in ((100, 1), (1, 100), (1, 1))]
    found = Findings()
    kept = encode_rows(tokenizer, rows, SFTSettings(model="demo", max_length=40), found)
    assert (found.dropped, found.truncated) == ({"answer_beyond_max_length": 1}, 1)
    assert [len(row["input_ids"]) <= 40 for row in kept] == [True, True] and max(found.lengths) > 100
    found = Findings()
    assert len(encode_rows(tokenizer, rows, SFTSettings(model="demo", max_length=40, long_rows="drop"), found)) == 1
    assert +found.dropped == {"answer_beyond_max_length": 1, "longer_than_max_length": 1} and not found.truncated


@pytest.mark.parametrize("template", ["alpaca", "mistral", "zephyr"])
def test_the_prompt_is_how_the_trained_text_begins(engine, base, template):
    tokenizer = load_tokenizer(SFTSettings(model="demo", chat_template=template))
    messages = CHATS["one turn"]["messages"]
    assert render_chat(tokenizer, messages).startswith(render_chat(tokenizer, messages[:-1], answer_next=True))


def test_a_template_whose_answers_never_end_is_refused(engine, base):
    tokenizer = load_tokenizer(SETTINGS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '!\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    rows = encode_rows(tokenizer, [CHATS["one turn"]], SETTINGS, Findings())
    with pytest.raises(ModelError, match=r"no end token of demo\. Set `chat_template: alpaca`"):
        data.refuse_endless(tokenizer, rows[0], SETTINGS)


@pytest.fixture
def prepared(engine, base, tmp_path):
    """A function that prepares rows, given as a list or as a file, and gives the run."""

    def prepare(rows, **values):
        path = tmp_path / "rows.jsonl"
        if isinstance(rows, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"model": "demo", "dataset": str(path if isinstance(rows, list) else rows), "storage": str(tmp_path)}
        run = Run.create(SFTSettings.load(settings | values))
        data.prepare_data(run)
        return run

    return prepare


def test_the_facts_add_up_and_the_rows_come_back_as_they_were(prepared):
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(40)]
    run = prepared([*rows, rows[0], {"question": "", "answer": "x"}], eval_fraction=0.1)
    facts, train, held_out = run.facts["data"], run.rows("train"), run.rows("eval")
    assert facts["read"] == 42 and facts["dropped"] == {"empty_question": 1, "duplicate": 1}
    assert (facts["kept"], facts["train_rows"], facts["eval_rows"]) == (40, len(train), len(held_out)) == (40, 36, 4)
    assert facts["train_tokens"] == sum(len(row["input_ids"]) for row in train)
    assert facts["learnt_tokens"] == sum(label != IGNORED for row in train for label in row["labels"])
    assert sum(facts["length"]["histogram"]["rows"]) == 40 and facts["form"] == "prompt"
    assert sorted(row["messages"][0]["content"] for part in (train, held_out) for row in part) == sorted(row["question"] for row in rows)  # fmt: skip
    assert all(row["text"].startswith("<s>### Instruction:\nWhat is") and row["tools"] is None for row in train)


def test_equal_rows_give_an_equal_fingerprint_and_other_rows_another(prepared):
    rows = [{"question": f"{i}?", "answer": f"{i}"} for i in range(10)]
    prints = [prepared(some, run_name=f"run{i}").facts["data"]["fingerprint"] for i, some in enumerate((rows, rows, rows[1:]))]  # fmt: skip
    assert prints[0] == prints[1] != prints[2]


def test_when_nothing_fits_the_error_says_what_became_of_the_rows(prepared):
    rows = [{"question": "word " * 100 + str(i), "answer": "yes"} for i in range(5)]
    with pytest.raises(DataError, match=r"0 to learn from, 0 to measure with \(5 answer beyond max length; max_length 64\)\. Raise `max_length`"):  # fmt: skip
        prepared(rows, max_length=64)
    tools = [chat("u:1", "a:call", "t:2", f"a:{i}") for i in range(5)]
    with pytest.raises(DataError, match=r"5 turn left out by template; .*Choose another `chat_template`"):
        prepared(tools)


@pytest.mark.parametrize("name, rows", [("gsm8k_train.jsonl", 7473), ("alpaca_en_demo.json", 999)])
def test_real_rows_are_prepared(prepared, real_data, name, rows):
    facts = prepared(real_data(name)).facts["data"]
    assert facts["read"] == rows == facts["kept"] + sum(facts["dropped"].values())
    assert sum(facts["dropped"].values()) < 0.02 * rows
