"""Whatever is named as the dataset becomes chats, or one sentence on what is wrong and one on what to do."""

import functools
import gzip
import http.server
import io
import json
import re
import threading
import zipfile

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.rows import load_rows
from support.strategies import json_values, turn_values

from autosloth.data.clean import Findings
from autosloth.errors import DataError
from autosloth.settings import SFTSettings

ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
CHATS = {("user: 1 + 1?", "assistant: 2"), ("user: 2 + 2?", "assistant: 4")}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "question,answer\n1 + 1?,2\n2 + 2?,4\n"


def chats_of(path, **values):
    """All rows of a dataset as a set of chats, each a tuple of `role: content`; and what was found."""
    found = Findings()
    train, held_out = load_rows(SFTSettings.load({"model": "demo", "dataset": str(path), **values}), found)
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in held_out}
    assert len(train) + len(held_out) + sum(found.dropped.values()) == found.read
    texts = [row.get("text") or tuple(f"{turn['role']}: {turn['content']}" for turn in row["messages"]) for row in train + held_out]  # fmt: skip
    return set(texts), found


def packed(**members):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/").replace("_", "."), content)
    return archive.getvalue()


def arrow(rows, opened):
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with opened(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet(rows):
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow_file(rows):
    import pyarrow

    return arrow(rows, pyarrow.ipc.new_file)


def arrow_stream(rows):
    import pyarrow

    return arrow(rows, pyarrow.ipc.new_stream)


# What is on disk: a name and its content, or several for a folder. Each holds the two rows of ROWS.
FILES = {
    "JSON Lines": {"rows.jsonl": LINES},
    "JSON Lines in capitals": {"ROWS.JSONL": LINES},
    "JSON Lines, blank lines and Windows ends": {"rows.ndjson": LINES.replace("\n", "\r\n\r\n")},
    "JSON Lines with a byte-order mark": {"rows.jsonl": b"\xef\xbb\xbf" + LINES.encode()},
    "JSON Lines in UTF-16": {"rows.jsonl": LINES.encode("utf-16")},
    "a JSON list": {"rows.json": json.dumps(ROWS, indent=2)},
    "JSON Lines named .json": {"rows.json": LINES},
    "JSON wrapped in `data`": {"rows.json": json.dumps({"version": 1, "data": ROWS})},
    "JSON by column": {"rows.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]})},
    "JSON as pandas writes it": {
        "rows.json": json.dumps({key: {"0": ROWS[0][key], "1": ROWS[1][key]} for key in ROWS[0]})
    },
    "CSV": {"rows.csv": CSV},
    "CSV with a byte-order mark": {"rows.csv": b"\xef\xbb\xbf" + CSV.encode()},
    "CSV with semicolons": {"rows.csv": CSV.replace(",", ";")},
    "CSV with tabs": {"rows.csv": CSV.replace(",", "\t")},
    "CSV with quotes and an index": {"rows.csv": ',question,answer\n0,"1 + 1?","2"\n1,"2 + 2?","4"\n'},
    "TSV": {"rows.tsv": CSV.replace(",", "\t")},
    "Parquet": {"rows.parquet": parquet},
    "Arrow file": {"rows.arrow": arrow_file},
    "Arrow stream": {"rows.arrow": arrow_stream},
    "gzipped JSON Lines": {"rows.jsonl.gz": gzip.compress(LINES.encode())},
    "gzipped CSV": {"rows.csv.gz": gzip.compress(CSV.encode())},
    "zipped CSV": {"rows.zip": packed(rows_csv=CSV, __MACOSX__rows_csv="x")},
    "zipped files": {"rows.zip": packed(a__one_jsonl=LINES.splitlines()[0], a__two_jsonl=LINES.splitlines()[1])},
    "a folder": {"one.jsonl": LINES.splitlines()[0], "two.csv": "question,answer\n2 + 2?,4\n", "README.md": "# hi"},
    "a folder as `datasets` saves it": {
        "data-00000-of-00001.arrow": arrow_stream,
        "state.json": "{}",
        "dataset_info.json": "{}",
    },
    "a folder with splits": {"train-00000-of-00001.jsonl": LINES, "test.jsonl": LINES, "validation.jsonl": LINES},
}


def put(folder, files):
    """Write files into a folder; the path of the only one, or of the folder."""
    for name, content in files.items():
        content = content(ROWS) if callable(content) else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / next(iter(files)) if len(files) == 1 else folder


@pytest.mark.parametrize("name", FILES)
def test_rows_are_read_from(tmp_path, name):
    assert chats_of(put(tmp_path, FILES[name]))[0] == CHATS


def turns(*said, role="role", content="content", names=("user", "assistant", "system", "tool")):
    roles = {"u": names[0], "a": names[1], "s": names[2], "t": names[3]}
    return [{role: roles[each[0]], content: each[2:]} for each in said]


SHAREGPT = {"role": "from", "content": "value", "names": ("human", "gpt", "system", "tool")}
CALL = {"name": "add", "arguments": {"a": 1}}
# A row, and the chat that it becomes: u(ser), a(ssistant), s(ystem), t(ool).
FORMS = {
    "Alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ["u:Add.\n\n1, 2", "a:3"]),
    "Alpaca without an input": ({"instruction": "Hi", "input": "", "output": "3", "text": "all"}, ["u:Hi", "a:3"]),
    "Alpaca with a system prompt": ({"instruction": "Hi", "output": "3", "system": "Be."}, ["s:Be.", "u:Hi", "a:3"]),
    "Dolly": ({"instruction": "Who?", "context": "Ann.", "response": "Ann"}, ["u:Who?\n\nAnn.", "a:Ann"]),
    "question, answer": ({"question": "Who?", "answer": "Ann"}, ["u:Who?", "a:Ann"]),
    "capitals and blanks": ({"Question ": "Who?", "ANSWER": "Ann"}, ["u:Who?", "a:Ann"]),
    "question, context, answer": ({"question": "Who?", "context": "T", "answer": "A"}, ["u:Who?\n\nT", "a:A"]),
    "query, response": ({"query": "Who?", "response": "Ann", "id": 7}, ["u:Who?", "a:Ann"]),
    "problem, solution": ({"problem": "1+1", "solution": "2"}, ["u:1+1", "a:2"]),
    "input, output": ({"input": "Who?", "output": "Ann"}, ["u:Who?", "a:Ann"]),
    "user, assistant": ({"user": "Who?", "assistant": "Ann"}, ["u:Who?", "a:Ann"]),
    "prompt, completion": ({"prompt": "Who?", "completion": "Ann"}, ["u:Who?", "a:Ann"]),
    "prompt, completion as turns": (
        {"prompt": turns("s:Be.", "u:Who?"), "completion": turns("a:Ann")},
        ["s:Be.", "u:Who?", "a:Ann"],
    ),
    "messages": ({"messages": turns("u:Who?", "a:Ann")}, ["u:Who?", "a:Ann"]),
    "messages beside a prompt": ({"prompt": "x", "messages": turns("u:Who?", "a:Ann")}, ["u:Who?", "a:Ann"]),
    "several turns": ({"messages": turns("s:Be.", "u:1", "a:2", "u:3", "a:4")}, ["s:Be.", "u:1", "a:2", "u:3", "a:4"]),
    "messages as JSON text": ({"messages": json.dumps(turns("u:Who?", "a:Ann"))}, ["u:Who?", "a:Ann"]),
    "messages by column": (
        {"messages": {"role": ["user", "assistant"], "content": ["Who?", "Ann"]}},
        ["u:Who?", "a:Ann"],
    ),
    "ShareGPT": ({"conversations": turns("s:Be.", "u:Who?", "a:Ann", **SHAREGPT)}, ["s:Be.", "u:Who?", "a:Ann"]),
    "ShareGPT beginning with an answer": ({"conversations": turns("a:Hi", "u:1", "a:2", **SHAREGPT)}, ["u:1", "a:2"]),
    "ShareGPT ending with a question": ({"conversations": turns("u:1", "a:2", "u:3", **SHAREGPT)}, ["u:1", "a:2"]),
    "ShareGPT with a system column": (
        {"system": "Be.", "conversations": turns("u:1", "a:2", **SHAREGPT)},
        ["s:Be.", "u:1", "a:2"],
    ),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]},
                *turns("a:Ann"),
            ]
        },
        ["u:Who?", "a:Ann"],
    ),
    "exchanges": (
        {"conversation": [{"input": "Hi", "output": "Hello"}, {"input": "Who?", "output": "Ann"}]},
        ["u:Hi", "a:Hello", "u:Who?", "a:Ann"],
    ),
    "Alpaca with a history": (
        {"instruction": "Who?", "input": "", "output": "Ann", "history": [["Hi", "Hello"]]},
        ["u:Hi", "a:Hello", "u:Who?", "a:Ann"],
    ),
    "plain text": ({"text": "All of this is learnt. \n"}, "All of this is learnt. \n"),
    "numbers and truth values": ({"question": 7, "answer": True}, ["u:7", "a:true"]),
    "a tool's turn": ({"messages": turns("u:1", "a:call", "t:2", "a:3")}, ["u:1", "a:call", "t:2", "a:3"]),
    "a call in ShareGPT's form": (
        {
            "conversations": [
                *turns("u:1+1", **SHAREGPT),
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2"},
            ]
        },
        ["u:1+1", "a:", "t:2", "a:2"],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_recognised_without_being_told(tmp_path, name):
    row, expected = FORMS[name]
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    if isinstance(expected, list):
        expected = tuple(f"{names[each[0]]}: {each[2:]}" for each in expected)
    chat = {"history": [], **dict.fromkeys(("messages", "conversations", "conversation"), turns("u:other", "a:other"))}
    other = {column: chat.get(column, "other") for column in row}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    assert expected in chats_of(path)[0]


LABELLED = '{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "c", "label": false}\n'
PAIRS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2
MAPPED = {"columns": {"chosen": "completion"}}
# File, content, settings, what is wrong, what to do.
REFUSED = {
    "no such file": ("rows.jsonl", None, {}, "does not exist", "Check the path"),
    "unknown form": ("rows.docx", b"PK", {}, "no form that is known", r"end in \.json, "),
    "empty file": ("rows.jsonl", "", {}, "is empty", "two rows"),
    "empty list": ("rows.json", "[]", {}, "is empty", "two rows"),
    "a broken line": (
        "rows.jsonl",
        LINES + '{"question": "1\n',
        {},
        r"Line 3 of rows\.jsonl is no valid JSON",
        "Correct or delete",
    ),
    "a broken document": (
        "rows.json",
        '[\n{"question": "a"\n"answer": "b"}]',
        {},
        r"Line 3 of rows\.json",
        "Correct or delete",
    ),
    "a line that is no record": (
        "rows.jsonl",
        LINES + "[1, 2]\n",
        {},
        r"Row 3 of rows\.jsonl is \[1, 2\]",
        "Write each row as",
    ),
    "a number": ("rows.json", "3", {}, "holds no list of rows", "Write a list"),
    "deeper than Python goes": ("rows.jsonl", "[" * 100_000, {}, "Line 1 .*nested too deeply", "Correct or delete"),
    "an encoding from another time": (
        "rows.csv",
        "question,answer\na,b\nWer?,Jörg\n".encode("latin-1"),
        {},
        r"no text in UTF-8: line 3 holds the byte 0xF6",
        "Save it as UTF-8",
    ),
    "a web page": ("rows.json", "<!DOCTYPE html><html>", {}, "is a web page", "address of the file itself"),
    "a CSV line with too many cells": (
        "rows.csv",
        CSV + "a,b,c\n",
        {},
        "Line 4 of rows.csv has 3 cells under 2 columns",
        "Quote",
    ),
    "a CSV column twice": ("rows.csv", "a,a\n1,2\n", {}, "two columns named 'a'", "Rename"),
    "a damaged Parquet file": (
        "rows.parquet",
        b"PAR1 and nothing",
        {},
        "cannot be read as Parquet",
        "Write or download",
    ),
    "a damaged Arrow file": ("rows.arrow", b"ARROW1 and nothing", {}, "cannot be read as Arrow", "Write or download"),
    "a damaged archive": ("rows.zip", b"PK and nothing", {}, "cannot be unpacked", "Pack the files again"),
    "a damaged gzip": ("rows.jsonl.gz", b"\x1f\x8b and nothing", {}, "cannot be unpacked", "Pack the files again"),
    "an archive without data": ("rows.zip", packed(readme_rst="hi"), {}, "no form that is known", r"end in \.json"),
    "columns that mean nothing here": (
        "rows.csv",
        "frage,antwort\na,b\n",
        {},
        "not recognised: frage, antwort",
        "columns: {frage: prompt",
    ),
    "a mapping of a column that is not there": (
        "rows.jsonl",
        LINES,
        {"columns": {"x": "prompt"}},
        "`columns` names x",
        "It has: question, answer",
    ),
    "two columns of one meaning": (
        "rows.jsonl",
        LINES,
        {"columns": {"question": "prompt", "answer": "prompt"}},
        "the same meaning",
        "Keep one",
    ),
    "turns that are none": (
        "rows.jsonl",
        '{"messages": ["a", "b"]}\n',
        {},
        "holds no list of turns: ",
        "Give turns such as",
    ),
    "every answer empty": (
        "rows.jsonl",
        '{"question": "a", "answer": ""}\n' * 2,
        {},
        r"2 with an empty answer \(rows 1, 2\)",
        "Correct them",
    ),
    "every answer a mapping": (
        "rows.jsonl",
        '{"question": "a", "answer": {"is": 1}}\n',
        {},
        r"1 with something else .*\(rows 1\)",
        "Correct them",
    ),
    "only questions": (
        "rows.jsonl",
        json.dumps({"messages": turns("u:a", "u:b")}),
        {},
        "1 without an answer to a question",
        "Correct them",
    ),
    "an unknown role": (
        "rows.jsonl",
        json.dumps({"messages": turns("u:a", "a:b", names=("king", "gpt", "", ""))}),
        {},
        "role that is not known",
        "Correct them",
    ),
    "two questions in a row": (
        "rows.jsonl",
        json.dumps({"messages": turns("u:a", "u:b", "a:c")}),
        {},
        "turns out of order",
        "Correct them",
    ),
    "half a character": (
        "rows.jsonl",
        '{"question": "\\ud83d", "answer": "b"}\n',
        {},
        "something else where text",
        "Correct them",
    ),
    "some rows bad, and told to refuse": (
        "rows.jsonl",
        LINES + '{"question": "", "answer": "b"}\n',
        {"bad_rows": "refuse"},
        r"Of the 3 rows .* 1 with an empty question \(rows 3\)",
        "or set `bad_rows: drop`",
    ),
    "equal rows": ("rows.jsonl", '{"question": "a", "answer": "b"}\n' * 20, {}, "only 1 usable row", "two that differ"),
    "rows labelled good and bad": (
        "rows.jsonl",
        LABELLED,
        {},
        "mark each answer as good or bad",
        "Keep only the good ones",
    ),
    "chats labelled good and bad": (
        "rows.jsonl",
        "".join(json.dumps({"messages": turns("u:a", f"a:{i}"), "label": bool(i)}) + "\n" for i in range(2)),
        {},
        "mark each answer as good or bad",
        "columns: {messages: messages}",
    ),
    "labels as a table holds them": (
        "rows.csv",
        "prompt,completion,label\na,b,True\na,c,False\n",
        {},
        "as KTO takes",
        "Keep",
    ),
    "preference pairs": ("rows.jsonl", PAIRS, {}, "a better and a worse answer", "AutoSloth-DPO takes them"),
    "an unknown split": ("rows.jsonl", LINES, {"split": "test"}, "no split `test`", r"that it has \(train\)"),
    "an unknown split to measure with": (
        "rows.jsonl",
        LINES,
        {"eval_split": "test"},
        "no split `test`",
        r"Set `eval_split` to one that it has \(train\)",
    ),
    "a split that means nothing": (
        "rows.jsonl",
        LINES,
        {"split": "train[:abc]"},
        "`train\\[:abc\\]` names no part",
        "Write a split such as",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named_in_two_sentences(tmp_path, name):
    file, content, values, what, todo = REFUSED[name]
    if content is not None:
        put(tmp_path, {file: content})
    with pytest.raises(DataError) as error:
        chats_of(tmp_path / file, **values)
    assert re.search(what, error.value.what) and re.search(todo, error.value.todo), str(error.value)


def test_a_mapping_wins_over_what_is_recognised(tmp_path):
    path = put(
        tmp_path, {"rows.jsonl": PAIRS.replace('"b"', '"b"', 1) + '{"prompt": "x", "chosen": "y", "rejected": "z"}\n'}
    )
    assert chats_of(path, **MAPPED)[0] == {("user: a", "assistant: b"), ("user: x", "assistant: y")}
    path = put(tmp_path, {"rows.csv": "frage,best,question\na,b,x\nc,d,y\n"})
    assert chats_of(path, columns={"frage": "prompt", "best": "completion"})[0] == {("user: a", "assistant: b"), ("user: c", "assistant: d")}  # fmt: skip


def test_bad_rows_are_dropped_counted_by_reason_and_named(tmp_path, capsys):
    bad = [{"question": "", "answer": "x"}, {"question": "x", "answer": None}, {"question": "x", "answer": [1]}]
    path = put(tmp_path, {"rows.jsonl": LINES + "".join(json.dumps(row) + "\n" for row in bad) + LINES})
    chats, found = chats_of(path)
    assert chats == CHATS
    assert +found.dropped == {"empty_question": 1, "empty_answer": 1, "not_text": 1, "duplicate": 2}
    assert "data: of 7 rows, 1 with an empty answer (rows 4): dropped" in capsys.readouterr().out


def test_repairs_are_counted(tmp_path):
    rows = [{"messages": turns("a:Hi", "u:1", "a:2", "u:3")}, {"messages": turns("u:5", "a:6")}]
    chats, found = chats_of(put(tmp_path, {"rows.json": json.dumps(rows)}))
    assert chats == {("user: 1", "assistant: 2"), ("user: 5", "assistant: 6")}
    assert found.changed == {"unasked_start_cut": 1, "unanswered_end_cut": 1}


def test_duplicates_are_kept_when_told_and_never_stand_in_both_parts(tmp_path):
    path = put(tmp_path, {"rows.jsonl": LINES * 20 + '{"question": "3", "answer": "4"}\n'})
    assert chats_of(path)[1].dropped["duplicate"] == 38
    found = Findings()
    settings = SFTSettings.load({"model": "demo", "dataset": str(path), "duplicates": "keep", "eval_fraction": 0.1})
    train, held_out = load_rows(settings, found)
    assert found.dropped["duplicate"] == 0 and len(held_out) == 4
    assert len(train) + len(held_out) + found.dropped["also_held_out"] == 41 and found.dropped["also_held_out"] > 0
    assert not {str(row) for row in train} & {str(row) for row in held_out}


def test_parts_and_sums_of_splits_are_read(tmp_path):
    rows = [json.dumps({"question": f"{i}?", "answer": f"{i}"}) + "\n" for i in range(100)]
    folder = put(tmp_path, {"train.jsonl": "".join(rows[:80]), "test.jsonl": "".join(rows[80:])})
    for split, numbers in (("train[:30]", range(30)), ("train[-10%:]+test[5:7]", [*range(72, 80), 85, 86]), ("test", range(80, 100))):  # fmt: skip
        assert chats_of(folder, split=split)[0] == {(f"user: {i}?", f"assistant: {i}") for i in numbers}


def test_a_given_eval_split_is_measured_with_and_taken_out_of_training(tmp_path):
    rows = [json.dumps({"question": f"{i}?", "answer": f"{i}"}) + "\n" for i in range(50)]
    folder = put(tmp_path, {"train.jsonl": "".join(rows[:40]), "test.jsonl": "".join(rows[35:])})
    found = Findings()
    values = {"model": "demo", "dataset": str(folder), "eval_split": "test", "eval_rows": 12}
    train, held_out = load_rows(SFTSettings.load(values), found)
    assert len(held_out) == 12 and {int(row["messages"][1]["content"]) for row in held_out} <= set(range(35, 50))
    assert found.dropped["more_than_eval_rows"] == 3 and found.dropped["also_held_out"] > 0
    assert len(train) == 40 - found.dropped["also_held_out"] and found.read == 55


def test_the_split_depends_on_the_seed_alone(tmp_path):
    rows = "".join(json.dumps({"question": f"{i}?", "answer": f"{i}"}) + "\n" for i in range(50))
    path = put(tmp_path, {"rows.jsonl": rows})
    parts = [load_rows(SFTSettings.load({"model": "demo", "dataset": str(path), "seed": s}), Findings())[1] for s in (1, 1, 2)]  # fmt: skip
    assert parts[0] == parts[1] != parts[2]


def test_several_datasets_are_read_each_with_its_share(tmp_path, capsys):
    put(tmp_path, {"a.jsonl": "".join(json.dumps({"question": f"a{i}", "answer": "x"}) + "\n" for i in range(200))})
    put(tmp_path, {"b.csv": "frage,antwort\nb1,x\nb2,y\na7,x\n"})
    columns = {"frage": "prompt", "antwort": "completion"}
    parts = [{"path": str(tmp_path / "a.jsonl"), "share": 0.25}, {"path": str(tmp_path / "b.csv"), "columns": columns}]
    found, seeds = Findings(), [SFTSettings.load({"model": "demo", "dataset": parts, "seed": seed}) for seed in (1, 1, 2)]  # fmt: skip
    train, held_out = load_rows(seeds[0], found)
    questions = [row["messages"][0]["content"] for row in train + held_out]
    taken = sum(question.startswith("a") for question in questions)
    assert {"b1", "b2"} < set(questions) and 30 < taken < 70 and len(set(questions)) == len(questions)
    assert found.dropped["beyond_its_share"] + found.dropped["duplicate"] == 203 - len(questions)
    of_a = found.read - 3 - found.dropped["beyond_its_share"]
    assert taken in (of_a, of_a + 1) and f"data: {of_a} rows of {tmp_path / 'a.jsonl'}" in capsys.readouterr().out
    again = [[row["messages"][0]["content"] for row in load_rows(settings, Findings())[0]] for settings in seeds]
    assert again[0] == again[1] != again[2]


def test_the_demo_and_a_split_of_ones_own_can_be_a_part(tmp_path):
    put(tmp_path, {"train.jsonl": LINES, "test.jsonl": LINES.replace("1 + 1", "3 + 3")})
    parts = [{"path": "demo", "share": 0.1}, {"path": str(tmp_path), "split": "test"}]
    train, held_out = load_rows(SFTSettings.load({"model": "demo", "dataset": parts}), Findings())
    questions = [row["messages"][0]["content"] for row in train + held_out]
    assert "3 + 3?" in questions and "1 + 1?" not in questions and len(questions) > 10


def test_a_text_is_read_by_its_paragraphs_and_lies_beside_other_files_unread(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "Word after word. " * 60 for i in range(12)]
    text = "\n\n".join(paragraphs) + "\n"
    put(tmp_path, {"book.md": text})
    passages = sorted(chats_of(tmp_path / "book.md")[0], key=text.index)
    assert len(passages) > 2 and "\n\n".join(passages) == text.rstrip("\n") and max(map(len, passages)) <= 4000
    put(tmp_path, {"rows.jsonl": LINES})
    assert chats_of(tmp_path)[0] == CHATS


def test_a_json_document_may_hold_splits(tmp_path):
    document = {"train": ROWS, "test": [{"question": "3 + 3?", "answer": "6"}, {"question": "4 + 4?", "answer": "8"}]}
    path = put(tmp_path, {"rows.json": json.dumps(document, indent=1)})
    assert chats_of(path)[0] == CHATS
    assert chats_of(path, split="test")[0] == {("user: 3 + 3?", "assistant: 6"), ("user: 4 + 4?", "assistant: 8")}
    assert len(chats_of(path, eval_split="test")[0]) == 4


def test_a_document_that_would_not_fit_into_the_memory_is_refused(tmp_path, monkeypatch):
    import psutil

    path = put(tmp_path, {"rows.json": json.dumps(ROWS)})
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=100))
    with pytest.raises(DataError, match=r"is one JSON document .*Write its rows as JSON Lines or Parquet"):
        chats_of(path)


def test_data_that_would_not_fit_onto_the_disk_is_refused_by_the_check(tmp_path, monkeypatch):
    import collections
    import shutil

    from autosloth.data import refuse_full_disk
    from autosloth.errors import StorageError

    path = put(tmp_path, {"rows.jsonl": LINES})
    usage = collections.namedtuple("usage", "total used free")
    settings = SFTSettings.load({"model": "demo", "dataset": str(path), "storage": str(tmp_path)})
    refuse_full_disk(settings)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 0, 100))
    with pytest.raises(StorageError, match=r"needs about .* GB of disk, .*Free some space"):
        refuse_full_disk(settings)


