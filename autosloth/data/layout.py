"""Where a chat's answers stand in what the chat template makes of it, and whether all of the chat is shown.

A template is asked about the shape of a chat: the chat with every text replaced by a mark. What it makes of the shape tells where
each text will stand, which texts it hides, and what lies around the answers, whatever the texts themselves say. Chats of
one shape share one layout, and a long chat costs two renderings, not two for each of its turns.
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError
from ..models import render_chat
from .turns import Turn

MARK = re.compile(r"Zq(\d+)qZ")  # letters and digits: filters such as `trim` and `tojson` leave it as it is
THINK, THOUGHT_END = "<think>", "</think>"
SHORT = 16  # turns up to which what stands around an answer is found out anew, not looked up
KEPT = 65_536  # turns in the layouts that are kept for other chats of the same shape
Boundary = tuple[int, int]  # in which of the literal stretches of a layout, and how far into it


@dataclass
class Shape:
    """A chat with marks for texts: `turns`, the `texts` in the order of the marks, and of each turn the numbers of the marks in what it says and thinks."""

    turns: list[Turn] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    marks: list[list[int]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The same for chats of the same shape."""
        return json.dumps(self.turns, default=str)


@dataclass
class Layout:
    """What the template makes of a shape.

    literals: the stretches of text before, between and after the marks; shown: the marks between them, in order; answers: of each
    answer that is learnt its turn and where it begins and ends.
    """

    literals: list[str]
    shown: list[int]
    answers: list[tuple[int, Boundary, Boundary]]
    hidden: bool = False  # a question, a system prompt, a tool's turn or a call is not shown
    rebuilt: bool = False  # put together from the prompt and the answer: the template shows the last answer otherwise
    closed: bool = False  # with an empty thought, where the prompt opens one and the answer has none
    thought_hidden: bool = False  # the template does not show thoughts
    blanks_hidden: bool = False  # nor the blanks that an answer begins with
    not_learnt: int = 0  # answers that are not shown whole
    other_opening: int = 0  # answers that stand behind another opening than that of generation


@dataclass
class Placed:
    """A chat's text and where in it the answers stand, as (turn, start, end) in characters."""

    text: str
    answers: list[tuple[int, int, int]]
    layout: Layout


