"""What a person wrote into a card on the Hub is kept when ours is written anew: ours stands between two marks, and the first one tells what our front matter was."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from ..run import fingerprint
from .front_matter import Loader, card, split, to_yaml

BEGIN, END = "<!-- autosloth begins", "<!-- autosloth ends -->"
# The first mark: which of the front matter's keys are ours, each with a hash of its value as we wrote it, and of a list with one of each item.
FIRST = re.compile(
    rf"{BEGIN}; text above this line and below the last one is kept, what is between is written anew\.((?: \S+=[0-9a-f]{{16}}(?:,[0-9a-f]{{8}})*)*) -->\n?"
)
INDENTED = re.compile(r"(?: {4}|\t)[^\n]*\Z")  # as the samples in our text are: a mark behind this is quoted
OURS = "autosloth"  # a tag of every card of ours


def marked(matter: dict[str, Any], body: str) -> str:
    """A card of ours: the front matter, and the text between the marks."""
    read_back = yaml.load(to_yaml(matter), Loader)
    hashes = "".join(f" {key}={','.join(hashes_of(value))}" for key, value in read_back.items())
    first = (
        f"{BEGIN}; text above this line and below the last one is kept, what is between is written anew.{hashes} -->"
    )
    return f"---\n{to_yaml(matter)}---\n{first}\n{body.strip()}\n\n{END}\n"


def keep_theirs(ours: str, theirs: str) -> str:
    r"""Our new card with what a person changed in the one that is there: text before and after our marks, keys of the front matter that they added, changed or took away.

    What they wrote into the front matter keeps its form and its comments. Of a list that they changed, ours are put behind theirs. A card without our marks stands below ours, with its own front matter before ours.

    >>> mine = marked({"license": "mit"}, "# Mine")
    >>> print(keep_theirs(mine, "Read this first.\n\n" + mine).split("\n")[3])
    Read this first.
    """
    (our_matter, our_text), (matter, text) = ours_alone(ours), split(theirs)
    whole = blocks(text)
    if not whole:
        below = "\n\n".join(part.strip() for part in FIRST.sub("\n", text).split(END) if part.strip())
        return card(merged(our_matter, matter, {}), our_text + (f"\n{below}\n" if below else ""), theirs)
    written = hashes_in(text, whole[0]) if matter else {}  # else they took all of it away
    before, after = text[: whole[0].start], outside(text[whole[0].end :])
    return card(merged(our_matter, matter, written), before + our_text.rstrip("\n") + (after or "\n"), theirs)


class Block(NamedTuple):
    """Where text of ours stands in a card, its marks with it."""

    start: int
    end: int


def blocks(text: str) -> list[Block]:
    """Each text of ours that has both marks: of what is between, none is a first mark, so a block whose last mark is gone is none, and nothing below it is lost."""
    found: list[Block] = []
    firsts = [at.start() for at in FIRST.finditer(text) if not is_quoted(text, at.start())]
    for end in (at.start() for at in re.finditer(re.escape(END), text) if not is_quoted(text, at.start())):
        begins = [start for start in firsts if (found[-1].end if found else 0) <= start < end]
        if begins:
            found.append(Block(begins[-1], end + len(END)))
    return found


def is_quoted(text: str, at: int) -> bool:
    """Whether a mark stands in an indented line."""
    return INDENTED.match(text[text.rfind("\n", 0, at) + 1 : at]) is not None


def outside(text: str) -> str:
    """A text without the blocks of ours in it."""
    for block in reversed(blocks(text)):
        text = text[: block.start] + text[block.end :]
    return text


def hashes_in(text: str, block: Block) -> dict[str, str]:
    """What the first mark of a block tells: the keys of ours and their hashes."""
    return dict(pair.rsplit("=", 1) for pair in FIRST.match(text, block.start)[1].split())


def hashes_of(value: Any) -> list[str]:
    """The hash of a value of front matter, and of a list one of each item."""
    return [fingerprint(value), *map(short_hash, flat(value) if isinstance(value, list) else [])]


def short_hash(item: Any) -> str:
    """The hash of an item of a list."""
    return fingerprint(item)[:8]


def is_ours(text: str) -> bool:
    """Whether a card is one of AutoSloth's, by its marks or, of an older one, by its tag."""
    matter, body = split(text)
    return bool(FIRST.search(body)) or OURS in listed(matter.get("tags"))


def ours_alone(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card of ours without what an earlier `keep_theirs` put there: so it may be done again."""
    matter, body = split(text)
    if not (whole := blocks(body)):
        return matter, body
    written = hashes_in(body, whole[0])
    alone = body[whole[0].start : whole[0].end] + "\n"
    return {key: value for key, value in matter.items() if key in written}, alone


def merged(ours: dict[str, Any], theirs: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """Front matter: our values where they are as we wrote them (`written`, key -> hash), and theirs elsewhere.

    >>> before = {"license": fingerprint("mit"), "tags": fingerprint(["a"]), "language": fingerprint("en")}
    >>> merged({"license": "llama3.2", "tags": ["a", "b"], "language": "en"}, {"license": "mit", "tags": ["a", "mine"], "thumbnail": "x"}, before)
    {'license': 'llama3.2', 'tags': ['a', 'mine', 'b'], 'thumbnail': 'x'}
    """
    found = {}
    for key, value in theirs.items():
        hash_before, *items_before = written.get(key, "").split(",")
        if hash_before != fingerprint(value):
            both = isinstance(value, list) and isinstance(ours.get(key), list)
            found[key] = merged_list(ours[key], value, items_before) if both else value
        elif key in ours:
            found[key] = ours[key]
    new = {key: value for key, value in ours.items() if key not in theirs and key not in written}
    return {key: found[key] for key in ours if key in found} | found | new


def merged_list(ours: list[Any], theirs: list[Any], before: list[str]) -> list[Any]:
    """A list that a person changed: without the items that we wrote `before`, by their hashes, and do not write now; ours behind theirs, but what they took away.

    >>> merged_list(["a", "c"], ["a", "b", "mine"], [short_hash("a"), short_hash("b")])
    ['a', 'mine', 'c']
    """
    ours, theirs = flat(ours), flat(theirs)
    kept = [item for item in theirs if item in ours or short_hash(item) not in before]
    return grouped([*kept, *(item for item in ours if item not in theirs and short_hash(item) not in before)])


def flat(items: list[Any]) -> list[Any]:
    """The items of a list; of the Hub's `model-index`, where one holds `results`, an item for each of these.

    >>> flat(["a", {"name": "m", "results": [1, 2]}])
    ['a', {'name': 'm', 'results': [1]}, {'name': 'm', 'results': [2]}]
    """
    several = [item["results"] if has_results(item) else None for item in items]
    return [
        part
        for item, results in zip(items, several, strict=True)
        for part in ([{**item, "results": [result]} for result in results] if results else [item])
    ]


def grouped(items: list[Any]) -> list[Any]:
    """What `flat` parted, together again."""
    found: list[Any] = []
    for item in items:
        alike = [
            old
            for old in found
            if has_results(old) and has_results(item) and {**old, "results": item["results"]} == item
        ]
        if alike:
            alike[0]["results"] = [*alike[0]["results"], *item["results"]]
        else:
            found.append(dict(item) if has_results(item) else item)
    return found


def has_results(item: Any) -> bool:
    """Whether an item is one of `model-index`."""
    return isinstance(item, dict) and isinstance(item.get("results"), list)


def listed(value: Any) -> list[Any]:
    """A value of front matter, which may be one or several, as a list."""
    return value if isinstance(value, list) else [value]