@pytest.fixture
def address(tmp_path, monkeypatch):
    """The address of a folder's files, served on loopback; what is fetched lands in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield served, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["JSON Lines", "gzipped CSV", "zipped files"])
def test_rows_are_read_from_an_address(address, name):
    served, url = address
    file = put(served, FILES[name])
    assert chats_of(f"{url}/{file.name}?key=secret")[0] == CHATS


def test_an_address_that_answers_nothing_is_named_without_its_key(address):
    with pytest.raises(DataError, match=r"/nothing\.jsonl could not be fetched .* Check it in a browser") as error:
        chats_of(f"{address[1]}/nothing.jsonl?key=secret")
    assert "secret" not in str(error.value)


def test_a_changed_file_at_an_address_is_fetched_again(address):
    served, url = address
    put(served, {"rows.jsonl": LINES})
    chats_of(f"{url}/rows.jsonl")
    put(served, {"rows.jsonl": LINES + '{"question": "new", "answer": "new"}\n'})
    assert ("user: new", "assistant: new") in chats_of(f"{url}/rows.jsonl")[0]


def test_the_page_of_a_dataset_on_the_hub_stands_for_its_id():
    page = "https://huggingface.co/datasets/yahma/alpaca-cleaned/tree/main"
    assert SFTSettings.load({"dataset": page}).dataset == "yahma/alpaca-cleaned"


columns = st.sampled_from(["messages", "instruction", "input", "output", "question", "answer", "text", "tools", "system", "chosen", "label", "x"])  # fmt: skip


@given(st.lists(st.dictionaries(columns, json_values | st.lists(turn_values, max_size=4), max_size=5), max_size=4))
@hypothesis_settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_rows_become_chats_or_a_named_error(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        chats, _ = chats_of(path)
    except DataError as error:
        assert error.what.endswith((".", "]", "}")) and error.todo.endswith(".")
    else:
        assert len(chats) >= 2
