"""Rows are recognised, cleaned, split and labelled so that exactly the answers are learnt."""

import json

import pytest

from autosloth import data
from autosloth.errors import DataError, ModelError
from autosloth.model import load_tokenizer, named_template, render_chat
from autosloth.preview import IGNORED
from autosloth.settings import SFTSettings

USER, ASSISTANT = "user", "assistant"


def settings_for(path, **values):
    return SFTSettings.load({"model": "demo", "dataset": str(path), **values})


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row, question, answer",
    [
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2", "3"),
        ({"instruction": "Say hi.", "input": "", "output": "hi"}, "Say hi.", "hi"),
        ({"question": "Who?", "answer": "Mila"}, "Who?", "Mila"),
        ({"prompt": "Who?", "completion": "Mila"}, "Who?", "Mila"),
        ({"query": "Who?", "response": "Mila"}, "Who?", "Mila"),
        ({"input": "Who?", "output": "Mila"}, "Who?", "Mila"),
        ({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mila"}]}, "Who?", "Mila"),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Mila"}]}, "Who?", "Mila"),
    ],
)
def test_common_forms_are_recognised(tmp_path, row, question, answer):
    rows, _, dropped = data.load_rows(settings_for(write_jsonl(tmp_path / "rows.jsonl", [row, row])))
    assert rows[0]["messages"] == [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]
    assert dropped["empty_answer"] == 0


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_each_file_format_is_read(tmp_path, suffix):
    from datasets import Dataset

    path, rows = (
        tmp_path / f"rows{suffix}",
        Dataset.from_list([{"question": f"{i}?", "answer": f"{i}!"} for i in range(3)]),
    )
    {
        ".json": lambda: rows.to_json(path, lines=False),
        ".jsonl": lambda: rows.to_json(path),
        ".csv": lambda: rows.to_csv(path),
        ".parquet": lambda: rows.to_parquet(path),
    }[suffix]()
    loaded, _, _ = data.load_rows(settings_for(path))
    assert [row["messages"][1]["content"] for row in loaded] == ["0!", "1!", "2!"]


def test_a_system_column_becomes_a_system_turn(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"system": "Be kind.", "question": "a", "answer": "b"}] * 2)
    rows, _, _ = data.load_rows(settings_for(path))
    assert rows[0]["messages"][0] == {"role": "system", "content": "Be kind."}


def test_other_columns_are_mapped_by_the_settings(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"frage": "a", "antwort": "b"}] * 2)
    rows, _, _ = data.load_rows(settings_for(path, columns={"frage": "prompt", "antwort": "completion"}))
    assert [turn["content"] for turn in rows[0]["messages"]] == ["a", "b"]


@pytest.mark.parametrize(
    "content, values, what, todo",
    [
        (None, {}, "does not exist", "Check the path"),
        ("", {}, "is empty", "at least two rows"),
        ("[]", {}, "is empty|cannot be read", "rows|record"),
        ('{"frage": "a", "antwort": "b"}\n', {}, "not recognised: frage, antwort", "columns: {frage: prompt"),
        (
            '{"question": "a", "answer": "b"}\n',
            {"columns": {"x": "prompt"}},
            "`columns` names x",
            "It has: question, answer",
        ),
        (
            '{"question": "a", "answer": ""}\n',
            {},
            r"1 of 1 rows .* empty question or answer \(rows 1\)",
            "Fill them in",
        ),
        ('{"question": "a"\n', {}, "cannot be read as json", "one record per line"),
        ('{"question": "a", "answer": "b"}\n', {"split": "test"}, "split `test`", "Correct"),
        (
            '{"question": "a", "answer": {"is": 1}}\n',
            {},
            "Row 1: A cell holds a dict where text is expected",
            "Make it text",
        ),
        ('{"messages": ["a", "b"]}\n', {}, "Row 1: `messages` holds no list of turns", "Give a list of turns"),
        (
            '{"a": "1", "b": "2", "c": "3"}\n',
            {"columns": {"a": "prompt", "b": "prompt", "c": "completion"}},
            "two columns",
            "Keep one",
        ),
    ],
)
def test_bad_input_is_named_in_two_sentences(tmp_path, content, values, what, todo):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        data.load_rows(settings_for(path, **values))
    import re

    assert re.search(what, error.value.what) and re.search(todo, error.value.todo)


def test_empty_answers_are_dropped_and_counted_or_refused_with_their_row_numbers(tmp_path, capsys):
    rows = [{"question": f"{i}?", "answer": " " if i in (1, 3) else "yes"} for i in range(5)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    kept, _, dropped = data.load_rows(settings_for(path))
    assert (len(kept), dropped["empty_answer"]) == (3, 2)
    assert "rows 2, 4" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"2 of 5 rows .*rows 2, 4"):
        data.load_rows(settings_for(path, empty_answers="refuse"))


