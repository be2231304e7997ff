"""What a person wrote into a card on the Hub is kept when ours is written anew: ours stands between two marks, and the first one tells what our front matter was."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..run import fingerprint

BEGIN, END = "<!-- autosloth begins", "<!-- autosloth ends -->"
# The first mark: which of the front matter's keys are ours, each with a hash of its value as we wrote it.
FIRST = re.compile(
    rf"{BEGIN}; text above this line and below the last one is kept, what is between is written anew\.((?: \S+=[0-9a-f]{{16}})*) -->\n?"
)
MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
OURS = "autosloth"  # a tag of every card of ours


class Loader(yaml.SafeLoader):
    """YAML as people write front matter: `no` is Norwegian and `yes` a word, and a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false", re.IGNORECASE), list("tTfF"))


def marked(matter: dict[str, Any], body: str) -> str:
    """A card of ours: the front matter, and the text between the marks."""
    read_back = yaml.load(to_yaml(matter), Loader)
    hashes = "".join(f" {key}={fingerprint(value)}" for key, value in read_back.items())
    first = (
        f"{BEGIN}; text above this line and below the last one is kept, what is between is written anew.{hashes} -->"
    )
    return f"---\n{to_yaml(matter)}---\n{first}\n{body.strip()}\n\n{END}\n"


def keep_theirs(ours: str, theirs: str) -> str:
    r"""Our new card with what a person changed in the one that is there: text before and after our marks, keys of the front matter that they added, changed or took away.

    Of a list that they changed, ours are put behind theirs. A card without our marks stands below ours, with its own front matter before ours.

    >>> mine = marked({"license": "mit"}, "# Mine")
    >>> print(keep_theirs(mine, "Read this first.\n\n" + mine).split("\n")[3])
    Read this first.
    """
    (our_matter, our_text), (matter, text) = ours_alone(ours), split(theirs)
    first = FIRST.search(text)
    if not first or END not in text[first.end() :]:
        below = "\n\n".join(part.strip() for part in FIRST.sub("\n", text).split(END) if part.strip())
        return card(merged(our_matter, matter, {}), our_text + (f"\n{below}\n" if below else ""))
    written = dict(pair.split("=") for pair in first[1].split()) if matter else {}  # else they took all of it away
    before, after = text[: first.start()], text[text.rindex(END) + len(END) :]
    return card(merged(our_matter, matter, written), before + our_text.rstrip("\n") + (after or "\n"))


def is_ours(text: str) -> bool:
    """Whether a card is one of AutoSloth's, by its marks or, of an older one, by its tag."""
    matter, body = split(text)
    return bool(FIRST.search(body)) or OURS in listed(matter.get("tags"))


def ours_alone(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card of ours without what an earlier `keep_theirs` put there: so it may be done again."""
    matter, body = split(text)
    first = FIRST.search(body)
    if not first or END not in body:
        return matter, body
    written = [pair.split("=")[0] for pair in first[1].split()]
    alone = body[first.start() : body.rindex(END) + len(END)] + "\n"
    return {key: value for key, value in matter.items() if key in written}, alone


def merged(ours: dict[str, Any], theirs: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """Front matter: our values where they are as we wrote them (`written`, key -> hash), and theirs elsewhere.

    >>> before = {"license": fingerprint("mit"), "tags": fingerprint(["a"]), "language": fingerprint("en")}
    >>> merged({"license": "llama3.2", "tags": ["a", "b"], "language": "en"}, {"license": "mit", "tags": ["a", "mine"], "thumbnail": "x"}, before)
    {'license': 'llama3.2', 'tags': ['a', 'mine', 'b'], 'thumbnail': 'x'}
    """
    found = {}
    for key, value in theirs.items():
        if written.get(key) != fingerprint(value):
            both = isinstance(value, list) and isinstance(ours.get(key), list)
            found[key] = [*value, *(new for new in ours[key] if new not in value)] if both else value
        elif key in ours:
            found[key] = ours[key]
    new = {key: value for key, value in ours.items() if key not in theirs and key not in written}
    return {key: found[key] for key in ours if key in found} | found | new


def split(text: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and its text; what is no front matter that can be read stays with the text."""
    matter = MATTER.match(text)
    try:
        read = yaml.load(matter[1], Loader) if matter else None
    except (yaml.YAMLError, ValueError):
        read = None
    if matter and isinstance(read, dict):
        return {str(key): value for key, value in read.items()}, text[matter.end() :]
    return {}, text


def card(matter: dict[str, Any], text: str) -> str:
    """A card of this front matter and this text."""
    return f"---\n{to_yaml(matter)}---\n{text}"


def to_yaml(matter: dict[str, Any]) -> str:
    """Front matter as YAML, in its order, as the Hub's own client writes it."""
    from huggingface_hub.utils import yaml_dump

    return yaml_dump(matter, sort_keys=False)


def listed(value: Any) -> list[Any]:
    """A value of front matter, which may be one or several, as a list."""
    return value if isinstance(value, list) else [value]
