"""What an answer is worth, by each metric."""

import pytest

from autosloth.score.metrics import METRICS, NotScored, last_number

CASES = {
    "exact": [(" Paris\n", "Paris", 1), ("paris", "Paris", 0), ("Paris.", "Paris", 0)],
    "contains": [("It is Paris.", " Paris ", 1), ("It is paris.", "Paris", 0)],
    "regex": [("call 555-0101", r"\d{3}-\d{4}", 1), ("call", r"\d", 0), ("Größe", r"\p{Lu}r", 1)],
    "number": [
        ("5 * 8 + 2 = 42.", "so it is\n#### 42", 1),
        ("It makes $1,042.00", "#### 1042", 1),
        ("-7", "7", 0),
        ("7 - 3", "#### 3", 1),
        ("no number", "#### 3", 0),
        ("it has 1 234", "234", 0),
        ("3.0000000000000000000000000000001", "3", 0),
    ],
    "json": [
        ('```json\n{"b": [1.0], "a": null}\n```', '{"a": null, "b": [1]}', 1),
        ('Here: {"a": 1} and more', '{"a": 1}', 1),
        ('{"a": true}', '{"a": 1}', 0),
        ("null", "null", 1),
        ("nothing", "null", 0),
        ("[1, NaN]", "[1]", 0),
        ("[" * 10_000, "{}", 0),
        ('{"a": 1e99999999999999999999}', '{"a": 1}', 0),
    ],
    "rouge": [
        ("The cat is on a mat!", "the cat sat on the mat", 2 / 3),
        ("собака", "Собака", 1),
        ("我喜欢吃苹果", "我喜欢吃梨", 8 / 11),
        ("cafe\u0301", "caf\u00e9", 1),
        ("", "a", 0),
    ],
}


@pytest.mark.parametrize(
    "metric, answer, expected, worth", [(metric, *case) for metric, cases in CASES.items() for case in cases]
)
def test_answers_are_worth(metric, answer, expected, worth):
    assert METRICS[metric](answer, expected) == pytest.approx(worth)


def test_every_metric_has_cases():
    assert CASES.keys() == METRICS.keys()


@pytest.mark.parametrize(
    "metric, expected, why",
    [
        ("contains", " ", "whose answer is empty"),
        ("regex", "", "whose answer is empty"),
        ("regex", "(", "with a pattern that is none"),
        ("regex", "(" * 3000 + ")" * 3000, "or too much of one"),
        ("number", "12,50", "whose last number can be read in several ways"),
        ("number", "none", "holds no number"),
        ("json", "{a}", "holds no JSON"),
        ("rouge", "...", "holds no word"),
    ],
)
def test_what_cannot_be_compared_is_named(metric, expected, why):
    with pytest.raises(NotScored, match=why):
        METRICS[metric]("an answer", expected)


@pytest.mark.parametrize(
    "text, number",
    [("-$5", -5), ("$-5", -5), ("\u22125", -5), ("€1,234,567.5", 1234567.5), ("10/20", None), ("1e5", 100000), ("\u20133", -3), ("2024-05-01", None), ("3/4", None), ("10^5", None), ("12,34,567", None), ("...42", 42), ("(3)-2", 2), ("H2O", None), (".5", 0.5)],
)  # fmt: skip
def test_the_last_number_is_read_as_people_write_it(text, number):
    assert last_number(text) == number
