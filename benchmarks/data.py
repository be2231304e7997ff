"""What preparing data costs: `python benchmarks/data.py [ALPACA.json]`, part of `make bench`.

50,000 rows of Alpaca's form are read, recognised, brought into one form, tokenised, labelled and split by AutoSloth, beside
the official approach: `datasets.map` for the format and SFTTrainer for the tokens, as Unsloth's Alpaca notebook does it, which
learns whole rows; the same with answers told apart by train_on_responses_only, as its chat notebooks do it; and the least that can
be done, two bare `datasets.map` calls on all cores. Each in a process of its own, with an empty cache,
timed after the imports. Without a file the rows are made from the demo's stories. Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROWS, ROUNDS = 50_000, 3

HEAD = """
import json, os, sys, time
os.environ["HF_DATASETS_CACHE"] = sys.argv[2] + "/cache"
os.environ["UNSLOTH_COMPILE_LOCATION"] = sys.argv[2] + "/compiled"
from autosloth.model import start_engine
from autosloth.settings import SFTSettings
unsloth = start_engine()
from autosloth.live import peak_ram_gb
from autosloth.model import load_model, load_tokenizer
settings = SFTSettings.load(dict(model="demo", dataset=sys.argv[1], max_length=2048, eval_fraction=0.01, eval_rows=500, storage=sys.argv[2]))
tokenizer = load_tokenizer(settings)
def report(rows, tokens, learnt):
    print(json.dumps(dict(seconds=time.perf_counter() - started, rows=rows, tokens=int(tokens), learnt=int(learnt), peak_ram_gb=peak_ram_gb())))
"""

AUTOSLOTH = """
from autosloth.clean import Findings, load_rows
from autosloth.data import describe, write_rows
from autosloth.encode import encode_rows
from pathlib import Path
import datasets, numpy, pyarrow.parquet
started = time.perf_counter()
found = Findings()
train, held_out = (encode_rows(tokenizer, rows, settings, found) for rows in load_rows(settings, found))
for name, rows in (("train", train), ("eval", held_out)):
    write_rows(rows, Path(sys.argv[2], name + ".parquet"))
facts = describe(train, held_out, found, settings)
report(facts["train_rows"], facts["train_tokens"], facts["learnt_tokens"])
"""

FORMATTED = """
from datasets import load_dataset
PROMPT = "<s>### Instruction:\\n{}\\n\\n### Response:\\n{}</s>"
def format_rows(batch):
    asked = (i + ("\\n\\n" + g if g else "") for i, g in zip(batch["instruction"], batch["input"]))
    return {"text": [PROMPT.format(*pair) for pair in zip(asked, batch["output"])]}
started = time.perf_counter()
rows = load_dataset("json", data_files=sys.argv[1], split="train").map(format_rows, batched=True)
parts = rows.train_test_split(test_size=500, seed=3407)
"""

# Its best: all cores for the tokeniser, which Unsloth switches off.
MAP = """
os.environ["TOKENIZERS_PARALLELISM"] = "true"
def tokenise(batch):
    return tokenizer(batch["text"], add_special_tokens=False, truncation=True, max_length=2048)
parts = parts.map(tokenise, batched=True, remove_columns=rows.column_names)
seconds = time.perf_counter() - started
tokens = sum(len(ids) for batch in parts["train"].iter(1000) for ids in batch["input_ids"])
started += time.perf_counter() - started - seconds
report(len(parts["train"]), tokens, tokens)
"""

TRAINER = """
before = time.perf_counter()
from trl import SFTConfig, SFTTrainer
from unsloth.chat_templates import train_on_responses_only
model = load_model(settings)
started += time.perf_counter() - before
args = SFTConfig(output_dir=sys.argv[2], dataset_text_field="text", max_length=2048, dataset_num_proc=os.cpu_count(), report_to=[], bf16=False, fp16=False)
trainer = SFTTrainer(model=model, args=args, train_dataset=parts["train"], eval_dataset=parts["test"], processing_class=tokenizer)
"""

MASK = """
trainer = train_on_responses_only(trainer, instruction_part="### Instruction:\\n", response_part="### Response:\\n", num_proc=os.cpu_count())
"""

COUNT = """
seconds = time.perf_counter() - started
counts = [(len(ids), sum(label != -100 for label in labels)) for batch in trainer.train_dataset.iter(1000) for ids, labels in zip(batch["input_ids"], batch.get("labels", batch["input_ids"]))]
started += time.perf_counter() - started - seconds
report(len(counts), sum(n for n, _ in counts), sum(n for _, n in counts))
"""

SIDES = {
    "autosloth": HEAD + AUTOSLOTH,
    "two datasets.map, whole rows": HEAD + FORMATTED + MAP,
    "trl, whole rows learnt": HEAD + FORMATTED + TRAINER + COUNT,
    "trl + unsloth, answers learnt": HEAD + FORMATTED + TRAINER + MASK + COUNT,
}


def write_input(path: Path, source: Path | None) -> None:
    """ROWS different rows of Alpaca's form, from a file (repeated) or from the demo's stories, answers of log-normal length."""
    if source:
        rows = json.loads(source.read_text(encoding="utf-8"))
        made = [
            {**rows[i % len(rows)], "instruction": f"{rows[i % len(rows)]['instruction']} ({i})"} for i in range(ROWS)
        ]
    else:
        from autosloth.demo import documents

        rng, words = random.Random(0), " ".join(documents(4000, 0.5)).split()

        def text(median: float) -> str:
            count, start = max(1, round(rng.lognormvariate(0, 0.9) * median)), rng.randrange(len(words) - 2000)
            return " ".join(words[start : start + min(count, 2000)])

        made = [
            {"instruction": f"{text(10)} ({i})?", "input": text(20) if i % 3 == 0 else "", "output": text(45)}
            for i in range(ROWS)
        ]
    path.write_text(json.dumps(made), encoding="utf-8")


def measure(script: str, rows: Path) -> dict[str, float]:
    """One run in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([sys.executable, "-c", script, str(rows), folder], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return next(json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"seconds"'))


def main() -> None:
    from autosloth.hardware import hardware, versions

    source = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        write_input(rows, source)
        for _ in range(ROUNDS):
            for side, script in SIDES.items():
                runs[side].append(measure(script, rows))
    ours = statistics.median(run["seconds"] for run in runs["autosloth"])
    print(f"{ROWS:,} rows, {ROUNDS} rounds in turn, medians")
    for side, measured in runs.items():
        times = [run["seconds"] for run in measured]
        last, median = measured[-1], statistics.median(times)
        print(
            f"{side:32} {median:6.1f} s ({min(times):.1f} to {max(times):.1f}), {median / ours:.2f} x; {last['rows']:,} rows,"
            f" {last['tokens']:,} tokens, {last['learnt']:,} learnt, {last['peak_ram_gb']:.2f} GB RAM at most"
        )
    results = {"rows": ROWS, "source": source.name if source else "made", "runs": runs}
    results |= {"hardware": hardware(), "versions": versions(), "load": os.getloadavg()}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "data.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
