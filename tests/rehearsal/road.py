"""Roads of AutoSloth on a few short rows, on a device that stand_in.py plays or on Unsloth's CPU backend; run as a script: `road.py FOLDER DEVICE ROAD...`.

FOLDER holds base/ and the rows; what was learnt from, and what came of it, is written to FOLDER/DEVICE/told.json.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

COMMON = {"load_in_4bit": False, "lora_r": 4, "lora_alpha": 8, "max_length": 64, "eval_answers": 2, "max_new_tokens": 6}
COMMON |= {"eval_fraction": 0.15, "warmup": 0, "scheduler": "constant", "seed": 1, "max_steps": 2, "save_steps": 1}
# Steps in proportion to the gradient: what the weights moved by tells whether it was right, in size too.
STEEP = {"optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": 1000.0, "weight_decay": 0.0}
SFT = {"dataset": "rows.jsonl", "batch_size": 4, "gradient_accumulation": 1, **STEEP}
START = {**SFT, "optimizer": "adamw_torch_fused", "learning_rate": 0.01, "max_steps": 24, "epochs": 10}
DPO = {"dataset": "pairs.jsonl", "batch_size": "auto", "gradient_accumulation": 4, **STEEP}
SPIN = {**DPO, "dataset": "rows.jsonl", "rounds": 1, "prompts_per_round": 8, "generation_batch": 4}
SPIN |= {"max_new_tokens": 10}
ROADS = {  # by name: the road, and its settings besides COMMON
    "start": ("sft", START),  # makes the adapter that the others begin with
    "sft": ("sft", SFT),
    "resumed": ("sft", SFT),  # "sft" once more from its first step on; exported and proven
    "small": ("sft", SFT),  # in a memory for a few tokens at once
    "four-bit": ("sft", {**SFT, "load_in_4bit": True}),
    "eight-bit": ("sft", {**SFT, "optimizer": "adamw_8bit", "learning_rate": 0.001}),
    # An adapter that starts inside the base; exported and proven.
    "olora": (
        "sft",
        {**SFT, "adapter": None, "init_lora_weights": "olora", "lora_plus_ratio": 4, "neftune_alpha": 1e-6},
    ),
    "packed": ("sft", {**SFT, "packing": True, "max_steps": 1}),  # all rows in a step, but not all at once
    "whole": ("sft", {**SFT, "batch_size": 12, "max_steps": 1}),  # the same rows, at once
    # As many at once as a trial finds room for.
    "auto": ("sft", {**SFT, "batch_size": "auto", "gradient_accumulation": 12, "max_steps": 1}),
    # Wrongly, the mean of each batch: tokens beside few others count for more.
    "means": ("sft", {**SFT, "batch_size": 2, "gradient_accumulation": 2}),
    "dpo": ("dpo", DPO),
    "spin": ("spin", SPIN),
}
HELD = {"small": 32, "packed": 130}  # tokens at once
PROVEN = ("resumed", "olora")
TRIED = {("T4", "auto"), ("T4", "spin"), ("A100", "dpo")}  # where the first minutes are a trial
GB_A_TOKEN = {
    "T4": 0.12,
    "A100": 0.001,
}  # that a trial finds a step to take; three times as much without gradient checkpointing


def main():
    folder, device, roads = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if device != "CPU":
        import stand_in

        stand_in.pretend(device, folder / device / "driver")
    from autosloth.models.engine import start_engine

    start_engine()
    from autosloth.training import forgetting

    told, short = {}, forgetting.passages()[:1]  # Triton's interpreter goes through a text token by token
    for name in roads:
        started = time.perf_counter()
        with mock.patch.object(forgetting, "passages", lambda: short):
            told[name] = follow(name, folder, device)
        told[name]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"{device}: {name}: {told[name]['seconds']} s", flush=True)
    (folder / device / "told.json").write_text(json.dumps(told))


def follow(name, folder, device):
    """A road up to its adapter, or to its proof: what it learnt from, and its facts."""
    from autosloth import roads
    from autosloth.data.stage import prepare_data
    from autosloth.proof import verify_gguf
    from autosloth.run import Run
    from autosloth.settings import ROADS as SETTINGS

    road, values = ROADS[name]
    values = {**COMMON, **values, "model": str(folder / "base"), "storage": str(folder / device), "run_name": name}
    values |= {"dataset": str(folder / values["dataset"])}
    if name != "start" and "adapter" not in values:
        values["adapter"] = str(folder / "start")
    if name == "resumed":
        broken_off(folder / device / "sft", folder / device / name)
    run = Run.create(SETTINGS[road].load(values))
    prepare_data(run)
    with (
        contextlib.nullcontext() if (device, name) in TRIED else without_trial(),
        noted(HELD.get(name, math.inf), name == "means") as batches,
        metered(device) as tried,
        same_answers(folder / "CPU" / name, run.folder),
    ):
        roads.TRAINING[road][0](run)
    if name == "start":
        shutil.copytree(run.path("adapter"), folder / "start")
    if name in PROVEN:
        for stage in (*roads.EXPORT, verify_gguf):
            stage(run)
    return {"batches": batches, "tried": tried, "facts": run.facts}


@contextlib.contextmanager
def without_trial():
    """Let a run pass for one that was tried on this GPU."""
    from autosloth.training import spin, train

    with mock.patch.object(train, "is_due", is_not_due), mock.patch.object(spin, "is_due", is_not_due):
        yield


def is_not_due(run):
    run.record("trial")


@contextlib.contextmanager
def metered(device):
    """The batches of a trial: the tokens of each, and whether blocks are computed again; the device's memory fills by them, to its end."""
    import torch

    from autosloth.training import trial

    batches, take = [], trial.one_step

    def one_step(trainer, *given, **named):
        from stand_in import GIB, Memory

        learn, Memory.reserved = trainer.training_step, 2 * GIB

        def training_step(model, inputs, items=None):
            again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            batches.append({"tokens": inputs["input_ids"].numel(), "again": again})
            Memory.reserved += int(batches[-1]["tokens"] * GB_A_TOKEN[device] * 1e9) * (1 if again else 3)
            if Memory.reserved > Memory.total:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {batches[-1]}")
            return learn(model, inputs, items)

        with mock.patch.object(trainer, "training_step", training_step):
            taken = take(trainer, *given, **named)
        Memory.reserved = 2 * GIB
        return taken

    with mock.patch.object(trial, "one_step", one_step):
        yield batches


