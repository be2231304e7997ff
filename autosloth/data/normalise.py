"""Rows of every form become chats or pairs. Each function takes a row and returns one; what is wrong with a row is a name, never an exception.

What a function changes of a row it counts by name in `notes`; a turn's key that nothing reads is noted as `turn key NAME`.
"""

from __future__ import annotations

import os
import re
from itertools import takewhile
from typing import Any

from .turns import (
    KNOWN,
    NOTHING,
    ROLES,
    Notes,
    Row,
    Turn,
    are_calls,
    are_turns,
    as_json,
    contents,
    parsed,
    text_of,
    turns_in,
)

IN_ORDER = re.compile(r"s?(ua(t+a)*)+")  # system first, then questions and answers in turn, with tools in between
UNUSABLE = {
    "empty_question": "with an empty question",
    "empty_answer": "with an empty answer",
    "no_answer": "without an answer to a question",
    "no_prompt": "without a prompt",
    "unknown_role": "with a turn of a role that is not known",
    "roles_out_of_order": "with turns out of order",
    "not_text": "with something else where text is expected",
    "odd_call": "with a tool call that is none",
    "odd_tools": "with tools that are no list of functions",
    "marked_not_to_learn": "whose answers are all marked as not to be learnt",
    "equal_answers": "with a chosen answer equal to the rejected one",
    "prompts_differ": "with answers to different prompts",
    "no_preference": "without a preference between their answers",
    "no_label": "whose label is neither good nor bad",
    "no_counterpart": "(single answers, as KTO takes them) whose prompt has no answer left that is marked otherwise",
    "other_branch": "of branches of a conversation that are not followed",
    "answer_not_among_choices": "with an answer that is none of its choices",
    "other_form": "of another form than most",
}


def to_chat(row: Row, form: str, notes: Notes) -> Row:
    """One row, its columns named by their roles, as {"messages": turns}, or {"text": ...} for plain text; `tools` stay.

    >>> to_chat({"prompt": "2+2?", "completion": "4"}, "prompt", Notes())
    {'messages': [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]}
    """
    if form == "text":
        return {"messages": [], "text": text_of(row.get("text"))}
    if form == "messages":
        turns = turns_in(parsed(row.get("messages")), notes)
    else:
        turns = history_of(row.get("history"), notes) + question_of(row, notes) + answer_of(row.get("completion"), notes)  # fmt: skip
    return {"messages": with_system(turns, row, notes)} | tools_of(row)


def to_pair(row: Row, notes: Notes) -> Row:
    """One row as {"prompt": turns, "chosen": turns, "rejected": turns}, `tools` besides; what both answers begin with belongs to the prompt.

    >>> pair = to_pair({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, Notes())
    >>> [turns[0]["content"] for turns in pair.values()]
    ['2+2?', '4', '5']
    """
    prompt: list[Turn] = []
    if {"prompt", "instruction"} & row.keys():
        prompt = question_of(row, notes)
    elif "messages" in row:
        prompt = turns_in(parsed(row["messages"]), notes)
    sides = [transcript_of(row.get(name), notes, parse=not prompt) for name in ("chosen", "rejected")]
    if not prompt and len(sides[0]) == len(sides[1]) == 1:
        prompt, *sides = split_at_prefix(sides[0][0], sides[1][0])
    else:
        prompt, sides = without_prompt(prompt, sides)
        if repeated(prompt, sides):
            notes["repeated_prompt_taken_off"] += 1
            sides = [[{**turn, "content": turn["content"].strip()[len(prompt[-1]["content"]) :].lstrip()}] for (turn,) in sides]  # fmt: skip
    return {"prompt": with_system(prompt, row, notes), "chosen": sides[0], "rejected": sides[1]} | tools_of(row)


def without_prompt(prompt: list[Turn], sides: list[list[Turn]]) -> tuple[list[Turn], list[list[Turn]]]:
    """The prompt and the answers alone, where an answer is the whole conversation: its turns before the answer are the prompt, if they ask the same."""
    whole = [side for side in sides if len(side) > 1 and side[0]["role"] in ("user", "system")]
    if len(whole) == 2:
        inside = common_start(whole[0][:-1], whole[1][:-1])
    else:
        asked = [i for i, turn in enumerate(whole[0]) if turn["role"] == "user"] if whole else []
        inside = whole[0][: asked[-1] + 1] if asked else []
    if not inside or (prompt and contents(inside)[-1] != contents(prompt)[-1]):
        return prompt, sides
    longer = prompt if len(prompt) > len(inside) else inside
    if prompt and prompt[0]["role"] == "system" != inside[0]["role"] and longer is inside:
        longer = [prompt[0], *inside]
    if longer is prompt and prompt[-len(inside) :] != inside:
        return prompt, sides
    return longer, [side[len(inside) :] if side[: len(inside)] == inside else side for side in sides]


