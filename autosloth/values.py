"""Values of settings as they come from files, the environment and `--set`: parsed, and explained when they are wrong."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import SettingsError

ENVIRONMENT_PREFIX = "AUTOSLOTH_"
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".zip", ".gz")
AUTO, WHOLE_NUMBER = "auto", "a whole number"  # what `batch_size` takes, as pydantic names it in an error
ONE, SEVERAL = "one dataset", "several datasets"  # what `dataset` takes, as pydantic names it in an error
TAGS = (AUTO, WHOLE_NUMBER, ONE, SEVERAL)
OWN_VARIABLE = ENVIRONMENT_PREFIX + "CACHE"  # the only one that is no setting
FILE_NAME = r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,94}$"
REPOSITORY = r"^$|^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]{0,94}$"
LETTERS = "letters without accents, digits, `.`, `_` and `-`, at most 95 of them, a letter or digit first"
PATTERNS = {FILE_NAME: LETTERS, REPOSITORY: f"`name` or `owner/name`, of {LETTERS}"}
IN_WORDS = {  # pydantic's kinds of errors whose own words speak of parsing
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **{"string_type": "text", "list_type": "a list, such as [a, b]", "dict_type": "a mapping, such as {a: b}"},
}
# What YAML makes of each JSON type beside text; one of several datasets is a mapping, for which a list stands.
PYTHON = {"integer": int, "number": (int, float), "array": (list, dict), "object": dict, "null": type(None)}
KEYS = {  # of the mappings that settings hold
    "extra_forbidden": "a dataset of several takes `path`, `share`, `split` and `columns`",
    "missing": "give a Hub id or a path",
    "string_too_short": "it should not be empty",
}
HUB_PAGE = re.compile(r"https://(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:/tree/main)?/?")


def is_address(name: str) -> bool:
    """Whether a dataset is named by an http(s) address."""
    return name.lower().startswith(("http://", "https://"))


def public_address(address: str) -> str:
    """An http(s) address as others may know it: host and path, without user, password, query and fragment, whatever stands in them.

    >>> public_address("https://me:word@a.b/c.jsonl?token=1#x"), public_address("https://me:wo/rd@a.b/c.jsonl"), public_address("http://[::1]:80/c")
    ('https://a.b/c.jsonl', 'https://a.b/c.jsonl', 'http://[::1]:80/c')
    """
    scheme, _, rest = address.partition("//")
    place = re.split("[?#]", rest)[0]
    if "@" not in place and re.search(r"^[^/]*:(?!\d*(/|$))", place):  # no port: a password with `?` or `#` in it
        place = re.split("[?#&]", rest.rpartition("@")[2])[0]
    return f"{scheme}//{place.rpartition('@')[2]}"


def last_part(path: str) -> str:
    """The last part of a path, of Windows too; of one that has none, such as `.`, a word that stands for it.

    >>> last_part("/home/mila/rows.jsonl"), last_part("C:\\\\Users\\\\mila\\\\rows.jsonl"), last_part("/")
    ('rows.jsonl', 'rows.jsonl', 'local')
    """
    return PureWindowsPath(path).name or "local"


def is_home(path: str) -> bool:
    """Whether a path that begins with `~` leads to a home folder of this machine."""
    try:
        Path(path).expanduser()
    except RuntimeError:
        return False
    return True


def is_jinja(text: str) -> bool:
    """Whether a text is a Jinja template and not the name or path of one."""
    return "{{" in text or "{%" in text


def is_hub_id(name: str) -> bool:
    """Whether a model or dataset is named by its Hub id: `owner/name` or `name`, and no file or folder of that name is here."""
    return (
        name != "demo"
        and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
        and not name.lower().endswith(DATA_SUFFIXES)
        and not Path(name).exists()
    )


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises SettingsError when it is missing or is no mapping."""
    path = Path(path).expanduser()
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"The settings file {path} does not exist.",
            "Give the path of a YAML or JSON file, or none for the defaults.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The settings file {path} cannot be read ({error}).", "Give a readable text file in UTF-8."
        ) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise SettingsError(
            f"The settings file {path} is not valid YAML{line}.", "Write one `name: value` per line."
        ) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"The settings file {path} holds a value that cannot be read ({str(error)[:80] or 'nested too deeply'}).",
            "Write one `name: value` per line.",
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"The settings file {path} holds a {type(content).__name__}, not settings.",
            "Write one `name: value` per line.",
        )
    return {str(key): value for key, value in content.items()}


class Loader(yaml.SafeLoader):
    """YAML as settings are written: what looks like a date is text, as is `1:30`, and no name is given twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises ValueError for a name that stands there twice."""
        names = [key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"`{twice[0]}` stands there twice, line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


def plain_number(loader: Loader, node: yaml.ScalarNode) -> Any:
    """A number in tens, or text: YAML 1.1 takes `1:30` for 90 and `010` for 8."""
    if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
        return node.value
    return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)


for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", plain_number)


