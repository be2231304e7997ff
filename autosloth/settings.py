"""The settings of a run: one typed declaration that the YAML file, `--set`, the form, the checks and the card are read from."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import SettingsError

ENVIRONMENT_PREFIX = "AUTOSLOTH_"
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".zip", ".gz")
MODELS = (
    "unsloth/mistral-7b-bnb-4bit",
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
    "unsloth/Qwen2.5-7B-Instruct-bnb-4bit",
    "unsloth/gemma-2-2b-it-bnb-4bit",
    "demo",
)
DATASETS = ("yahma/alpaca-cleaned", "mlabonne/FineTome-100k", "demo")
HUB_PAGE = re.compile(r"https://(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:/tree/main)?/?")


def setting(
    default: Any, group: str, help: str, *, front: bool = False, suggestions: tuple[str, ...] = (), **bounds: Any
) -> Any:
    """One field: its default, a one-line help, pydantic's bounds, and what the form needs to know.

    group: where the form shows it; front: whether it is one of the few that most people touch; suggestions: values to
    choose from besides any other; `title`: its label, where the field's name does not make one.
    """
    extra: dict[str, Any] = {"group": group, "front": front, "suggestions": list(suggestions)}
    kind = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
    return Field(**kind, description=help, json_schema_extra=extra, **bounds)


class SFTSettings(BaseModel):
    """Supervised fine-tuning.

    The defaults are the reference run on a free T4 (13.6 of 15.0 GB VRAM, 8.5 GB RAM): 60 steps of
    8 rows. With `model: demo` the defaults are those that suit the embedded tiny base (`DEMO_DEFAULTS`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    road: ClassVar[str] = "sft"
    DEMO_DEFAULTS: ClassVar[dict[str, Any]] = {
        **{
            "batch_size": 16,
            "gradient_accumulation": 1,
            "max_steps": 150,
            "learning_rate": 2e-3,
            "scheduler": "cosine",
        },
        **{"warmup": 10, "optimizer": "adamw_torch_fused", "load_in_4bit": False, "max_length": 512, "save_steps": 50},
        **{"eval_answers": 64, "max_new_tokens": 24, "merged": True},
    }

    model: str = setting(
        "unsloth/mistral-7b-bnb-4bit",
        "Model",
        "Hub id or folder of the base model; `demo` is the embedded tiny base.",
        min_length=1,
        front=True,
        suggestions=MODELS,
    )
    revision: str | None = setting(
        None, "Model", "Branch, tag or commit of the model on the Hub; empty means its main branch."
    )
    load_in_4bit: bool = setting(
        True, "Model", "Load the base in 4 bit (NF4): a 7B model then fits a free T4.", title="4 bit", front=True
    )
    max_length: int = setting(
        2048, "Model", "Longest row in tokens; longer rows are cut.", ge=16, le=131072, front=True
    )
    chat_template: Literal["auto", "alpaca", "mistral", "zephyr"] = setting(
        "auto", "Model", "`auto` keeps the tokenizer's own chat template and takes `alpaca` where it has none."
    )
    lora_r: int = setting(16, "Model", "Rank of the LoRA adapter.", ge=1, le=1024, title="LoRA rank")
    lora_alpha: int = setting(
        16, "Model", "LoRA scale: the adapter counts alpha / r times.", ge=1, le=4096, title="LoRA alpha"
    )
    lora_dropout: float = setting(
        0.0, "Model", "Dropout in the adapter; 0 is fastest.", ge=0, lt=1, title="LoRA dropout"
    )

    dataset: str = setting(
        "yahma/alpaca-cleaned",
        "Data",
        "Hub id; or path or http(s) address of a JSON, JSONL, CSV, TSV, Parquet or Arrow file, also zipped or gzipped; or a folder of them; `demo` is the embedded toy task.",
        min_length=1,
        front=True,
        suggestions=DATASETS,
    )
    dataset_config: str | None = setting(None, "Data", "Configuration of a Hub dataset that has several.")
    split: str = setting(
        "train", "Data", "Split to train on, or a part of it such as `train[:2000]`.", min_length=1, front=True
    )
    columns: dict[
        str, Literal["instruction", "input", "prompt", "completion", "messages", "system", "tools", "text"]
    ] = setting(
        {}, "Data", "What other columns mean, for example `{frage: prompt, antwort: completion}`.", title="Columns"
    )
    bad_rows: Literal["drop", "refuse"] = setting(
        "drop", "Data", "What to do with rows that nothing can be learnt from, such as those with an empty answer."
    )
    duplicates: Literal["drop", "keep"] = setting("drop", "Data", "What to do with rows that stand there already.")
    long_rows: Literal["truncate", "drop"] = setting(
        "truncate", "Data", "What to do with rows of more than `max_length` tokens."
    )
    eval_split: str | None = setting(
        None, "Data", "Split to measure with, for example `test`; empty holds out a part of `split` by the seed."
    )
    eval_fraction: float = setting(0.05, "Data", "Share of the rows that is held out to measure with.", gt=0, le=0.5)
    eval_rows: int = setting(200, "Data", "Most rows that are held out.", ge=1, le=10000)

    batch_size: int = setting(2, "Training", "Rows per forward pass.", ge=1, le=1024, front=True)
    gradient_accumulation: int = setting(4, "Training", "Forward passes per optimizer step.", ge=1, le=1024, front=True)
    epochs: float = setting(
        1.0, "Training", "Passes over the rows; counts when `max_steps` is 0.", gt=0, le=100, front=True
    )
    max_steps: int = setting(
        60, "Training", "Optimizer steps; 0 trains for `epochs` instead.", ge=0, le=10_000_000, front=True
    )
    learning_rate: float = setting(2e-4, "Training", "Peak learning rate.", gt=0, le=0.1, front=True)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "Training", "How the learning rate changes after the warm-up."
    )
    warmup: float = setting(
        5, "Training", "Warm-up in steps, or as a share of all steps when below 1.", ge=0, le=100_000
    )
    optimizer: Literal["adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused", "rmsprop", "sgd"] = setting(
        "adamw_8bit", "Training", "The 8-bit ones need a GPU; without one `adamw_torch_fused` takes their place."
    )
    weight_decay: float = setting(0.01, "Training", "Weight decay.", ge=0, le=1)
    max_grad_norm: float = setting(1.0, "Training", "Gradients are clipped to this norm.", gt=0, le=1000)
    seed: int = setting(3407, "Training", "Seed of the split, the shuffling and the adapter.", ge=0, lt=2**31)
    packing: bool = setting(False, "Training", "Put several short rows into one sequence (needs a GPU).")
    save_steps: int = setting(
        20, "Training", "A checkpoint to go on from is written every so many steps.", ge=1, le=1_000_000
    )
    eval_answers: int = setting(
        8, "Training", "Held-out questions that a new training answers before and after.", ge=0, le=1000
    )
    max_new_tokens: int = setting(256, "Training", "Longest answer in tokens when answers are compared.", ge=1, le=8192)

    merged: bool = setting(
        False, "Export", "Also write the merged model as 16-bit safetensors.", title="Merged model", front=True
    )
    quantizations: list[Literal["q8_0"]] = setting(
        ["q8_0"],
        "Export",
        "GGUF files to make; an empty list makes none.",
        max_length=1,
        title="GGUF files",
        front=True,
    )
    sixteen_bit_model: str | None = setting(
        None, "Export", "16-bit original of a 4-bit base; found by itself for Unsloth's.", title="16-bit original"
    )

    run_name: str = setting(
        "",
        "Publish",
        "Name of the run folder; made from model and dataset when empty.",
        pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,94}$",
    )
    storage: str = setting("runs", "Publish", "Folder that holds the run folders.", min_length=1)
    repo: str = setting(
        "",
        "Publish",
        "Hub repository `name` or `owner/name`; the run name when empty.",
        pattern=r"^$|^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]{0,94}$",
        front=True,
    )
    private: bool = setting(False, "Publish", "Make the repository private.", front=True)
    publish_to_hub: bool = setting(
        False, "Publish", "Upload the publish folder; needs a token with write access.", front=True
    )
    publish_unverified: bool = setting(False, "Publish", "Upload even when the GGUF failed its verification.")

    @model_validator(mode="before")
    @classmethod
    def _suit_the_demo_model(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("model") == "demo":
            return {**cls.DEMO_DEFAULTS, **values}
        return values

    @field_validator("model", "dataset", mode="before")
    @classmethod
    def _take_the_id_from_a_page(cls, value: Any) -> Any:
        page = HUB_PAGE.fullmatch(value.strip()) if isinstance(value, str) else None
        return page[1] if page else value

    @field_validator("quantizations", mode="before")
    @classmethod
    def _lower_case(cls, value: Any) -> Any:
        return [v.lower() if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _name_the_run(self) -> SFTSettings:
        if not self.run_name:
            object.__setattr__(self, "run_name", self._default_run_name())
        return self

    def _default_run_name(self) -> str:
        model, dataset = (
            re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).stem if "/" not in name else name.rsplit("/", 1)[1]).strip("-.")
            for name in (self.model, self.dataset.partition("?")[0].rstrip("/"))
        )
        model = re.sub(r"(-unsloth)?-bnb-4bit$", "", model)
        dataset = re.sub(rf"({'|'.join(map(re.escape, DATA_SUFFIXES))})+$", "", dataset)
        return "-".join(dict.fromkeys([model[:45] or "model", dataset[:40] or "data", self.road]))

    @property
    def folder(self) -> Path:
        """The run folder, `<storage>/<run_name>`."""
        return Path(self.storage).expanduser() / self.run_name

    def to_yaml(self, changes_only: bool = False) -> str:
        """The settings, or those that differ from the defaults, as the YAML text that `load` reads."""
        values = self.model_dump()
        if changes_only:
            defaults = {
                name: field.get_default(call_default_factory=True)
                for name, field in self.__class__.model_fields.items()
            }
            defaults["run_name"] = self._default_run_name()
            values = {name: value for name, value in values.items() if value != defaults[name]}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @classmethod
    def load(
        cls, source: str | Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
    ) -> SFTSettings:
        """Defaults < `source` < environment `AUTOSLOTH_<FIELD>` < `overrides`, checked.

        source: a YAML or JSON file, or the values of a notebook cell; overrides: from `--set`.
        Raises SettingsError, which names every wrong field, what was given and what is allowed.
        """
        values = source if isinstance(source, Mapping) else read_settings_file(source) if source else {}
        given = {**values, **environment_values(cls), **(overrides or {})}
        return cls.from_values(given, str(source) if isinstance(source, (str, Path)) and source else "the settings")

    @classmethod
    def from_values(cls, given: Mapping[str, Any], source: str) -> SFTSettings:
        """Settings from a mapping, checked; `source` is what an error tells the user to correct."""
        refuse_unknown(given, cls)
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError(*explain(error, source)) from None


