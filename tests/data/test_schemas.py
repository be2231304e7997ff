"""A row of each schema of the table becomes what is meant by it, or the refusal names the line of `columns` that would do."""

import json
import re

import pytest
import yaml
from support.chats import chat
from support.rows import usable

from autosloth.data.clean import Findings
from autosloth.data.recognise import recognise_columns
from autosloth.data.schemas import SCHEMAS
from autosloth.errors import DataError
from autosloth.settings import DPOSettings, SFTSettings

SFT = SFTSettings(model="demo")
DPO = DPOSettings(model="demo", dataset="demo", adapter=None)
ADD = {"name": "add", "description": "adds", "parameters": {"a": {"type": "int", "description": "one"}}}
TREE = [
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi", "rank": None},
    {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "worse", "rank": 1},
    {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "Hello", "rank": 0},
    {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "Who?", "rank": None},
    {"message_id": "5", "parent_id": "4", "role": "assistant", "text": "Me", "rank": 0},
]
ASKED = ["u:Who?", "a:Me"]
# Rows in the columns of much-used sets, in our own words, and what they become: chats, or a pair of chats.
ROWS = {
    "OpenAssistant": (TREE, ["u:Hi", "a:Hello", "u:Who?", "a:Me"]),
    "guanaco": ({"text": "### Human: Who?### Assistant: Me"}, ASKED),
    "Vicuna's text": ({"text": "USER: Who? ASSISTANT: Me</s>"}, ASKED),
    "Alpaca's text": ({"text": "Below is a task.\n\n### Instruction:\nWho?\n\n### Input:\nAnn\n\n### Response:\nMe"}, ["s:Below is a task.", "u:Who?\n\nAnn", "a:Me"]),
    "lines of a dialogue": ({"text": "Human: Who?\nAssistant: Me\nand you"}, ["u:Who?", "a:Me\nand you"]),
    "glaive": ({"system": "SYSTEM: Be brief.", "chat": "USER: Who?\n\n\nASSISTANT: Me <|endoftext|>\n\n\nFUNCTION RESPONSE: {}\n\n\nASSISTANT: Yes <|endoftext|>"}, ["s:Be brief.", "u:Who?", "a:Me", "t:{}", "a:Yes"]),
    "LIMA": ({"conversations": ["Who?", "Me"], "source": "x"}, ASKED),
    "DailyDialog": ({"dialog": ["Who?", "Me", "Oh"], "act": [1, 2, 1]}, ASKED),
    "MMLU": ({"question": "1+1?", "subject": "x", "choices": ["1", "2"], "answer": 1}, ["u:1+1?\n\nA. 1\nB. 2", "a:B. 2"]),
    "ARC": ({"question": "1+1?", "choices": {"text": ["1", "2"], "label": ["1", "2"]}, "answerKey": "2"}, ["u:1+1?\n\n1. 1\n2. 2", "a:2. 2"]),
    "choices numbered from 1": ({"question": "1+1?", "choices": ["1", "two"], "answer": 2}, ["u:1+1?\n\nA. 1\nB. two", "a:B. two"]),
    "a choice by its text": ({"question": "1+1?", "choices": ["1", "2"], "answer": "2"}, ["u:1+1?\n\nA. 1\nB. 2", "a:B. 2"]),
    "a choice by its text, numbers throughout": ({"question": "2+3?", "choices": ["3", "4", "5", "6"], "answer": "5"}, ["u:2+3?\n\nA. 3\nB. 4\nC. 5\nD. 6", "a:C. 5"]),
    "HellaSwag": ({"ctx": "One and", "endings": ["two", "x"], "label": "0", "ind": 3}, ["u:One and\n\nA. two\nB. x", "a:A. two"]),
    "MMLU-Pro": ({"question": "1+1?", "options": ["1", "2"], "answer": "B", "answer_index": 1}, ["u:1+1?\n\nA. 1\nB. 2", "a:B. 2"]),
    "MMMLU": ({"Question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B", "Subject": "x"}, ["u:1+1?\n\nA. 1\nB. 2\nC. 3\nD. 4", "a:B. 2"]),
    "MedMCQA": ({"question": "1+1?", "opa": "1", "opb": "2", "opc": "3", "cop": "b", "exp": "x"}, ["u:1+1?\n\nA. 1\nB. 2\nC. 3", "a:B. 2"]),
    "choices apart, numbered from 1": ({"question": "1+1?", "option_a": "1", "option_b": "two", "answer": 2}, ["u:1+1?\n\nA. 1\nB. two", "a:B. two"]),
    "SQuAD": ({"question": "Who?", "context": "Me and you.", "answers": {"text": ["Me"], "answer_start": [0]}}, ["u:Who?\n\nMe and you.", "a:Me"]),
    "TriviaQA": ({"question": "Who?", "answer": {"value": "Me", "aliases": ["I"]}}, ASKED),
    "NQ open": ({"question": "Who?", "answer": ["Me", "I"]}, ASKED),
    "xlam": ({"id": 1, "query": "1+1?", "answers": json.dumps([{"name": "add", "arguments": {"a": 1}}]), "tools": json.dumps([ADD])}, ["u:1+1?", "a:"]),
    "text to SQL": ({"sql_prompt": "Who?", "sql_context": "T", "sql": "SELECT", "domain": "x"}, ["u:Who?\n\nT", "a:SELECT"]),
    "SQL with a context": ({"question": "Who?", "context": "T", "answer": "SELECT"}, ["u:Who?\n\nT", "a:SELECT"]),
    "medical o1": ({"Question": "Who?", "Complex_CoT": "hm", "Response": "Me"}, ASKED),
    "OpenMathInstruct-2": ({"problem": "Who?", "generated_solution": "Me", "expected_answer": "x"}, ASKED),
    "NuminaMath": ({"source": "x", "problem": "Who?", "solution": "Me", "answer": "x"}, ASKED),
    "HumanEval": ({"prompt": "Who?", "canonical_solution": "Me", "test": "x"}, ASKED),
    "SAMSum": ({"id": "1", "dialogue": "Who?", "summary": "Me"}, ASKED),
    "CNN": ({"article": "Who?", "highlights": "Me", "id": "x"}, ASKED),
    "XSum": ({"document": "Who?", "summary": "Me"}, ASKED),
    "WMT": ({"translation": {"en": "Who?", "fr": "Qui ?"}}, ["u:Translate from en to fr:\n\nWho?", "a:Qui ?"]),
    "BoolQ": ({"question": "Who?", "passage": "T", "answer": True}, ["u:Who?\n\nT", "a:true"]),
    "PubMedQA": ({"question": "Who?", "context": {"contexts": ["T"]}, "long_answer": "Me", "final_decision": "x"}, ['u:Who?\n\n{"contexts": ["T"]}', "a:Me"]),
    "natural instructions": ({"definition": "Answer.", "inputs": "Who?", "targets": "Me"}, ["u:Answer.\n\nWho?", "a:Me"]),
    "MBPP": ({"task_id": 1, "text": "Who?", "code": "Me", "test_list": []}, ASKED),
    "Alpaca with its text": ({"instruction": "Who?", "input": "", "output": "Me", "text": "### Instruction:\nWho?\n\n### Response:\nMe"}, ASKED),
    "OpenOrca": ({"id": "1", "system_prompt": "Be.", "question": "Who?", "response": "Me"}, ["s:Be.", "u:Who?", "a:Me"]),
    "MetaMath": ({"query": "Who?", "response": "Me", "type": "x", "original_question": "y"}, ASKED),
    "aya": ({"inputs": "Who?", "targets": "Me", "language": "x"}, ASKED),
    "UltraChat": ({"prompt": "Who?", "messages": chat(*ASKED)["messages"]}, ASKED),
    "Capybara": ({"source": "x", "conversation": [{"input": "Who?", "output": "Me"}]}, ASKED),
    "WildChat": ({"conversation": [{"role": "user", "content": "Who?", "toxic": False}, {"role": "assistant", "content": "Me", "toxic": False}], "model": "x"}, ASKED),
    "TinyStories": ({"text": "Once upon a time."}, "Once upon a time."),
    "SafeRLHF": ({"prompt": "Who?", "response_0": "No", "response_1": "Me", "better_response_id": 1, "safer_response_id": 0}, (ASKED, "No")),
    "SHP": ({"history": "Who?", "human_ref_A": "Me", "human_ref_B": "No", "labels": 1}, (ASKED, "No")),
    "stack exchange, paired": ({"question": "Who?", "response_j": "Me", "response_k": "No"}, (ASKED, "No")),
    "chatbot arena": ({"conversation_a": chat("u:Who?", "a:No")["messages"], "conversation_b": chat(*ASKED)["messages"], "winner": "model_b"}, (ASKED, "No")),
    "AlpacaFarm": ({"instruction": "Who?", "output_1": "No", "output_2": "Me", "preference": 2}, (ASKED, "No")),
    "a winner from 0": ([{"prompt": "Who?", "response_a": "Me", "response_b": "No", "winner": 0}, {"prompt": "Who?", "response_a": "No", "response_b": "Me", "winner": 1}], (ASKED, "No")),
    "a winner as pandas has it": ({"prompt": "Who?", "response_a": "No", "response_b": "Me", "winner": 2.0}, (ASKED, "No")),
    "answers that are JSON": ({"prompt": "Who?", "response_a": '[{"value": "Me"}]', "response_b": "No", "winner": "model_a"}, (["u:Who?", 'a:[{"value": "Me"}]'], "No")),
    "arena 55k, flags in words": ({"prompt": "Who?", "response_a": "Me", "response_b": "No", "winner_model_a": "True", "winner_model_b": "False"}, (ASKED, "No")),
    "arena 55k": ({"prompt": "Who?", "response_a": "Me", "response_b": "No", "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, (ASKED, "No")),
    "WebGPT": ({"question": {"full_text": "Who?", "id": 1}, "answer_0": "No", "score_0": -1.0, "answer_1": "Me", "score_1": 1.0}, (ASKED, "No")),
    "HelpSteer3": ({"context": chat("u:Who?")["messages"], "response1": "Me", "response2": "No", "overall_preference": -2}, (ASKED, "No")),
    "Nectar": ({"prompt": "Who?", "answers": [{"answer": "No", "rank": 2.0}, {"answer": "Me", "rank": 1.0}]}, (ASKED, "No")),
    "UltraFeedback": ({"instruction": "Who?", "completions": [{"response": "No", "overall_score": 2}, {"response": "Me", "overall_score": 7.5}]}, (ASKED, "No")),
    "stack exchange, scored": ({"question": "Who?", "answers": [{"text": "No", "pm_score": 1}, {"text": "Me", "pm_score": 3}]}, (ASKED, "No")),
    "answers beside scores": ({"prompt": "Who?", "responses": ["No", "Me"], "scores": [0.1, 0.9]}, (ASKED, "No")),
    "summaries": ({"info": {"post": "Who?"}, "summaries": [{"text": "No"}, {"text": "Me"}], "choice": 1}, (ASKED, "No")),
    "KTO": ([{"prompt": "Who?", "completion": "Me", "label": True}, {"prompt": "Who?", "completion": "No", "label": False}], (ASKED, "No")),
    "HH": ({"chosen": "\n\nHuman: Who?\n\nAssistant: Me", "rejected": "\n\nHuman: Who?\n\nAssistant: No"}, (ASKED, "No")),
    "Orca pairs": ({"system": "", "question": "Who?", "chosen": "Me", "rejected": "No"}, (ASKED, "No")),
}  # fmt: skip


def told(turns):
    return [f"{turn['role'][0]}:{turn['content']}" for turn in turns]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_much_used_columns_becomes_what_is_meant(name):
    rows, expected = ROWS[name]
    rows, found = rows if isinstance(rows, list) else [rows], Findings()
    (made,) = usable(rows, "x", DPO if isinstance(expected, tuple) else SFT, found)
    if isinstance(expected, tuple):
        chat_of_chosen, rejected = expected
        assert told(made["prompt"] + made["chosen"]) == chat_of_chosen and told(made["rejected"]) == [f"a:{rejected}"]
    else:
        assert (made["text"] if isinstance(expected, str) else told(made["messages"])) == expected
    assert set(+found.dropped) <= {"other_branch", "duplicate"}


def test_each_schema_has_a_row_here_and_its_columns_alone_are_known():
    seen = set()
    for rows, expected in ROWS.values():
        found = Findings()
        usable(rows if isinstance(rows, list) else [rows], "x", DPO if isinstance(expected, tuple) else SFT, found)
        seen.add(found.readings[0][1].name)
    assert {schema.name for schema in SCHEMAS} <= seen
    for schema in SCHEMAS:
        recognise_columns([names.split("|")[0] for names in schema.columns.values()], {}, "x", schema.road)


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("chatbot arena", {"winner": "tie (bothbad)"}, "no_preference"),
        ("HelpSteer3", {"overall_preference": 0}, "no_preference"),
        ("Nectar", {"answers": [{"answer": "No", "rank": 1.0}, {"answer": "Me", "rank": 1.0}]}, "no_preference"),
        ("arena 55k", {"winner_model_a": 0}, "no_preference"),
        ("MMLU", {"answer": 7}, "answer_not_among_choices"),
        ("MMLU", {"question": None}, "empty_question"),
        ("MMLU", {"question": {"stem": "1+1?"}}, "not_text"),
        ("MMLU", {"answer": -1}, "no_answer"),
        ("MMMLU", {"B": None}, "other_form"),
        ("SQuAD", {"answers": {"text": [], "answer_start": []}}, "empty_answer"),
        ("guanaco", {"text": "Once upon a time."}, "other_form"),
    ],
)
def test_what_has_no_meaning_in_a_schema_is_dropped_by_name(name, change, reason):
    row, expected = ROWS[name]
    found = Findings()
    made = usable([row, row | change, row], "x", DPO if isinstance(expected, tuple) else SFT, found)
    assert len(made) == 1 and +found.dropped == {reason: 1, "duplicate": 1}


