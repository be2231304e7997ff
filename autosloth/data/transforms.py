"""What turns a row of a form from schemas.py into one of a common form.

Each function takes a row, its columns named by what they mean, and gives the rows that it makes (mostly one), the name of
the reason why it makes none, or None where it is no row of this form. Those of WHOLE take all rows at once.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from .turns import Notes, Row, are_turns, first_of, parsed, text_of

Made = list[Row] | str | None
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER, SCORE, RANK = ("answer", "response", "text", "content", "completion"), ("overall_score", "score", "pm_score", "rating"), ("rank",)  # fmt: skip
SPEAKERS = {"human": "user", "user": "user", "instruction": "user", "input": "user", "q": "user", "question": "user",
            "assistant": "assistant", "response": "assistant", "output": "assistant", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "a": "assistant", "answer": "assistant",
            "system": "system", "function response": "tool"}  # fmt: skip
NAMES = "|".join(sorted(SPEAKERS, key=len, reverse=True))
# How a text tells who speaks: after hashes, in capitals, or at the beginning of a line.
TRANSCRIPTS = (
    re.compile(rf"###\s*({NAMES})\s*:", re.IGNORECASE | re.ASCII),
    re.compile(r"(?:^|(?<=[\s>]))(SYSTEM|USER|HUMAN|ASSISTANT|GPT|FUNCTION RESPONSE)\s*:"),
    re.compile(r"^(System|User|Human|Assistant|Bot|AI|Question|Answer|Q|A)\s*:", re.MULTILINE),
)
LABELS = dict.fromkeys(("true", "1", "1.0", "good", "desirable", "yes", "up", "thumbs_up", "chosen"), True)
LABELS |= dict.fromkeys(
    ("false", "0", "0.0", "bad", "undesirable", "no", "down", "thumbs_down", "rejected", "-1", "-1.0"), False
)
ENDS = re.compile(r"\s*(<\|endoftext\|>|</s>|<\|im_end\|>)\s*\Z")


def renamed(row: Row, notes: Notes, pairs: str) -> Made:
    """The row as it is: only its columns have other names."""
    return [row]


def transcript(row: Row, notes: Notes, pairs: str) -> Made:
    """A chat told in one text.

    >>> made = transcript({"text": "### Human: Hi### Assistant: Hello</s>"}, Counter(), "best")
    >>> [turn["content"] for turn in made[0]["messages"]]
    ['Hi', 'Hello']
    """
    text = row.get("text")
    for speakers in TRANSCRIPTS if isinstance(text, str) else ():
        before, *parts = speakers.split(text)
        said = [
            (SPEAKERS[who.lower()], ENDS.sub("", what).strip())
            for who, what in zip(parts[::2], parts[1::2], strict=True)
        ]
        roles = [role for role, _ in said]
        if roles[:1] in (["user"], ["system"]) and "assistant" in roles and (not before.strip() or "###" in text):
            turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
            for role, what in said:
                if turns and turns[-1]["role"] == role == "user":
                    turns[-1]["content"] += f"\n\n{what}"
                elif what or role != "system":
                    turns.append({"role": role, "content": what})
            system = row.get("system")
            system = re.sub(r"\A\s*SYSTEM:\s*", "", system) if isinstance(system, str) else system
            return [{"messages": turns, "system": system}]
    return None


def alternating(row: Row, notes: Notes, pairs: str) -> Made:
    """A chat as a list of texts, of which the user says the first."""
    texts = parsed(row["texts"])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    return [{"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}]


def choices(row: Row, notes: Notes, pairs: str, first: int | None = None) -> Made:
    """A question with what can be chosen, and the choice, by its letter, its text or its number, from 0; with `first` a number is no text.

    >>> choices({"question": "1+1?", "choices": ["1", "2"], "answer": 1}, Counter(), "best")
    [{'prompt': '1+1?\\n\\nA. 1\\nB. 2', 'completion': 'B. 2'}]
    """
    offered = offered_in(row)
    if isinstance(offered, list) and offered and all(isinstance(each, dict) for each in offered):
        offered = {key: [each.get(key) for each in offered] for key in ("text", "label")}
    texts = offered.get("text") if isinstance(offered, dict) else offered
    labels = offered.get("label") if isinstance(offered, dict) else None
    if (
        not isinstance(texts, list)
        or not 2 <= len(texts) <= len(LETTERS)
        or not all(isinstance(text, (str, int, float)) for text in texts)
    ):
        return None
    texts = [str(text) for text in texts]
    labels = (
        [str(label) for label in labels]
        if isinstance(labels, list) and len(labels) == len(texts) and all(labels)
        else list(LETTERS[: len(texts)])
    )
    given, question = row["answer"], text_of(row["question"])
    if given in (None, "", -1):
        return "no_answer"
    if not question:
        return "empty_question"
    right = chosen_one(given, labels, texts, first)
    if right is None:
        return "answer_not_among_choices"
    listed = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    asked = f"{question}\n\n{listed}" if isinstance(question, str) else question
    return [{"prompt": asked, "completion": f"{labels[right]}. {texts[right]}"}]


def offered_in(row: Row) -> Any:
    """What can be chosen: the column of choices, or those of each choice, up to the last that holds something.

    >>> offered_in({"question": "1+1?", "a": "1", "b": "2", "c": None, "answer": "B"})
    ['1', '2']
    """
    if "choices" in row:
        return parsed(row["choices"])
    offered = [row.get(each) for each in "abcdef"]
    while offered and offered[-1] in (None, ""):
        offered.pop()
    return offered


def chosen_one(given: Any, labels: list[str], texts: list[str], first: int | None) -> int | None:
    """Which choice an answer means: by its label, by its very text, or by its number, counted from `first`; None for none of them.

    Where `first` is given, answers are numbers: one that is also the text of a choice is not meant as the text.
    """
    told, number = str(given).strip(), whole_number(given)
    if told in labels:
        return labels.index(told)
    if is_text(given, texts) and (first is None or number is None):
        return texts.index(told)
    if told.upper() in labels:
        return labels.index(told.upper())
    place = -1 if number is None else number - (first or 0)
    return place if 0 <= place < len(texts) else None


def is_text(given: Any, texts: list[Any]) -> bool:
    """Whether an answer is the very text of a choice; a number that is no text means a place."""
    return isinstance(given, (str, bool)) and str(given).strip() in map(str, texts)


def whole_number(given: Any) -> int | None:
    """An answer as a whole number; None where it is none.

    >>> [whole_number(given) for given in (2, "2", "2.0", 2.0, "two", "2.5", None)]
    [2, 2, 2, 2, None, None, None]
    """
    return int(float(given)) if re.fullmatch(r"[+-]?\d+(\.0*)?", str(given).strip()) else None


def choices_from_zero(row: Row, notes: Notes, pairs: str) -> Made:
    """A question with what can be chosen, and the choice by its number, from 0."""
    return choices(row, notes, pairs, first=0)


def choices_from_one(row: Row, notes: Notes, pairs: str) -> Made:
    """A question with what can be chosen, and the choice by its number, from 1."""
    return choices(row, notes, pairs, first=1)


def listed_choices(sample: list[Row]) -> list[tuple[Any, list[Any]]]:
    """The answer and what can be chosen of each row that has a list of it."""
    return [(row["answer"], offered) for row in sample if isinstance(offered := offered_in(row), list)]


def read_both_ways(sample: list[Row]) -> tuple[int, int]:
    """How many answers are the text of one of their choices, and how many may be the number of one."""
    answers = listed_choices(sample)
    as_texts = sum(is_text(given, texts) for given, texts in answers)
    return as_texts, sum(0 <= number <= len(texts) for given, texts in answers if (number := whole_number(given)) is not None)  # fmt: skip


def are_numbered(sample: list[Row]) -> bool:
    """Whether the answers to these questions are numbers of choices: more of them than are texts of choices."""
    as_texts, as_numbers = read_both_ways(sample)
    return as_numbers > as_texts


def counted_from_one(sample: list[Row]) -> bool:
    """Whether the answers to these questions are numbers of choices of which the last one's is how many there are, and none is 0."""
    answers = [(whole_number(given), len(texts)) for given, texts in listed_choices(sample)]
    return 0 not in [number for number, _ in answers] and any(number == count for number, count in answers)


