"""The chat template of a run: chosen, settled once and for all, and the one way to a prompt."""

from __future__ import annotations

import datetime
import functools
import json
import re
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..hub_client import first_lines
from ..output import say
from ..settings import Settings
from ..values import is_jinja
from .adapter import starting_adapter

TEMPLATE = "data/chat_template.jinja"  # in a run's folder: the chat template, as it is settled for the run
CHAT_TEMPLATES = Path(__file__).parent / "templates" / "chat"  # ours; beside each the same in Ollama's language
OPTIONAL_BOS = "{{ bos_token or '' }}"  # how our own chat templates begin
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
HELD = re.compile(r"(?:{%.*?%})?{# The date is held at (\d{4}-\d\d-\d\d)\. #}")
OTHER_THOUGHTS = ("thinking", "reasoning", "thought")  # names that templates have for it besides `reasoning_content`


def template_for(tokenizer: Any, settings: Settings, tools: bool) -> str:
    """The chat template of a run: the one asked for or the model's own, with the date and the thinking mode settled. Raises ModelError."""
    own = tokenizer.chat_template
    template = (
        chosen_template(settings)
        or (one_of(own, settings, tools) if isinstance(own, dict) else own)
        or named_template("alpaca")
    )
    if tokenizer.bos_token is None:  # llama.cpp takes one for granted: with Qwen's vocabulary it would be a comma
        template = template.replace(OPTIONAL_BOS, "")
    fixed = with_fixed_date(template)
    if fixed != template:
        say("tokenizer: the chat template writes the date; for this run and its file that is today's")
        template = fixed
    return with_thinking(template) if settings.thinking else without_thinking(template)


def one_of(templates: dict[str, str], settings: Settings, tools: bool) -> str:
    """Of several chat templates of a model the one for these rows: `tool_use` for tools, if there is one, else `default`. Raises ModelError."""
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ModelError(
            f"{settings.model} has several chat templates ({', '.join(templates)}), and none of them is called default.",
            "Set `chat_template: alpaca`, or another of ours, or choose a model with one template.",
        )
    say(f"tokenizer: of the chat templates of {settings.model} ({', '.join(templates)}) `{name}` is used")
    return templates[name]


def with_fixed_date(template: str) -> str:
    """A chat template in which what it would write of the clock (`strftime_now`, as Llama 3.1 does) is today's date. Raises ModelError.

    Else the file would be held tomorrow against prompts of today. A comment in it tells the date (`held_date`).

    >>> with_fixed_date("{{ strftime_now('%%') if strftime_now is defined }}").partition("#}")[2]
    "{{ '%' if true }}"
    """
    if "strftime_now" not in template:
        return template
    now = datetime.datetime.now()
    fixed = CLOCK.sub(lambda call: repr(now.strftime(call[2])), template)
    fixed = fixed.replace("strftime_now is not defined", "false").replace("strftime_now is defined", "true")
    if "strftime_now" in fixed:
        raise ModelError(
            "The model's chat template reads the clock in a way that cannot be held fast.",
            "Set `chat_template: alpaca`, or another of ours.",
        )
    return f"{{# The date is held at {now:%Y-%m-%d}. #}}{fixed}"


def held_date(template: str) -> str | None:
    """The date, as year-month-day, at which the clock of a chat template was held for a run; None where it reads no clock.

    >>> held_date(with_fixed_date("{{ messages[0].content }}"))
    """
    found = HELD.match(template)
    return found and found[1]


def chosen_template(settings: Settings) -> str | None:
    """The chat template that the settings name, or the one that the adapter to start from was trained with."""
    if settings.chat_template != "auto":
        return own_template(settings.chat_template) or named_template(settings.chat_template)
    folder = starting_adapter(settings)
    path = folder / "chat_template.jinja" if folder else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else None


def own_template(chat_template: str) -> str | None:
    """The template that is given as Jinja text or as the path of a file; None for a name of ours. Raises ModelError."""
    if is_jinja(chat_template):
        return chat_template
    if "/" not in chat_template and "." not in chat_template:
        return None
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"The chat template {chat_template} cannot be read ({first_lines(error)}).",
            "Check the path, or write the Jinja text itself into `chat_template`.",
        ) from None


