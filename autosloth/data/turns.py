"""A cell becomes text or the turns of a chat, in the forms of OpenAI and ShareGPT. What is none stays as it is, for the row to be told from it.

What a function changes it counts by name in `notes`; a turn's key that nothing reads is noted as `turn key NAME`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
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
CALLED_WITH = ("arguments", "parameters", "args")  # what a call's arguments are called
PART_TYPES = (None, "text", "input_text", "output_text", "summary_text")  # parts of a content that are texts
NO_TEXT = ("cache_control", "annotations")  # keys of such a part that say nothing to the model
NOTHING = (None, "", [], {})
PLAIN = ({"role", "content", "tool_calls"}, {"from", "value"})  # the keys of most turns
EXCHANGES = (("input", "output"), ("user", "assistant"), ("human", "assistant"), ("question", "answer"), ("prompt", "response"))  # fmt: skip


def are_turns(value: Any) -> bool:
    """Whether a value is a list of turns, each of a known role and with something said."""
    return isinstance(value, list) and bool(value) and all(is_turn(turn) for turn in value)


def is_turn(value: Any) -> bool:
    """Whether a value is a turn of a known role that says, thinks or calls something."""
    told = isinstance(value, dict) and (value.keys() & {*SAID, "tool_calls"})
    return bool(told) and any(str(value.get(key)).strip().lower() in ROLES for key in SPEAKER)


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
    thought, content = thought_and_rest(content, first_filled(turn, THOUGHT), notes)
    result: Turn = {"role": role, "content": text_of(content, notes, leading=role == "assistant")}
    if role == "tool" and isinstance(result["content"], (dict, list)):
        result["content"] = as_json(result["content"])
        notes["tool_result_written_as_json"] += 1
    calls = calls_in(first_filled(turn, ("tool_calls", "function_call")))
    if said_by in CALLING and are_calls(called := calls_in(content)):
        calls, result["content"] = called, ""
    if calls:
        result["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if isinstance(turn.get(key), str) and role == "tool":
            result[key] = turn[key]
    if thought and role == "assistant":
        result["reasoning_content"] = thought
    for key in unread_keys(turn, role):
        notes[f"{TURN_KEY}{key}"] += 1
    weights = [turn[key] for key in WEIGHTS if turn.get(key) is not None] if role == "assistant" else []
    if any(map(is_off, weights)):
        result["weight"] = 0
    elif not all(map(is_on, weights)):  # 0.5, say
        notes["turn_weights_taken_as_1"] += 1
    return result


def first_of(turn: Turn, keys: Iterable[str]) -> Any:
    """The first of these keys' values that is there; Arrow fills those that other rows have with None."""
    for key in keys:
        if (value := turn.get(key)) is not None:
            return value
    return None


def first_filled(turn: Turn, keys: Iterable[str]) -> Any:
    """The first of these keys' values that says something."""
    for key in keys:
        if (value := turn.get(key)) not in NOTHING:
            return value
    return None


def unread_keys(turn: Turn, role: str) -> list[str]:
    """The keys of a turn that say something and that nothing reads; besides a second text, a user's thought, a name that is no tool's."""
    if any(turn.keys() <= plain for plain in PLAIN):  # most are
        return []
    filled = {key for key, value in turn.items() if value not in NOTHING}
    unread = filled - TURN_KEYS
    for keys in (SAID, THOUGHT, ("tool_calls", "function_call")):
        first, *others = [key for key in keys if key in filled] or [None]
        unread |= {key for key in others if turn[key] != turn[first]}
    if role != "assistant":
        unread |= filled & {*THOUGHT}
    if role != "tool":
        unread |= filled & {"name", "tool_call_id"}
    return sorted(unread)


def thought_and_rest(content: Any, thought: Any, notes: Notes) -> tuple[Any, Any]:
    """What a turn thinks and what it says, where its content is a list of parts of which some may be thoughts; a thought that is no text stays as it is."""
    thought, parts = text_of(thought), content if isinstance(content, list) else []
    thinks = [isinstance(part, dict) and part.get("type") in THOUGHT for part in parts]
    if not any(thinks):
        return thought, content
    told = [text_of(first_filled(part, (*THOUGHT, *SAID, "summary"))) for part, is_thought in zip(parts, thinks, strict=True) if is_thought]  # fmt: skip
    rest = [part for part, is_thought in zip(parts, thinks, strict=True) if not is_thought]
    if not all(isinstance(each, str) for each in (thought, *told)):
        return parts, rest
    if thought and thought != "".join(told):
        notes["thoughts_joined"] += 1
        return "\n\n".join([thought, *told]), rest
    return "".join(told), rest


def calls_in(value: Any) -> Any:
    """The calls of a turn as chat templates take them; what is none stays as it is, and None where there is nothing.

    >>> calls_in('{"name": "f", "arguments": "{}"}')
    [{'type': 'function', 'function': {'name': 'f', 'arguments': {}}}]
    """
    if value is None:
        return None
    value = parsed(value)
    calls = [as_call(parsed(each)) for each in (value if isinstance(value, list) else [value])]
    return calls if all(calls) else value


def are_calls(value: Any) -> bool:
    """Whether a value is a list of calls as `calls_in` gives them."""
    return isinstance(value, list) and bool(value) and all(map(is_call, value))


def is_call(value: Any) -> bool:
    """Whether a value is a call as `as_call` gives it: with a name and arguments, and nothing else to tell."""
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        return False
    function = value["function"]
    return value.keys() <= {"type", "id", "function"} and function.keys() == {"name", "arguments"} and isinstance(function["name"], str)  # fmt: skip


def as_call(call: Any) -> dict[str, Any] | None:
    """A call as {"type", "function": {"name", "arguments"}}, and its id, from OpenAI's form or a bare {"name", "arguments"}; None for what is none."""
    if not isinstance(call, dict):
        return None
    told = call["function"] if isinstance(call.get("function"), dict) else call
    name = first_of(told, ("name", "function", "tool"))
    given = [key for key in CALLED_WITH if told.get(key) is not None]
    if not isinstance(name, str) or not name or len(given) > 1:
        return None
    arguments = parsed(told[given[0]]) if given else {}
    read = {"id", "type", "index", "function", "name", "tool", *CALLED_WITH}
    if any(value not in NOTHING for key, value in (call | told).items() if key not in read):
        return None
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {"type": "function", **kept, "function": {"name": name, "arguments": {} if arguments == "" else arguments}}


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


def as_json(value: Any) -> Any:
    """A structured value as JSON text; itself where it holds bytes.

    >>> as_json({"a": [1]}), as_json([b"a"])
    ('{"a": [1]}', [b'a'])
    """
    try:
        return AS_JSON.encode(value)
    except TypeError:
        return value


def written(value: Any) -> str:
    """What JSON does not know, a date say, as text. Raises TypeError for bytes."""
    if isinstance(value, bytes):
        raise TypeError
    return str(value)


AS_JSON = json.JSONEncoder(ensure_ascii=False, default=written)


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
        value = "".join(map(part_text, value))
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
    """The text of a part of a turn's content, None where it is a picture, or has more to tell than a text."""
    if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
        return None
    told = [key for key, value in part.items() if key not in ("type", *NO_TEXT) and value not in (None, [], {})]
    return part[told[0]] if len(told) == 1 and told[0] in SAID else None


def contents(turns: Iterable[Turn]) -> list[Any]:
    """What the turns say."""
    return [turn["content"] for turn in turns]