def unclear_choice(sample: list[Row]) -> tuple[Any, list[Any]] | None:
    """An answer, with what can be chosen, that means one choice by its text and another by its number, where nothing tells which all are; else None."""
    as_texts, as_numbers = read_both_ways(sample)
    first = int(counted_from_one(sample))
    for given, texts in listed_choices(sample) if as_texts == as_numbers else ():
        number = whole_number(given)
        if number is not None and is_text(given, texts) and [*map(str, texts)].index(str(given).strip()) != number - first:  # fmt: skip
            return given, texts
    return None


def first_answer(row: Row, notes: Notes, pairs: str) -> Made:
    """A question with several right answers, of which the first is learnt."""
    answers = row["answers"]  # text is an answer itself
    if isinstance(answers, dict):
        answers = first_of(answers, ("text", "value", "answer_text"))
        answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
        return None
    notes["other_answers_not_used"] += len(set(answers)) > 1
    return [
        {name: value for name, value in row.items() if name != "answers"}
        | {"completion": answers[0] if answers else ""}
    ]


def calls(row: Row, notes: Notes, pairs: str) -> Made:
    """A question, the tools there are, and the calls that answer it, as JSON."""
    made, tools = parsed(row["calls"]), parsed(row["tools"])
    if isinstance(made, dict):
        made = [made]
    named = (
        isinstance(made, list)
        and made
        and all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in made)
    )
    if not named or not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return None
    called = [
        {"type": "function", "function": {"name": call["name"], "arguments": parsed(call["arguments"])}}
        for call in made
    ]
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "", "tool_calls": called}]
    return [{"messages": turns, "tools": [as_function(tool) for tool in tools]}]


