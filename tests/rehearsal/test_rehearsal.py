"""The roads on the classes that Unsloth takes on a GPU, rehearsed without one, beside the same roads on its CPU backend.

A T4 learns in fp16, an A100 in bf16, the CPU backend in fp32.
"""

import json
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from support.commands import made_once
from support.patience import HUNG
from support.tiny_models import tiny_model

from autosloth.data import IGNORED
from autosloth.run import cache_dir

TRITON = "3.6.0"  # what Colab's torch brings; torch for a CPU comes without
CHAT = (
    "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else '=' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
WORDS = "the quick brown fox jumps over lazy dog sloths are slow animals".split()
ROADS = {
    "CPU": ["start", "sft", "four-bit", "eight-bit", "whole", "means", "olora", "dpo", "spin"],
    "T4": ["sft", "resumed", "small", "auto", "four-bit", "eight-bit", "olora", "dpo", "spin"],
    "A100": ["packed", "sft", "dpo", "spin"],
}
# Which road of the CPU backend learns the same.
BESIDE = {"resumed": "sft", "small": "sft", "auto": "whole", "packed": "whole"}
ANSWERS = "rounds/0/train/answers-00000.json"  # of the opponent
NEAR = {"T4": 0.01, "A100": 0.02}  # nats: fp16 has 11 bits, bf16 has 8
CLOSE = {"T4": 0.01, "A100": 0.05}  # of what the weights moved by
ROUGH = {"eight-bit": 0.05}  # Adam moves by as much where a gradient is next to nothing, and keeps what it saw in 8 bit

pytestmark = pytest.mark.slow


def triton():
    """A folder with Triton, which runs kernels on a CPU by its interpreter; fetched by pip once, 190 MB."""
    folder = cache_dir() / f"triton-{TRITON}-py{sys.version_info.major}{sys.version_info.minor}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", folder, f"triton=={TRITON}"], check=True, timeout=HUNG)
            (folder / "complete").touch()
    return folder


