"""What stands in a row is what is learnt, or the row is in a count: each kind of damage that was seen, and a property over all."""

import datetime
import json

import jinja2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.chats import CHATML, HEADERS, SETTINGS, THINKING, chat
from support.rows import encode_pairs, encode_rows, usable

from autosloth.data.clean import Findings
from autosloth.data.encode import IGNORED
from autosloth.data.files import read_source
from autosloth.data.layout import Template
from autosloth.data.sources import Source
from autosloth.errors import DataError
from autosloth.models.template import held_date, named_template, render_chat, with_fixed_date, without_thinking
from autosloth.settings import DPOSettings, SFTSettings

THINKS = SFTSettings(model="demo", max_length=1024, thinking=True)
DPO = DPOSettings(model="demo", dataset="demo", adapter=None, max_length=1024)
# As reasoning models' templates do it, in our own words: R1's opens a thought and cuts the one in an answer; Qwen3's shows it in the
# last answers only, from the text or from a key of its own; the last one writes calls.
OPENING = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|open|>' + m.content }}{% else %}{{ '<|head|>' + m.content.split('</think>')[-1] + '<|over|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|head|><think>\n' }}{% endif %}"
SPLITTING = "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|open|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% set said = m.content %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}{{ '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
CALLING = "{% if tools %}{{ 'Tools: ' + (tools | tojson) + '<|over|>' }}{% endif %}{% for m in messages %}{{ '<|open|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}{{ '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% endif %}"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
THOUGHT = "<think>\nadd\n</think>\n\nIt is 3."


def learnt(tokenizer, row, template=CHATML, settings=SETTINGS, found=None):
    """What is given and what is learnt of a row as it stands in a file, decoded."""
    tokenizer.chat_template, found = template, found or Findings()
    (made,) = encode_rows(tokenizer, usable([row], "x", settings, found), settings, found)
    labels, ids = made["labels"], made["input_ids"]
    first = int((labels != IGNORED).argmax())
    return tokenizer.decode(ids[:first]), tokenizer.decode(ids[labels != IGNORED])


@pytest.mark.parametrize("given", [{"title": ["houses"], "rooms": [[1]]}, [{"a": 1}, {"b": "é"}], ["one", "two"]])
@pytest.mark.parametrize("columns", [("question", "context", "answer"), ("instruction", "input", "output")])
def test_structured_input_stands_below_the_question_as_json(tokenizer, given, columns):
    found = Findings()
    before, _ = learnt(tokenizer, dict(zip(columns, ("Who?", given, "Ann"), strict=True)), found=found)
    assert json.dumps(given, ensure_ascii=False) in before and found.changed == {"input_written_as_json": 1}
    assert found.examples["input_written_as_json"].startswith("{")


@pytest.mark.parametrize(
    "answer",
    [
        {"from": "Ulm", "to": "Bonn"},
        {"input": "weather?", "output": "Ulm"},
        [["Ann", "PER"], ["Ulm", "LOC"]],
        {"name": "Ann", "role": "assistant", "text": "greets"},
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    ],
)
def test_json_text_is_text_in_questions_and_answers(tokenizer, answer):
    text = json.dumps(answer)
    before, after = learnt(tokenizer, {"prompt": text, "completion": text})
    assert text in before and after == text + "<|over|>"
    pair = {"prompt": "Q", "chosen": text, "rejected": "[]"}
    tokenizer.chat_template, found = CHATML, Findings()
    (made,) = encode_pairs(tokenizer, usable([pair], "x", DPO, found), DPO, found)
    assert tokenizer.decode(made["chosen_ids"]) == text + "<|over|>" and not +found.changed


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_a_thought_of_its_own_key_is_learnt_where_the_template_shows_it(tokenizer, key):
    row = {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3", key: "I add."}]}
    found = Findings()
    assert learnt(tokenizer, row, SPLITTING, THINKS, found)[1] == "<think>\nI add.\n</think>\n\n3<|over|>"
    assert not +found.changed
    assert learnt(tokenizer, row, SPLITTING.replace("reasoning_content", "thinking"), THINKS)[1].startswith("<think>\nI")  # fmt: skip
    assert learnt(tokenizer, row, CHATML, THINKS, found)[1] == "3<|over|>"
    assert found.changed == {"thought_left_out_by_template": 1}


def test_parts_of_a_content_are_read_by_any_of_their_names(tokenizer):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "on"}, {"type": "text", "value": "e"}]
    row = {"messages": [{"role": "user", "content": parts[1:]}, {"role": "assistant", "content": parts}]}
    before, after = learnt(tokenizer, row, SPLITTING, THINKS)
    assert before.endswith("<|open|>user\none<|over|>\n<|open|>assistant\n") and after == "<think>\nhm\n</think>\n\none<|over|>"  # fmt: skip


