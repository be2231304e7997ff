"""The settings of a run: one typed declaration for each road, which the YAML file, `--set`, the form, the checks and the card all read."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import (  # pydantic takes typing's only from Python 3.12 on
    Annotated,
    Any,
    ClassVar,
    Literal,
    Required,
    Self,
    get_args,
    get_origin,
)

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from .errors import SettingsError
from .hardware import first_gpu
from .values import (
    AUTO,
    DATA_SUFFIXES,
    FILE_NAME,
    HUB_PAGE,
    ONE,
    REPOSITORY,
    SEVERAL,
    WHOLE_NUMBER,
    environment_values,
    explain,
    flag,
    is_address,
    is_home,
    is_jinja,
    misspelt,
    no_truth,
    public_address,
    read_settings_file,
    refuse_unknown,
    refuse_unknown_variables,
    variable,
    yaml_text,
)

# A word on each model that the form suggests: all its parameters and, where memory.py's estimate tells, on what a run by the defaults fits
# (tests/models/test_suggestions.py holds both against the shapes).
ON_T4, ON_A100 = "fits a T4 in 4 bit", "fits an A100 in 4 bit"
MODELS = {
    "unsloth/mistral-7b-bnb-4bit": f"7.2B, a base that has learnt no chat; {ON_T4}",
    "unsloth/Qwen3-4B-Instruct-2507-unsloth-bnb-4bit": f"4.0B; {ON_T4}",
    "unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit": f"3.2B; {ON_T4}",
    "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit": f"1.2B; {ON_T4}",
    "unsloth/Llama-3.1-8B-Instruct-unsloth-bnb-4bit": f"8.0B; {ON_T4}",
    "unsloth/Qwen3-8B-unsloth-bnb-4bit": f"8.2B; {ON_T4}",
    "unsloth/gemma-3-1b-it-unsloth-bnb-4bit": f"1.0B; {ON_T4}",
    "unsloth/Qwen3-0.6B-unsloth-bnb-4bit": f"0.6B; {ON_T4}",
    "unsloth/gemma-4-E2B-it-unsloth-bnb-4bit": f"5.1B, of which 2.3B compute and the others are embeddings; {ON_T4}",
    "unsloth/Ministral-3-3B-Instruct-2512-unsloth-bnb-4bit": f"3.8B, of which 0.4B see images; {ON_T4}",
    "unsloth/LFM2.5-1.2B-Instruct": f"1.2B, in 16 bit on the Hub; {ON_T4}",
    "unsloth/granite-4.0-micro-unsloth-bnb-4bit": f"3.4B; {ON_T4}",
    "demo": "the embedded tiny base; needs no GPU",
}
DPO_MODELS = {
    "unsloth/zephyr-sft-bnb-4bit": f"7.2B; {ON_T4}",
    **MODELS,
    "unsloth/Qwen3-14B-unsloth-bnb-4bit": f"14.8B; {ON_A100}",
    "unsloth/phi-4-unsloth-bnb-4bit": f"14.7B; {ON_A100}",
}
DATASETS = ("yahma/alpaca-cleaned", "mlabonne/FineTome-100k", "demo")
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
ULTRAFEEDBACK_SPLITS = {"split": "train_prefs", "eval_split": "test_prefs"}  # it has no `train`
ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRACHAT_SPLITS = {"split": "train_sft", "eval_split": "test_sft"}
SPIN_DATASETS = (ULTRACHAT, "yahma/alpaca-cleaned", "demo")
DPO_DATASETS = (ULTRAFEEDBACK, "argilla/ultrafeedback-binarized-preferences-cleaned", "demo")
FAMILY = ("sft", "dpo", "spin")
LONGEST_FILE_NAME = 255
CHAT_TEMPLATE_NAMES = ("auto", "alpaca", "mistral", "zephyr")
COMMON_NAMES = {"question": "prompt", "answer": "completion", "output": "completion", "response": "completion"}
ON_THE_HUB = "hub"  # as `storage`
AT_FIRST = 2  # rows in a forward pass where nothing tells that there is room for more
A100_GB = 35.0  # of GPU memory from which the profile for an A100 (40 or 80 GB) fits


def setting(
    default: Any, group: str, help: str, *, front: bool = False, suggestions: Iterable[str] = (), **bounds: Any
) -> Any:
    """One field: its default, a one-line help, pydantic's bounds, and what the form needs to know.

    group: where the form shows it; front: whether it is one of the few that most people touch; suggestions: values to
    choose from besides any other, as a mapping with a word on each; `title`: its label, where the field's name does not make one.
    """
    extra: dict[str, Any] = {"group": group, "front": front, "suggestions": suggestions}
    kind = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
    return Field(**kind, description=help, json_schema_extra=extra, **bounds)


def otherwise(name: str, default: Any, **extra: Any) -> Any:
    """The shared field of this name with another default, and what else is otherwise for the form."""
    field = copy.deepcopy(Settings.model_fields[name])
    field.default = default
    field.json_schema_extra |= extra
    return field


def refuse_misspelt_meaning(name: str, other: str, meanings: tuple[str, ...]) -> None:
    """Raises ValueError where in `{name: other}`, of which neither is a meaning, the first looks like one with a slip in it."""
    near = difflib.get_close_matches(name, meanings, n=1, cutoff=0.8)
    if near and not name.startswith(near[0]):  # as `inputs` and `text_2` do, which may well be columns
        raise ValueError(f"{misspelt([name], near, 'a meaning')}; write {{{other}: {near[0]}}}, or {{{name}: {near[0]}}} if a column is called so")  # fmt: skip


NotEmpty = Annotated[str, Field(min_length=1)]


class Part(TypedDict, total=False):
    """One of several datasets: `path` as `dataset` takes it, the `share` of its rows that is taken (all by default), and its own `split` and `columns`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: Required[NotEmpty]
    share: Annotated[float, Field(gt=0, le=1), BeforeValidator(lambda value: no_truth(value, [float]))]
    split: NotEmpty
    columns: dict[str, str]