def repeated(prompt: list[Turn], sides: list[list[Turn]]) -> bool:
    """Whether both answers are single texts that begin with the question over again, and go on."""
    asked = prompt[-1]["content"] if prompt else None
    if not isinstance(asked, str) or not asked or any(len(side) != 1 for side in sides):
        return False
    said = [side[0]["content"] for side in sides]
    whole_word = rf"{re.escape(asked)}(?!\w)" if asked[-1].isalnum() else re.escape(asked)
    return all(isinstance(text, str) and re.match(whole_word, text.strip()) and text.strip() != asked for text in said)


def tools_of(row: Row) -> Row:
    """{"tools": [...]} of a row that has tools, as a list, one alone, or JSON text of them; what is none stays as it is, for `fault`."""
    tools = parsed(row.get("tools"))
    if tools in NOTHING or str(tools).strip().lower() in ("", "none", "null", "nan"):
        return {}
    if isinstance(tools, (dict, list)):
        tools = [parsed(each) for each in (tools if isinstance(tools, list) else [tools])]
    return {"tools": tools}


def history_of(value: Any, notes: Notes) -> list[Turn]:
    """The turns of what was said before: turns, or questions with their answers; anything else is a turn that is no text, for `fault`."""
    value = parsed(value)
    if value in NOTHING:
        return []
    return turns_in(value, notes) or [{"role": "user", "content": {"history": value}}]


def question_of(row: Row, notes: Notes) -> list[Turn]:
    """The turns before the answer: an instruction or a prompt, its input below it; a prompt may be a chat itself."""
    asked, given = row.get("instruction", row.get("prompt")), row.get("input")
    turns = [] if isinstance(asked, str) else turns_in(asked, notes, exchanges=False)
    if isinstance(given, (dict, list)) and given:
        notes["input_written_as_json"] += 1
        given = as_json(given)
    given = text_of(given, notes)
    if turns and given:
        turns = (
            [*turns, {"role": "user", "content": given}] if turns[-1]["role"] != "user" else turns_with(turns, given)
        )
    if turns:
        return turns
    question = text_of(asked, notes)
    if given and not isinstance(given, str):
        question = given
    elif given and isinstance(question, str):
        question = f"{question}\n\n{given}" if question else given
    return [{"role": "user", "content": question}]


def turns_with(turns: list[Turn], given: Any) -> list[Turn]:
    """The turns with an input below the last of them."""
    last = turns[-1]
    both = isinstance(last["content"], str) and isinstance(given, str)
    return [*turns[:-1], {**last, "content": f"{last['content']}\n\n{given}" if both else [last["content"], given]}]


def answer_of(value: Any, notes: Notes) -> list[Turn]:
    """The turns of an answer: text, which may well be JSON, or one turn, or several."""
    turns = [] if isinstance(value, str) else turns_in(value, notes, exchanges=False)
    return turns or [{"role": "assistant", "content": text_of(value, notes, leading=True)}]


