"""The data stage: load rows, recognise their form, hold some out, and write them as the trainer gets them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DataError, ModelError
from .load import load_raw
from .model import end_ids, load_tokenizer, render_chat
from .preview import IGNORED, preview
from .run import Run, file_hash, say, stage
from .settings import SFTSettings

# What columns are commonly called; the first name of a role that is present wins.
COLUMN_NAMES = {
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction",),
    "prompt": ("prompt", "question", "query", "input"),
    "completion": ("completion", "answer", "response", "output"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"} | {
    role: role for role in ("system", "user", "assistant")
}
MAX_LISTED = 5


def local_inputs(run: Run) -> list[object]:
    """What identifies a local dataset (its content) and a local model (its files), so that a changed one is prepared again."""
    dataset, model = Path(run.settings.dataset).expanduser(), Path(run.settings.model).expanduser()
    return [
        file_hash(dataset) if dataset.is_file() else None,
        sorted((path.name, path.stat().st_size) for path in model.iterdir()) if model.is_dir() else None,
    ]


@stage(
    "data",
    reads=("model", "revision", "chat_template", "max_length", "dataset", "dataset_config", "split", "columns", "empty_answers", "eval_fraction", "eval_rows", "seed"),
    inputs=local_inputs,
    result=lambda run: [file_hash(run.path("data", f"{name}.parquet")) for name in ("train", "eval")],
    facts=("data",),
    folders=("data",),
)  # fmt: skip
def prepare_data(run: Run) -> None:
    """Write data/train.parquet and data/eval.parquet: `messages`, `input_ids`, `labels` (IGNORED where nothing is learnt). Raises DataError."""
    settings = run.settings
    rows, held_out, dropped = load_rows(settings)
    read = len(rows) + len(held_out) + sum(dropped.values())
    train, held_out, overlapping = split_rows(rows, held_out, settings)
    tokenizer = load_tokenizer(settings)
    train, cut = encode_rows(tokenizer, train, settings.max_length)
    held_out, cut_held_out = encode_rows(tokenizer, held_out, settings.max_length)
    if not train or not held_out:
        raise DataError(
            f"Too few rows of {settings.dataset} have an answer that begins within max_length = {settings.max_length} tokens: {len(train)} to learn from, {len(held_out)} to measure with.",
            "Raise `max_length`, or shorten the questions.",
        )
    refuse_endless(tokenizer, train, settings)
    folder = run.fresh("data")
    write_rows(train, folder / "train.parquet")
    write_rows(held_out, folder / "eval.parquet")
    counts = dropped + overlapping + cut + cut_held_out
    truncated = counts.pop("truncated", 0)
    facts = describe(train, held_out) | {"read": read, "dropped": dict(counts), "truncated": truncated}
    run.record("data", **facts)
    say(f"data: {len(train)} rows to train on, {len(held_out)} held out, of {read} read")
    say(f"data: dropped {dict(counts) or 'none'}; {truncated} cut at {settings.max_length} tokens")
    preview(tokenizer, train[0])


def refuse_endless(tokenizer: Any, rows: list[dict], settings: SFTSettings) -> None:
    """Raises ModelError when the chat template ends answers with a token that nothing takes for an end: the model would never stop."""
    whole = next((row for row in rows if len(row["input_ids"]) < settings.max_length), None)
    last = [label for label in whole["labels"] if label != IGNORED][-1] if whole else None
    if last is not None and last not in end_ids(tokenizer, settings):
        raise ModelError(
            f"The chat template ends answers with {tokenizer.decode([last])!r}, which is no end token of {settings.model}.",
            "Set `chat_template: alpaca`, whose answers end with the model's own end token, or choose a model whose template and end token agree.",
        )


def describe(train: list[dict], held_out: list[dict]) -> dict[str, int]:
    """The facts of encoded rows: how many, and tokens per epoch."""
    return {
        "kept": len(train) + len(held_out),
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "train_tokens": sum(len(row["input_ids"]) for row in train),
        "learnt_tokens": sum(label != IGNORED for row in train for label in row["labels"]),
    }


def load_rows(settings: SFTSettings) -> tuple[list[dict], list[dict], Counter]:
    """Rows as {"messages": [...]}, those that the dataset itself holds out, and the count of rows dropped by reason. Raises DataError."""
    if settings.dataset == "demo":
        from .demo import sft_rows

        train, held_out = sft_rows()
        return (
            [to_messages(row, "instruction") for row in train],
            [to_messages(row, "instruction") for row in held_out],
            Counter(),
        )
    raw = load_raw(settings)
    if not len(raw):
        raise DataError(f"The dataset {settings.dataset} is empty.", "Give one with at least two rows.")
    roles, form = recognise(raw.column_names, settings.columns, settings.dataset)
    rows, empty = [], []
    for number, row in enumerate(raw.select_columns(list(dict.fromkeys(roles.values()))), start=1):
        chat = in_row(number, to_messages, {role: row[column] for role, column in roles.items()}, form)
        (rows.append(chat) if is_complete(chat) else empty.append(number))
    listed = ", ".join(map(str, empty[:MAX_LISTED])) + (", ..." if len(empty) > MAX_LISTED else "")
    what = f"{len(empty)} of {len(raw)} rows of {settings.dataset} have an empty question or answer (rows {listed})"
    if not rows or (empty and settings.empty_answers == "refuse"):
        raise DataError(f"{what}.", "Fill them in" + (", or set `empty_answers: drop`." if rows else "."))
    if empty:
        say(f"data: {what}; dropped")
    return rows, [], Counter(empty_answer=len(empty))


def in_row(number: int, function: Callable, *arguments: Any) -> Any:
    """Call a row's function; a DataError says in which row it arose."""
    try:
        return function(*arguments)
    except DataError as error:
        raise DataError(f"Row {number}: {error.what}", error.todo) from None