@pytest.mark.parametrize("mark", [("weight", 0), ("train", False), ("loss", False), ("loss_weight", 0.0)])
def test_answers_that_are_marked_are_given_and_not_learnt(tokenizer, mark):
    row, found = chat("u:1", "a:BAD", "u:Again.", "a:good"), Findings()
    row["messages"][1] |= dict([mark])
    before, after = learnt(tokenizer, row, found=found)
    assert "BAD" in before and after == "good<|over|>" and found.noted["answers_marked_not_to_learn"] == 1
    row["messages"][3] |= dict([mark])
    with pytest.raises(DataError, match="marked as not to be learnt"):
        learnt(tokenizer, row)


@pytest.mark.parametrize(
    "template, thinking, answer, learnt_text, changed",
    [
        (OPENING, False, THOUGHT, "add\n</think>\n\nIt is 3.", {"answer_put_behind_the_prompt"}),
        (OPENING, False, "add\n</think>\n\nIt is 3.", "add\n</think>\n\nIt is 3.", {"answer_put_behind_the_prompt"}),
        (OPENING, False, "It is 3.", "\n</think>\n\nIt is 3.", {"opened_thought_closed_before_the_answer"}),
        (SPLITTING, True, THOUGHT, THOUGHT, set()),
        (without_thinking(SPLITTING), False, THOUGHT, "It is 3.", {"thought_left_out_as_thinking_is_off", "answer_put_behind_the_prompt"}),
        (without_thinking(SPLITTING), False, "It is 3.", "It is 3.", {"answer_put_behind_the_prompt"}),
        (CHATML, False, THOUGHT, THOUGHT, set()),
    ],
)  # fmt: skip
def test_the_learnt_text_follows_the_prompt_of_generation_and_holds_the_answer_whole(
    tokenizer, template, thinking, answer, learnt_text, changed
):
    row, found = chat("u:1+2?", "a:" + answer), Findings()
    before, after = learnt(tokenizer, row, template, THINKS if thinking else SETTINGS, found)
    assert before == render_chat(tokenizer, row["messages"][:-1], answer_next=True)
    assert after == learnt_text + "<|over|>" and {*+found.changed} == changed


def test_earlier_answers_whose_thoughts_a_template_drops_are_not_learnt_and_counted(tokenizer):
    row, found = chat("u:1", "a:" + THOUGHT, "u:2", "a:" + THOUGHT), Findings()
    assert learnt(tokenizer, row, SPLITTING, THINKS, found)[1] == THOUGHT + "<|over|>"
    assert found.answers_not_learnt == 1
    found = Findings()
    assert learnt(tokenizer, chat("u:1", "a:one", "u:2", "a:two"), without_thinking(THINKING), found=found)[1].startswith("one<|over|>")  # fmt: skip
    assert found.noted["answers_behind_another_opening"] == 1


