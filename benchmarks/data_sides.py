"""The sides of `data.py`: rows of Alpaca's form, a JSON file, made ready for training by AutoSloth, by `datasets.map` and by TRL."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from sides import Case, play

LENGTH, SEED = 2048, 3407  # tokens
PROMPT = "<s>### Instruction:\n{}\n\n### Response:\n{}</s>"


# Writes tools, calls and all turns, as models that call tools do.
CALLING = "{% if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ eos_token }}{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"


def begin(folder: str, rows: str, held_out: int, calls: bool = False) -> tuple[Any, Any]:
    """AutoSloth's settings for these rows and the tokenizer of all sides; caches are empty ones. calls: the rows are chats of tool calls."""
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = f"{folder}/compiled"
    from autosloth.models import load_tokenizer
    from autosloth.settings import SFTSettings

    given = {
        "model": "demo",
        "dataset": rows,
        "max_length": LENGTH,
        "eval_fraction": 0.5,
        "eval_rows": held_out,
        "storage": folder,
        "chat_template": CALLING if calls else "auto",
    }
    settings = SFTSettings.load(given)
    return settings, load_tokenizer(settings)


def autosloth(folder: str, rows: str, held_out: int, calls: bool = False) -> Case:
    """What AutoSloth's data stage does, but for its marks and facts."""
    settings, tokenizer = begin(folder, rows, held_out, calls)
    import datasets  # noqa: F401 (imports are not timed)
    import numpy  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from autosloth.data.clean import Findings, draw_parts, streams
    from autosloth.data.encode import encode_rows
    from autosloth.data.prepared import Prepared
    from autosloth.data.stage import describe

    started, found = time.perf_counter(), Findings()
    rows = Prepared(encode_rows(tokenizer, streams(settings, found)[0], settings, found), Path(folder, "rows.tmp"))
    parts = draw_parts(rows.keys, None, settings, found)
    for name, part in zip(("train", "eval"), parts, strict=True):
        rows.take(part, Path(folder, f"{name}.parquet"))
    facts = describe(rows, *parts, found, settings)
    return figures(time.perf_counter() - started, facts["train_rows"], facts["train_tokens"], facts["learnt_tokens"])


def plain(folder: str, rows: str, held_out: int, calls: bool) -> Case:
    """The chats as text by the template and as ids by the tokenizer, each as its library does it; answers are not told apart, nothing is written."""
    _, tokenizer = begin(folder, rows, held_out, calls)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    started, lengths = time.perf_counter(), []
    with open(rows, encoding="utf-8") as file:
        while chats := [json.loads(line) for line in itertools.islice(file, 1000)]:
            texts = [
                tokenizer.apply_chat_template(chat["messages"], tools=chat["tools"], tokenize=False) for chat in chats
            ]
            ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=LENGTH).input_ids
            lengths += map(len, ids)
    return figures(time.perf_counter() - started, len(lengths), sum(lengths), 0)


def two_maps(folder: str, rows: str, held_out: int) -> Case:
    """The format and the tokens by `datasets.map` at its best: all cores for the tokeniser, which Unsloth switches off."""
    _, tokenizer = begin(folder, rows, held_out)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    def tokenise(batch: Case) -> Case:
        return tokenizer(batch["text"], add_special_tokens=False, truncation=True, max_length=LENGTH)

    started = time.perf_counter()
    parts = formatted(rows, held_out)
    parts = parts.map(tokenise, batched=True, remove_columns=parts["train"].column_names)
    return counted(time.perf_counter() - started, parts["train"])


def trl(folder: str, rows: str, held_out: int) -> Case:
    """The format by `datasets.map`, the tokens by TRL."""
    seconds, trainer = trainer_made(folder, rows, held_out)
    return counted(seconds, trainer.train_dataset)


def trl_answers(folder: str, rows: str, held_out: int) -> Case:
    """The same, and then all but the answers masked by Unsloth."""
    seconds, trainer = trainer_made(folder, rows, held_out)
    from unsloth.chat_templates import train_on_responses_only

    started = time.perf_counter()
    marks = {"instruction_part": "### Instruction:\n", "response_part": "### Response:\n"}
    trainer = train_on_responses_only(trainer, **marks, num_proc=os.cpu_count())
    return counted(seconds + time.perf_counter() - started, trainer.train_dataset)


def trainer_made(folder: str, rows: str, held_out: int) -> tuple[float, Any]:
    """TRL's trainer, and the seconds from the file to there without those that the model takes to load."""
    settings, tokenizer = begin(folder, rows, held_out)
    from autosloth.models import load_model

    model = load_model(settings)
    from trl import SFTConfig, SFTTrainer

    texts = {"dataset_text_field": "text", "max_length": LENGTH, "dataset_num_proc": os.cpu_count()}
    args = SFTConfig(output_dir=folder, **texts, report_to=[], bf16=False, fp16=False)
    started = time.perf_counter()
    parts = formatted(rows, held_out)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=parts["train"], eval_dataset=parts["test"], processing_class=tokenizer
    )
    return time.perf_counter() - started, trainer


def formatted(rows: str, held_out: int) -> Any:
    """The rows with a column `text`, in two parts."""
    from datasets import load_dataset

    def as_text(batch: Case) -> Case:
        given = zip(batch["instruction"], batch["input"], batch["output"], strict=True)
        return {"text": [PROMPT.format(asked + ("\n\n" + more if more else ""), said) for asked, more, said in given]}

    every = load_dataset("json", data_files=rows, split="train").map(as_text, batched=True)
    return every.train_test_split(test_size=held_out, seed=SEED)


def counted(seconds: float, rows: Any) -> Case:
    """The figures of rows with `input_ids`, and with `labels` where not all of them are learnt."""
    rows = rows.select_columns([name for name in ("input_ids", "labels") if name in rows.column_names])
    every = [
        (len(ids), sum(label != -100 for label in labels))
        for batch in rows.iter(1000)
        for ids, labels in zip(batch["input_ids"], batch.get("labels", batch["input_ids"]), strict=True)
    ]
    return figures(seconds, len(every), sum(tokens for tokens, _ in every), sum(learnt for _, learnt in every))


def figures(seconds: float, rows: int, tokens: int, learnt: int) -> Case:
    """What a side measured: rows and tokens are those to train on."""
    from autosloth.hardware import peak_ram_gb

    return {
        "seconds": seconds,
        "rows": rows,
        "tokens": int(tokens),
        "learnt": int(learnt),
        "peak_ram_gb": peak_ram_gb(),
    }


if __name__ == "__main__":
    play([autosloth, plain, two_maps, trl, trl_answers])