def load_yaml(text: str) -> Any:
    """What YAML text says. Raises yaml.YAMLError, ValueError.

    >>> load_yaml("2024-02-30"), load_yaml("{a: 1}"), load_yaml("1:30"), load_yaml("010"), load_yaml("1_000")
    ('2024-02-30', {'a': 1}, '1:30', '010', 1000)
    """
    value = yaml.load(text, Loader)
    with contextlib.suppress(TypeError):  # a key that JSON does not have is told where it is wrong
        json.dumps(value, default=str)  # raises ValueError for what holds itself
    return value


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")


def environment_values(model: type[BaseModel]) -> dict[str, Any]:
    """Settings given as `AUTOSLOTH_<FIELD>`; the values are read as those of `--set` are."""
    given = {name: os.environ[variable(name)] for name in model.model_fields if variable(name) in os.environ}
    schema = model.model_json_schema()["properties"] if given else {}
    return {name: read_texts([text], schema[name]) for name, text in given.items()}


def refuse_unknown_variables(names: Iterable[str]) -> None:
    """Raises SettingsError for environment variables `AUTOSLOTH_...` that are none of these settings, of whatever road."""
    known = {OWN_VARIABLE, *map(variable, names)}
    unknown = sorted(name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    if unknown:
        raise SettingsError(
            f"{misspelt(unknown, known, 'an environment variable of AutoSloth')}.",
            f"Correct or unset {'it' if len(unknown) == 1 else 'them'}: a setting is given as `{ENVIRONMENT_PREFIX}` and its name in capitals.",
        )


def misspelt(unknown: Iterable[str], known: Iterable[str], kind: str) -> str:
    """What is wrong with names that are not known, with the nearest that is, whatever their case.

    >>> misspelt(["modle", "SEED"], ["model", "seed"], "a setting")
    '`modle` is not a setting (did you mean `model`?); `SEED` is not a setting (did you mean `seed`?)'
    """
    folded = {name.casefold(): name for name in known}
    nearest = {name: difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5) for name in unknown}
    return "; ".join(f"`{name}` is not {kind}" + (f" (did you mean `{folded[near[0]]}`?)" if near else "") for name, near in nearest.items())  # fmt: skip


def no_truth(value: Any, kinds: Iterable[Any]) -> Any:
    """A value for a field of these kinds: of true and false their names where numbers are wanted, which pydantic refuses; it would take true for 1.

    >>> no_truth(True, [int]), no_truth(True, [bool]), no_truth(2, [int])
    ('true', True, 2)
    """
    if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
        return str(value).lower()
    return value


def yaml_text(values: Mapping[str, Any]) -> str:
    r"""Values as YAML that reads back as the same: line separators that PyYAML takes for line ends unless they are escaped.

    >>> yaml_text({"repo": "ö"}), yaml.safe_load(yaml_text({"repo": "\x85"}))
    ('repo: ö\n', {'repo': '\x85'})
    """
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text if yaml.safe_load(text) == values else yaml.safe_dump(dict(values), sort_keys=False)


