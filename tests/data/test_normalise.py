"""Preference pairs of every common form become one form; each row transform is shown by its own example."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.strategies import json_values, turn_values

from autosloth.data.normalise import UNUSABLE, fault_of_pair, to_pair
from autosloth.data.recognise import recognise
from autosloth.errors import DataError

USER, A, B = (
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
    {"role": "assistant", "content": "B"},
)
SYSTEM = {"role": "system", "content": "S"}
PAIR = ([USER], [A], [B])


def shared(value):
    return {"from": {"user": "human", "assistant": "gpt"}[value["role"]], "value": value["content"]}


PAIRS = {
    "strings": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, PAIR),
    "question and strings": ({"question": "Q", "chosen": "A", "rejected": "B"}, PAIR),
    "messages": ({"prompt": [USER], "chosen": [A], "rejected": [B]}, PAIR),
    "messages without a prompt": ({"chosen": [USER, A], "rejected": [USER, B]}, PAIR),
    "UltraFeedback-binarized": (
        {"prompt": "Q", "prompt_id": "x", "chosen": [USER, A], "rejected": [USER, B], "messages": [USER, A], "score_chosen": 8.0},
        PAIR,
    ),
    "system prompt": ({"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"}, ([SYSTEM, USER], [A], [B])),
    "system turn": ({"chosen": [SYSTEM, USER, A], "rejected": [SYSTEM, USER, B]}, ([SYSTEM, USER], [A], [B])),
    "several turns": ({"chosen": [USER, A, USER, A], "rejected": [USER, A, USER, B]}, ([USER, A, USER], [A], [B])),
    "conversations with answers": ({"conversations": [shared(USER)], "chosen": shared(A), "rejected": shared(B)}, PAIR),
    "instruction with an input": (
        {"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"},
        ([{"role": "user", "content": "Q\n\nI"}], [A], [B]),
    ),
    "transcripts": ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}, PAIR),
    "texts that begin alike": (
        {"chosen": "What is it? Ape", "rejected": "What is it? Ant"},
        ([{"role": "user", "content": "What is it?"}], [{"role": "assistant", "content": "Ape"}], [{"role": "assistant", "content": "Ant"}]),
    ),
    "SPIN": ({"real": [USER, A], "generated": [USER, B]}, PAIR),
    "mapped": ({"frage": "Q", "gut": "A", "schlecht": "B"}, PAIR),
}  # fmt: skip


def pair_of(row):
    mapping = {"frage": "prompt", "gut": "chosen", "schlecht": "rejected"} if "frage" in row else {}
    roles = recognise([row], mapping, "x", road="dpo").columns
    return to_pair({role: row[column] for role, column in roles.items()}, Counter())


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_recognised_from(name):
    row, (prompt, chosen, rejected) = PAIRS[name]
    pair = pair_of(row)
    assert pair == {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert fault_of_pair(pair) is None


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "equal_answers"),
        ({"prompt": "Q", "chosen": [USER, A], "rejected": [USER, A]}, "equal_answers"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "empty_answer"),
        ({"prompt": "", "chosen": "A", "rejected": "B"}, "empty_question"),
        ({"prompt": None, "chosen": "Ape", "rejected": "Bee"}, "empty_question"),
        ({"chosen": "Ape", "rejected": "Bee"}, "no_prompt"),
        ({"chosen": [USER, A], "rejected": [{"role": "user", "content": "R"}, B]}, "prompts_differ"),
        ({"prompt": "Q", "chosen": {"a": 1}, "rejected": "B"}, "not_text"),
    ],
)
def test_a_pair_that_teaches_nothing_has_a_reason(row, reason):
    assert fault_of_pair(pair_of(row)) == reason


@pytest.mark.parametrize(
    "row, what, todo",
    [
        ({"instruction": "a", "output": "b"}, "one answer each", "AutoSloth-SFT takes them"),
        ({"messages": [USER, A]}, "one answer each", "AutoSloth-SFT takes them"),
        ({"x": "a"}, "not recognised: x", "prompt/chosen/rejected"),
    ],
)
def test_rows_that_are_no_pairs_are_refused_for_preference_training(row, what, todo):
    with pytest.raises(DataError) as error:
        recognise([row], {}, "x", road="dpo")
    assert what in error.value.what and todo in error.value.todo


pair_columns = st.sampled_from(["prompt", "instruction", "input", "messages", "chosen", "rejected", "system", "label"])


@given(st.lists(st.dictionaries(pair_columns, json_values | st.lists(turn_values, max_size=4), max_size=5), max_size=4))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_rows_become_pairs_or_have_a_named_fault(rows):
    try:
        roles = recognise(rows, {}, "x", road="dpo").columns
    except DataError as error:
        assert error.what.endswith(".") and error.todo.endswith(".")
        return
    for row in rows:
        pair = to_pair({role: row.get(column) for role, column in roles.items()}, Counter())
        assert fault_of_pair(pair) in (None, *UNUSABLE)


def test_pairs_of_a_real_file_are_recognised(real_data):
    rows = json.loads(real_data("dpo_en_demo.json").read_text())
    roles = recognise(rows, {}, "x", road="dpo").columns
    pairs = [to_pair({role: row[column] for role, column in roles.items()}, Counter()) for row in rows]
    assert len(pairs) == 300 and sum(fault_of_pair(pair) is None for pair in pairs) >= 295
    with pytest.raises(DataError, match="AutoSloth-DPO takes them"):
        recognise(rows, {}, "x")