def as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as templates take it: a function with a JSON schema of its parameters."""
    if "function" in tool:
        return tool
    parameters = tool.get("parameters") or {}
    if isinstance(parameters, dict) and parameters.get("type") != "object":
        tool = {**tool, "parameters": {"type": "object", "properties": parameters}}
    return {"type": "function", "function": tool}


def with_thought(row: Row, notes: Notes, pairs: str) -> Made:
    """A question, what was thought about it, and the answer."""
    thought = row["thought"]
    if isinstance(thought, list) and thought and all(isinstance(each, str) for each in thought):
        notes["thoughts_joined"] += len(thought) > 1
        thought = "\n\n".join(thought)
    if thought is not None and not isinstance(thought, str):
        return None
    answer = {"role": "assistant", "content": row["completion"], "reasoning_content": thought}
    return [{"messages": [{"role": "user", "content": row["prompt"]}, answer]}]


def translation(row: Row, notes: Notes, pairs: str) -> Made:
    """A text in two languages, by their codes: from the first into the second."""
    said = parsed(row["translation"])
    texts = [(code, text) for code, text in said.items() if isinstance(text, str)] if isinstance(said, dict) else []
    if len(texts) < 2:
        return None
    notes["other_languages_not_used"] += len(texts) > 2
    (source, text), (target, right) = texts[:2]
    return [{"prompt": f"Translate from {source} to {target}:\n\n{text}", "completion": right}]


def number_of(value: Any) -> float | None:
    """A verdict as a number, true and false, as text too, as 1 and 0; None where it is none."""
    try:
        number = float({"true": 1, "false": 0}.get(str(value).strip().lower(), value))
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def pair(row: Row, first: bool | None) -> Made:
    """The pair of two answers of which the first is better, or the second, or neither."""
    if first is None:
        return "no_preference"
    chosen, rejected = (row["a"], row["b"]) if first else (row["b"], row["a"])
    prompt = row.get("prompt")
    if isinstance(prompt, dict):  # WebGPT's question has its text in a key
        prompt = first_of(prompt, ("full_text", "text", "post", "article"))
    return [({"prompt": prompt} if "prompt" in row else {}) | {"chosen": turns_or_text(chosen), "rejected": turns_or_text(rejected)} | ({"system": row["system"]} if "system" in row else {})]  # fmt: skip


def turns_or_text(value: Any) -> Any:
    """The turns of a conversation, as JSON text too; any other text is an answer as it stands."""
    return held if are_turns(held := parsed(value)) else value


def by_number(row: Row, notes: Notes, pairs: str) -> Made:
    """The better answer is the one of this number, from 0."""
    number = number_of(row["verdict"])
    return pair(row, {0: True, 1: False}.get(number))


def first_if_true(row: Row, notes: Notes, pairs: str) -> Made:
    """1 where the first answer is better, 0 where the second is."""
    return pair(row, {1: True, 0: False}.get(number_of(row["verdict"])))


def by_winner(row: Row, notes: Notes, pairs: str) -> Made:
    """The winner by name (`model_a`, `a`) or by number from 1; ties, and 0, have none."""
    told = re.sub(r"^(model|response|answer|output|assistant|player)[_ ]?", "", str(row["verdict"]).strip().lower())
    return pair(row, {"a": True, "1": True, "1.0": True, "b": False, "2": False, "2.0": False}.get(told))


def by_winner_from_zero(row: Row, notes: Notes, pairs: str) -> Made:
    """The winner by its number from 0."""
    number = number_of(row["verdict"])
    return pair(row, number == 0) if number in (0, 1) else "no_preference" if number is None else "other_form"


def by_sign(row: Row, notes: Notes, pairs: str) -> Made:
    """Below 0 the first answer is better, above 0 the second."""
    number = number_of(row["verdict"])
    return pair(row, None if not number else number < 0)


def by_scores(row: Row, notes: Notes, pairs: str) -> Made:
    """The higher score is the better one's."""
    one, other = number_of(row["a_wins"]), number_of(row["b_wins"])
    return pair(row, None if one is None or other is None or one == other else one > other)


