"""What a row holds in a form that is none of the usual ones is written as it is meant, or the row is left out by name; never half of it."""

import gzip
import json
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from support.chats import CHATML, SETTINGS, chat
from support.rows import encode_rows, load_rows, usable

from autosloth.data.clean import LOOKED_AT, Findings
from autosloth.data.transforms import tree
from autosloth.errors import DataError
from autosloth.settings import DPOSettings, SFTSettings, SPINSettings

DPO = DPOSettings(model="demo", dataset="demo", adapter=None, bad_rows="drop")
DROPS = SFTSettings(model="demo", bad_rows="drop")
GOOD = {"question": "Who?", "answer": "Me"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def end_of(row, settings=DROPS):
    """What a row beside a good one of the same columns becomes, or the reason why it is left out."""
    found = Findings()
    good = dict(GOOD) if "question" in row else chat("u:Who?", "a:Me") if "messages" in row else {"prompt": "Who?", "completion": "Me", "chosen": "Me", "rejected": "No"}  # fmt: skip
    made = usable([good, row], "x", settings, found)
    (reason,) = [reason for reason, count in found.dropped.items() if count] or [None]
    return (made[1] if len(made) > 1 else None, reason, found)


def answered(**turn):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ok", **turn}]}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": [{"title": "T", "text": "Passage."}], "answer": "b"}, "not_text"),
        ({"question": "a", "answer": [{"text": "Ann", "type": "PER"}, {"text": "Ulm", "type": "LOC"}]}, "not_text"),
        ({"question": "a", "answer": "b", "context": b"IMPORTANT"}, "not_text"),
        ({"question": "a", "answer": "b", "context": [b"IMPORTANT"]}, "not_text"),
        ({"question": "a", "answer": "b", "history": "User said hi"}, "not_text"),
        ({"question": "a", "answer": "b", "history": [["Hi", None]]}, "not_text"),
        ({"question": "a", "answer": "b", "tools": "get_weather(city)"}, "odd_tools"),
        ({"question": "a", "answer": "b", "tools": '[{"name": "f"}'}, "odd_tools"),
        ({"question": "a", "answer": "b", "tools": [{"name": "\ud83d"}]}, "odd_tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "b"}]}, "not_text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "tool_result", "content": "b"}]}, {"role": "assistant", "content": "b"}]}, "not_text"),
        (answered(tool_calls="f(1)"), "odd_call"),
        (answered(tool_calls=["f"]), "odd_call"),
        (answered(function_call="f"), "odd_call"),
        (answered(tool_calls=[{"name": "f", "arguments": {}, "more": 1}]), "odd_call"),
        (answered(tool_calls=[{"name": "\ud83d", "arguments": {}}]), "odd_call"),
        (answered(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}, "when": "now"}}]), "odd_call"),
        (answered(tool_calls=[{"type": "function", "function": {"name": "f"}, "result": 4}]), "odd_call"),
        (answered(reasoning={"steps": ["x"]}), "not_text"),
        (answered(reasoning=["step 1", "step 2"]), "not_text"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_to_the_model_leaves_its_row_out_by_name(row, reason):
    made, why, _ = end_of(row)
    assert made is None and why == reason


@pytest.mark.parametrize(
    "turn, calls",
    [
        ({"tool_calls": {"name": "f", "arguments": {"x": 1}}}, [CALL]),
        ({"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}, [{"id": "1", **CALL}]),
        ({"function_call": '{"name": "f", "arguments": "{}"}'}, [{"type": "function", "function": {"name": "f", "arguments": {}}}]),
        ({"tool_calls": [{"type": "function", "function": "f", "arguments": {"x": 1}}]}, [CALL]),
        ({"tool_calls": [{"tool": "f", "args": {"x": 1}}]}, [CALL]),
        ({"tool_calls": [{"name": "f", "parameters": {"x": 1}}]}, [CALL]),
    ],
)  # fmt: skip
def test_calls_of_other_forms_are_brought_into_one(turn, calls):
    made, _, _ = end_of(answered(**turn))
    assert made["messages"][1]["tool_calls"] == calls


def test_calls_in_a_text_are_calls_only_if_all_are():
    said = '[{"name": "f", "arguments": {}}, {"unclear": 1}]'
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": said}, {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}]  # fmt: skip
    made, _, _ = end_of({"messages": turns})
    assert made["messages"][1] == {"role": "assistant", "content": said}


def test_tools_alone_and_in_texts_are_tools():
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in (tool, json.dumps(tool), [json.dumps(tool)], [tool]):
        assert end_of({"question": "a", "answer": "b", "tools": tools})[0]["tools"] == [tool]
    assert "tools" not in end_of({"question": "a", "answer": "b", "tools": "none"})[0]


def test_a_history_may_be_turns():
    turns = chat("u:Hi", "a:Hello")["messages"]
    for history in (turns, json.dumps(turns), [["Hi", "Hello"]]):
        made, _, _ = end_of({"question": "a", "answer": "b", "history": history})
        assert made["messages"] == [*turns, *chat("u:a", "a:b")["messages"]]


def test_what_tools_tell_is_written_as_json_and_counted():
    for content in ([{"name": "temp", "value": "15"}], {"temp": 15}):
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": content}, {"role": "assistant", "content": "b"}]}  # fmt: skip
        made, _, found = end_of(row)
        assert json.loads(made["messages"][2]["content"]) == content
        assert found.changed["tool_result_written_as_json"] == 1


def test_thoughts_are_found_wherever_they_stand():
    assert end_of(answered(reasoning_content="", reasoning="hm"))[0]["messages"][1]["reasoning_content"] == "hm"
    parts = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, {"type": "text", "text": "ok"}]
    assert end_of(answered(content=parts))[0]["messages"][1] == {"role": "assistant", "content": "ok", "reasoning_content": "hm"}  # fmt: skip
    made, _, found = end_of(answered(content=[{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "ok"}], reasoning_content="hm"))  # fmt: skip
    assert made["messages"][1]["reasoning_content"] == "hm\n\nso" and found.changed["thoughts_joined"] == 1
    rows = [{"question": "a", "thinking_trajectory": ["one", "two"], "attempt": "b"}, {"question": "c", "thinking_trajectory": ["three"], "attempt": "d"}]  # fmt: skip
    assert [row["messages"][1]["reasoning_content"] for row in usable(rows, "x", DROPS, Findings())] == ["one\n\ntwo", "three"]  # fmt: skip


def test_keys_of_turns_that_nothing_reads_are_named():
    turns = [{"role": "user", "content": "a", "text": "second", "name": "Ann", "reasoning": "hm"}, {"role": "assistant", "content": "b", "text": "b"}]  # fmt: skip
    found = Findings()
    usable([{"messages": turns}], "x", DROPS, found)
    assert sorted(name.split()[-1] for name in found.unused) == ["name", "reasoning", "text"]


def test_a_column_that_is_to_be_ignored_is_ignored_by_schemas_too():
    settings = DROPS.model_copy(update={"columns": {"passage": "ignore"}})
    (row,) = usable([{"question": "a", "passage": "T", "answer": "b"}], "x", settings, Findings())
    assert row["messages"] == chat("u:a", "a:b")["messages"]


@pytest.mark.parametrize("inside, expected", [(["u:Q1"], ["s:Be rude.", "u:Q0", "a:A0", "u:Q1"]), (["u:Q0", "a:A0", "u:Q1"], ["s:Be rude.", "u:Q0", "a:A0", "u:Q1"])])  # fmt: skip
def test_a_prompt_is_not_cut_to_what_the_answers_repeat(inside, expected):
    prompt = chat("s:Be rude.", "u:Q0", "a:A0", "u:Q1")["messages"]
    row = {"prompt": prompt, "chosen": chat(*inside, "a:good")["messages"], "rejected": chat(*inside, "a:bad")["messages"]}  # fmt: skip
    (pair,) = usable([row], "x", DPO, Findings())
    assert pair["prompt"] == chat(*expected)["messages"] and pair["chosen"] == chat("a:good")["messages"]
    (pair,) = usable([row | {"prompt": chat("s:Be rude.", "u:Q1")["messages"]}], "x", DPO, Findings())
    assert pair["prompt"][0] == prompt[0] and pair["prompt"][-1] == prompt[-1]


def test_a_prompt_that_is_the_beginning_of_a_word_is_not_taken_off():
    (pair,) = usable([{"prompt": "I", "chosen": "It is good", "rejected": "If not"}], "x", DPO, Findings())
    assert pair["chosen"][0]["content"] == "It is good"


def test_bad_answers_are_not_learnt_where_some_labels_are_missing():
    rows = [{"prompt": f"{i}?", "completion": str(i), "label": [True, False, None][i % 3]} for i in range(9)]
    with pytest.raises(DataError, match="mark each answer as good or bad"):
        usable(rows, "x", DROPS, Findings())


@pytest.mark.parametrize("good, bad", [(1, 0), ("good", "bad"), (1, -1), ("thumbs_up", "thumbs_down"), (True, False)])
def test_what_dpo_takes_for_thumbs_sft_refuses(good, bad):
    rows = [{"prompt": f"{i // 2}?", "completion": f"{i}", "label": [good, bad][i % 2]} for i in range(4)]
    assert len(usable(rows, "x", DPO, Findings())) == 2
    with pytest.raises(DataError, match="mark each answer as good or bad"):
        usable(rows, "x", DROPS, Findings())
    assert len(usable(rows[::2], "x", DROPS, Findings())) == 2, "all of them good"


def test_what_most_rows_are_wins_over_a_column_that_few_have():
    rows = [{"prompt": f"{i}?", "completion": "x"} for i in range(20)] + [chat("u:a", "a:b")] * 3
    found = Findings()
    assert len(usable(rows, "x", DROPS, found)) == 20 and found.unused == ["messages"]
    alone = [{"messages": []}] * 20 + [chat("u:a", "a:b"), chat("u:c", "a:d")]
    assert len(usable(alone, "x", DROPS, Findings())) == 2, "there is nothing else that most could be"


def test_questions_may_be_names_of_columns():
    rows = [{"Timestamp": "1", "What is it?": "a", "Why?": "because"}]
    with pytest.raises(DataError, match="are not recognised"):
        usable(rows, "x", DROPS, Findings())


def test_answers_of_one_kind_are_not_guessed_to_be_better_and_worse_ones():
    with pytest.raises(DataError, match="hold one answer each, and no pairs") as told:
        usable([{"instruction": "Translate", "input": "Hund", "output": "dog"}], "x", DPO, Findings())
    assert "columns" not in told.value.todo


def test_self_play_refuses_plain_texts():
    settings = SPINSettings(model="demo", dataset="demo")
    with pytest.raises(DataError, match="plain texts; self-play needs questions"):
        usable([{"text": "Once."}], "x", settings, Findings())


def test_thoughts_that_no_switch_can_turn_off_are_counted(tokenizer):
    tokenizer.chat_template, found = CHATML, Findings()
    rows = [chat("u:a", "a:<think>hm</think>b"), chat("u:c", "a:d")]
    assert len(encode_rows(tokenizer, usable(rows, "x", SETTINGS, found), SETTINGS, found)) == 2
    assert found.noted["thoughts_learnt_as_the_template_has_no_switch"] == 1
    hidden = [{"question": "a", "complex_cot": "hm", "response": "b"}]
    assert len(encode_rows(tokenizer, usable(hidden, "x", SETTINGS, found), SETTINGS, found)) == 1
    assert found.noted["thoughts_learnt_as_the_template_has_no_switch"] == 1, "left out by the template"
    assert found.changed["thought_left_out_by_template"] == 1


def test_an_answer_without_a_label_is_not_a_bad_one():
    rows = [{"prompt": "a?", "completion": f"{i}", "label": label} for i, label in enumerate([True, False, None])]
    rows += [{"prompt": "b?", "completion": "good", "label": True}, {"prompt": "b?", "completion": "unmarked", "label": None}]  # fmt: skip
    found = Findings()
    (pair,) = usable(rows, "x", DPO, found)
    assert pair["rejected"][0]["content"] == "1" and +found.dropped == {"no_label": 2, "no_counterpart": 1}


def test_rows_beyond_a_share_do_not_take_their_copies_along(tmp_path):
    for name in "ab":
        lines = [json.dumps({"question": f"{i}?", "answer": str(i)}) for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = [{"path": str(tmp_path / "a.jsonl"), "share": 0.1}, {"path": str(tmp_path / "b.jsonl")}]
    found = Findings()
    train, held_out = load_rows(SFTSettings(model="demo", dataset=mixture), found)
    assert len(train) + len(held_out) == 200
    assert found.dropped["beyond_its_share"] + found.dropped["duplicate"] == 200


def test_a_row_that_is_left_out_is_not_among_the_changed_ones(tokenizer):
    tokenizer.chat_template, found = CHATML, Findings()
    rows = [{"question": "a ", "answer": "b"}] * 3 + [{"question": "c ", "answer": "d " * 500}]
    settings = SETTINGS.model_copy(update={"max_length": 200, "long_rows": "drop"})
    assert len(encode_rows(tokenizer, usable(rows, "x", settings, found), settings, found)) == 1
    assert +found.dropped == {"duplicate": 2, "longer_than_max_length": 1} and +found.changed == {"outer_blanks_cut": 1}


def test_columns_that_come_late_are_told():
    rows = [{"question": f"{i}?", "answer": "x"} for i in range(LOOKED_AT)]
    late = {"question": "?", "answer": "x", "system": "Be brief."}
    with pytest.raises(DataError, match="Row 1001 of x is the first one with a column `system`"):
        usable([*rows, late], "x", DROPS, Findings())
    usable([*rows, late | {"system": ""}, {"question": "!", "answer": "x", "other": 1}], "x", DROPS, Findings())
    usable([*rows, late], "x", DROPS.model_copy(update={"columns": {"system": "ignore"}}), Findings())


def test_messages_that_reply_to_each_other_do_not_end_in_a_loop():
    root = {"id": None, "parent": None, "role": "prompter", "text": "q"}
    rows = [root, {"id": "1", "parent": "1", "role": "prompter", "text": "a"}, {"id": ["2"], "parent": "1", "role": "assistant", "text": "b"}]  # fmt: skip
    chats, left = tree(rows, "best")
    assert [[turn["content"] for turn in made["messages"]] for _, made in chats] == [["q"], ["a", "b"]]
    assert left == {"other_branch": []}
    round_about = [{"id": "1", "parent": "2", "role": "prompter", "text": "a"}, {"id": "2", "parent": "1", "role": "assistant", "text": "b"}]  # fmt: skip
    assert tree(round_about, "best") == ([], {"other_branch": [1, 2]})


def read(tmp_path, name, content):
    """The usable rows of a file, and what was found."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = Findings()
    train, held_out = load_rows(SFTSettings(model="demo", dataset=str(path), bad_rows="drop"), found)
    return [row["messages"] or row["text"] for row in train + held_out], found


@pytest.mark.parametrize(
    "rows",
    [
        {"id": 0, "turns": chat("u:hi", "a:yo")["messages"]},
        {"question": "hi", "answer": "yo", "sources": [{"question": "src?", "answer": "src"}]},
        {"prompt": "hi", "completion": "yo", "docs": [{"text": "doc"}]},
    ],
)
def test_a_document_of_one_row_is_that_row(tmp_path, rows):
    (tmp_path / "many").mkdir()
    other = json.loads(json.dumps(rows).replace('"hi', '"hi again'))
    (tmp_path / "many" / "a.json").write_text(json.dumps(rows))
    (tmp_path / "many" / "b.json").write_text(json.dumps(other))
    train, held_out = load_rows(SFTSettings(model="demo", dataset=str(tmp_path / "many")), Findings())
    assert sorted(row["messages"][0]["content"] for row in train + held_out) == ["hi", "hi again"]
    wrapped = {"conversations": [{"messages": chat(f"u:{i}", "a:x")["messages"]} for i in range(3)]}
    assert len(read(tmp_path, "wrapped.json", json.dumps(wrapped))[0]) == 3


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.csv", 'question,answer\n"q1", "line1\nline2"\n"q2","b"\n', "Line 2 of a.csv has a blank before a quote"),
        ("a.csv", 'question,answer\n"q1", "said"\n"q2","b"\n', "Line 2 of a.csv has a blank before a quote"),
        ("a.csv", "What is A?,It is a.\nWhat is B?,It is b.\n", "its first line is a row"),
        ("a.csv", "question,answer\na,b\rc\nd,e\n", "a carriage return stands alone within a cell"),
        ("a.tsv", 'question\tanswer\nq1\t"multi\nline"\nq2\tb\n', "Line 3 of a.tsv goes on with a quoted cell"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "completion": "c"}\n', r"Line 1 of a.jsonl is no valid JSON \(the key 'completion' stands twice"),
        ("a.json", '[{"prompt": "a", "completion": "b", "completion": "c"}]', r"a.json is no valid JSON \(the key 'completion' stands twice"),
        ("a.json", "[" + "1" * 5000 + "]", "a.json is no valid JSON"),
        ("a.jsonl", "[" + "1" * 5000 + "]", r"Line 1 of a.jsonl is no valid JSON \(Exceeds"),
    ],
)  # fmt: skip
def test_a_file_that_would_be_read_otherwise_than_it_is_meant_is_refused(tmp_path, name, content, told):
    with pytest.raises(DataError, match=told):
        read(tmp_path, name, content)


def test_excels_line_tells_the_delimiter_and_quotes_in_a_cell_are_text(tmp_path):
    rows, _ = read(tmp_path, "a.csv", 'sep=;\nquestion;answer\n"q1";" ""said"" so"\nq2;b, "c"\n')
    assert sorted(turns[1]["content"] for turns in rows) == [' "said" so', 'b, "c"']


def test_splits_are_found_in_packed_documents_too(tmp_path):
    content = json.dumps({"train": [{"question": f"{i}?", "answer": "x"} for i in range(3)], "test": [GOOD]})
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(content.encode()))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("c.json", content)
        archive.writestr("d.jsonl.gz", gzip.compress((json.dumps(GOOD | {"answer": "You"}) + "\n").encode()))
    for name, count in (("a.json.gz", 3), ("b.zip", 4)):
        train, held_out = load_rows(SFTSettings(model="demo", dataset=str(tmp_path / name)), Findings())
        assert len(train) + len(held_out) == count


def test_rows_of_a_plain_text_are_no_longer_than_what_is_learnt(tmp_path, tokenizer):
    paragraphs = [f"{i} " + "word " * 20 for i in range(60)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found, settings = Findings(), SFTSettings(model="demo", dataset=str(tmp_path / "book.txt"), max_length=128)
    train, held_out = load_rows(settings, found)
    assert max(len(row["text"]) for row in train + held_out) <= 3 * 128 and len(train) > 15
    assert sum(row["text"].count("word") for row in train + held_out) == 60 * 20
    encode_rows(tokenizer, train, settings.model_copy(update={"max_length": 20}), found)
    assert found.truncated == len(train) and found.cut_tokens == sum(found.lengths) - 20 * len(train)


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    for name in (
        "part1.jsonl",
        "part2.jsonl.zst",
        "part3.xlsx",
        "notes.txt",
        "test-cases.jsonl",
        "README.md",
        ".hidden",
    ):
        (tmp_path / name).write_text("\n".join(json.dumps({"question": f"{i}{name}", "answer": "x"}) for i in range(3)))
    load_rows(SFTSettings(model="demo", dataset=str(tmp_path)), Findings())
    said = capsys.readouterr().out
    assert f"data: not read of {tmp_path.name}: notes.txt, part2.jsonl.zst, part3.xlsx\n" in said
    assert (
        "data: left out as the split `test`, by name: test-cases.jsonl; `eval_split: test` measures with it\n" in said
    )


@pytest.mark.parametrize("row, left", [({"question": "a", "answer": "b", "note": "\ud83d"}, 3), ({"question": "a", "answer": "\ud83d"}, 2)])  # fmt: skip
def test_halves_of_characters_end_in_no_error(tmp_path, row, left):
    lines = [json.dumps(each) for each in (row, GOOD, GOOD | {"answer": "You"})]
    rows, found = read(tmp_path, "a.jsonl", "\n".join(lines))
    json.dumps(found.examples, ensure_ascii=False).encode()
    assert len(rows) == left


def test_parquet_that_python_cannot_hold_is_a_named_problem(tmp_path):
    table = pyarrow.table({"question": ["a", "b"], "answer": ["c", "d"], "when": pyarrow.array([2**45, 0], pyarrow.timestamp("s"))})  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a", "b"])] * 3, names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    for name, told in (("a", "cannot be read as Parquet"), ("b", "two columns are named 'completion'")):
        with pytest.raises(DataError, match=told):
            load_rows(SFTSettings(model="demo", dataset=str(tmp_path / f"{name}.parquet")), Findings())


def test_rows_of_a_file_with_other_columns_are_no_empty_questions(tmp_path):
    one, other = [{"question": f"{i}?", "answer": str(i)} for i in range(4)], [{"title": "x", "body": "y"}] * 2
    found = Findings()
    assert len(usable(one + other, "x", DROPS, found)) == 4 and +found.dropped == {"other_form": 2}
    for name, rows in {"a": one, "b": [{"prompt": "a?", "response": "b"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as error:
        load_rows(SFTSettings(model="demo", dataset=str(tmp_path)), Findings())
    assert "Files with other columns are datasets of their own" in error.value.todo
    each = SFTSettings.load({"model": "demo", "dataset": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]})
    assert sum(map(len, load_rows(each, Findings()))) == 5
