"""What an answer is worth beside the one that the file gives, from 0 to 1."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

# A number as people write it: a sign that stands at it, a currency before or behind the sign, thousands parted by commas.
SIGN = r"[-+\u2212\u2013]"
NUMBER = re.compile(
    rf"((?<![\w)\]]){SIGN})?(?:[$€£¥]({SIGN})?)?(?<!\w)((?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)([eE][-+]?\d{{1,3}}(?!\d))?"
)
# Digits with what may be a part of their number: 12,50 and 1 234 and 3/4 and 2024-05-01 and 10^5 are read in several ways, 1,042.50 and 1e5 in one.
CLUSTER = re.compile(r"\d(?:[\d.,/:^'\u2019\u00a0\u202f\u2009\u2013-]*\d| \d{3}(?!\d)|[eE][-+]?\d+)*")
PLAIN = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
# Words as ROUGE counts them; of scripts that put no blanks between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character is one.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
PATTERN_S = 1.0  # seconds that a pattern may search an answer
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)
Metric = Callable[[str, str], float]  # of the answer and the expected one
NO_VALUE = object()  # where there is no JSON; null is a value


class NotScored(Exception):
    """Why the answer that the file gives cannot be compared with any."""


def exact(answer: str, expected: str) -> float:
    """Whether they are the same text but for white space around it and how accents are encoded (Unicode's NFC)."""
    return float(composed(answer).strip() == composed(expected).strip())


def composed(text: str) -> str:
    """The text with each accent in its letter, as most texts are encoded."""
    return unicodedata.normalize("NFC", text)


def contains(answer: str, expected: str) -> float:
    """Whether the answer holds the expected text. Raises NotScored."""
    return float(something(composed(expected).strip()) in composed(answer))


def something(text: str) -> str:
    """The text. Raises NotScored where it is empty, which every answer holds."""
    if not text:
        raise NotScored("whose answer is empty")
    return text


def pattern(answer: str, expected: str) -> float:
    """Whether the expected pattern (of the package `regex`, a superset of Python's) is found in the answer. Raises NotScored."""
    import regex

    try:
        return float(regex.search(something(expected), answer, timeout=PATTERN_S) is not None)
    except (regex.error, RecursionError, MemoryError, OverflowError):
        raise NotScored("with a pattern that is none, or too much of one") from None
    except TimeoutError:
        raise NotScored(f"with a pattern that takes more than {PATTERN_S:.0f} s") from None


def number(answer: str, expected: str) -> float:
    """Whether the last number of both is the same: `#### 1,042` and `It makes $1042.00.` are. Raises NotScored."""
    wanted = last_number(expected)
    if wanted is None:
        none = NUMBER.search(expected) is None
        raise NotScored("whose answer holds no number" if none else "whose last number can be read in several ways")
    return float(last_number(answer) == wanted)


def last_number(text: str) -> Decimal | None:
    """The last number in a text; commas part thousands, a full stop the decimals; None where there is none, or it can be read in several ways.

    >>> last_number("#### 1,042"), last_number("5-3 = -$2.50."), last_number("from 10 to 20%"), last_number("1 234 or 12,50")
    (Decimal('1042'), Decimal('-2.50'), Decimal('20'), None)
    """
    found = [*NUMBER.finditer(text)]
    if not found or not PLAIN.fullmatch([*CLUSTER.finditer(text)][-1][0]):
        return None
    before, behind, digits, exponent = found[-1].groups()
    number = Decimal(digits.replace(",", "") + (exponent or ""))
    return number.copy_negate() if (before or behind or "+") != "+" else number


def same_json(answer: str, expected: str) -> float:
    """Whether both hold the same JSON value, whatever the order of keys. Raises NotScored."""
    wanted = json_value(expected)
    if wanted is NO_VALUE:
        raise NotScored("whose answer holds no JSON")
    return float(equal(json_value(answer), wanted))


def json_value(text: str) -> Any:
    """The JSON value that a text is, or the first in a fence, or else the first object or list in it; NO_VALUE where there is none.

    >>> json_value('It is:\\n```json\\n{"a": 1.0}\\n```'), json_value("The list [1, 2] has 2."), json_value("none") is NO_VALUE
    ({'a': Decimal('1.0')}, [1, 2], True)
    """
    decoder = json.JSONDecoder(parse_float=decimal, parse_constant=refused)
    try:
        for whole in (text, *FENCE.findall(text)):
            with contextlib.suppress(ValueError):
                return decoder.decode(whole)
        for start in re.finditer(r"[{\[]", text):
            with contextlib.suppress(ValueError):
                return decoder.raw_decode(text, start.start())[0]
    except RecursionError:  # nested as deeply as no answer is meant to be
        pass
    return NO_VALUE


def decimal(text: str) -> Decimal:
    """A number with a point or an exponent. Raises ValueError for one that is too large to be told."""
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError(text) from None


def refused(constant: str) -> Any:
    """NaN and Infinity, which Python reads, are no JSON (RFC 8259)."""
    raise ValueError(constant)


def equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same; 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def rouge(answer: str, expected: str) -> float:
    """ROUGE-L's F1 (Lin 2004): of the words, in small letters, the longest common subsequence. Raises NotScored.

    With words m and n long and a common subsequence of length l it is 2l / (m + n), which is 1 less the normalized distance of insertions and deletions.
    """
    from rapidfuzz.distance import Indel

    said, wanted = (WORD.findall(composed(text).casefold()) for text in (answer, expected))
    if not wanted:
        raise NotScored("whose answer holds no word")
    return Indel.normalized_similarity(said, wanted)


METRICS: dict[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "regex": pattern,
    "number": number,
    "json": same_json,
    "rouge": rouge,
}
IN_WORDS = {
    "exact": "exact match",
    "contains": "the expected text in the answer",
    "regex": "the expected pattern in the answer",
    "number": "the same last number",
    "json": "the same JSON",
    "rouge": "ROUGE-L F1",
}