def recognise(columns: list[str], mapping: dict[str, str], name: str) -> tuple[dict[str, str], str]:
    """Which column plays which role, and the form: `messages`, `instruction` or `prompt`. Raises DataError.

    >>> recognise(["question", "answer"], {}, "x")
    ({'prompt': 'question', 'completion': 'answer'}, 'prompt')
    """
    unknown = [column for column in mapping if column not in columns]
    if unknown:
        raise DataError(
            f"`columns` names {', '.join(unknown)}, which {name} does not have.", f"It has: {', '.join(columns)}."
        )
    roles = {role: column for column, role in mapping.items()}
    if len(roles) < len(mapping):
        raise DataError(f"`columns` gives two columns of {name} the same meaning.", "Keep one of them.")
    for role, names in COLUMN_NAMES.items():
        present = [column for column in names if column in columns and column not in mapping]
        if present:
            roles.setdefault(role, present[0])
    for form, needed, optional in (
        ("messages", ["messages"], []),
        ("instruction", ["instruction", "completion"], ["input", "system"]),
        ("prompt", ["prompt", "completion"], ["system"]),
    ):
        if all(role in roles for role in needed):
            return {role: roles[role] for role in needed + optional if role in roles}, form
    raise DataError(
        f"The columns of {name} are not recognised: {', '.join(columns)}.",
        "Use instruction/input/output, question/answer, prompt/completion or messages, or say what they mean, for example `columns: {frage: prompt, antwort: completion}`.",
    )


def to_messages(row: dict[str, Any], form: str) -> dict[str, list[dict[str, str]]]:
    """One row as a chat.

    >>> to_messages({"prompt": "2+2?", "completion": "4"}, "prompt")
    {'messages': [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]}
    """
    if form == "messages":
        turns = row["messages"] or []
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            todo = "Give a list of turns such as {role: user, content: ...}."
            raise DataError(f"`messages` holds no list of turns: {str(turns)[:60]}.", todo)
        return {
            "messages": [
                {
                    "role": ROLES.get(str(t.get("role") or t.get("from")), "unknown"),
                    "content": text_of(t.get("content") or t.get("value")),
                }
                for t in turns
            ]
        }
    question = text_of(row.get("instruction") if form == "instruction" else row["prompt"])
    if form == "instruction" and text_of(row.get("input")):
        question = f"{question}\n\n{text_of(row['input'])}"
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_of(row.get("completion", row.get("output")))},
    ]
    system = text_of(row.get("system"))
    return {"messages": ([{"role": "system", "content": system}] if system else []) + chat}


