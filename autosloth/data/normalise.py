"""Rows of every form become chats or pairs. Each function takes a row and returns one; what is wrong with a row is a name, never an exception.

What a function changes of a row it counts by name in `notes`; a turn's key that nothing reads is noted as `turn key NAME`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

Turn = dict[str, Any]
Row = dict[str, Any]
Notes = Counter[str]

ROLES = (
    dict.fromkeys(("user", "human", "prompter", "usr"), "user")
    | dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "bing", "ai"), "assistant")
    | dict.fromkeys(("function_call", "tool_call"), "assistant")
    | dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool")
)
KNOWN = set(ROLES.values())
CALLING = ("function_call", "tool_call")  # roles whose text is the call itself
SPEAKER = ("role", "from")
SAID = ("content", "value", "text")
THOUGHT = ("reasoning_content", "reasoning", "thinking", "thought")
WEIGHTS = ("weight", "train", "loss", "loss_weight", "trainable")  # of a turn; 0 or false: it is not learnt
TURN_KEYS = {*SPEAKER, *SAID, *THOUGHT, *WEIGHTS, "tool_calls", "function_call", "name", "tool_call_id"}
TURN_KEY = "turn key "
EXCHANGES = (("input", "output"), ("user", "assistant"), ("human", "assistant"), ("question", "answer"), ("prompt", "response"))  # fmt: skip
IN_ORDER = re.compile(r"s?(ua(t+a)*)+")  # system first, then questions and answers in turn, with tools in between
UNUSABLE = {
    "empty_question": "with an empty question",
    "empty_answer": "with an empty answer",
    "no_answer": "without an answer to a question",
    "no_prompt": "without a prompt",
    "unknown_role": "with a turn of a role that is not known",
    "roles_out_of_order": "with turns out of order",
    "not_text": "with something else where text is expected",
    "marked_not_to_learn": "whose answers are all marked as not to be learnt",
    "equal_answers": "with a chosen answer equal to the rejected one",
    "prompts_differ": "with answers to different prompts",
    "no_preference": "without a preference between their answers",
    "no_counterpart": "(single answers, as KTO takes them) whose prompt has no answer that is marked otherwise",
    "other_branch": "of branches of a conversation that are not followed",
    "answer_not_among_choices": "with an answer that is none of its choices",
    "other_form": "of another form than most",
}


def to_chat(row: Row, form: str, notes: Notes) -> Row:
    """One row, its columns named by their roles, as {"messages": turns}, or {"text": ...} for plain text; `tools` stay.

    >>> to_chat({"prompt": "2+2?", "completion": "4"}, "prompt", Counter())
    {'messages': [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]}
    """
    if form == "text":
        return {"messages": [], "text": text_of(row.get("text"))}
    if form == "messages":
        turns = turns_in(parsed(row.get("messages")), notes)
    else:
        turns = exchanges_in(parsed(row.get("history"))) + question_of(row, notes) + answer_of(row.get("completion"), notes)  # fmt: skip
    return {"messages": with_system(turns, row, notes)} | tools_of(row)


def to_pair(row: Row, notes: Notes) -> Row:
    """One row as {"prompt": turns, "chosen": turns, "rejected": turns}, `tools` besides; what both answers begin with belongs to the prompt.

    >>> pair = to_pair({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, Counter())
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
    return inside, [side[len(inside) :] if side[: len(inside)] == inside else side for side in sides]


def repeated(prompt: list[Turn], sides: list[list[Turn]]) -> bool:
    """Whether both answers are single texts that begin with the question over again, and go on."""
    asked = prompt[-1]["content"] if prompt else None
    if not isinstance(asked, str) or not asked or any(len(side) != 1 for side in sides):
        return False
    said = [side[0]["content"] for side in sides]
    return all(isinstance(text, str) and text.strip().startswith(asked) and text.strip() != asked for text in said)


def tools_of(row: Row) -> Row:
    """{"tools": [...]} of a row that has tools, as a list or as JSON text; else nothing."""
    tools = parsed(row.get("tools"))
    return {"tools": tools} if isinstance(tools, list) and tools else {}


def question_of(row: Row, notes: Notes) -> list[Turn]:
    """The turns before the answer: an instruction or a prompt, its input below it; a prompt may be a chat itself."""
    asked, given = row.get("instruction", row.get("prompt")), row.get("input")
    turns = [] if isinstance(asked, str) else turns_in(asked, notes, exchanges=False)
    if isinstance(given, (dict, list)) and given:
        notes["input_written_as_json"] += 1
        given = json.dumps(given, ensure_ascii=False, default=str)
    given = text_of(given, notes)
    if turns and given:
        turns = (
            [*turns, {"role": "user", "content": given}] if turns[-1]["role"] != "user" else turns_with(turns, given)
        )
    if turns:
        return turns
    question = text_of(asked, notes)
    if given and isinstance(question, str) and isinstance(given, str):
        question = f"{question}\n\n{given}" if question else given
    return [{"role": "user", "content": question}]


def turns_with(turns: list[Turn], given: Any) -> list[Turn]:
    """The turns with an input below the last of them."""
    last = turns[-1]
    both = isinstance(last["content"], str) and isinstance(given, str)
    return [*turns[:-1], {**last, "content": f"{last['content']}\n\n{given}" if both else given}]


def answer_of(value: Any, notes: Notes) -> list[Turn]:
    """The turns of an answer: text, which may well be JSON, or one turn, or several."""
    turns = [] if isinstance(value, str) else turns_in(value, notes, exchanges=False)
    return turns or [{"role": "assistant", "content": text_of(value, notes, leading=True)}]


def transcript_of(value: Any, notes: Notes, parse: bool) -> list[Turn]:
    """The turns of an answer that may be a whole conversation, as turns or as text with `Human:` and `Assistant:`.

    parse: there is no prompt beside it, so JSON text of a conversation is taken for one.

    >>> [turn["role"] for turn in transcript_of("\\n\\nHuman: Hi\\n\\nAssistant: Hello", Counter(), parse=True)]
    ['user', 'assistant']
    """
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        return [{"role": ROLES.get(who.lower(), who.lower()), "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]  # fmt: skip
    if parse and are_turns(held := parsed(value)) and len(held) > 1:
        value = held
    return answer_of(value, notes)


def are_turns(value: Any) -> bool:
    """Whether a value is a list of turns, each of a known role and with something said."""
    return isinstance(value, list) and bool(value) and all(is_turn(turn) for turn in value)


def is_turn(value: Any) -> bool:
    """Whether a value is a turn of a known role that says, thinks or calls something."""
    told = isinstance(value, dict) and (value.keys() & {*SAID, "tool_calls"})
    return bool(told) and any(str(value.get(key)).strip().lower() in ROLES for key in SPEAKER)


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


def turns_in(value: Any, notes: Notes, exchanges: bool = True) -> list[Turn]:
    """The turns in a cell: a list of them, one, or a struct of lists; empty when it holds none.

    exchanges: a list of questions with their answers is taken too.

    >>> turns_in([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], Counter())[1]
    {'role': 'assistant', 'content': 'Hello'}
    """
    if isinstance(value, dict):
        lists = list(value.values())
        columnar = lists and all(isinstance(each, list) for each in lists) and len({len(each) for each in lists}) == 1
        single = [value] if is_turn(value) else []
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)] if columnar else single
    if not isinstance(value, list) or not all(isinstance(turn, dict) and set(SPEAKER) & turn.keys() for turn in value):
        return exchanges_in(value) if exchanges else []
    return [to_turn(turn, notes) for turn in value]


def exchanges_in(value: Any) -> list[Turn]:
    """The turns in a list of questions with their answers, each two texts or a mapping of two; empty when it is none.

    >>> [turn["content"] for turn in exchanges_in([["Hi", "Hello"], {"input": "Who?", "output": "Me"}])]
    ['Hi', 'Hello', 'Who?', 'Me']
    """
    said = [two_texts(each) for each in value] if isinstance(value, list) else []
    if not all(said):
        return []
    return [{"role": role, "content": text} for two in said for role, text in zip(("user", "assistant"), two, strict=True)]  # fmt: skip


def two_texts(exchange: Any) -> list[str] | None:
    """The question and the answer of one exchange, or None."""
    keys = next((keys for keys in EXCHANGES if isinstance(exchange, dict) and exchange.keys() == set(keys)), None)
    two = [exchange[key] for key in keys] if keys else exchange
    return two if isinstance(two, list) and [type(text) for text in two] == [str, str] else None


def to_turn(turn: Turn, notes: Notes) -> Turn:
    """A turn of OpenAI's or ShareGPT's form as {"role", "content"}, with what tools and thoughts need; `weight` 0 where it is not to be learnt.

    >>> to_turn({"from": "human", "value": " Hi "}, Counter())
    {'role': 'user', 'content': 'Hi'}
    """
    name = str(first_of(turn, SPEAKER)).strip()
    said_by = name.lower()
    role, content = ROLES.get(said_by, name), first_of(turn, SAID)
    for key in turn.keys() - TURN_KEYS:
        if turn[key] not in (None, "", [], {}):
            notes[f"{TURN_KEY}{key}"] += 1
    thought, content = thought_and_rest(content, text_of(first_of(turn, THOUGHT)))
    result: Turn = {"role": role, "content": text_of(content, notes, leading=role == "assistant")}
    if role == "tool" and isinstance(result["content"], (dict, list)):
        result["content"] = json.dumps(result["content"], ensure_ascii=False, default=str)
    calls = parsed(turn.get("tool_calls"))
    if isinstance(called := turn.get("function_call"), dict) and not calls:  # OpenAI's older form
        calls = [{"type": "function", "function": called}]
    if said_by in CALLING and isinstance(call := parsed(content), (dict, list)):
        named = [
            each for each in (call if isinstance(call, list) else [call]) if isinstance(each, dict) and "name" in each
        ]
        if named:
            calls, result["content"] = [{"type": "function", "function": each} for each in named], ""
    if isinstance(calls, list) and calls and all(isinstance(call, dict) for call in calls):
        result["tool_calls"] = [with_parsed_arguments(call) for call in calls]
    for key in ("name", "tool_call_id"):
        if isinstance(turn.get(key), str) and role == "tool":
            result[key] = turn[key]
    if thought and role == "assistant":
        result["reasoning_content"] = thought
    weights = [turn[key] for key in WEIGHTS if turn.get(key) is not None] if role == "assistant" else []
    if any(map(is_off, weights)):
        result["weight"] = 0
    elif not all(map(is_on, weights)):  # 0.5, say
        notes["turn_weights_taken_as_1"] += 1
    return result


def first_of(turn: Turn, keys: Iterable[str]) -> Any:
    """The first of these keys' values that is there; Arrow fills those that other rows have with None."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def thought_and_rest(content: Any, thought: Any) -> tuple[Any, Any]:
    """What a turn thinks and what it says, where its content is a list of parts of which some are thoughts."""
    thought = thought if isinstance(thought, str) else ""
    if not isinstance(content, list) or not any(
        isinstance(part, dict) and part.get("type") in THOUGHT for part in content
    ):
        return thought, content
    thoughts = [first_of(part, (*THOUGHT, *SAID)) for part in content if part.get("type") in THOUGHT]
    texts = [text_of(each) for each in thoughts]
    rest = [part for part in content if part.get("type") not in THOUGHT]
    return thought or "".join(text for text in texts if isinstance(text, str)), rest


def is_off(value: Any) -> bool:
    """Whether a turn's weight says that it is not to be learnt.

    >>> [is_off(value) for value in (0, 0.0, False, "false", "0", None, 1, True)]
    [True, True, True, True, True, False, False, False]
    """
    return value is not None and (value in (0, False) or str(value).strip().lower() in ("0", "0.0", "false", "no"))


def is_on(value: Any) -> bool:
    """Whether a turn's weight says that it is learnt like any other.

    >>> [is_on(value) for value in (1, True, "1.0", "yes", 0.5, 2)]
    [True, True, True, True, False, False]
    """
    return value in (1, True) or str(value).strip().lower() in ("1", "1.0", "true", "yes")


def with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are a mapping, as chat templates take them; OpenAI's form holds them as JSON text."""
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": parsed(function.get("arguments"))}}


def parsed(value: Any) -> Any:
    """What JSON text of a list or a mapping says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def text_of(value: Any, notes: Notes | None = None, leading: bool = False) -> Any:
    """A cell as text; an empty or blank cell is the empty text. What is no text is returned as it is.

    notes: blanks around it are cut, which is noted; leading: those before it stay (code and Markdown begin with some).

    >>> text_of([{"type": "text", "text": "two "}, {"type": "text", "value": "parts"}]), text_of(4), text_of(None)
    ('two parts', '4', '')
    """
    if isinstance(value, list) and value and all(isinstance(part_text(part), str) for part in value):
        value = "".join(part_text(part) for part in value)
    if value is None or value == [] or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (list, dict, bytes)):
        return value
    text = str(value)
    if notes is None:
        return text
    cut = text.rstrip() if leading else text.strip()
    if cut != text and cut:
        notes["outer_blanks_cut"] += 1
    return cut


def part_text(part: Any) -> Any:
    """The text of a part of a turn's content, None where it is a picture or another thing."""
    return (
        first_of(part, ("text", "value", "content"))
        if isinstance(part, dict) and not set(SPEAKER) & part.keys()
        else None
    )


def contents(turns: Iterable[Turn]) -> list[Any]:
    """What the turns say."""
    return [turn["content"] for turn in turns]


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
    >>> notes = Counter()
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
    return next((turn["role"] for turn in turns if turn["role"] not in KNOWN), None)


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

    >>> fault_of_pair(to_pair({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, Counter()))
    'equal_answers'
    """
    if any(len(pair[name]) > 1 and pair[name][0]["role"] != "assistant" for name in ("chosen", "rejected")):
        return "prompts_differ"
    if not pair["prompt"] or pair["prompt"][-1]["role"] not in ("user", "tool"):
        return "no_prompt"
    for name in ("chosen", "rejected"):
        wrong = fault({"messages": pair["prompt"] + pair[name]})
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