def test_of_several_answers_the_best_and_the_worst_make_a_pair_or_each_two_that_differ(capsys):
    row = {"prompt": "Who?", "answers": [{"answer": each, "rank": rank} for each, rank in (("b", 2), ("a", 1), ("c", 3))]}  # fmt: skip
    said = [(told(each["chosen"])[0], told(each["rejected"])[0]) for each in usable([row], "x", DPO, Findings())]
    assert said == [("a:a", "a:c")]
    every = DPOSettings.load({"model": "demo", "dataset": "demo", "adapter": None, "pairs": "all"})
    said = [(told(each["chosen"])[0], told(each["rejected"])[0]) for each in usable([row], "x", every, Findings())]
    assert said == [("a:a", "a:b"), ("a:a", "a:c"), ("a:b", "a:c")]
    assert "data: 1 rows of x make 3" in capsys.readouterr().out


def test_thumbs_without_their_counterpart_are_dropped_or_refused():
    rows, _ = ROWS["KTO"]
    found = Findings()
    assert len(usable([*rows, {"prompt": "Else?", "completion": "b", "label": True}], "x", DPO, found)) == 1
    assert +found.dropped == {"no_counterpart": 1}
    with pytest.raises(
        DataError, match=r"as KTO takes them\) whose prompt has no answer left that is marked otherwise"
    ):
        usable(rows[:1], "x", DPO, Findings())
    with pytest.raises(DataError, match="mark each answer as good or bad"):
        usable(rows, "x", SFT, Findings())