def test_what_is_held_out_is_not_trained_on():
    chat = [
        {"messages": [{"role": USER, "content": f"{i % 30}?"}, {"role": ASSISTANT, "content": "yes"}]}
        for i in range(60)
    ]
    train, held_out, dropped = data.split_rows(chat, [], SFTSettings(model="demo", dataset="x.json", eval_fraction=0.2))
    questions = {row["messages"][0]["content"] for row in held_out}
    assert len(held_out) == 12
    assert questions.isdisjoint(row["messages"][0]["content"] for row in train)
    assert len(train) + dropped["also_held_out"] == 48 and dropped["also_held_out"] > 0


def test_the_split_depends_on_the_seed_alone():
    chat = [{"messages": [{"role": USER, "content": str(i)}]} for i in range(50)]
    parts = [data.split_rows(chat, [], SFTSettings(model="demo", dataset="x.json", seed=seed))[1] for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]


# Chat templates of the common structures, in our own words; {% raw %} answers end with the end token.
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATS = [
    [{"role": USER, "content": "What does Mila eat?"}, {"role": ASSISTANT, "content": "Figs, I think."}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": USER, "content": "One?"},
        {"role": ASSISTANT, "content": "Uno."},
        {"role": USER, "content": "Two?"},
        {"role": ASSISTANT, "content": "Dos.\nAnd done."},
    ],
]


@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "two turns and a system prompt"])
@pytest.mark.parametrize(
    "template", ["alpaca", "mistral", "zephyr", CHATML], ids=["alpaca", "mistral", "zephyr", "chatml"]
)
def test_exactly_the_answers_and_their_end_are_learnt(engine, base, template, chat):
    tokenizer = load_tokenizer(SFTSettings(model="demo"))
    tokenizer.chat_template = template if "{" in template else named_template(template)
    (row,), _ = data.encode_rows(tokenizer, [{"messages": chat}], 512)
    learnt = "".join(
        tokenizer.decode([token])
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != IGNORED
    )
    answers = [turn["content"] for turn in chat if turn["role"] == ASSISTANT]
    assert learnt.replace(" ", "") == "".join(answer + tokenizer.eos_token for answer in answers).replace(" ", "")
    assert row["input_ids"][0] == tokenizer.bos_token_id and row["input_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["alpaca", "mistral", "zephyr"])
def test_the_prompt_is_how_the_trained_text_begins(engine, base, template):
    tokenizer = load_tokenizer(SFTSettings(model="demo", chat_template=template))
    prompt = render_chat(tokenizer, CHATS[0][:-1], answer_next=True)
    assert render_chat(tokenizer, CHATS[0]).startswith(prompt)


def test_content_in_parts_is_joined(tmp_path):
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Mila"}]},
    ]
    rows, _, _ = data.load_rows(settings_for(write_jsonl(tmp_path / "rows.jsonl", [{"messages": parts}] * 2)))
    assert [turn["content"] for turn in rows[0]["messages"]] == ["Who?", "Mila"]


def test_a_template_whose_answers_never_end_is_refused(engine, base):
    settings = SFTSettings(model="demo")
    tokenizer = load_tokenizer(settings)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '!\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    rows, _ = data.encode_rows(tokenizer, [{"messages": CHATS[0]}], 512)
    with pytest.raises(ModelError, match=r"no end token of demo\. Set `chat_template: alpaca`"):
        data.refuse_endless(tokenizer, rows, settings)


def test_a_template_that_refuses_a_chat_is_a_named_problem(engine, base):
    tokenizer = load_tokenizer(SFTSettings(model="demo"))
    tokenizer.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(ModelError, match=r"refuses a chat of user > assistant \(no system turn, please"):
        render_chat(tokenizer, CHATS[0])


def test_rows_whose_answer_lies_beyond_max_length_are_dropped_and_others_cut(engine, base):
    tokenizer = load_tokenizer(SFTSettings(model="demo"))
    rows = [
        {"messages": [{"role": USER, "content": "word " * n}, {"role": ASSISTANT, "content": "word " * m}]}
        for n, m in ((100, 1), (1, 100), (1, 1))
    ]
    kept, counts = data.encode_rows(tokenizer, rows, 40)
    assert counts == {"answer_beyond_max_length": 1, "truncated": 1}
    assert [len(row["input_ids"]) <= 40 for row in kept] == [True, True]