def broken_off(finished, folder):
    """A copy of a finished run, as it was after its first step."""
    shutil.copytree(finished, folder)
    for path in ("adapter", "reference", "checkpoints/checkpoint-2"):
        shutil.rmtree(folder / path)
    (folder / ".done" / "train.json").unlink()


@contextlib.contextmanager
def noted(held, uncounted):
    """The batches that trainers learn from: of which step each is, its lines, its rows, and by how many tokens its loss is divided.

    held: how many tokens at once the memory is large enough for, half as many in measuring; uncounted: let the loss of each batch be a mean over its own tokens.
    """
    import torch

    from autosloth.training import measure, train

    batches, resume, mean_loss = [], train.resume, measure.mean_loss

    def fill(inputs, room):
        size = inputs["input_ids"].numel()
        if size > room:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size} tokens")

    def measuring(trainer, rows):
        predict = trainer.prediction_step

        def prediction_step(model, inputs, **asked):
            fill(inputs, held / 2)
            return predict(model, inputs, **asked)

        with mock.patch.object(trainer, "prediction_step", prediction_step):
            return mean_loss(trainer, rows)

    def noting(trainer, checkpoint):
        learn = trainer.training_step

        def training_step(model, inputs, items=None):
            fill(inputs, held)
            told = {"step": trainer.state.global_step + 1, "items": items if items is None else int(items)}
            told["again"] = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            batches.append({**told, "lines": len(inputs["input_ids"]), "rows": rows_of(inputs)})
            return learn(model, inputs, None if uncounted else items)

        with mock.patch.object(trainer, "training_step", training_step):
            resume(trainer, checkpoint)

    with mock.patch.object(train, "resume", noting), mock.patch.object(measure, "mean_loss", measuring):
        yield batches


@contextlib.contextmanager
def same_answers(cpu, folder):
    """Let self-play go on with the answers that the CPU backend gave, once the device has given its own: a draw may fall otherwise by a rounding."""
    from autosloth.training import opponent, spin

    def answers_of(chunks, *given):
        own, path = opponent.answers_of(chunks, *given), cpu / chunks.relative_to(folder) / "answers-00000.json"
        return json.loads(path.read_text())["answers"] if path.is_file() else own

    with mock.patch.object(spin, "answers_of", answers_of):
        yield


def rows_of(inputs):
    """The rows in a batch, padded or one behind the other: the ids of each, and what is learnt: labels, or 1 at tokens of an answer."""
    learnt = "labels" if "labels" in inputs else "completion_mask"
    if "packed_seq_lengths" in inputs:
        lengths = inputs["packed_seq_lengths"].tolist()
        return list(zip(*(split(inputs[name][0].tolist(), lengths) for name in ("input_ids", learnt)), strict=True))
    lengths = inputs["attention_mask"].sum(1).tolist()
    lines = [inputs[name].tolist() for name in ("input_ids", learnt)]
    return [(ids[:n], marks[:n]) for ids, marks, n in zip(*lines, lengths, strict=True)]


def split(values, lengths):
    """A list in parts of these lengths."""
    values = iter(values)
    return [[next(values) for _ in range(length)] for length in lengths]


if __name__ == "__main__":
    main()