class Template:
    """A tokenizer's chat template, and what was found out about it."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.looked_for = looked_for(tokenizer.chat_template)
        self.special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
        self.layouts: dict[tuple[str, str], Layout] = {}
        self.kept = 0  # turns in them
        self.tools_shown: dict[str, bool] = {}
        self.openings: dict[tuple, tuple[str, bool]] = {}
        self.closings: dict[tuple, str] = {}

    def place(self, turns: list[Turn], tools: list | None) -> Placed:
        """The chat, which ends with an answer, as the model is to read it. Raises ModelError when the template refuses it."""
        shape, hidden = self.shape_of(turns), False
        try:
            layout = self.layout_of(shape, tools)
            hidden = layout.hidden
            told = turns[:-1] if layout.rebuilt else turns
            text = render_chat(self.tokenizer, told, answer_next=layout.rebuilt, tools=tools)
            return placed(layout, shape.texts, text)
        except (ModelError, LookupError):  # the template looks into the texts, or refuses the marks
            shape = Shape(turns, [], [[] for _ in turns])
            layout = Finder(self, shape, tools).layout()
            layout.hidden |= hidden  # marks tell that surely; a short text may stand elsewhere by chance
            return placed(layout, [], layout.literals[0])

    def layout_of(self, shape: Shape, tools: list | None) -> Layout:
        """The layout of a shape, found or remembered. Raises ModelError."""
        key = (shape.key, json.dumps(tools, default=str))
        if key not in self.layouts:
            if self.kept >= KEPT:
                self.layouts.clear()
                self.kept = 0
            self.layouts[key] = Finder(self, shape, tools).layout()
            self.kept += len(shape.turns)
        return self.layouts[key]

    def shows(self, tools: list) -> bool:
        """Whether the template shows tools: a question looks otherwise with them."""
        key = json.dumps(tools, default=str)
        if key not in self.tools_shown:
            chat = [{"role": "user", "content": "?"}]
            self.tools_shown[key] = True
            with contextlib.suppress(ModelError):  # then it has something against this chat, not against tools
                self.tools_shown[key] = render_chat(self.tokenizer, chat, tools=tools) != render_chat(
                    self.tokenizer, chat
                )
        return self.tools_shown[key]

    def shape_of(self, turns: list[Turn]) -> Shape:
        """The shape of a chat: blanks around its texts stay, and what the template looks for in them (`</think>`, say)."""
        shape = Shape()
        for turn in turns:
            first = len(shape.texts)
            marked = {
                name: self.marked(turn[name], shape.texts)
                for name in ("reasoning_content", "content")
                if turn.get(name)
            }
            shape.marks.append(list(range(first, len(shape.texts))))
            if "tool_calls" in turn:
                marked["tool_calls"] = [self.marked_call(call, shape.texts) for call in turn["tool_calls"]]
            shape.turns.append({**turn, **marked})
        return shape

    def marked_call(self, call: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        """A call with marks in place of the texts in its arguments."""
        function = call["function"]
        return {**call, "function": {**function, "arguments": self.marked_leaves(function["arguments"], texts)}}

    def marked_leaves(self, value: Any, texts: list[str]) -> Any:
        """A value with marks in place of the texts in it, at any depth."""
        if isinstance(value, str):
            return self.marked(value, texts) if value else value
        if isinstance(value, dict):
            return {key: self.marked_leaves(each, texts) for key, each in value.items()}
        return [self.marked_leaves(each, texts) for each in value] if isinstance(value, list) else value

    def marked(self, text: str, texts: list[str]) -> str:
        """A text with marks in place of what it says, which is added to `texts`."""
        parts = self.looked_for.split(text) if self.looked_for.search(text) else [text]
        for i in range(0, len(parts), 2):
            said = parts[i].strip()
            if said:
                start = parts[i].index(said)
                texts.append(said)
                parts[i] = f"{parts[i][:start]}Zq{len(texts) - 1}qZ{parts[i][start + len(said) :]}"
        return "".join(parts)


@functools.lru_cache(maxsize=8)
def looked_for(template: str) -> re.Pattern[str]:
    """What a template may look for in a text: the markup in its own strings, and what marks a thought.

    >>> looked_for("{% if '[END]' in m.content %}{{ m.role == 'user' }}{% endif %}").pattern
    '(</think>|<think>|\\\\[END\\\\])'
    """
    import jinja2

    strings = {THINK, THOUGHT_END}
    with contextlib.suppress(jinja2.TemplateError, SyntaxError, ValueError):
        for _, kind, token in jinja2.Environment().lex(template):
            if kind == "string":
                strings.add(str(ast.literal_eval(token)).strip())
    markup = [each for each in strings if len(each) > 2 and set("<>[]|") & set(each)]
    return re.compile(f"({'|'.join(map(re.escape, sorted(markup, key=lambda each: (-len(each), each))))})")


def placed(layout: Layout, texts: list[str], rendered: str) -> Placed:
    """The texts in their places. Raises LookupError when what was rendered is not what the layout foretells."""
    starts, pieces, at = [], [], 0
    for literal, mark in zip(layout.literals, [*layout.shown, None], strict=True):
        starts.append(at)
        pieces.append(literal)
        at += len(literal)
        if mark is not None:
            said = as_shown(texts[mark], rendered, at)
            pieces.append(said)
            at += len(said)
    text = "".join(pieces)
    if not (text.startswith(rendered) if layout.rebuilt else text == rendered):
        raise LookupError
    where = [(turn, starts[a] + b, starts[c] + d) for turn, (a, b), (c, d) in layout.answers]
    return Placed(text, where, layout)


def as_shown(said: str, rendered: str, at: int) -> str:
    """A text as it stands at a place: as it is, or as in JSON, where a template shows it so."""
    if rendered.startswith(said, at):
        return said
    escaped = (json.dumps(said, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return next((each for each in escaped if rendered.startswith(each, at)), said)


class Finder:
    """Finds the layout of one shape. A shape without marks is a chat itself: then its own texts are looked for."""

    def __init__(self, template: Template, shape: Shape, tools: list | None):
        self.template, self.shape, self.tools = template, shape, tools
        self.turns, self.last = shape.turns, len(shape.turns) - 1
        self.by_marks = any(shape.marks)
        users = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        self.last_user = users[-1] if users else -1
        self.kinds = [kind(turn) for turn in self.turns]
        self.found = Layout([], [], [])

    def render(self, count: int, answer_next: bool = False) -> str:
        """The first `count` turns as the template shows them."""
        return render_chat(self.template.tokenizer, self.turns[:count], answer_next=answer_next, tools=self.tools)

    def layout(self) -> Layout:
        """The layout. Raises ModelError when the template refuses the chat."""
        found, self.text = self.found, self.render(len(self.turns))
        self.spots = self.spots_in(self.text)
        begin = self.begin_of_last()
        self.ending = self.text[self.spots[self.last][-1][1] :].rstrip() if self.spots[self.last] else ""
        self.check_shown()
        answers = []
        for i, turn in enumerate(self.turns[:-1]):
            if turn["role"] == "assistant":
                where = self.span_of(i)
                if where is None:
                    found.not_learnt += 1
                else:
                    answers.append((i, *where))
        if begin is None:
            found.not_learnt += 1
        else:
            answers.append((self.last, begin, len(self.text.rstrip())))
        marks = list(MARK.finditer(self.text)) if self.by_marks else []
        edges = [0, *(edge for mark in marks for edge in mark.span()), len(self.text)]
        bounds = list(zip(edges[::2], edges[1::2], strict=True))
        found.literals, found.shown = [self.text[a:b] for a, b in bounds], [int(mark[1]) for mark in marks]
        found.answers = [(i, boundary(bounds, a), boundary(bounds, b)) for i, a, b in answers]
        return found

    def spots_in(self, text: str) -> list[list[tuple[int, int]]]:
        """Of each turn, where its texts stand that are shown, in order."""
        if self.by_marks:
            spots: dict[int, tuple[int, int]] = {}
            for mark in MARK.finditer(text):
                spots.setdefault(int(mark[1]), mark.span())
            return [[spots[number] for number in marks if number in spots] for marks in self.shape.marks]
        found, at = [], 0
        for turn in self.turns:
            said = [turn[name].strip() for name in ("reasoning_content", "content") if turn.get(name)]
            here = []
            for each in said:
                start = text.find(each, at)
                start = text.find(each) if start < 0 else start
                if start >= 0:
                    here.append((start, start + len(each)))
                    at = start + len(each)
            found.append(here)
        return found

    def expected(self, i: int, thoughts: bool = True) -> int:
        """How many texts of a turn are to be shown."""
        turn = self.turns[i]
        if not self.by_marks:
            return bool(turn.get("content")) + bool(thoughts and turn.get("reasoning_content"))
        of_thought = len(MARK.findall(turn.get("reasoning_content") or ""))
        return len(self.shape.marks[i]) - (0 if thoughts else of_thought)

    def begin_of_last(self) -> int | None:
        """Where the last answer begins: behind the prompt that generation uses; None when it cannot be shown whole.

        Where the template shows it otherwise than behind that prompt, or in part, the text becomes that prompt and the answer itself.
        """
        turn, known = self.turns[self.last], self.opening_known(self.last)
        if known is not None and len(self.spots[self.last]) == self.expected(self.last):
            return known
        prompt = self.render(self.last, answer_next=True)
        opens = prompt.rstrip().endswith(THINK)
        whole = len(self.spots[self.last]) == self.expected(self.last)
        if not whole and turn.get("reasoning_content") and not opens:
            self.found.thought_hidden = len(self.spots[self.last]) == self.expected(self.last, thoughts=False)
            whole = self.found.thought_hidden
        if whole and self.text.startswith(prompt) and all(at >= len(prompt) for at, _ in self.spots[self.last]):
            return self.remember_opening(self.last, len(prompt))
        answer = self.rebuilt_answer(prompt, opens)
        if answer is None:
            return None
        self.found.rebuilt, self.text = True, prompt + answer
        self.spots = self.spots_in(self.text)
        return len(prompt)

    def rebuilt_answer(self, prompt: str, opens: bool) -> str | None:
        """The last answer as it goes on from the prompt, with what the template puts after answers; None when that cannot be known."""
        turn = self.turns[self.last]
        said, spots = turn["content"], self.spots[self.last]
        in_said = [mark.span() for mark in MARK.finditer(said)] if self.by_marks else [(0, len(said))] if said else []
        if not spots or not in_said or not self.ends_with_content(spots[-1]):
            return None
        tail, trail = self.text[spots[-1][1] :], said[in_said[-1][1] :]
        tail = tail[len(trail) :] if trail and tail.startswith(trail) else tail
        if opens:
            if turn.get("reasoning_content"):
                said = f"{turn['reasoning_content']}\n{THOUGHT_END}\n\n{said}"
            elif said.lstrip().startswith(THINK):
                said = said.lstrip()[len(THINK) :].lstrip("\n")
            elif THOUGHT_END not in said:
                self.found.closed = True
                said = ("\n" if prompt.endswith("\n") else "\n\n") + f"{THOUGHT_END}\n\n{said}"
        return said + (trail if trail and not said.endswith(trail) else "") + tail

    def ends_with_content(self, spot: tuple[int, int]) -> bool:
        """Whether the text at a spot is the last of what the last turn says, so that what follows it is the template's."""
        said = self.turns[self.last]["content"]
        if not self.by_marks:
            return self.text[slice(*spot)] == said.strip()
        return self.text[slice(*spot)] == MARK.findall(said)[-1].join(("Zq", "qZ"))

    def check_shown(self) -> None:
        """Note a turn, a call or tools that the template hides, and blanks that it cuts."""
        found = self.found
        for i, turn in enumerate(self.turns):
            if turn["role"] != "assistant" and len(self.spots[i]) < self.expected(i):
                found.hidden = True
            if turn.get("tool_calls") and not all(shown(call, self.around(i)) for call in turn["tool_calls"]):
                found.hidden = True
        if self.tools and not self.template.shows(self.tools):
            found.hidden = True
        blanks = [
            i for i, turn in enumerate(self.turns) if turn["role"] == "assistant" and turn["content"][:1].isspace()
        ]
        if blanks and not found.rebuilt:
            bare = [
                {**turn, "content": turn["content"].lstrip()} if i in blanks else turn
                for i, turn in enumerate(self.turns)
            ]
            cut = sum(len(self.turns[i]["content"]) - len(bare[i]["content"]) for i in blanks)
            found.blanks_hidden = (
                len(self.text) - len(render_chat(self.template.tokenizer, bare, tools=self.tools)) < cut
            )

    def around(self, i: int) -> str:
        """The text from the turn before to the turn after, where a turn's calls are looked for."""
        start = self.spots[i - 1][-1][1] if i and self.spots[i - 1] else 0
        stop = self.spots[i + 1][0][0] if i < self.last and self.spots[i + 1] else len(self.text)
        return self.text[start:stop] if start < stop else self.text

    def span_of(self, i: int) -> tuple[int, int] | None:
        """Where an earlier answer begins and ends, its end token included; None when it is not shown whole where generation would put it."""
        if len(self.spots[i]) < self.expected(i, thoughts=not self.found.thought_hidden):
            return None
        others = self.found.other_opening
        begin, end = self.opening_known(i), self.closing_known(i)
        with contextlib.suppress(ModelError):
            begin = self.begin_of(i) if begin is None else begin
            end = self.end_of(i) if end is None else end
        fits = begin is not None and end is not None and all(begin <= a and b <= end for a, b in self.spots[i])
        if fits and begin < end:
            return begin, end
        self.found.other_opening = others
        return None

    def begin_of(self, i: int) -> int | None:
        """Where an earlier answer begins, by what the template makes of the turns before it.

        A prompt may end otherwise than the text goes on (with an opened thought, say), but not in what was asked.
        """
        prompt = self.render(i, answer_next=True)
        if self.text.startswith(prompt):
            return self.remember_opening(i, len(prompt))
        asked = self.render(i).rstrip()
        begin = len(os.path.commonprefix([prompt, self.text]))
        begin = min([begin, *(start for start, _ in self.spots[i][:1])])
        if not self.text.startswith(asked) or begin < len(asked):
            return None
        self.found.other_opening += 1
        return self.remember_opening(i, begin, other=True)

    def end_of(self, i: int) -> int | None:
        """Where an earlier answer ends: where the chat up to it does, or with what ends the last answer."""
        upto = self.render(i + 1).rstrip()
        if self.text.startswith(upto):
            return self.remember_closing(i, len(upto))
        if self.spots[i] and self.ending and self.text.startswith(self.ending, self.spots[i][-1][1]):
            return self.remember_closing(i, self.spots[i][-1][1] + len(self.ending))
        return None

    # What a template puts around an answer is the same for all answers between turns of the same kinds, so it is found out once
    # and then only looked for: else a chat would cost the square of its length.

    def around_of(self, i: int) -> tuple:
        """What a template may look at when it writes what stands around an answer: the kinds of the turns there."""
        return i > self.last_user, *self.kinds[i - 1 : i + 2]

    def remember_opening(self, i: int, begin: int, other: bool = False) -> int:
        """Keep what stands between the turn before an answer and the answer, which begins there; other: it is not what generation puts there."""
        if self.by_marks and i and self.spots[i - 1]:
            self.template.openings.setdefault(self.around_of(i), (self.text[self.spots[i - 1][-1][1] : begin], other))
        return begin

    def opening_known(self, i: int) -> int | None:
        """Where an answer begins, if what stands before such answers is known and stands here."""
        known = self.template.openings.get(self.around_of(i)) if self.by_marks and self.last >= SHORT else None
        if known is None or not i or not self.spots[i - 1]:
            return None
        (opening, other), at = known, self.spots[i - 1][-1][1]
        if not self.text.startswith(opening, at):
            return None
        self.found.other_opening += other
        return at + len(opening)

    def remember_closing(self, i: int, end: int) -> int:
        """Keep what stands between the end of an answer and the text of the turn after it."""
        if self.by_marks and self.spots[i + 1] and end <= self.spots[i + 1][0][0]:
            self.template.closings.setdefault(self.around_of(i), self.text[end : self.spots[i + 1][0][0]])
        return end

    def closing_known(self, i: int) -> int | None:
        """Where an answer ends, if what stands after such answers is known and stands here."""
        closing = self.template.closings.get(self.around_of(i)) if self.by_marks and self.last >= SHORT else None
        if closing is None or not self.spots[i + 1]:
            return None
        at = self.spots[i + 1][0][0]
        return at - len(closing) if self.text.endswith(closing, 0, at) else None


def kind(turn: Turn) -> tuple:
    """The kind of a turn: role, the beginning of its text up to the first mark, whether it says, thinks or calls something."""
    said = turn["content"]
    mark = MARK.search(said)
    lead = said[: mark.start()] if mark else said
    return turn["role"], lead, bool(said), "reasoning_content" in turn, "tool_calls" in turn


def boundary(bounds: list[tuple[int, int]], at: int) -> Boundary:
    """In which of these stretches a place lies, and how far into it.

    >>> boundary([(0, 5), (9, 12)], 5), boundary([(0, 5), (9, 12)], 10)
    ((0, 5), (1, 1))
    """
    index = bisect.bisect_left(bounds, at, key=lambda stretch: stretch[1])
    return index, at - bounds[index][0]


def shown(call: dict[str, Any], text: str) -> bool:
    """Whether the name of a call and the texts in its arguments stand in a text."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        return True
    return all(each in text or json.dumps(each, ensure_ascii=False)[1:-1] in text or json.dumps(each)[1:-1] in text
               for each in [str(function.get("name", "")), *leaves(function.get("arguments"))])  # fmt: skip


def leaves(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