def test_what_could_be_read_in_two_ways_is_said():
    found = Findings()
    usable([{"instruction": "a", "output": "b", "text": "c"}], "x", SFT, found)
    assert found.readings[0][1].others == ("text",) and found.unused == ["text"]


def test_pairs_in_other_columns_are_refused_for_sft():
    with pytest.raises(DataError, match=r"pairs of a better and a worse answer .*AutoSloth-DPO takes them"):
        usable([ROWS["SafeRLHF"][0]], "x", SFT, Findings())


@pytest.mark.parametrize(
    "row, settings, columns",
    [
        ({"customer": "Where is my parcel?", "agent": "On its way."}, SFT, {"customer": "prompt", "agent": "completion"}),
        ({"Frage": "Wer?", "Antwort": "Ann"}, SFT, {"Frage": "prompt", "Antwort": "completion"}),
        ({"id": "1", "left one": "short", "right one": "much, much longer"}, SFT, {"left one": "prompt", "right one": "completion"}),
        ({"story": "Once upon a time."}, SFT, {"story": "text"}),
        ({"frage": "Wer?", "gut": "Ann", "schlecht": "Niemand"}, DPO, {"frage": "prompt", "gut": "chosen", "schlecht": "rejected"}),
        ({"ask": "Who?", "winner_text": "Ann", "loser_text": "No"}, DPO, {"ask": "prompt", "winner_text": "chosen", "loser_text": "rejected"}),
    ],
)  # fmt: skip
def test_the_refusal_names_the_line_that_would_do(row, settings, columns):
    with pytest.raises(DataError) as error:
        usable([row], "x", settings, Findings())
    line = yaml.safe_load(re.search(r"`(columns: .*?)`", error.value.todo)[1])
    assert line == {"columns": columns}
    told_so = type(settings).load(settings.model_dump(mode="json") | line)
    assert len(usable([row], "x", told_so, Findings())) == 1
