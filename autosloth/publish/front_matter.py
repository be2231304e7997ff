"""The YAML on top of a card: read as people write it, and written by the lines that a person wrote, where they still say what is to be said."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)


class Loader(yaml.SafeLoader):
    """YAML as people write front matter: `no` is Norwegian and `yes` a word, and a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false", re.IGNORECASE), list("tTfF"))


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


def card(matter: dict[str, Any], text: str, theirs: str = "") -> str:
    """A card of this front matter and this text; theirs: a card whose lines are kept in the front matter."""
    return f"---\n{by_their_lines(matter, theirs)}---\n{text}"


def to_yaml(matter: dict[str, Any]) -> str:
    """Front matter as YAML, in its order, as the Hub's own client writes it."""
    from huggingface_hub.utils import yaml_dump

    return yaml_dump(matter, sort_keys=False)


def by_their_lines(matter: dict[str, Any], theirs: str) -> str:
    r"""Front matter as YAML in which a key, or an item of a list, that a card has with the same value keeps its lines there: comments, and how numbers and texts are written.

    Of one that has another value now, or is gone, the comments are kept, above what comes in its place; those below all keys stay there. Where such lines together would not say what they should (the anchor of an alias may be gone), none is.

    >>> print(by_their_lines({"version": 1.1, "tags": ["a", "b"]}, "---\nversion: 1.10 # mine\ntags:\n- 'a'\n---\n"), end="")
    version: 1.10 # mine
    tags:
    - 'a'
    - b
    """
    there, foot = keys_in(theirs)
    lines = [line for key, value in matter.items() for line in lines_of({key: value}, value, there.get(key))]
    gone = [line for key, part in there.items() if key not in matter for line in part.comments]
    text = "".join(lines + gone + foot)
    return text if split(f"---\n{text}---\n")[0] == matter else to_yaml(matter)


class Part(NamedTuple):
    """A key of front matter, or an item of a list there, as a card has it: what it says, its lines, of them those that are comments; of a list its items, the lines above these, and what stands before each."""

    value: Any
    lines: list[str]
    comments: list[str]
    items: Sequence[Part] = ()
    head: Sequence[str] = ()
    indent: str = ""


def lines_of(dumped: Any, value: Any, part: Part | None) -> list[str]:
    """The lines of a key: those that it has, where they say the same; of a list with other items those of the items that stay."""
    if part and part.value == value:
        return part.lines
    if not part or not part.items or not value or not isinstance(value, list):
        return [*(part.comments if part else []), to_yaml(dumped)]
    above, left, lines = above_items(value, part), [*part.items], [*part.head]
    for number, item in enumerate(value):
        known = next((each for each in left if each.value == item), None)
        if known:
            left.remove(known)
        fresh = textwrap.indent(to_yaml([item]), part.indent)
        lines += [*above.get(number, []), *(known.lines if known else [fresh])]
    return lines


def above_items(value: list[Any], part: Part) -> dict[int, list[str]]:
    """The comments of a list's items that are gone, by the number of the item that they go above: the one that comes in its place, or the last one."""
    above: dict[int, list[str]] = {}
    place = 0
    for item in part.items:
        if item.value in value:
            place = value.index(item.value) + 1
        else:
            comments = [part.indent + line for line in item.comments]
            above.setdefault(min(place, len(value) - 1), []).extend(comments)
    return above


def keys_in(theirs: str) -> tuple[dict[str, Part], list[str]]:
    """The keys of a card's front matter, and the lines of comments below them; none where it has none, writes it in braces, or has keys that are given twice or merged."""
    values, _ = split(theirs)
    if not values:
        return {}, []
    raw = MATTER.match(theirs)[1].replace("\r\n", "\n")
    root, lines = yaml.compose(raw, Loader), raw.splitlines(keepends=True)
    if root.flow_style or [key.value for key, _ in root.value] != [*values]:
        return {}, []
    foot = len(lines) - len([*itertools.takewhile(re.compile(r"#|\s*$").match, reversed(lines))])
    foot = next((number for number in range(foot, len(lines)) if lines[number].startswith("#")), len(lines))
    starts = [*starts_of([key for key, _ in root.value], lines), foot]
    found, comments = zip(values, root.value, itertools.pairwise(starts), strict=True), comments_of(raw)
    return {name: part_of(values[name], node, lines, comments, *at) for name, (_, node), at in found}, lines[foot:]


def comments_of(raw: str) -> list[str]:
    r"""The comment of each line of YAML, or nothing; a `#` within a text is none.

    >>> comments_of("a: 'b # c' # d\ne: |\n  # f\n")
    ['# d\n', '', '']
    """
    said = [token for token in yaml.scan(raw, Loader) if isinstance(token, yaml.ScalarToken)]
    places = [at for token in said for at in (token.start_mark.index, token.end_mark.index)]
    parts = [raw[start:end] for start, end in itertools.pairwise([0, *places, len(raw)])]
    parts[1::2] = [re.sub(r"\S", "x", part) for part in parts[1::2]]
    found = [re.search(r"(?:^|\s)(#.*)", line) for line in "".join(parts).splitlines()]
    return [f"{comment[1]}\n" if comment else "" for comment in found]


def part_of(value: Any, node: yaml.Node, lines: list[str], comments: list[str], start: int, end: int) -> Part:
    """What stands between two lines of front matter."""
    own = [comment for comment in comments[start:end] if comment]
    if not isinstance(node, yaml.SequenceNode) or node.flow_style or not node.value:
        return Part(value, lines[start:end], own)
    starts = [*starts_of(node.value, lines), end]
    nodes = zip(value, node.value, itertools.pairwise(starts), strict=True)
    items = [part_of(item, each, lines, comments, *between) for item, each, between in nodes]
    return Part(value, lines[start:end], own, items, lines[start : starts[0]], " " * node.start_mark.column)


def starts_of(nodes: list[yaml.Node], lines: list[str]) -> list[int]:
    """The line that each of these begins at, comments above it and empty lines among them; those within a text that it is no part of are further to the right."""
    starts: list[int] = []
    for node in nodes:
        start, above = node.start_mark.line, re.compile(rf" {{0,{node.start_mark.column}}}(#|$)")
        while start > (starts[-1] + 1 if starts else 0) and above.match(lines[start - 1].rstrip()):
            start -= 1
        starts.append(start)
    return starts