def test_keys_that_arrow_fills_with_null_are_absent(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": call}, {"role": "tool", "content": "ok"}, {"role": "assistant", "content": "b"}], "tools": [WEATHER]},
        {"messages": [{"role": "user", "value": "a"}, {"role": "assistant", "value": "b"}], "tools": [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}]},
    ]  # fmt: skip
    rows[1]["messages"].append({"role": "assistant", "value": "c", "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"x": "1"}}}]})  # fmt: skip
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = list(read_source(Source(path.name, lambda: path.open("rb"), ".parquet")))
    assert read == [{**rows[0], "messages": [rows[0]["messages"][0], {key: value for key, value in rows[0]["messages"][1].items() if value is not None}, *rows[0]["messages"][2:]]}, rows[1]]  # fmt: skip
    before, after = learnt(tokenizer, read[0], CALLING)
    assert after == '<call>weather {"city": "Ulm"}</call><|over|>b<|over|>' and "null" not in before
    assert before.removeprefix("<s>").startswith(f"Tools: {json.dumps([WEATHER])}")


def test_labels_have_their_names(tmp_path, tokenizer):
    import datasets

    kinds = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    datasets.Dataset.from_dict({"question": ["2 even?", "3?"], "answer": [1, -1]}, features=kinds).to_parquet(tmp_path / "x.parquet")  # fmt: skip
    path = tmp_path / "x.parquet"
    rows = list(read_source(Source(path.name, lambda: path.open("rb"), ".parquet")))
    assert [row["answer"] for row in rows] == ["yes", None]


@pytest.mark.parametrize(
    "row, unused",
    [
        ({"text": "good", "label": 1, "note": None}, ["label"]),
        ({"Question": "a", "Remark": "x", "Response": "b"}, ["Remark"]),
        ({"messages": [{"role": "user", "content": "a", "mood": "glad"}, {"role": "assistant", "content": "b"}], "id": 3}, ["id", "turn key mood"]),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_named(row, unused):
    found = Findings()
    usable([row], "x", SETTINGS, found)
    assert found.unused == unused


@pytest.mark.parametrize("value", [["1.png"], "https://a.example/1", {"bytes": b"x", "path": None}])
def test_pictures_are_refused_unless_told_to_ignore_them(value):
    row = {"prompt": "What is it?", "completion": "a cat", "image": value}
    with pytest.raises(DataError, match=r"come with `image`, .* set `columns: \{image: ignore\}`"):
        usable([row], "x", SETTINGS, Findings())
    found, settings = Findings(), SFTSettings.load({"model": "demo", "columns": {"image": "ignore"}})
    assert len(usable([row], "x", settings, found)) == 1 and found.unused == ["image"]
    assert len(usable([row | {"image": "a sloth in a tree"}], "x", SETTINGS, Findings())) == 1


def test_tools_stand_in_the_prompt_of_a_pair(tokenizer):
    row = {"prompt": [{"role": "user", "content": "w?"}], "tools": [WEATHER], "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]}], "rejected": [{"role": "assistant", "content": "no"}]}  # fmt: skip
    tokenizer.chat_template, found = CALLING, Findings()
    (made,) = encode_pairs(tokenizer, usable([row], "x", DPO, found), DPO, found)
    assert "Tools: " in tokenizer.decode(made["prompt_ids"]) and not found.unused
    assert tokenizer.decode(made["chosen_ids"]) == '<call>weather {"city": "Ulm"}</call><|over|>'
    tokenizer.chat_template = CHATML
    assert encode_pairs(tokenizer, usable([row], "x", DPO, found), DPO, found) == []
    assert found.dropped["turn_left_out_by_template"] == 1


def read(name, text):
    import io

    return list(read_source(Source(name, lambda: io.BytesIO(text.encode()), name[-4:])))


def test_quotes_in_tables_never_swallow_rows():
    with pytest.raises(
        DataError, match=r"What begins in line 3 of x\.csv is no CSV: a quote is opened and not closed .*written twice"
    ):
        read("x.csv", 'question,answer\n"a","b"\n"c,d\ne,f\n')
    with pytest.raises(DataError, match=r"Line 2 of x\.csv is no CSV"):
        read("x.csv", 'question,answer\n"a","She said \\"hi\\" twice"\n')
    assert read("x.csv", 'question,answer\n"a\nb","say ""hi"""\n') == [{"question": "a\nb", "answer": 'say "hi"'}]
    assert read("x.csv", "question,answer\ra,b\rc,d\r") == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]  # fmt: skip
    assert read("x.tsv", 'question\tanswer\n"Hello\tworld\n') == [{"question": '"Hello', "answer": "world"}]


@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        ({"prompt": "1+1? Answer:", "chosen": "1+1? Answer: 2", "rejected": "1+1? Answer: no"}, "1+1? Answer:", "2", "no"),
        ({"prompt": "1+1?", "chosen": chat("u:1+1?", "a:2")["messages"], "rejected": "no"}, "1+1?", "2", "no"),
        ({"prompt": "1+1?", "chosen": "2", "rejected": chat("u:1+1?", "a:no")["messages"]}, "1+1?", "2", "no"),
        ({"chosen": chat("u:1+1?", "a:2")["messages"], "rejected": "no"}, "1+1?", "2", "no"),
        ({"prompt": "Say hi.", "chosen": "Say hi. I do.", "rejected": "no"}, "Say hi.", "Say hi. I do.", "no"),
    ],
)  # fmt: skip
def test_the_prompt_stands_once_in_a_pair(tokenizer, row, prompt, chosen, rejected):
    tokenizer.chat_template, found = CHATML, Findings()
    (made,) = encode_pairs(tokenizer, usable([row], "x", DPO, found), DPO, found)
    assert tokenizer.decode(made["prompt_ids"]).endswith(f"user\n{prompt}<|over|>\n<|open|>assistant\n")
    assert (tokenizer.decode(made["chosen_ids"]), tokenizer.decode(made["rejected_ids"])) == (chosen + "<|over|>", rejected + "<|over|>")  # fmt: skip


def test_the_blanks_that_an_answer_begins_with_are_learnt_or_counted(tokenizer):
    row, found = {"question": "Code?", "answer": "    return 1\n"}, Findings()
    assert learnt(tokenizer, row, found=found)[1] == "    return 1<|over|>"
    assert found.changed == {"outer_blanks_cut": 1}
    assert learnt(tokenizer, row, HEADERS, found=found)[1].strip() == "return 1<|over|>"
    assert found.changed["first_blanks_cut_by_template"] == 1
    with pytest.raises(DataError, match="empty answer"):
        learnt(tokenizer, {"question": "Code?", "answer": " \n\t "})


def test_ids_without_an_embedding_and_special_tokens_in_a_text_are_counted(tokenizer):
    tokenizer.chat_template, found = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|begin|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        Findings(),
    )
    rows = [chat("u:a", "a:b"), chat("u:a <|over|> b", "a:c")]
    assert len(encode_rows(tokenizer, rows, SETTINGS, found)) == 2 and found.noted["special_tokens_in_a_text"] == 1
    last = tokenizer.convert_tokens_to_ids("<|over|>")
    assert len(encode_rows(tokenizer, rows, SETTINGS, found, embeddings=last + 1)) == 2
    (kept,) = encode_rows(tokenizer, rows, SETTINGS, found, embeddings=last)
    assert kept["messages"] == rows[0]["messages"] and found.dropped["token_beyond_embeddings"] == 1


def test_roles_are_known_by_more_names_and_an_unknown_one_is_named(capsys):
    turns = [{"role": "human", "content": "a"}, {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}, {"role": "tool_response", "content": "1"}, {"role": "ai", "content": "b"}]  # fmt: skip
    (row,) = usable([{"messages": turns}], "x", SETTINGS, Findings())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"][0]["function"]["name"] == "f"
    bad = {"messages": [{"role": "Narrator", "content": "a"}, *chat("u:a", "a:b")["messages"]]}
    usable([{"messages": turns}, bad], "x", SETTINGS, Findings())
    assert "1 with a turn of a role that is not known `Narrator` (rows 2): dropped" in capsys.readouterr().out


def test_the_clock_in_a_template_stands_still():
    clock = "{% if not date is defined %}{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'x' %}{% endif %}{{ date }}"
    fixed = with_fixed_date(clock)
    assert "strftime_now" not in fixed and with_fixed_date(fixed) == fixed
    today = datetime.date.fromisoformat(held_date(fixed))
    assert abs(datetime.date.today() - today) <= datetime.timedelta(days=1)
    assert held_date("{% set enable_thinking = false %}" + fixed) == held_date(fixed) and held_date(clock) is None
    assert jinja2.Template(fixed).render() == today.strftime("%d %b %Y")
    assert with_fixed_date(named_template("alpaca")) == named_template("alpaca")


def test_weights_between_nothing_and_one_are_counted(tokenizer):
    tokenizer.chat_template, found = CHATML, Findings()
    turns = chat("u:1", "a:2", "u:3", "a:4")["messages"]
    (row,) = usable([{"messages": [turns[0], {**turns[1], "weight": 0.5}, turns[2], {**turns[3], "weight": 1.0}]}], "x", SETTINGS, found)  # fmt: skip
    assert found.changed == {"turn_weights_taken_as_1": 1} and row["messages"] == turns


# The property: whatever stands in a row is found again in what the model reads, or the row is in a count.
texts = st.text(max_size=12) | st.sampled_from(["</think>", "<think>a</think>b", '{"role": "user"}', "[[1]]", "  x", "\n\nx\n", "<|over|>", "a Zq0qZ b", "user", "<|open|>assistant\n"])  # fmt: skip
said = texts.filter(lambda text: text.isprintable() or text.strip())
rows = st.one_of(
    st.fixed_dictionaries({"prompt": said, "completion": said}, optional={"system": said, "context": said | st.lists(said, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"instruction": said, "input": said, "output": said}),
    st.fixed_dictionaries({"text": said}),
    st.lists(said, min_size=2, max_size=6).map(lambda all_said: {"messages": [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(all_said)]}),
    st.lists(st.tuples(said, said), min_size=1, max_size=3).map(lambda pairs: {"conversations": [turn for asked, given in pairs for turn in ({"from": "human", "value": asked}, {"from": "gpt", "value": given, "thinking": asked})]}),
)  # fmt: skip
pairs = st.fixed_dictionaries({"prompt": said, "chosen": said, "rejected": said}, optional={"system": said})
ALL = {"ChatML": CHATML, "headers": HEADERS, "thinking": THINKING, "R1": OPENING, "splitting": SPLITTING, "off": without_thinking(SPLITTING), "calls": CALLING, "alpaca": named_template("alpaca")}  # fmt: skip


def texts_in(value):
    """All texts of a row."""
    if isinstance(value, dict):
        return [text for key, each in value.items() if key not in ("role", "from") for text in texts_in(each)]
    return [text for each in value for text in texts_in(each)] if isinstance(value, list) else [value]


def counted(found):
    """Whether anything is said of the row."""
    return bool(+found.dropped or +found.changed or +found.noted or found.answers_not_learnt or found.truncated or found.unused)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
@given(row=rows | pairs)
@hypothesis_settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_text_of_a_row_is_read_or_the_row_is_counted(tokenizer, name, row):
    tokenizer.chat_template, found = ALL[name], Findings()
    settings, encode = (DPO, encode_pairs) if "chosen" in row else (SETTINGS, encode_rows)
    try:
        made = encode(tokenizer, usable([row], "x", settings, found), settings, found)
    except DataError:
        return
    assert made or +found.dropped
    for each in made:
        read = each["text"] + each.get("rejected_text", "")
        missing = [text for text in texts_in(row) if text not in read]
        assert not missing or counted(found), (missing, read, found)
        ids = each.get("rejected_ids", each["input_ids"])
        assert len(ids) and (each["labels"] != IGNORED).any()


@pytest.mark.parametrize("name", ["ChatML", "headers", "thinking", "R1", "splitting", "calls"])
@pytest.mark.parametrize("system", [[], ["s:Be brief."]])
def test_a_long_chat_is_read_as_its_turns_say_and_costs_no_more_for_each(tokenizer, name, system, monkeypatch):
    """The answers of a long chat stand where one would find them by rendering the chat up to each, which costs the square of its length."""
    from autosloth.data import layout

    tokenizer.chat_template = ALL[name]
    turns = chat(*system, *(f"{who}:{who} {i}" for i in range(40) for who in "ua"))["messages"]
    rendered = []
    monkeypatch.setattr(layout, "render_chat", lambda *args, **kwargs: rendered.append(len(args[1])) or render_chat(*args, **kwargs))  # fmt: skip
    placed = Template(tokenizer).place(turns, None)
    assert sum(rendered) < 8 * len(turns)
    exact = Template(tokenizer)
    monkeypatch.setattr(layout, "SHORT", 1000)
    assert exact.place(turns, None) == placed
    assert len(placed.answers) == 40
    assert all(turns[turn]["content"] in placed.text[start:end] for turn, start, end in placed.answers)


@pytest.mark.parametrize(
    "arguments",
    [{"city": 'Köln "West"'}, {"city": "x </think> y"}, {"city": "  "}, {"city": ["a", "b\nc", ""]}, {"city": "Zq0qZ"}],
)
def test_chats_with_calls_of_one_shape_are_looked_through_once_and_read_alike(tokenizer, arguments, monkeypatch):
    """What a call is made with does not matter for where the answers stand, however it is written."""
    from autosloth.data import layout

    def called(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = chat("u:Where?", "a:", "t:there", "a:There.")["messages"]
        return [{**turn, "tool_calls": [call]} if turn["content"] == "" else turn for turn in turns]

    tokenizer.chat_template, rendered = ALL["calls"], []
    template = Template(tokenizer)
    template.place(called(city="Ulm" if isinstance(arguments["city"], str) else ["u", "v", ""]), None)
    monkeypatch.setattr(layout, "render_chat", lambda *args, **kwargs: rendered.append(args) or render_chat(*args, **kwargs))  # fmt: skip
    placed = template.place(called(**arguments), None)
    of_one_shape = arguments["city"] not in ("x </think> y", "  ")
    assert (len(rendered) == 1) == of_one_shape
    assert placed == Template(tokenizer).place(called(**arguments), None)
    assert len(placed.answers) == 2 and not placed.layout.hidden
    learnt = [placed.text[start:end] for _, start, end in placed.answers]
    assert json.dumps(arguments["city"], ensure_ascii=False) in learnt[0] and learnt[1].startswith("There.")


def test_a_turn_that_a_template_drops_is_missed_even_where_its_text_stands_elsewhere(tokenizer):
    """The template splits answers at line ends, so that marks do not do for them, and drops what the system says."""
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ '<|open|>' + m.role + '\n' + m.content.split('\n') | join('\n ') + '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% endif %}"
    found = Findings()
    assert encode_rows(tokenizer, [chat("s:a", "u:a b a", "a:one\ntwo")], SETTINGS, found) == []
    assert +found.dropped == {"turn_left_out_by_template": 1}