def by_choice(row: Row, notes: Notes, pairs: str) -> Made:
    """Two texts in a list, and the number of the better one."""
    answers = parsed(row["answers"])
    if not isinstance(answers, list) or len(answers) != 2:
        return None
    texts = [first_of(each, ANSWER) if isinstance(each, dict) else each for each in answers]
    return by_number({**row, "a": texts[0], "b": texts[1]}, notes, pairs)


def ranked(row: Row, notes: Notes, pairs: str) -> Made:
    """Several answers with their ranks (1 is best) or scores: the best with the worst, or, with `pairs: all`, each with each that is worse."""
    answers = parsed(row["answers"])
    if not isinstance(answers, list) or not answers:
        return None
    if all(isinstance(each, dict) for each in answers):
        marks = [(number_of(first_of(each, SCORE)), number_of(first_of(each, RANK))) for each in answers]
        worth = [score if score is not None else -rank if rank is not None else None for score, rank in marks]
        texts = [first_of(each, ANSWER) for each in answers]
    else:
        told, sign = (row["scores"], 1) if row.get("scores") is not None else (row.get("ranks"), -1)
        told = parsed(told)
        if not isinstance(told, list) or len(told) != len(answers):
            return None
        worth = [None if number_of(each) is None else sign * number_of(each) for each in told]
        texts = answers
    if any(each is None for each in worth):
        return None
    order = sorted(range(len(texts)), key=lambda i: -worth[i])
    two = list(itertools.combinations(order, 2)) if pairs == "all" else [(order[0], order[-1])]
    made = [each for a, b in two if worth[a] > worth[b] for each in pair({**row, "a": texts[a], "b": texts[b]}, True)]
    return made or "no_preference"