def check_template(settings: Settings) -> None:
    """Whether a chat template of one's own can be read and shows a short chat, its texts in order. Raises ModelError."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = own_template(settings.chat_template)
    if template is None:
        return
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refused_by_template, "strftime_now": "{}".format}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    turns = [{"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")]
    try:
        made = environment.from_string(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "tools": None}
        asked = made.render(messages=turns[:-1], add_generation_prompt=True, **tokens)
        text = made.render(messages=turns, add_generation_prompt=False, **tokens)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ModelError(
            f"The chat template that `chat_template` gives cannot be rendered ({line}{first_lines(error)}).",
            "Correct it: it takes `messages` (each with `role` and `content`), `add_generation_prompt` and `tools`.",
        ) from None
    places = [text.find(turn["content"]) for turn in turns]
    if -1 in places or places != sorted(places) or any(turn["content"] not in asked for turn in turns[:-1]):
        raise ModelError(
            "The chat template that `chat_template` gives leaves out turns of a chat, or changes their order.",
            "Let it write every message's `content`, one after the other.",
        )


def refused_by_template(reason: str) -> None:
    """What templates call `raise_exception`. Raises jinja2.TemplateError."""
    import jinja2

    raise jinja2.TemplateError(reason)


def without_thinking(template: str) -> str:
    """A chat template with its thinking mode switched off, if it has one (Qwen3 and kin call the switch `enable_thinking`).

    The switch stands in the template itself, so that training, generation, the published tokenizer and the GGUF agree about it.

    >>> without_thinking("{{ messages[0].content }}")
    '{{ messages[0].content }}'
    """
    template = template.removeprefix("{% set enable_thinking = true %}")
    off = "{% set enable_thinking = false %}"
    return off + template if "enable_thinking" in template and not template.startswith(off) else template


def with_thinking(template: str) -> str:
    """A chat template with its thinking mode switched on, if it has one: some have it off by themselves.

    >>> with_thinking(without_thinking("{{ enable_thinking }}"))
    '{% set enable_thinking = true %}{{ enable_thinking }}'
    """
    template = template.removeprefix("{% set enable_thinking = false %}")
    on = "{% set enable_thinking = true %}"
    return on + template if "enable_thinking" in template and not template.startswith(on) else template


def named_template(name: str) -> str:
    """One of our chat templates; none needs tokens that the tokenizer may lack."""
    return (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], answer_next: bool = False, tools: list[dict] | None = None
) -> str:
    """The text of a chat, in one way for training, generation, verification and the card. Raises ModelError.

    answer_next: end with the opening of the assistant's turn; tools: what the assistant may call, as JSON schemas.
    The text carries the BOS token where the tokenizer would add one, so it is always encoded with
    `add_special_tokens=False`.
    """
    import jinja2

    try:
        turns = [as_shown(turn, tokenizer.chat_template) for turn in messages]
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=answer_next)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template meets types that it was not made for
        roles = " > ".join(message["role"] for message in messages)
        raise ModelError(
            f"The model's chat template refuses a chat of {roles} ({first_lines(error)}).",
            "Set `chat_template: alpaca`, or leave such rows out of the dataset.",
        ) from None
    begin = opening(tokenizer)
    return text if text.startswith(begin) else begin + text


def as_shown(turn: dict[str, Any], template: str) -> dict[str, Any]:
    """A turn as a chat template takes it: without what is for the training alone, its thought under the name that the template knows."""
    if "weight" in turn:
        turn = {key: value for key, value in turn.items() if key != "weight"}
    if "reasoning_content" in turn and "reasoning_content" not in template:
        known = next((name for name in OTHER_THOUGHTS if re.search(rf"\b{name}\b", template)), "reasoning_content")
        turn = {known if key == "reasoning_content" else key: value for key, value in turn.items()}
    return turn


@functools.lru_cache(maxsize=8)
def opening(tokenizer: Any) -> str:
    """The BOS token where this tokenizer would begin a text with one, else the empty text."""
    adds = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds else ""


def encode_prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict] | None = None) -> list[int]:
    """The token ids that the assistant's answer to these messages goes on from."""
    return tokenizer(
        render_chat(tokenizer, messages, answer_next=True, tools=tools), add_special_tokens=False
    ).input_ids
