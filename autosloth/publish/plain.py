"""Text that comes from a user's rows and names, so that it breaks nothing in a card: no row of a table, no block of code."""

from __future__ import annotations

import re

LONGEST = 2000  # characters of a sample
CONTROL = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # no tab and no line feed; a half of a character cannot be written
)


def in_line(text: object) -> str:
    r"""A name within a line, which may be a row of a table.

    >>> in_line("a|b\n<i>\x00")
    'a&#124;b &lt;i>'
    """
    return one_line(text).replace("|", "&#124;").replace("<", "&lt;").replace("`", "'")


def in_code(text: object) -> str:
    """A name between backticks within a line.

    >>> in_code("a`b|c")
    "a'b|c"
    """
    return one_line(text).replace("`", "'")


def in_sample(text: object) -> str:
    r"""A text of a row, without what a terminal or a browser would obey, and not too long.

    >>> in_sample("a\x1b[1mb\r\nc"), len(in_sample("x" * 200_000))
    ('a[1mb\nc', 2004)
    """
    kept = re.sub(f"[{CONTROL}]", "", str(text))
    return kept if len(kept) <= LONGEST else kept[:LONGEST] + " ..."


def one_line(text: object) -> str:
    """A text without line ends and control characters."""
    return re.sub(f"[{CONTROL}\\s]+", " ", str(text)).strip()
