"""Rows of every form become chats or pairs. Each function takes a row and returns one; what is wrong with a row is a name, never an exception."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

Turn = dict[str, Any]
Row = dict[str, Any]

ROLES = (
    dict.fromkeys(("user", "human", "prompter", "usr"), "user")
    | dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "bing", "function_call"), "assistant")
    | dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool")
)
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
    "equal_answers": "with a chosen answer equal to the rejected one",
    "prompts_differ": "with answers to different prompts",
}


def to_chat(row: Row, form: str) -> Row:
    """One row, its columns named by their roles, as {"messages": turns}, or {"text": ...} for plain text; `tools` stay.

    >>> to_chat({"prompt": "2+2?", "completion": "4"}, "prompt")
    {'messages': [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]}
    """
    if form == "text":
        text = text_of(row.get("text"), strip=False)
        return {"messages": [], "text": text}
    whole = form == "messages"
    turns = (
        turns_in(row.get("messages"))
        if whole
        else exchanges_in(row.get("history")) + question_of(row) + answer_of(row.get("completion"))
    )
    chat: Row = {"messages": with_system(turns, row)}
    tools = parsed(row.get("tools"))
    return chat | ({"tools": tools} if isinstance(tools, list) and tools else {})


def to_pair(row: Row) -> Row:
    """One row as {"prompt": turns, "chosen": turns, "rejected": turns}; what both answers begin with belongs to the prompt.

    >>> pair = to_pair({"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    >>> [turns[0]["content"] for turns in pair.values()]
    ['2+2?', '4', '5']
    """
    chosen, rejected = (transcript_of(row.get(name)) for name in ("chosen", "rejected"))
    prompt = question_of(row) if {"prompt", "instruction"} & row.keys() else turns_in(row.get("messages"))
    if not prompt and len(chosen) == len(rejected) == 1:
        prompt, chosen, rejected = split_at_prefix(chosen[0]["content"], rejected[0]["content"])
    shared = len(common_start(chosen[:-1], rejected[:-1]))
    inside = chosen[:shared]
    if inside and (not prompt or contents(inside)[-1] == contents(prompt)[-1]):
        prompt, chosen, rejected = inside, chosen[shared:], rejected[shared:]
    return {"prompt": with_system(prompt, row), "chosen": chosen, "rejected": rejected}


def question_of(row: Row) -> list[Turn]:
    """The turns before the answer: an instruction or a prompt, its input below it; a prompt may be a chat itself."""
    asked = row.get("instruction", row.get("prompt"))
    turns = turns_in(asked)
    if turns:
        return turns
    question, given = text_of(asked), text_of(row.get("input"))
    if given and isinstance(question, str) and isinstance(given, str):
        question = f"{question}\n\n{given}" if question else given
    return [{"role": "user", "content": question}]


def answer_of(value: Any) -> list[Turn]:
    """The turns of an answer: text, one turn, or several."""
    return turns_in(value) or [{"role": "assistant", "content": text_of(value)}]


def transcript_of(value: Any) -> list[Turn]:
    """The turns of an answer that may be a whole conversation, as turns or as text with `Human:` and `Assistant:`.

    >>> [turn["role"] for turn in transcript_of("\\n\\nHuman: Hi\\n\\nAssistant: Hello")]
    ['user', 'assistant']
    """
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        return [{"role": ROLES.get(who.lower(), who.lower()), "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]  # fmt: skip
    return answer_of(value)


def with_system(turns: list[Turn], row: Row) -> list[Turn]:
    """The turns after the system prompt of the row's own column, if they bring none; an empty one is none."""
    turns = [turn for turn in turns if turn["role"] != "system" or turn["content"]]
    system = text_of(row.get("system"))
    if not system or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def turns_in(value: Any) -> list[Turn]:
    """The turns in a cell: a list of them, one, a struct of lists, or any of these as JSON text; empty when it holds none.

    >>> turns_in([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])[1]
    {'role': 'assistant', 'content': 'Hello'}
    """
    value = parsed(value)
    if isinstance(value, dict):
        lists = list(value.values())
        columnar = lists and all(isinstance(each, list) for each in lists) and len({len(each) for each in lists}) == 1
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)] if columnar else [value]
    if not isinstance(value, list) or not all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value
    ):
        return exchanges_in(value)
    return [to_turn(turn) for turn in value]


def exchanges_in(value: Any) -> list[Turn]:
    """The turns in a list of questions with their answers, each two texts or a mapping of two; empty when it is none.

    >>> [turn["content"] for turn in exchanges_in([["Hi", "Hello"], {"input": "Who?", "output": "Me"}])]
    ['Hi', 'Hello', 'Who?', 'Me']
    """
    value = parsed(value)
    said = [two_texts(each) for each in value] if isinstance(value, list) else []
    if not all(said):
        return []
    return [{"role": role, "content": text_of(text)} for two in said for role, text in zip(("user", "assistant"), two, strict=True)]  # fmt: skip