def rehearse(folder, device):
    """Follow the device's roads in a process of its own: what was told of each, and all that was printed."""
    paths = [os.environ.get("PYTHONPATH"), *([triton()] if device != "CPU" else [])]
    alone = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))}
    alone |= {"UNSLOTH_COMPILE_LOCATION": str(folder / device / "compiled"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, Path(__file__).with_name("road.py"), folder, device, *ROADS[device]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=alone, timeout=HUNG)
    assert result.returncode == 0, result.stdout + result.stderr
    return told_of(folder, device), result.stdout + result.stderr


def told_of(folder, device):
    """What was told of the device's roads."""
    return json.loads((folder / device / "told.json").read_text())


@pytest.fixture(scope="module")
def stage(tmp_path_factory, worker_id):
    """The folder with the base, the rows, and what came of the roads on the CPU backend, the start adapter among it."""

    def make(folder):
        tiny_model("llama", folder / "base", "float16", steps=150)
        (folder / "base" / "chat_template.jinja").write_text(CHAT)
        said = [(f"item {n}", " ".join(WORDS[n % 12 :][: 1 + (5 * n) % 9])) for n in range(14)]
        rows = [{"prompt": question, "completion": answer} for question, answer in said]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        worse = [" ".join(WORDS[n % 7 :][: 1 + (3 * n) % 8]) for n in range(14)]
        pairs = [
            {"prompt": question, "chosen": answer, "rejected": other}
            for (question, answer), other in zip(said, worse, strict=True)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        rehearse(folder, "CPU")

    return made_once(tmp_path_factory, worker_id, "rehearsal", make)


def test_a_t4_learns_as_the_cpu_backend_does_and_its_gguf_is_proven(stage):
    told, printed = rehearse(stage, "T4")
    for road in ROADS["T4"]:
        learns_the_same(stage, "T4", road, told[road])
        assert training(told[road])["peak_vram_gb"] == 2.15, "as the device tells"
    assert lines(told["sft"]) == lines(told["four-bit"]) == {1}, "rows without padding, one behind the other"
    assert told["resumed"]["facts"]["verify"]["passed"] and "going on from checkpoint-1" in printed
    assert told["olora"]["facts"]["verify"]["passed"] and training(told["olora"])["saved_r"] == 8
    assert training(told["eight-bit"])["optimizer"] == "adamw_8bit"
    assert training(told["four-bit"])["four_bit"] and not training(told["sft"])["four_bit"]
    assert "going on with 2 and gradient_accumulation 2, as many rows a step" in printed
    assert "measure: no GPU memory for 2 rows at once; going on with 1" in printed
    answers = [json.loads((stage / device / "spin" / ANSWERS).read_text())["answers"] for device in ("T4", "CPU")]
    assert len(answers[1]) == 8 and sum(map(operator.eq, *answers)) >= 6, "a draw falls otherwise by a rounding, seldom"
    fits(told["auto"], rows=6, passes=2, again=True, steps=5)  # 12 rows do not fit, by what one and two take
    fits(told["spin"], rows=2, passes=2, again=True, steps=4)
    assert printed.count("trial: a checkpoint was written and read back; answers in a batch are those of") == 2
    assert (
        len(re.findall(r"the adapter has its place in the GGUF, and \d\d texts become the same tokens", printed)) == 2
    )
    assert "prompts are answered one by one" not in printed and "num_items_in_batch" not in printed


def test_an_a100_learns_as_the_cpu_backend_does(stage):
    told, printed = rehearse(stage, "A100")
    for road in ROADS["A100"]:
        learns_the_same(stage, "A100", road, told[road])
    fits(told["dpo"], rows=4, passes=1, again=False, steps=6)
    assert lines(told["packed"]) == {1} and len(told["packed"]["batches"]) == 2, "in two batches of other sizes"
    assert "num_items_in_batch" not in printed


def test_a_mean_of_batches_of_other_sizes_would_be_seen(stage):
    assert apart(stage, ("CPU", "means"), ("CPU", "sft")) > 3 * max(CLOSE.values())


def fits(told, rows, passes, again, steps):
    """The trial of a road found that so many rows go at once and whether blocks are computed again, in so many steps; and so they did.

    By how many passes a step takes: a batch of short pairs holds more than one of long ones.
    """
    assert told["facts"]["trial"]["batch_size"] == rows and len(told["tried"]) == steps
    assert (
        {batch["again"] for batch in told["batches"]} == {again} == {told["facts"]["trial"]["gradient_checkpointing"]}
    )
    tokens = [batch["tokens"] for batch in told["tried"]]
    assert sum(tokens) <= 21 * tokens[0], (
        "the longest row comes first, and is the measure of the time that a trial takes"
    )
    assert [batch["step"] for batch in told["batches"]].count(1) == passes


def learns_the_same(stage, device, road, told):
    """A road learns the same as on the CPU backend: rows, labels, tokens that losses are divided by; losses before, at each step, after; weights."""
    beside = BESIDE.get(road, road)
    wanted = told_of(stage, "CPU")[beside]
    expected = steps(wanted)
    if road == "resumed":
        del expected[1]
    assert steps(told) == expected, road
    assert losses(told) == pytest.approx(losses(wanted), abs=NEAR[device]), road
    assert training(told)["first_loss"] == pytest.approx(training(wanted)["first_loss"], abs=0.01), road
    assert apart(stage, (device, road), ("CPU", beside)) < ROUGH.get(road, CLOSE[device]), road
    assert training(told)["precision"] == {"T4": "float16", "A100": "bfloat16"}[device]


def steps(told):
    """{step: (its rows with what is learnt of each, sorted; how many tokens the losses of all its batches are divided by)}; in SFT those that are learnt."""
    found = {}
    for batch in told["batches"]:
        rows, items = found.setdefault(batch["step"], ([], set()))
        rows += batch["rows"]
        items.add(batch["items"])
    for rows, items in found.values():
        assert items in ({None}, {sum(label != IGNORED for _, labels in rows for label in labels)})
    return {step: (sorted(rows), items) for step, (rows, items) in found.items()}


def losses(told):
    """The losses of a road's training by step, and those on the held-out rows before and after it."""
    measured = {when: told["facts"]["eval"][when]["loss"] for when in ("before", "after")}
    return measured | {str(step): loss for step, loss in training(told)["losses"]}


def training(told):
    """The facts of a road's training; of self-play those of its round."""
    rounds = told["facts"].get("rounds")
    return {**rounds[0], **rounds[0]["trained"]} if rounds else told["facts"]["train"]


def lines(told):
    """How many lines the batches of a road have."""
    return {batch["lines"] for batch in told["batches"]}


def apart(stage, one, other):
    """How far the weights of two roads moved apart, in parts of what those of the other moved by."""
    moved, wanted = changes(stage, *one), changes(stage, *other)
    return ((moved - wanted).norm() / wanted.norm()).item()


def changes(stage, device, road):
    """What the weights moved by, one behind the other."""
    import torch
    from safetensors.torch import load_file

    adapter = stage / device / road / ("rounds/0/adapter" if road == "spin" else "adapter")
    if road == "olora":  # as a plain one it starts at the base
        end = load_file(adapter / "adapter_model.safetensors")
        pairs = [(name, name.replace(".lora_A.", ".lora_B.")) for name in sorted(end) if ".lora_A." in name]
        return torch.cat([(end[b].float() @ end[a].float()).flatten() for a, b in pairs])
    start, end = (load_file(folder / "adapter_model.safetensors") for folder in (stage / "start", adapter))
    return torch.cat([(end[name].float() - start[name].float()).flatten() for name in sorted(start)])