def parse_value(text: str) -> Any:
    """The value that a YAML file would hold there: `true`, `3`, `{a: b}`, or plain text."""
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def kinds_of(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that a setting takes, from its JSON schema; none of a name that is no setting.

    >>> sorted(kinds_of({"oneOf": [{"type": "integer"}, {"const": "auto", "type": "string"}]}))
    ['integer', 'string']
    """
    return {kind["type"] for kind in schema.get("anyOf") or schema.get("oneOf") or [schema] if "type" in kind}


def read_text(text: str, kinds: Iterable[str]) -> Any:
    """The value of a setting that takes these JSON types, from what was typed: as a YAML file would hold it, but text stays as it is where text is taken.

    >>> read_text("2024", ["string"]), read_text("2024", ["integer"]), read_text("# {{ x }} # y", ["string"]), read_text("", ["string", "null"])
    ('2024', 2024, '# {{ x }} # y', None)
    >>> read_text("'2024'", ["string"]), read_text("{path: a}", ["string", "array"])
    ('2024', {'path': 'a'})
    """
    value, text = parse_value(text), text.strip()
    if "string" not in kinds or (isinstance(value, str) and text[:1] in ("'", '"')):
        return value
    return value if any(isinstance(value, PYTHON.get(kind, ())) for kind in kinds) else text


def read_texts(texts: Iterable[str], schema: Mapping[str, Any]) -> Any:
    """The value of a setting from what was typed, once or several times: a list of names also with commas between them, mappings together; of others the last counts.

    >>> read_texts(["q8_0,q4_k_m", "f16"], {"type": "array", "items": {"type": "string"}})
    ['q8_0', 'q4_k_m', 'f16']
    >>> read_texts(["{frage: prompt}", "{antwort: completion}"], {"type": "object"})
    {'frage': 'prompt', 'antwort': 'completion'}
    """
    kinds = kinds_of(schema)
    values = [read_text(text, kinds) for text in texts]
    if kinds == {"object"}:
        wrong = [value for value in values if not isinstance(value, dict)]
        return wrong[0] if wrong else {name: meaning for value in values for name, meaning in value.items()}
    lists = [kind for kind in (schema, *schema.get("oneOf", ())) if kind.get("type") == "array"]
    if not lists or (len(values) == 1 and not isinstance(values[0], (str, dict))):
        return values[-1]
    if lists[0]["items"].get("type") == "string":  # names, in which there is no comma
        values = [[part.strip() for part in value.split(",")] if isinstance(value, str) else value for value in values]
    every = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return every[0] if len(every) == 1 and isinstance(every[0], str) else every


def refuse_unknown(
    given: Mapping[str, Any], model: type[BaseModel], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raises SettingsError for keys that are no settings, with the nearest name that is one; elsewhere: what is said of names that only other models have."""
    if "token" in given:
        raise SettingsError(
            "`token` is not a setting: settings are kept in files.",
            "Take it away there, and give the token as HF_TOKEN (environment or Colab secret), or by `hf auth login`.",
        )
    if unknown := [key for key in given if key not in model.model_fields]:
        known = list(model.model_fields)
        told = [f"`{key}` is {(elsewhere or {})[key]}" for key in unknown if key in (elsewhere or {})]
        if strange := [key for key in unknown if key not in (elsewhere or {})]:
            told.append(misspelt(strange, known, "a setting"))
        raise SettingsError(f"{'; '.join(told)}.", f"The settings are: {', '.join(known)}.")


def explain(error: ValidationError, source: str, sources: Mapping[str, str] | None = None) -> tuple[str, str]:
    """What is wrong (each field, what was given, what is allowed) and what to do, from a pydantic error.

    source: where the values come from; sources: of those that come from elsewhere, where from, by field.
    """
    wrong = []
    for problem in error.errors(include_url=False):
        parts = [part for part in problem["loc"] if part not in TAGS]
        if len(parts) > 1 and isinstance(parts[-1], int):  # which of a list it is, its value tells
            parts.pop()
        field = ".".join(map(str, parts))
        given = f"`{field}` is {json.dumps(problem['input'], default=str)}, but " if field else ""
        if problem["type"] == "missing":
            given = f"`{field}` is missing: "
        wrong.append(f"{given}{allowed(problem)}")
    names = dict.fromkeys(problem["loc"][0] for problem in error.errors() if problem["loc"])
    places = ", ".join(f"`{name}` in {(sources or {}).get(name, source)}" for name in names)
    return "; ".join(wrong) + ".", f"Correct {places or f'that in {source}'}."


def allowed(problem: Mapping[str, Any]) -> str:
    """What a field takes, from one of pydantic's errors, in words: `it should be a number`; of several fields together, what is wrong with them."""
    if words := IN_WORDS.get(problem["type"]) or PATTERNS.get(problem.get("ctx", {}).get("pattern", "")):
        return f"it should be {words}" + (f", or {AUTO}" if WHOLE_NUMBER in problem["loc"] else "")
    if words := KEYS.get(problem["type"]):
        return words
    said = problem["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:]
    for symbols, words in (("input should", "it should"), ("greater than or equal to", "at least"), ("less than or equal to", "at most")):  # fmt: skip
        said = said.replace(symbols, words)
    return said


def shown(value: Any) -> str:
    """A value as a file of settings has it.

    >>> shown(None), shown(True), shown("auto"), shown(2e-4), shown(["q8_0"])
    ('empty', 'true', 'auto', '0.0002', '["q8_0"]')
    """
    return "empty" if value in (None, "") else value if isinstance(value, str) else json.dumps(value)


def in_words(schema: Mapping[str, Any]) -> str:
    """What a setting takes, from its JSON schema; nothing for any text, and for true and false.

    >>> in_words({"type": "integer", "minimum": 1, "maximum": 8}), in_words({"enum": ["a", "b", "c"]}), in_words({"type": "string"})
    ('1 to 8', 'a, b or c', '')
    >>> in_words({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 0.1}, {"type": "null"}]})
    'above 0 to 0.1, or empty'
    >>> in_words({"oneOf": [{"type": "integer", "minimum": 1, "maximum": 8}, {"const": "auto"}]})
    '1 to 8, or auto'
    """
    if "const" in schema:
        return schema["const"]
    if "oneOf" in schema:
        kinds = [in_words(kind) for kind in schema["oneOf"]]
        return ", or ".join(kinds) if all(kinds) else ""
    if "anyOf" in schema:
        kinds = [in_words(kind) for kind in schema["anyOf"] if kind["type"] != "null"]
        return f"{kinds[0]}, or empty" if kinds[0] else ""
    if "enum" in schema:
        *others, last = schema["enum"]
        return f"{', '.join(others)} or {last}"
    if schema.get("type") == "array":
        return f"a list of {in_words(schema['items'])}"
    if schema.get("type") == "object":
        return f"each column to {in_words(schema['additionalProperties'])}"
    if "pattern" in schema:
        return PATTERNS[schema["pattern"]]
    least = f"above {schema['exclusiveMinimum']:,}" if "exclusiveMinimum" in schema else f"{schema.get('minimum', '')}"
    most = f"below {schema['exclusiveMaximum']:,}" if "exclusiveMaximum" in schema else f"{schema.get('maximum', 0):,}"
    return f"{least} to {most}" if least else ""