def two_texts(exchange: Any) -> list[str] | None:
    """The question and the answer of one exchange, or None."""
    keys = next((keys for keys in EXCHANGES if isinstance(exchange, dict) and exchange.keys() == set(keys)), None)
    two = [exchange[key] for key in keys] if keys else exchange
    return two if isinstance(two, list) and [type(text) for text in two] == [str, str] else None


def to_turn(turn: Turn) -> Turn:
    """A turn of OpenAI's or ShareGPT's form as {"role", "content"}, with what tools need.

    >>> to_turn({"from": "human", "value": " Hi "})
    {'role': 'user', 'content': 'Hi'}
    """
    said_by = str(turn.get("role") or turn.get("from")).strip().lower()
    content = text_of(turn.get("content", turn.get("value", turn.get("text"))))
    result: Turn = {"role": ROLES.get(said_by, "unknown"), "content": content}
    if result["role"] == "tool" and isinstance(content, (dict, list)):
        result["content"] = json.dumps(content, ensure_ascii=False, default=str)
    calls = parsed(turn.get("tool_calls"))
    if said_by == "function_call" and isinstance(call := parsed(content), dict) and "name" in call:
        calls, result["content"] = [{"type": "function", "function": call}], ""
    if isinstance(calls, list) and calls and all(isinstance(call, dict) for call in calls):
        result["tool_calls"] = [with_parsed_arguments(call) for call in calls]
    for key in ("name", "tool_call_id"):
        if isinstance(turn.get(key), str) and result["role"] == "tool":
            result[key] = turn[key]
    return result


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


def text_of(value: Any, strip: bool = True) -> Any:
    """A cell as text without blanks around it; an empty cell is the empty text. What is no text is returned as it is.

    >>> text_of([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]), text_of(4), text_of(None)
    ('two parts', '4', '')
    """
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (list, dict, bytes)):
        return value
    return str(value).strip() if strip else str(value)


def contents(turns: Iterable[Turn]) -> list[Any]:
    """What the turns say."""
    return [turn["content"] for turn in turns]


def common_start(one: list[Turn], other: list[Turn]) -> list[Turn]:
    """The turns that two chats begin with alike."""
    return [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def split_at_prefix(chosen: Any, rejected: Any) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Two texts as prompt and answers: the prompt is what they share, up to its last whole word."""
    texts = (chosen, rejected)
    shared = os.path.commonprefix(texts) if all(isinstance(text, str) for text in texts) else ""
    cut = 0 if chosen == rejected else max(shared.rfind(" "), shared.rfind("\n")) + 1
    prompt = [{"role": "user", "content": shared[:cut].strip()}] if cut else []
    answers = ([{"role": "assistant", "content": text[cut:].strip() if cut else text}] for text in texts)
    return prompt, *answers


def repair(chat: Row) -> tuple[Row, list[str]]:
    """The chat without questions at its end that nobody answers and answers at its start that nobody asked for, and what was cut.

    >>> turns = [{"role": who, "content": "x"} for who in ("assistant", "user", "assistant", "user")]
    >>> cut, repairs = repair({"messages": turns})
    >>> len(cut["messages"]), repairs
    (2, ['unanswered_end_cut', 'unasked_start_cut'])
    """
    turns, repairs = chat["messages"], []
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or "assistant" not in roles or "unknown" in roles:
        return chat, []
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    first = roles.index("user")
    start = [turn for turn in turns[:first] if turn["role"] == "system"]
    if last < first:
        return chat, []
    if last < len(turns) - 1:
        repairs.append("unanswered_end_cut")
    if len(start) < first:
        repairs.append("unasked_start_cut")
    return {**chat, "messages": [*start, *turns[first : last + 1]]}, repairs


def fault(row: Row) -> str | None:
    """Why nothing can be learnt from a chat or a text, as a key of UNUSABLE, or None.

    >>> fault({"messages": [{"role": "user", "content": "Who?"}]})
    'no_answer'
    """
    turns = row["messages"]
    said = [row["text"]] if "text" in row else contents(turns)
    if not all(is_text(each) for each in said):
        return "not_text"
    if "text" in row:
        return None if row["text"].strip() else "empty_answer"
    roles = [turn["role"] for turn in turns]
    if "unknown" in roles:
        return "unknown_role"
    if "assistant" not in roles or "user" not in roles:
        return "no_answer"
    for turn in turns:
        if not turn["content"] and turn["role"] != "tool" and not turn.get("tool_calls"):
            return "empty_answer" if turn["role"] == "assistant" else "empty_question"
    return None if IN_ORDER.fullmatch("".join(role[0] for role in roles)) else "roles_out_of_order"


def fault_of_pair(pair: Row) -> str | None:
    """Why nothing can be learnt from a pair, as a key of UNUSABLE, or None.

    >>> fault_of_pair(to_pair({"prompt": "2+2?", "chosen": "4", "rejected": "4"}))
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