def tree(rows: list[Row], pairs: str) -> tuple[list[tuple[int, Row]], dict[str, list[int]]]:
    """Chats from messages that name the one they reply to: from each beginning on, the best-ranked reply at each step; other branches are left out."""
    replies: dict[Any, list[int]] = {}
    names = [(str(row["id"]), str(row["parent"])) for row in rows]
    place = {name: i for i, (name, _) in reversed([*enumerate(names)]) if rows[i]["id"] is not None}
    for i, (_, parent) in enumerate(names):
        if not is_marked(
            rows[i].get("deleted")
        ):  # what replies to itself, or to nothing that is there, begins a conversation
            replies.setdefault(parent if place.get(parent, i) != i else None, []).append(i)
    chats, used = [], set()
    for start in replies.get(None, []):
        thread = [start]
        while following := [i for i in replies.get(names[thread[-1]][0], ()) if i not in thread]:
            thread.append(min(following, key=lambda i: (number_of(rows[i].get("rank")) is None, number_of(rows[i].get("rank")) or 0)))  # fmt: skip
        used.update(thread)
        chats.append((start + 1, {"messages": [{"role": rows[i]["role"], "content": rows[i]["text"]} for i in thread]}))
    return chats, {"other_branch": [i + 1 for i in range(len(rows)) if i not in used]}


def is_marked(value: Any) -> bool:
    """Whether a mark is set, as text too.

    >>> [is_marked(value) for value in (True, "True", "1", False, "False", "0", "", None)]
    [True, True, True, False, False, False, False, False]
    """
    return str(value).strip().lower() not in ("false", "0", "0.0", "", "none", "null", "nan", "no")


def thumbs(rows: list[Row], pairs: str) -> tuple[list[tuple[int, Row]], dict[str, list[int]]]:
    """Pairs from single answers that are marked good or bad, where a prompt has both; the others are left out."""
    by_prompt: dict[str, dict[bool, list[int]]] = {}
    unmarked = {i for i, row in enumerate(rows) if is_good(row["label"]) is None}
    for i, row in enumerate(rows):
        if i in unmarked:
            continue
        key = json.dumps([row["prompt"], row.get("system")], sort_keys=True, default=str)
        by_prompt.setdefault(key, {True: [], False: []})[is_good(row["label"])].append(i)
    made, used = [], set()
    for marked in by_prompt.values():
        two = list(itertools.product(marked[True], marked[False]))
        for good, bad in two if pairs == "all" else two[:1]:
            used |= {good, bad}
            made += [
                (good + 1, each)
                for each in pair({**rows[good], "a": rows[good]["completion"], "b": rows[bad]["completion"]}, True)
            ]
    alone = [i + 1 for i in range(len(rows)) if i not in used and i not in unmarked]
    return made, {"no_counterpart": alone, "no_label": [i + 1 for i in sorted(unmarked)]}


def is_good(label: Any) -> bool | None:
    """Whether a label marks an answer as good or bad; None where it tells neither.

    >>> [is_good(label) for label in (True, 1, "desirable", "good", False, "0", "undesirable", None, 0.5)]
    [True, True, True, True, False, False, False, None, None]
    """
    return LABELS.get(str(label).strip().lower())


TRANSFORMS: dict[str, Callable[[Row, Notes, str], Made]] = {
    each.__name__: each
    for each in (renamed, transcript, alternating, choices, choices_from_zero, choices_from_one, first_answer, calls, with_thought, translation,
                 by_number, first_if_true, by_winner, by_winner_from_zero, by_sign, by_scores, by_choice, ranked)
}  # fmt: skip
WHOLE: dict[str, Callable[[list[Row], str], Any]] = {each.__name__: each for each in (tree, thumbs)}


def makes_rows(transform: str, sample: list[Row]) -> bool:
    """Whether rows of these columns are of the form: most of those that can be read make some."""
    if transform == "tree":
        return bool(tree(sample, "best")[0])
    if transform == "thumbs":
        labels = {str(row["label"]).strip().lower() for row in sample} - {"none", "nan", ""}
        return bool(labels) and labels <= LABELS.keys()
    if transform == "choices_from_one" and not (are_numbered(sample) and counted_from_one(sample)):
        return False
    if transform == "by_winner_from_zero" and {number_of(row["verdict"]) for row in sample} - {None} != {0, 1}:
        return False
    made = [TRANSFORMS[transform](row, Counter(), "best") for row in sample]
    return sum(each is not None for each in made) > len(made) / 2 and any(isinstance(each, list) for each in made)