def transcript_of(value: Any, notes: Notes, parse: bool) -> list[Turn]:
    """The turns of an answer that may be a whole conversation, as turns or as text with `Human:` and `Assistant:`.

    parse: there is no prompt beside it, so JSON text of a conversation is taken for one.

    >>> [turn["role"] for turn in transcript_of("\\n\\nHuman: Hi\\n\\nAssistant: Hello", Notes(), parse=True)]
    ['user', 'assistant']
    """
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        return [{"role": ROLES.get(who.lower(), who.lower()), "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]  # fmt: skip
    if parse and are_turns(held := parsed(value)) and len(held) > 1:
        value = held
    return answer_of(value, notes)


def with_system(turns: list[Turn], row: Row, notes: Notes) -> list[Turn]:
    """The turns after the system prompt of the row's own column, if they bring none; an empty one is none."""
    turns = [turn for turn in turns if turn["role"] != "system" or turn["content"]]
    system = text_of(row.get("system"), notes)
    if not system:
        return turns
    if any(turn["role"] == "system" for turn in turns):
        notes["system_column_beside_a_system_turn_not_used"] += contents(turns)[0] != system
        return turns
    return [{"role": "system", "content": system}, *turns]


def common_start(one: list[Turn], other: list[Turn]) -> list[Turn]:
    """The turns that two chats begin with alike."""
    return [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def split_at_prefix(chosen: Turn, rejected: Turn) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Two turns as prompt and answers: the prompt is what their texts share, up to its last whole word."""
    texts = (chosen["content"], rejected["content"])
    shared = os.path.commonprefix(texts) if all(isinstance(text, str) for text in texts) else ""
    cut = 0 if texts[0] == texts[1] else max(shared.rfind(" "), shared.rfind("\n")) + 1
    if not shared[:cut].strip():
        return [], [chosen], [rejected]
    answers = ([{**turn, "content": turn["content"][cut:].strip()}] for turn in (chosen, rejected))
    return [{"role": "user", "content": shared[:cut].strip()}], *answers


def repair(chat: Row, notes: Notes) -> Row:
    """The chat without questions at its end that nobody answers and answers at its start that nobody asked for.

    >>> turns = [{"role": who, "content": "x"} for who in ("assistant", "user", "assistant", "user")]
    >>> notes = Notes()
    >>> len(repair({"messages": turns}, notes)["messages"]), [*notes]
    (2, ['unanswered_end_cut', 'unasked_start_cut'])
    """
    turns = chat["messages"]
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or "assistant" not in roles or unknown_role(chat) is not None:
        return chat
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    first = roles.index("user")
    start = [turn for turn in turns[:first] if turn["role"] == "system"]
    if last < first:
        return chat
    notes["unanswered_end_cut"] += last < len(turns) - 1
    notes["unasked_start_cut"] += len(start) < first
    return {**chat, "messages": [*start, *turns[first : last + 1]]}


def unknown_role(chat: Row) -> str | None:
    """The first role of a chat or a pair that is not known, as the row calls it."""
    turns = (turn for name in ("messages", "prompt", "chosen", "rejected") for turn in chat.get(name, ()))
    return next((printable(turn["role"]) for turn in turns if turn["role"] not in KNOWN), None)


def printable(text: str) -> str:
    """A text that can be written as UTF-8: halves of characters, which JSON can hold, are question marks."""
    return text.encode("utf-8", "replace").decode()


def are_functions(tools: Any) -> bool:
    """Whether tools are a list of mappings that can be written."""
    return isinstance(tools, list) and all(isinstance(each, dict) for each in tools) and is_text(as_json(tools))


def fault(row: Row) -> str | None:
    """Why nothing can be learnt from a chat or a text, as a key of UNUSABLE, or None.

    >>> fault({"messages": [{"role": "user", "content": "Who?"}]})
    'no_answer'
    """
    turns = row["messages"]
    said = [row["text"]] if "text" in row else contents(turns)
    thoughts = [turn["reasoning_content"] for turn in turns if "reasoning_content" in turn]
    if not all(is_text(each) for each in said + thoughts):
        return "not_text"
    if not are_functions(row.get("tools", [])):
        return "odd_tools"
    called = [turn["tool_calls"] for turn in turns if "tool_calls" in turn]
    if not (all(map(are_calls, called)) and is_text(as_json(called))):
        return "odd_call"
    if not all(is_text(turn[key]) for turn in turns for key in ("name", "tool_call_id") if key in turn):
        return "not_text"
    if "text" in row:
        return None if row["text"].strip() else "empty_answer"
    roles = [turn["role"] for turn in turns]
    if not KNOWN.issuperset(roles):
        return "unknown_role"
    if "assistant" not in roles or "user" not in roles:
        return "no_answer"
    for turn in turns:
        if not turn["content"] and turn["role"] != "tool" and not turn.get("tool_calls"):
            return "empty_answer" if turn["role"] == "assistant" else "empty_question"
    if not IN_ORDER.fullmatch("".join(role[0] for role in roles)):
        return "roles_out_of_order"
    learnt = any(turn["role"] == "assistant" and "weight" not in turn for turn in turns)
    return None if learnt else "marked_not_to_learn"


def fault_of_pair(pair: Row) -> str | None:
    """Why nothing can be learnt from a pair, as a key of UNUSABLE, or None.

    >>> fault_of_pair(to_pair({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, Notes()))
    'equal_answers'
    """
    if any(len(pair[name]) > 1 and pair[name][0]["role"] != "assistant" for name in ("chosen", "rejected")):
        return "prompts_differ"
    if not pair["prompt"] or pair["prompt"][-1]["role"] not in ("user", "tool"):
        return "no_prompt"
    for name in ("chosen", "rejected"):
        wrong = fault({**pair, "messages": pair["prompt"] + pair[name]})
        if wrong:
            return wrong
        if any("weight" in turn for turn in pair[name]):
            return "marked_not_to_learn"
    return "equal_answers" if pair["chosen"] == pair["rejected"] else None


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written as UTF-8; JSON can hold halves of characters that cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