RowsAtOnce = Annotated[
    Annotated[int, Field(ge=1, le=1024), Tag(WHOLE_NUMBER)] | Annotated[Literal["auto"], Tag(AUTO)],
    Discriminator(lambda value: AUTO if value == AUTO else WHOLE_NUMBER),
]
EvalSteps = Annotated[
    Annotated[int, Field(ge=0, le=1_000_000), Tag(WHOLE_NUMBER)] | Annotated[Literal["auto"], Tag(AUTO)],
    Discriminator(lambda value: AUTO if value == AUTO else WHOLE_NUMBER),
]
# One dataset or several; told apart at once, so that an error speaks of what was meant.
OneOrMore = Annotated[NotEmpty, Tag(ONE)] | Annotated[list[Part], Tag(SEVERAL)]
TOLD_APART = Discriminator(lambda value: SEVERAL if isinstance(value, list) else ONE)


class Settings(BaseModel):
    """What the settings of every road share."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    road: ClassVar[str]
    DEMO_DEFAULTS: ClassVar[dict[str, Any]]  # that suit the embedded tiny base

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
    chat_template: str = setting(
        "auto", "Model", "`auto` keeps the tokenizer's own chat template and takes `alpaca` where it has none; or one of ours, a path of your own, or Jinja text.",
        suggestions=CHAT_TEMPLATE_NAMES,
    )  # fmt: skip
    thinking: bool = setting(
        False, "Model", "Keep the thinking mode of a chat template that has one; off, answers begin at once."
    )
    lora_r: int = setting(16, "Model", "Rank of the LoRA adapter.", ge=1, le=1024, title="LoRA rank")
    lora_alpha: int = setting(
        16, "Model", "LoRA scale: the adapter counts alpha / r times.", ge=1, le=4096, title="LoRA alpha"
    )
    lora_dropout: float = setting(
        0.0, "Model", "Dropout in the adapter; 0 is fastest.", ge=0, lt=1, title="LoRA dropout"
    )
    target_modules: Annotated[Annotated[NotEmpty, Tag(ONE)] | Annotated[list[NotEmpty], Tag(SEVERAL)], TOLD_APART] = setting(
        "all-linear", "Model", "Which layers get LoRA: `all-linear`, every linear layer and the experts of the text part; `attention`; or names, such as `[q_proj, v_proj]`.",
        suggestions=("all-linear", "attention"), title="Trained layers",
    )  # fmt: skip
    use_rslora: bool = setting(
        False, "Model", "Count the adapter alpha / sqrt(r) times (rsLoRA, arXiv 2312.03732).", title="rsLoRA"
    )
    use_dora: bool = setting(
        False,
        "Model",
        "Train the length of each row apart from its direction (DoRA, arXiv 2402.09353); slower.",
        title="DoRA",
    )
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] = setting(
        [], "Model", "Train these whole beside the adapter, for a language or tokens that the base hardly knows; takes much memory.", title="Trained whole",
    )  # fmt: skip

    adapter: str | None = setting(
        None,
        "Model",
        "An adapter to train further, of AutoSloth-SFT say: a run folder, a folder, or a Hub id; empty starts at the base itself.",
    )

    dataset: Annotated[OneOrMore, TOLD_APART] = setting(
        "yahma/alpaca-cleaned",
        "Data",
        "Hub id; or path or http(s) address of a JSON, JSONL, CSV, TSV, Parquet, Arrow or text file, also zipped or gzipped; or a folder of them; or several, as `[{path: a, share: 0.5}, {path: b}]`; `demo` is the embedded toy task.",
        front=True,
        suggestions=DATASETS,
    )
    dataset_config: str | None = setting(None, "Data", "Configuration of a Hub dataset that has several.")
    split: str = setting(
        "train", "Data", "Split to train on, or a part of it such as `train[:2000]`.", min_length=1, front=True
    )
    columns: dict[str, str] = setting(
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

    batch_size: RowsAtOnce = setting(
        "auto", "Training", "Rows per forward pass; `auto` takes as many of a step's rows as the GPU is found to have room for.",
        front=True, suggestions=("auto",),
    )  # fmt: skip
    gradient_accumulation: int = setting(
        8, "Training", "Forward passes per optimizer step; with `batch_size: auto` rows per step. By default as many as bring the rows of a step nearest to the default's.", ge=1, le=1024, front=True
    )  # fmt: skip
    epochs: float = setting(
        1.0, "Training", "Passes over the rows; counts when `max_steps` is 0.", gt=0, le=100, front=True
    )
    max_steps: int = setting(
        60, "Training", "Optimizer steps; 0 trains for `epochs` instead.", ge=0, le=10_000_000, front=True
    )
    learning_rate: float = setting(2e-4, "Training", "Peak learning rate.", gt=0, le=0.1, front=True)
    precision: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Training", "`auto` takes bfloat16 where the GPU has it, else float16; without a GPU it is float32."
    )
    scheduler: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "warmup_stable_decay"
    ] = setting(
        "linear", "Training", "How the learning rate changes after the warm-up; `warmup_stable_decay` keeps it until the last fifth of the steps (arXiv 2405.18392)."
    )  # fmt: skip
    scheduler_cycles: int = setting(
        3, "Training", "Falls of the learning rate in `cosine_with_restarts` (arXiv 1608.03983); counts for it alone.", ge=2, le=100
    )  # fmt: skip
    warmup: float = setting(
        5, "Training", "Warm-up in steps, or as a share of all steps when below 1.", ge=0, le=100_000
    )
    optimizer: Literal[
        "adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused", "adafactor", "lion", "rmsprop", "sgd"
    ] = setting(
        "adamw_8bit", "Training", "The 8-bit ones need a GPU; without one `adamw_torch_fused` takes their place. `adafactor` keeps the least in memory (arXiv 1804.04235); `lion` wants a third to a tenth of AdamW's learning rate (arXiv 2302.06675)."
    )  # fmt: skip
    lora_plus_ratio: float = setting(
        1.0, "Training", "How many times A's learning rate LoRA's B gets (LoRA+, arXiv 2402.12354): 16 learns faster there, at half the learning rate; 1 is off.", ge=1, le=100, title="LoRA+ ratio"
    )  # fmt: skip
    weight_decay: float = setting(0.01, "Training", "Weight decay.", ge=0, le=1)
    max_grad_norm: float = setting(1.0, "Training", "Gradients are clipped to this norm.", gt=0, le=1000)
    seed: int = setting(3407, "Training", "Seed of the split, the shuffling and the adapter.", ge=0, lt=2**31)
    save_steps: int = setting(
        20, "Training", "A checkpoint to go on from is written every so many steps.", ge=1, le=1_000_000
    )
    save_total: int = setting(
        2, "Training", "Checkpoints that are kept, the newest ones; with 1 there is none to fall back on where a disk loses some of it.", ge=1, le=100
    )  # fmt: skip
    eval_answers: int = setting(
        8, "Training", "Held-out questions that a new training answers before and after.", ge=0, le=1000
    )
    metric: Literal["exact", "contains", "regex", "number", "json", "rouge"] = setting(
        "exact", "Training", "What such an answer is scored by: the same text, the expected one in it, its pattern found, the same last number, the same JSON, or shared words (ROUGE-L F1)."
    )  # fmt: skip
    max_new_tokens: int = setting(256, "Training", "Longest answer in tokens when answers are compared.", ge=1, le=8192)

    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = setting(
        [], "Training", "Trackers that are told what the training logs, such as `[tensorboard]`, which then lies in the run folder; their keys come from the environment.", title="Trackers"
    )  # fmt: skip

    merged: bool = setting(
        False, "Export", "Also write the merged model as 16-bit safetensors.", title="Merged model", front=True
    )
    quantizations: list[
        Literal["q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "bf16", "f16", "adapter"]
    ] = setting(
        ["q8_0"],
        "Export",
        "GGUF files to make, the first one for Ollama; `adapter` is the adapter alone, small; an empty list makes none.",
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
        pattern=FILE_NAME,
    )
    storage: str = setting(
        "runs", "Publish", "Folder that holds the run folders; `hub` is `runs` with `hub_checkpoints`.", min_length=1
    )
    repo: str = setting(
        "",
        "Publish",
        "Hub repository `name` or `owner/name`; the run name when empty.",
        pattern=REPOSITORY,
        front=True,
    )
    card_rows: bool = setting(
        True, "Publish", "Show some held-out rows in the card, with the answers to them; off for data that is not to be public."
    )  # fmt: skip
    private: bool = setting(False, "Publish", "Make the repositories private.", front=True)
    one_repo: bool = setting(
        False, "Publish", "Put the GGUF files beside the model; otherwise they get a repository of their own, `<repo>-GGUF`.", title="One repository"
    )  # fmt: skip
    publish_to_hub: bool = setting(
        False, "Publish", "Upload the publish folder; needs a token with write access.", front=True
    )
    hub_checkpoints: bool = setting(
        False, "Publish", "Keep checkpoints and all that a lost run needs to go on in a private Hub repository while it trains; `storage: hub` means this.", title="Checkpoints on the Hub"
    )  # fmt: skip
    keep_hub_checkpoints: bool = setting(
        False, "Publish", "Leave that repository there when the run is published; otherwise it is deleted.", title="Keep them there"
    )  # fmt: skip
    publish_unverified: bool = setting(False, "Publish", "Upload even when the GGUF failed its verification.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if values.get("storage") == ON_THE_HUB:
            values = {**values, "storage": cls.model_fields["storage"].default, "hub_checkpoints": True}
        return {**cls.defaults_beside(values), **values}

    @classmethod
    def defaults_beside(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults that depend on these values, for settings that may not be among them."""
        defaults = cls.brought_along(values)
        size = values.get("batch_size")
        with contextlib.suppress(ValidationError):
            size = size if size == AUTO else TypeAdapter(int).validate_python(size)
        if size == AUTO or (isinstance(size, int) and size > 0):  # as many rows a step as by default
            usual = {name: cls.model_fields[name].default for name in ("batch_size", "gradient_accumulation")} | defaults  # fmt: skip
            rows = (1 if usual["batch_size"] == AUTO else usual["batch_size"]) * usual["gradient_accumulation"]
            defaults["gradient_accumulation"] = max(1, rows // (1 if size == AUTO else size))
        return defaults

    @classmethod
    def brought_along(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults that these values bring along for settings that are not among them."""
        return dict(cls.DEMO_DEFAULTS) if values.get("model") == "demo" else {}

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        kinds = [get_args(each)[0] if get_origin(each) is Annotated else each for each in get_args(kind) or [kind]]
        return no_truth(value, kinds)

    @field_validator("model", "dataset", mode="before")
    @classmethod
    def _take_the_id_from_a_page(cls, value: Any) -> Any:
        if isinstance(value, list):
            parts = [{"path": part} if isinstance(part, str) else part for part in value]
            return [
                {**part, "path": cls._take_the_id_from_a_page(part["path"])}
                if isinstance(part, dict) and "path" in part
                else part
                for part in parts
            ]
        page = HUB_PAGE.fullmatch(value.strip()) if isinstance(value, str) else None
        return page[1] if page else value

    @field_validator("target_modules")
    @classmethod
    def _names_of_layers(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("give `all-linear`, `attention`, or at least one name of a layer")
        return [value] if isinstance(value, str) and value not in ("all-linear", "attention") else value

    @field_validator("dataset")
    @classmethod
    def _some_parts(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("give at least one dataset")
        return value

    @property
    def parts(self) -> list[Part]:
        """The datasets, each with all that a part can tell."""
        given = [{"path": self.dataset}] if isinstance(self.dataset, str) else self.dataset
        return [{"share": 1.0, "split": self.split, "columns": getattr(self, "columns", {}), **part} for part in given]

    @property
    def dataset_name(self) -> str:
        """What the dataset is called in messages: its id or path, or those of all parts; of an address without what may be a key."""
        return " + ".join(
            public_address(part["path"]) if is_address(part["path"]) else part["path"] for part in self.parts
        )

    def of_part(self, part: Part) -> Self:
        """These settings for one of several datasets alone."""
        return type(self).model_validate(
            self.model_dump() | {"dataset": part["path"], "split": part["split"], "columns": part["columns"]}
        )

    @field_validator("columns", mode="before", check_fields=False)
    @classmethod
    def _either_way_round(cls, value: Any) -> Any:
        """Column to meaning, as documented, or the other way round where only that can be meant; a meaning may have its common name."""
        if not isinstance(value, Mapping):
            return value
        if not all(isinstance(name, str) for pair in value.items() for name in pair):
            return value
        meanings = get_args(get_args(cls.model_fields["columns"].annotation)[1])
        named = {name: COMMON_NAMES.get(name, name) for name in (*value, *value.values()) if isinstance(name, str)}

        def turned(column: str, meaning: str) -> bool | None:
            """Whether the meaning stands first; None where either may be meant. A meaning as it is called here is surer than a common name for it."""
            for known in (lambda name: named[name] in meanings, lambda name: name in meanings):
                if known(column) != known(meaning):
                    return known(column)
            return None

        ways = [turned(*pair) for pair in value.items()]
        both = True in ways  # then what may be meant either way is meant as the others
        given = [
            pair[::-1] if (both if way is None else way) else pair
            for way, pair in zip(ways, value.items(), strict=True)
        ]
        pairs = [(column, named[meaning]) for column, meaning in given]
        for column, meaning in given:
            if meaning not in meanings:
                refuse_misspelt_meaning(column, meaning, meanings)
        if len(dict(pairs)) < len(pairs):
            raise ValueError("it gives one column two meanings; give each column once")
        return dict(pairs)

    @field_validator("run_name", "repo", mode="before")
    @classmethod
    def _empty_is_none_given(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("model", "dataset", "storage", "adapter", "sixteen_bit_model")
    @classmethod
    def _could_be_a_path(cls, value: Any) -> Any:
        """What no disk could have as a path is told here, not by the first that opens it."""
        for path in [part["path"] for part in value] if isinstance(value, list) else [value or ""]:
            if "\0" in path or any(len(name.encode()) > LONGEST_FILE_NAME for name in path.split("/")):
                raise ValueError(
                    f"a file or folder has a name of at most {LONGEST_FILE_NAME} bytes, without the character 0"
                )
            if path.startswith("~") and not is_home(path):
                raise ValueError("there is no such user on this machine")
        return value

    @field_validator("chat_template")
    @classmethod
    def _template_or_its_place(cls, value: str) -> str:
        """One of our names, Jinja text, or what looks like a path; whether it is there and renders is for the checks."""
        if value in CHAT_TEMPLATE_NAMES or is_jinja(value) or "/" in value or "." in value:
            return value
        raise ValueError(f"give {', '.join(CHAT_TEMPLATE_NAMES)}, the path of a Jinja file, or Jinja text")

    @field_validator("quantizations", "modules_to_save", "report_to", mode="before")
    @classmethod
    def _lower_case_each_once(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value  # one name
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            return value
        return list(dict.fromkeys(v.lower() if isinstance(v, str) else v for v in value))

    @model_validator(mode="after")
    def _score_what_is_answered(self) -> Settings:
        if self.metric != "exact" and not self.eval_answers:
            raise ValueError("metric scores held-out answers, and eval_answers is 0; set it to how many are to be scored, or leave metric out")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _name_the_run(self) -> Settings:
        if not self.run_name:
            object.__setattr__(self, "run_name", self._default_run_name())
        return self

    def _default_run_name(self) -> str:
        path = self.parts[0]["path"]
        dataset = public_address(path) if is_address(path) else path.partition("?")[0]
        model, dataset = (
            re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).stem if "/" not in name else name.rsplit("/", 1)[1]).strip("-.")
            for name in (self.model.replace("\\", "/"), dataset.replace("\\", "/").rstrip("/"))
        )
        model = re.sub(r"(-unsloth)?-bnb-4bit$", "", model)
        dataset = re.sub(rf"({'|'.join(map(re.escape, DATA_SUFFIXES))})+$", "", dataset)
        others = [] if len(self.parts) == 1 else [f"and-{len(self.parts) - 1}-more"]
        return "-".join(dict.fromkeys([model[:45] or "model", dataset[:40] or "data", *others, self.road]))

    @classmethod
    def other_defaults(cls) -> dict[str, dict[str, Any]]:
        """What other values a setting brings along where they are not set, by that setting, such as `model: demo`."""
        return {"model: demo": cls.DEMO_DEFAULTS}

    def reasons(self) -> list[str]:
        """What was chosen for the user, and why, and what counts for nothing beside the others, a line each."""
        idle = []
        if self.max_steps and self.epochs != type(self).model_fields["epochs"].default:
            idle.append(
                f"epochs: {self.epochs:g} does not count, as `max_steps` is {self.max_steps}; set `max_steps: 0` to train for epochs"
            )
        cycles = type(self).model_fields["scheduler_cycles"].default
        if self.scheduler != "cosine_with_restarts" and self.scheduler_cycles != cycles:
            idle.append(f"scheduler_cycles: {self.scheduler_cycles} does not count, as `scheduler` is {self.scheduler}")
        return idle

    def passed_means(self) -> str:
        """What a passed proof of the GGUF says and what it does not say: of an adapter alone, and where the demo's base is trained on other rows."""
        alone = (
            "the adapter's file holds what was trained, matrix by matrix; it was not run, so what it answers on a GGUF of the base, "
            "whose rounding comes on top, is not proven"
        )
        model = "the GGUF is the trained model, within its type's rounding"
        if set(self.quantizations) == {"adapter"}:
            model = alone
        elif "adapter" in self.quantizations:
            model = f"{model} ({alone})"
        if self.model == "demo" and self.dataset != "demo":
            toy = "the demo's toy, which knows nothing but its own forest: expect nonsense of it on other rows"
            return f"{model}; {'the base' if model is alone else 'that model'} is {toy}"
        return f"{model}; how good {'the trained' if model is alone else 'that'} model is, the held-out figures tell"

    def warmup_steps(self, steps: int) -> int:
        """The warm-up of a training of so many steps, as transformers counts it; half of the steps where else none had the full learning rate.

        >>> [SFTSettings(warmup=warmup).warmup_steps(steps) for warmup, steps in ((5, 60), (0.1, 60), (5, 5), (0.1, 1))]
        [5, 6, 2, 0]
        """
        asked = self._warmup_asked(steps)
        return asked if asked < steps else steps // 2

    def _warmup_asked(self, steps: int) -> int:
        if self.scheduler == "constant":  # which has none
            return 0
        return int(self.warmup) if self.warmup >= 1 else math.ceil(steps * self.warmup)

    def shorter_warmup(self, steps: int) -> str | None:
        """What is said where the warm-up is shorter than it was asked to be; None where it is not."""
        asked, taken = self._warmup_asked(steps), self.warmup_steps(steps)
        if asked == taken:
            return None
        return f"the warm-up is {taken} instead of {asked} step{'' if asked == 1 else 's'}: in {steps} there would be none at the full learning rate"

    @property
    def rows_per_step(self) -> int:
        """Rows that an optimizer step of one process learns from."""
        return self.gradient_accumulation * (1 if self.batch_size == AUTO else self.batch_size)

    @property
    def is_batch_free(self) -> bool:
        """Whether a trial may choose how many rows go at once; not where a step would learn otherwise by it, as TRL's loss of `sft_weight`, a mean over each batch, lets it."""
        return self.batch_size == AUTO and not getattr(self, "sft_weight", 0)

    @property
    def rows_at_once(self) -> int:
        """Rows in a forward pass: `batch_size`; for `auto` what a trial may change, AT_FIRST of them, or one where a step's rows are odd."""
        if self.batch_size != AUTO:
            return self.batch_size
        return AT_FIRST if self.rows_per_step % AT_FIRST == 0 else 1

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
            defaults["run_name"], beside = self._default_run_name(), self.defaults_beside(values)
            values = {
                name: value
                for name, value in values.items()
                if value != defaults[name] or value != beside.get(name, value)
            }
        return yaml_text(values)

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
        options: Container[str] = (),
    ) -> Settings:
        """Defaults < `source` < environment `AUTOSLOTH_<FIELD>` < `overrides`, checked.

        source: a YAML or JSON file, or the values of a notebook cell; overrides: from `--set`, or, those named in `options`, from an option of their own.
        Raises SettingsError, which names every wrong field, what was given, what is allowed, and where it was given.
        """
        refuse_unknown_variables(name for road in ROADS.values() for name in road.model_fields)
        values = source if isinstance(source, Mapping) else read_settings_file(source) if source else {}
        outer, overrides = environment_values(cls), overrides or {}
        sources = {name: f"the environment variable {variable(name)}" for name in outer}
        sources |= {name: f"`{flag(name)}`" if name in options else f"`--set {name}=...`" for name in overrides}
        told = str(source) if isinstance(source, (str, Path)) and source else "the settings"
        return cls.from_values({**values, **outer, **overrides}, told, sources)

    @classmethod
    def from_values(cls, given: Mapping[str, Any], source: str, sources: Mapping[str, str] | None = None) -> Settings:
        """Settings from a mapping, checked; source: what an error tells the user to correct; sources: the same by field, where it is another."""
        road = given.get("road", cls.road)
        if road not in FAMILY:
            raise SettingsError(f"`road` is {road!r} in {source}.", f"Write {', '.join(FAMILY)}, or leave it out.")
        if road != cls.road:
            raise SettingsError(
                f"The settings are of `autosloth {road}`, not of `autosloth {cls.road}` (`road` in {source}).",
                f"Use `autosloth {road}` for them.",
            )
        given = {name: value for name, value in given.items() if name != "road"}
        refuse_unknown(given, cls, settings_elsewhere(cls))
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError(*explain(error, source, sources)) from None


class LossSettings(Settings):
    """What the roads share that train once by a loss, which held-out rows have as well; self-play has rounds, and chooses among them."""

    init_lora_weights: Literal["default", "pissa", "olora"] = setting(
        "default", "Model", "Where a fresh adapter starts: at nothing, or in the base's strongest directions (`pissa`, arXiv 2404.02948) or orthogonal ones (`olora`, arXiv 2406.01775), which can learn faster; a base in 16 bit only.", title="LoRA start"
    )  # fmt: skip
    eval_steps: EvalSteps = setting(
        AUTO, "Training", "The held-out loss is measured every so many steps, on as many rows as take 5 % of the time; `auto` does so about ten times, 0 never.",
        suggestions=(AUTO,),
    )  # fmt: skip
    keep: Literal["best", "last"] = setting(
        "best", "Training", "Export the weights that had the lowest held-out loss while it trained, or those of the last step.", title="Weights to keep"
    )  # fmt: skip
    patience: int = setting(
        0, "Training", "Stop where the held-out loss has not fallen for so many measurements; 0 is off.", ge=0, le=1000
    )

    @model_validator(mode="after")
    def _start_where_it_can(self) -> LossSettings:
        """An adapter that starts inside the base takes a part of each weight away: of weights in 4 bit the rest would be rounded anew, and DoRA's lengths are of the whole weight."""
        start = self.init_lora_weights
        if start != "default":
            if self.load_in_4bit:
                raise ValueError(
                    f"`init_lora_weights: {start}` needs the base in 16 bit; set `load_in_4bit: false`, or `init_lora_weights: default`"
                )
            if self.adapter:
                raise ValueError(
                    f"`init_lora_weights: {start}` is for a fresh adapter, and `adapter` is {self.adapter}; set `adapter: null`, or `init_lora_weights: default`"
                )
            for name in ("use_dora", "modules_to_save"):
                if getattr(self, name):
                    raise ValueError(f"`init_lora_weights: {start}` cannot be had with `{name}`; leave one of them out")
        return self

    @model_validator(mode="after")
    def _patience_needs_measurements(self) -> LossSettings:
        if self.patience and not self.eval_steps:
            raise ValueError("patience counts measurements of the held-out loss; set eval_steps to `auto` or a number, or patience to 0")  # fmt: skip
        return self


class SFTSettings(LossSettings):
    """Supervised fine-tuning.

    The defaults are the reference run on a free T4 (13.6 of 15.0 GB VRAM, 8.5 GB RAM): 60 steps of 8 rows.
    """

    road: ClassVar[str] = "sft"
    DEMO_DEFAULTS: ClassVar[dict[str, Any]] = {
        **{"batch_size": 16, "gradient_accumulation": 1, "max_steps": 150, "learning_rate": 2e-3, "scheduler": "cosine"},
        **{"warmup": 10, "optimizer": "adamw_torch_fused", "load_in_4bit": False, "max_length": 512, "save_steps": 50},
        **{"eval_answers": 64, "max_new_tokens": 24, "merged": True},
    }  # fmt: skip

    columns: dict[
        str, Literal["instruction", "input", "prompt", "completion", "messages", "system", "tools", "text", "ignore"]
    ] = setting(
        {}, "Data", "What other columns mean, for example `{frage: prompt, antwort: completion}`.", title="Columns"
    )
    packing: bool = setting(False, "Training", "Put several short rows into one sequence (needs a GPU).")
    neftune_alpha: float = setting(
        0.0, "Training", "Noise on the embeddings while training (NEFTune, arXiv 2310.05914, by 5 to 15): freer and longer answers from few chats; no help to facts and sums; 0 is off.", ge=0, le=100, title="NEFTune alpha"
    )  # fmt: skip

    @model_validator(mode="after")
    def _noise_by_row(self) -> SFTSettings:
        if self.neftune_alpha and self.packing:
            raise ValueError(
                "`neftune_alpha` is a noise by the length of a row, and `packing` puts several rows into one; set one of them to 0 or false"
            )
        return self


class DPOSettings(LossSettings):
    """Preference tuning by pairs of a better and a worse answer (DPO, arXiv 2305.18290, and its kin).

    The defaults are the reference run on an A100: a Zephyr-like base on UltraFeedback; `profile` suits them to a T4.
    """

    road: ClassVar[str] = "dpo"
    DEMO_DEFAULTS: ClassVar[dict[str, Any]] = {
        **{"adapter": "demo", "batch_size": 16, "gradient_accumulation": 1, "max_steps": 40, "learning_rate": 3e-4},
        **{"scheduler": "cosine", "warmup": 5, "optimizer": "adamw_torch_fused", "load_in_4bit": False},
        **{"lora_r": 16, "lora_alpha": 16, "max_length": 256, "save_steps": 20},
        **{"eval_answers": 32, "max_new_tokens": 48, "merged": True},
    }
    # The reference is the adapter as it was: its second pass needs no more memory than the first, which
    # has gradients, and reference answers computed ahead would be lost with the runtime; they pay from the second epoch on.
    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {
        "a100": {"max_length": 1024, "precision": "bfloat16", "precompute_reference": False},
        "t4": {"max_length": 512, "precision": "float16", "precompute_reference": False},
    }  # fmt: skip

    model: str = otherwise("model", "unsloth/zephyr-sft-bnb-4bit", suggestions=DPO_MODELS)
    max_length: int = otherwise("max_length", 1024)
    lora_r: int = otherwise("lora_r", 64)
    lora_alpha: int = otherwise("lora_alpha", 64)
    adapter: str | None = otherwise("adapter", None, front=True)
    dataset: OneOrMore = otherwise("dataset", ULTRAFEEDBACK, suggestions=DPO_DATASETS)
    columns: dict[
        str, Literal["instruction", "input", "prompt", "messages", "system", "tools", "chosen", "rejected", "ignore"]
    ] = setting(
        {}, "Data", "What other columns mean, for example `{frage: prompt, gut: chosen, schlecht: rejected}`.", title="Columns"
    )  # fmt: skip
    pairs: Literal["best", "all"] = setting(
        "best",
        "Data",
        "Of several answers with ranks, scores or thumbs: the best with the worst, or each with each that is worse.",
    )
    profile: Literal["auto", "a100", "t4"] = setting(
        "auto",
        "Training",
        "The defaults of length and precision for this GPU; `auto` looks at the one that is here.",
        front=True,
    )
    gradient_accumulation: int = otherwise("gradient_accumulation", 16)
    learning_rate: float = otherwise("learning_rate", 5e-6)
    warmup: float = otherwise("warmup", 0.1)
    beta: float = setting(
        0.1, "Training", "How strongly the model is held to its reference; lower lets it move further.", gt=0, le=10, front=True
    )  # fmt: skip
    loss: Literal["sigmoid", "hinge", "ipo", "robust", "sppo_hard", "apo_zero"] = setting(
        "sigmoid",
        "Training",
        "`sigmoid` is DPO's; the others are told apart in TRL's documentation of DPO.",
        front=True,
    )
    sft_weight: float = setting(
        0.0, "Training", "Weight of the plain loss of the better answer beside it, which keeps it likely; 0 is off.", ge=0, le=100
    )  # fmt: skip
    label_smoothing: float = setting(
        0.0, "Training", "Share of pairs that are taken to be the wrong way round; for the loss `robust` only.", ge=0, lt=0.5
    )  # fmt: skip
    precompute_reference: bool = setting(
        False, "Training", "Compute the reference's answers once ahead: quicker from the second epoch on, begun anew by each resume."
    )  # fmt: skip

    @classmethod
    def brought_along(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        profile = dict(cls.PROFILES.get(str(values.get("profile", "auto")), {}))
        if not profile:  # whatever GPU it is, it knows its precision
            profile = {**cls.PROFILES[fitting_profile()[0]], "precision": "auto"}
        splits = ULTRAFEEDBACK_SPLITS if values.get("dataset", ULTRAFEEDBACK) == ULTRAFEEDBACK else {}
        return {**profile, **splits, **super().brought_along(values)}

    @model_validator(mode="after")
    def _smooth_what_can_be(self) -> DPOSettings:
        if self.label_smoothing and self.loss != "robust":
            raise ValueError("label_smoothing counts for `loss: robust` only; set that, or label_smoothing to 0")
        return self

    @classmethod
    def other_defaults(cls) -> dict[str, dict[str, Any]]:
        return {f"profile: {name}": values for name, values in cls.PROFILES.items()} | super().other_defaults()

    def reasons(self) -> list[str]:
        name, reason = fitting_profile() if self.profile == "auto" else (self.profile, "as set")
        taken = {field: getattr(self, field) for field in self.PROFILES[name]}
        profile = f"profile: {name} ({reason}): {', '.join(f'{field} {value}' for field, value in taken.items())}"
        return [profile, *super().reasons()]


class SPINSettings(Settings):
    """Self-play fine-tuning (SPIN, arXiv 2401.01335): rounds in which a model learns to tell the dataset's answers from its own last ones."""

    road: ClassVar[str] = "spin"
    DEMO_DEFAULTS: ClassVar[dict[str, Any]] = {
        **{"adapter": "demo", "rounds": 2, "prompts_per_round": 144, "batch_size": 16, "gradient_accumulation": 1},
        **{"learning_rate": 3e-4, "last_learning_rate": None, "last_beta": None, "warmup": 2, "epochs": 1.0},
        **{"optimizer": "adamw_torch_fused", "load_in_4bit": False, "lora_r": 16, "lora_alpha": 16, "max_length": 256},
        **{"save_steps": 3, "eval_answers": 32, "max_new_tokens": 48, "merged": True},
    }
    # paper: section 6.1 and appendix B.1 of arXiv 2401.01335. t4: what a free T4 can do in an evening; fresh prompts each round.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "t4": {
            **{"rounds": 3, "prompts_per_round": 1000, "mix_previous": False, "epochs": 1.0, "learning_rate": 5e-6},
            **{"last_learning_rate": None, "last_beta": None, "optimizer": "adamw_8bit", "warmup": 0.1},
            **{"batch_size": "auto", "gradient_accumulation": 16, "max_length": 768},
        },
        "paper": {
            **{"rounds": 4, "prompts_per_round": 50_000, "mix_previous": True, "epochs": 2.0, "learning_rate": 5e-7},
            **{"last_learning_rate": 1e-7, "last_beta": 5.0, "optimizer": "rmsprop", "warmup": 0.1},
            **{"batch_size": 8, "gradient_accumulation": 8, "max_length": 2048},
        },
    }

    model: str = otherwise("model", "unsloth/zephyr-sft-bnb-4bit", suggestions=DPO_MODELS)
    adapter: str | None = otherwise("adapter", None, front=True)
    dataset: OneOrMore = otherwise("dataset", ULTRACHAT, suggestions=SPIN_DATASETS)
    columns: dict[
        str, Literal["instruction", "input", "prompt", "completion", "messages", "system", "tools", "ignore"]
    ] = setting(
        {}, "Data", "What other columns mean, for example `{frage: prompt, antwort: completion}`.", title="Columns"
    )
    preset: Literal["t4", "paper"] = setting(
        "t4", "Training", "`t4` for a free T4, `paper` as the authors of SPIN did it; each value can be set otherwise.", front=True
    )  # fmt: skip
    rounds: int = setting(
        3, "Training", "Rounds of self-play; most gain comes from the first.", ge=1, le=10, front=True
    )
    prompts_per_round: int = setting(
        1000, "Training", "Prompts that the model answers in each round.", ge=2, le=1_000_000, front=True
    )
    gradient_accumulation: int = otherwise("gradient_accumulation", 16)
    max_length: int = otherwise("max_length", 768)
    max_steps: int = otherwise("max_steps", 0)
    learning_rate: float = otherwise("learning_rate", 5e-6)
    last_learning_rate: float | None = setting(
        None, "Training", "Peak learning rate of the third round and later; empty keeps it.", gt=0, le=0.1
    )
    warmup: float = otherwise("warmup", 0.1)
    beta: float = setting(
        0.1, "Training", "Lambda of the paper: how strongly a round is held to the model it began with.", gt=0, le=10, front=True
    )  # fmt: skip
    last_beta: float | None = setting(None, "Training", "Beta of the last round; empty keeps it.", gt=0, le=10)
    loss: Literal["sigmoid", "hinge"] = setting("sigmoid", "Training", "`sigmoid` is the paper's logistic loss.")
    sft_weight: float = setting(
        0.0, "Training", "Weight of the plain loss of the dataset's answers beside it; 0 is off.", ge=0, le=100
    )
    mix_previous: bool = setting(False, "Training", "Learn from the pairs of the round before once more.")
    sft_arm: bool = setting(
        False, "Training", "For comparison, also train the start by as many steps of plain SFT; its figures go beside the rounds.", title="SFT arm"
    )  # fmt: skip
    sft_steps: int = setting(
        0, "Training", "Steps of plain SFT on the same dataset before the rounds, for a base that cannot answer yet; 0 is off.", ge=0, le=1_000_000, title="SFT steps first"
    )  # fmt: skip
    sft_learning_rate: float = setting(
        2e-4, "Training", "Peak learning rate of the SFT before the rounds.", gt=0, le=0.1, title="SFT learning rate"
    )
    stop_early: bool = setting(
        True, "Training", "End the rounds where the held-out figures say that another would not help."
    )
    fast_inference: bool = setting(
        False, "Training", "Answer with vLLM, where it is installed beside Unsloth; it shares the GPU's memory with the training.", title="vLLM"
    )  # fmt: skip
    generation_batch: int = setting(32, "Training", "Answers that are generated at once.", ge=1, le=1024)

    @classmethod
    def brought_along(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        preset = cls.PRESETS.get(str(values.get("preset", "t4")), {})
        splits = ULTRACHAT_SPLITS if values.get("dataset", ULTRACHAT) == ULTRACHAT else {}
        return {**preset, **splits, **super().brought_along(values)}

    @classmethod
    def other_defaults(cls) -> dict[str, dict[str, Any]]:
        return {f"preset: {name}": values for name, values in cls.PRESETS.items()} | super().other_defaults()

    def of_round(self, number: int) -> SPINSettings:
        """The settings of a round, counted from 0, its own learning rate and beta in place."""
        late, last = number >= 2 and self.last_learning_rate, number == self.rounds - 1 and self.last_beta
        changed = {"learning_rate": late or self.learning_rate, "beta": last or self.beta}
        return self.model_copy(update=changed)


def settings_elsewhere(road: type[Settings]) -> dict[str, str]:
    """What is to be said of each setting that this road has not and others have.

    >>> settings_elsewhere(SPINSettings)["patience"], settings_elsewhere(SFTSettings)["rounds"]
    ('a setting of `autosloth sft` and `autosloth dpo`, not of `autosloth spin`', 'a setting of `autosloth spin`, not of `autosloth sft`')
    """
    having = {
        name: [other.road for other in ROADS.values() if name in other.model_fields]
        for other in ROADS.values()
        for name in other.model_fields
        if name not in road.model_fields
    }
    return {
        name: f"a setting of {' and '.join(f'`autosloth {each}`' for each in roads)}, not of `autosloth {road.road}`"
        for name, roads in having.items()
    }


@functools.cache
def fitting_profile() -> tuple[str, str]:
    """The name of the profile for the GPU that is here, and the reason."""
    gpu = first_gpu()
    if gpu is None:
        return "t4", "no GPU is here yet; a T4 is what the free tier has"
    return ("a100" if gpu.memory_gb >= A100_GB else "t4"), f"{gpu.name} with {gpu.memory_gb:.0f} GB"


ROADS: dict[str, type[Settings]] = {road.road: road for road in (SFTSettings, DPOSettings, SPINSettings)}
