"""What the road of supervised fine-tuning costs: `make bench`.

Prints the demo road by stage, the import of `autosloth`, and a training step beside the same model and rows
trained by a plain TRL script, both in processes of their own, in turn. Writes benchmarks/results/sft.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PAIRS, STEPS, WARMUP_STEPS = 5, 60, 10
SETTINGS = {
    "batch_size": 16,
    "gradient_accumulation": 1,
    "learning_rate": 2e-3,
    "max_steps": STEPS,
    "warmup": 10,
    "save_steps": 10_000,
    "max_length": 256,
}

# The steps are timed alike on both sides: from the end of step WARMUP_STEPS to the end of the last one.
CLOCK = f"""
import json, time
from transformers import TrainerCallback
class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == {WARMUP_STEPS}: self.started = time.perf_counter()
    def on_train_end(self, args, state, control, **_):
        seconds = (time.perf_counter() - self.started) / (state.global_step - {WARMUP_STEPS})
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        print(json.dumps({{"step_ms": 1000 * seconds, "first_loss": float(losses[0]), "last_loss": float(losses[-1])}}))
"""

AUTOSLOTH = """
import sys
from autosloth.settings import SFTSettings
from autosloth.run import Run
from autosloth.data import prepare_data
from autosloth.model import load_model, load_tokenizer, start_engine
from autosloth.train import make_trainer
start_engine()
{clock}
run = Run.create(SFTSettings.load(dict(model="demo", dataset="demo", storage=sys.argv[1], **{settings})))
prepare_data(run)
trainer = make_trainer(run, load_model(run.settings), load_tokenizer(run.settings), run.rows("train"), run.rows("eval"))
trainer.add_callback(Clock())
trainer.train()
"""

PLAIN = """
import os, sys
os.environ["UNSLOTH_COMPILE_LOCATION"] = sys.argv[1] + "/compiled"
from unsloth import FastLanguageModel
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from autosloth.demo import demo_base, sft_rows
from autosloth.model import named_template
{clock}
model, tokenizer = FastLanguageModel.from_pretrained(str(demo_base()), max_seq_length={settings}["max_length"], dtype=torch.float32, load_in_4bit=False)
tokenizer.chat_template = named_template("alpaca")
layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, lora_dropout=0, target_modules=layers, use_gradient_checkpointing=False, random_state=3407)
rows = Dataset.from_list([{{"prompt": [{{"role": "user", "content": row["instruction"]}}], "completion": [{{"role": "assistant", "content": row["output"]}}]}} for row in sft_rows()[0]])
s = {settings}
args = SFTConfig(output_dir=sys.argv[1] + "/plain", per_device_train_batch_size=s["batch_size"], gradient_accumulation_steps=1, learning_rate=s["learning_rate"], max_steps=s["max_steps"],
    warmup_steps=s["warmup"], lr_scheduler_type="linear", optim="adamw_torch_fused", weight_decay=0.01, seed=3407, data_seed=3407, max_length=s["max_length"], logging_steps=1,
    save_strategy="no", report_to=[], bf16=False, fp16=False, gradient_checkpointing=False, completion_only_loss=True)
SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]).train()
"""


def step_times() -> dict[str, list[dict[str, float]]]:
    """PAIRS runs of each side, in turn, each in a fresh process."""
    runs: dict[str, list[dict[str, float]]] = {"autosloth": [], "plain": []}
    for _ in range(PAIRS):
        for side, script in (("autosloth", AUTOSLOTH), ("plain", PLAIN)):
            code = script.format(clock=CLOCK, settings=SETTINGS)
            with tempfile.TemporaryDirectory() as folder:
                result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
            if result.returncode:
                sys.exit(result.stderr)
            runs[side].append(
                next(json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"step_ms"'))
            )
    return runs


def import_ms() -> float:
    """Median wall time of `import autosloth.cli` beyond a bare interpreter's, in ms, over 9 processes each."""

    def median(code: str) -> float:
        command = f"import time, sys, subprocess; t = time.perf_counter(); subprocess.run([sys.executable, '-c', {code!r}]); print(time.perf_counter() - t)"
        return statistics.median(
            float(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout)
            for _ in range(9)
        )

    return 1000 * (median("import autosloth.cli") - median("pass"))


def demo_stages() -> dict[str, float]:
    """Seconds of each stage of the demo road, run anew by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "autosloth",
            "sft",
            "--set",
            "model=demo",
            "--set",
            "dataset=demo",
            "--set",
            f"storage={folder}",
            "--set",
            "run_name=demo",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr)
        marks = sorted(Path(folder, "demo", ".done").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: json.loads(path.read_text())["seconds"] for path in marks}


def main() -> None:
    from autosloth.demo import demo_base
    from autosloth.hardware import hardware, versions

    demo_base()
    stages, imported, runs = demo_stages(), import_ms(), step_times()
    print(
        "demo road, seconds by stage:",
        ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items()),
        f"(sum {sum(stages.values()):.1f})",
    )
    print(f"import autosloth.cli: {imported:.0f} ms (goal: under 300 ms)")
    for side, measured in runs.items():
        times = [run["step_ms"] for run in measured]
        print(
            f"{side:9} step: median {statistics.median(times):.1f} ms, {min(times):.1f} to {max(times):.1f}; loss {measured[0]['first_loss']:.4f} -> {measured[0]['last_loss']:.4f}"
        )
    ratios = [ours["step_ms"] / plain["step_ms"] for ours, plain in zip(runs["autosloth"], runs["plain"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"ratio of paired runs: median {ratio:.3f}, {min(ratios):.3f} to {max(ratios):.3f} (goal: at most 1.03)")
    results = {
        "stages_s": stages,
        "import_ms": round(imported, 1),
        "runs": runs,
        "ratio": round(ratio, 4),
        "hardware": hardware(),
        "versions": versions(),
        "load": os.getloadavg(),
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "sft.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
