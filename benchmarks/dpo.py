"""What preference tuning gains from batches of pairs of like length: `make bench`.

The same trainer on the same pairs, as long as UltraFeedback's, in the A100 profile (16 pairs a step in four batches), on a small model of random
weights: with the batches that AutoSloth makes, and with random ones, in processes of their own, in turn. A step has the same pairs on both sides,
so the losses must agree. Writes benchmarks/results/dpo.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROUNDS, STEPS = 2, 6
SETTINGS = {
    **{"profile": "a100", "precision": "float32", "optimizer": "adamw_torch_fused", "load_in_4bit": False, "lora_r": 4, "lora_alpha": 4},
    **{"max_length": 1024, "max_steps": STEPS, "warmup": 1, "save_steps": 10_000, "eval_rows": 8, "eval_answers": 0},
}  # fmt: skip

SIDE = """
import json, sys
from pathlib import Path
from autosloth.model import load_model, load_tokenizer, start_engine
start_engine()
sys.path.insert(0, sys.argv[3])
from gpu_meter import Meter, same_start
from gpu_models import make_model, write_pairs
from autosloth import dpo
from autosloth.data import prepare_data
from autosloth.run import Run
from autosloth.settings import DPOSettings
folder, side, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[4])
base, rows = make_model(folder / "base", "small", four_bit=False, dtype="float32"), folder / "pairs.json"
write_pairs(rows, 400)
where = dict(model=str(base), dataset=str(rows), storage=str(folder), run_name="run")
run = Run.create(DPOSettings.from_values({**where, **settings}, "the benchmark"))
prepare_data(run)
model, arguments = load_model(run.settings), dpo.pair_arguments
same_start(model)
if side == "random":
    dpo.pair_arguments = lambda *given: arguments(*given) | {"train_sampling_strategy": "random"}
trainer = dpo.make_trainer(run, model, load_tokenizer(run.settings), run.rows("train"), run.rows("eval"), [])
told = Meter(trainer).train()
print("RESULT " + json.dumps({name: told[name] for name in ("step_s", "steps_s", "padding", "losses")}))
"""


def measure(side: str) -> dict:
    """One training of a side, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SIDE, folder, side, str(HERE), json.dumps(SETTINGS)]
        result = subprocess.run(command, capture_output=True, text=True)
    told = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode or not told:
        sys.exit(result.stderr)
    return json.loads(told[-1].removeprefix("RESULT "))


def main() -> None:
    from autosloth.hardware import hardware, versions

    runs: dict[str, list[dict]] = {"autosloth": [], "random": []}
    for _ in range(ROUNDS):
        for side, measured in runs.items():
            measured.append(measure(side))
            print(f"{side:9} a step {measured[-1]['step_s']:.2f} s, padding {measured[-1]['padding']:.0%}", flush=True)
    ours, theirs = (statistics.median(sum(run["steps_s"]) for run in measured) for measured in runs.values())
    losses = zip(runs["autosloth"][0]["losses"], runs["random"][0]["losses"], strict=True)
    apart = max(abs(one - other) / other for one, other in losses)
    print(f"autosloth beside random: {theirs / ours:.2f} x as many pairs a second; losses at most {apart:.1e} apart")
    if apart > 1e-3:
        sys.exit("The losses differ: the sides did not train the same.")
    result = {"runs": runs, "speedup": theirs / ours, "losses_apart": apart, "hardware": hardware(), "versions": versions()}  # fmt: skip
    (HERE / "results" / "dpo.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
