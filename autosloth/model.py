"""The model: the only file that imports unsloth. Loading, precision, the LoRA adapter, and the one way to a prompt."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import TOKENIZER_FILES, model_errors, model_source, tokenizer_files
from .errors import ModelError
from .fetch import first_lines
from .run import cache_dir, say
from .settings import SFTSettings

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def start_engine() -> Any:
    """Import unsloth, before trl, transformers and peft, which it patches; hold down its side effects.

    Without these, Unsloth 2026.10 compiles into the working directory, pings a statistics repository at
    each load, and may call apt-get in its own exports.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled_cache"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
    for chatty in (
        "torchao",
        "bitsandbytes",
        "torch.utils._pytree",
    ):  # they warn of kernels that a machine without a GPU does not miss
        logging.getLogger(chatty).setLevel(logging.ERROR)
    import unsloth
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    return unsloth


def choose_precision() -> tuple[str, str]:
    """The name of the torch dtype to train in, and the reason for it."""
    import torch

    if not torch.cuda.is_available():
        return "float32", "no GPU"
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", f"{name} has bf16"
    return "float16", f"{name} has no bf16"


def load_tokenizer(settings: SFTSettings) -> Any:
    """The base model's tokenizer with the chat template that the settings ask for. Raises ModelError."""
    start_engine()
    from transformers import AutoTokenizer

    source = model_source(settings)
    with model_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_files(source, settings.revision))
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {source} has no fast form or no end token.",
            "Choose a model whose repository has a tokenizer.json.",
        )
    if settings.chat_template != "auto" or not tokenizer.chat_template:
        tokenizer.chat_template = named_template(
            "alpaca" if settings.chat_template == "auto" else settings.chat_template
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def named_template(name: str) -> str:
    """One of our chat templates; none needs tokens that the tokenizer may lack."""
    return (Path(__file__).parent / "templates" / "chat" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


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
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer_next)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template meets types that it was not made for
        roles = " > ".join(message["role"] for message in messages)
        raise ModelError(
            f"The model's chat template refuses a chat of {roles} ({first_lines(error)}).",
            "Set `chat_template: alpaca`, or leave such rows out of the dataset.",
        ) from None
    begin = opening(tokenizer)
    return text if text.startswith(begin) else begin + text


@functools.lru_cache(maxsize=8)
def opening(tokenizer: Any) -> str:
    """The BOS token where this tokenizer would begin a text with one, else the empty text."""
    adds = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds else ""


def end_ids(tokenizer: Any, settings: SFTSettings) -> set[int]:
    """The ids that end an answer: the tokenizer's end token and those of the model's generation_config.json."""
    path = tokenizer_files(model_source(settings), settings.revision) / "generation_config.json"
    configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}


def encode_prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict] | None = None) -> list[int]:
    """The token ids that the assistant's answer to these messages goes on from."""
    return tokenizer(
        render_chat(tokenizer, messages, answer_next=True, tools=tools), add_special_tokens=False
    ).input_ids


def save_tokenizer(tokenizer: Any, settings: SFTSettings, folder: Path) -> None:
    """Write the tokenizer as its author published it, with our chat template.

    `save_pretrained` of transformers 5 drops `tokenizer.model` and `added_tokens_decoder`, without which
    the GGUF converter makes a file that tokenises differently; so the original files are copied.
    """
    source = tokenizer_files(model_source(settings), settings.revision)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    config.setdefault("pad_token", tokenizer.pad_token)
    if not config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = {
            str(token_id): described(token) for token_id, token in tokenizer.added_tokens_decoder.items()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def described(token: Any) -> dict[str, Any]:
    """An added token as tokenizer_config.json holds it."""
    return {key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}


def load_model(settings: SFTSettings) -> Any:
    """The base model, in 4 bit where asked for and possible, with a fresh LoRA adapter on all linear layers. Raises ModelError."""
    unsloth = start_engine()
    import torch

    source, (dtype, reason) = model_source(settings), choose_precision()
    say(f"precision: {dtype} ({reason})")
    with model_errors(source):
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            source,
            revision=settings.revision,
            max_seq_length=settings.max_length,
            dtype=getattr(torch, dtype),
            load_in_4bit=settings.load_in_4bit,
        )
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LINEAR_LAYERS,
        bias="none",
        use_gradient_checkpointing="unsloth" if torch.cuda.is_available() else False,
        random_state=settings.seed,
        max_seq_length=settings.max_length,
    )


@contextlib.contextmanager
def answering(model: Any) -> Iterator[Any]:
    """The model in Unsloth's inference mode, in the precision of training, and back in training mode afterwards."""
    unsloth = start_engine()
    import torch

    unsloth.FastLanguageModel.for_inference(model)
    dtype = getattr(torch, choose_precision()[0])
    try:
        # no_grad, not inference_mode: what a forward pass caches here is used by training later.
        with torch.no_grad(), torch.autocast("cuda", dtype=dtype, enabled=torch.cuda.is_available()):
            yield model
    finally:
        unsloth.FastLanguageModel.for_training(model)