ROADS = {road.road: road for road in (SFTSettings,)}


def is_address(name: str) -> bool:
    """Whether a dataset is named by an http(s) address."""
    return name.lower().startswith(("http://", "https://"))


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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"The settings file {path} holds a {type(content).__name__}, not settings.",
            "Write one `name: value` per line.",
        )
    return {str(key): value for key, value in content.items()}


def environment_values(model: type[BaseModel]) -> dict[str, Any]:
    """Settings given as `AUTOSLOTH_<FIELD>`; the values are read as YAML, like those of `--set`."""
    return {
        name: parse_value(os.environ[variable])
        for name in model.model_fields
        if (variable := ENVIRONMENT_PREFIX + name.upper()) in os.environ
    }


def parse_value(text: str) -> Any:
    """The value that a YAML file would hold there: `true`, `3`, `{a: b}`, or plain text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def refuse_unknown(given: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Raises SettingsError for keys that are no settings, with the nearest name that is one."""
    known = list(model.model_fields)
    unknown = [key for key in given if key not in model.model_fields]
    if not unknown:
        return
    nearest = {key: difflib.get_close_matches(key, known, n=1, cutoff=0.5) for key in unknown}
    what = "; ".join(
        f"`{key}` is not a setting" + (f" (did you mean `{near[0]}`?)" if near else "") for key, near in nearest.items()
    )
    raise SettingsError(f"{what}.", f"The settings are: {', '.join(known)}.")


def explain(error: ValidationError, source: str) -> tuple[str, str]:
    """What is wrong (each field, what was given, what is allowed) and what to do, from a pydantic error."""
    wrong = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        wrong.append(f"`{field}` is {json.dumps(problem['input'], default=str)}, but {allowed(problem)}")
    names = dict.fromkeys(f"`{problem['loc'][0]}`" for problem in error.errors() if problem["loc"])
    return "; ".join(wrong) + ".", f"Correct {', '.join(names)} in {source}."


def allowed(problem: Mapping[str, Any]) -> str:
    """What a field takes, from one of pydantic's errors: `it should be greater than 0`."""
    said = problem["msg"].removeprefix("Value error, ")
    return (said[0].lower() + said[1:]).replace("input should", "it should")