def text_of(value: Any) -> str:
    """A cell as text without blanks around it; an empty cell is the empty text. Raises DataError for what is no text.

    >>> text_of([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}])
    'two parts'
    """
    if isinstance(value, list) and all(isinstance(part, dict) and "text" in part for part in value):
        value = "".join(part["text"] or "" for part in value)
    if isinstance(value, (list, dict)):
        raise DataError(
            f"A cell holds a {type(value).__name__} where text is expected: {str(value)[:60]}.", "Make it text."
        )
    return "" if value is None else str(value).strip()


def is_complete(chat: dict[str, list[dict[str, str]]]) -> bool:
    """Whether every turn says something and the last one is the assistant's answer to a user."""
    turns = chat["messages"]
    roles = [turn["role"] for turn in turns]
    return (
        len(turns) > 1
        and roles[-1] == "assistant"
        and "user" in roles
        and "unknown" not in roles
        and all(turn["content"] for turn in turns)
    )


def split_rows(rows: list[dict], held_out: list[dict], settings: SFTSettings) -> tuple[list[dict], list[dict], Counter]:
    """Rows to train on, rows held out by the seed, and the count of training rows dropped because they stand in both. Raises DataError."""
    if not held_out:
        if len(rows) < 2:
            raise DataError(
                f"The dataset {settings.dataset} has only {len(rows)} usable row.",
                "Give at least two: one is held out to measure with.",
            )
        from datasets import Dataset

        size = max(1, min(settings.eval_rows, round(len(rows) * settings.eval_fraction)))
        parts = Dataset.from_dict({"row": list(range(len(rows)))}).train_test_split(test_size=size, seed=settings.seed)
        rows, held_out = [rows[i] for i in parts["train"]["row"]], [rows[i] for i in parts["test"]["row"]]
    questions = {str(row["messages"]) for row in held_out}
    train = [row for row in rows if str(row["messages"]) not in questions]
    return train, held_out, Counter(also_held_out=len(rows) - len(train))


def encode_rows(tokenizer: Any, rows: list[dict], max_length: int) -> tuple[list[dict], Counter]:
    """Add `input_ids` and `labels` to each row; rows whose whole answer lies beyond max_length are left out and counted."""
    kept, counts = [], Counter()
    for start in range(0, len(rows), 1000):
        batch = rows[start : start + 1000]
        texts = [render_chat(tokenizer, row["messages"]) for row in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for row, text, ids, offsets in zip(batch, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            labels = label_answers(ids, offsets, answer_spans(tokenizer, row["messages"], text))
            if all(label == IGNORED for label in labels[:max_length]):
                counts["answer_beyond_max_length"] += 1
                continue
            counts["truncated"] += len(ids) > max_length
            kept.append({**row, "input_ids": ids[:max_length], "labels": labels[:max_length]})
    return kept, counts


def answer_spans(tokenizer: Any, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
    """Where in the rendered text the assistant's answers stand, end token included, as (start, end) characters.

    An answer begins where the prompt for it ends. Where a template renders earlier turns differently
    once the chat goes on (thinking is cut, say), only the last answer is learnt.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not i:
            continue
        before = render_chat(tokenizer, messages[:i], answer_next=True)
        upto = render_chat(tokenizer, messages[: i + 1])
        if text.startswith(upto):
            spans.append((len(os.path.commonprefix([before, upto])), len(upto.rstrip())))
    return spans


def label_answers(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """The ids where a token begins inside an answer, IGNORED elsewhere.

    >>> label_answers([5, 6, 7], [(0, 2), (2, 4), (4, 5)], [(2, 5)])
    [-100, 6, 7]
    """
    return [
        token if end > begin and any(start <= begin < stop for start, stop in spans) else IGNORED
        for token, (begin, end) in zip(ids, offsets, strict=True)
    ]


def write_rows(rows: list[dict], path: Path) -> None:
    """Rows as one Parquet file."""
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(path)
