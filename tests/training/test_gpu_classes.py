"""The class tree that Unsloth takes on a GPU, as far as a machine without one can import it; one process for all, since loading it takes long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support.gpu_classes
import support.gpu_layers
from support.families import without_weights

ROWS = [list(range(10 * n + 10, 10 * n + 17 + n)) for n in range(6)]


def test_unsloths_gpu_classes_take_every_argument_and_keep_each_label_at_its_token(base, tmp_path):
    """As given, in SFT and DPO; batches of rows without padding, packed or not."""
    given = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in ROWS]
    command = [sys.executable, Path(support.gpu_classes.__file__), base, json.dumps(given)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["sft"] == told["dpo"] == {}
    assert [len(epoch) for epoch in told["batches"]] == [2, 1]  # three rows at once, all six rows in one
    for epoch in told["batches"]:
        assert sorted(rows_of(epoch), key=lambda row: row["input_ids"]) == given


@pytest.mark.slow
def test_a_gpu_trains_the_layers_that_check_tells_and_packs_those_that_memory_counts(engine, tmp_path):
    """By Unsloth's GPU loader in 4 bit, which packs experts, scopes names of layers to attention and MLP, and writes Mamba's class anew."""
    from autosloth.models.counts import counts_of
    from autosloth.models.targets import targets_of

    asked = {
        "Llama 3": {"use_dora": True, "use_rslora": True, "lora_r": 4},
        "LFM 2": {"use_dora": True},
        "Qwen 3 MoE": {"use_rslora": True, "lora_alpha": 8},
        "Granite 4 H": {},
        "gpt-oss": {"target_modules": "attention"},
        "Mixtral": {"target_modules": ["gate_up_proj"]},
        "Gemma 3": {},
    }
    command = [sys.executable, support.gpu_layers.__file__, tmp_path / "models", json.dumps(asked)]
    apart = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=apart)
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    for family, given in asked.items():
        model, layers = without_weights(family), given.get("target_modules", "all-linear")
        assert set(told[family]["layers"]) == targets_of(model, layers).names, family
        assert told[family]["packed"] == counts_of(model, layers).narrow, family
        kind = {"lora_r": 16, "lora_alpha": 16, "use_rslora": False, "use_dora": False, **given}
        assert all(told[family].get(name, value) == value for name, value in kind.items()), family


def rows_of(epoch):
    """The rows that batches of one line each hold, one behind the other."""
    for batch in epoch:
        (ids,), (labels,), lengths = batch["input_ids"], batch["labels"], batch["packed_seq_lengths"]
        assert len(ids) == sum(lengths)
        for length in lengths:
            yield {"input_ids": ids[:length], "labels": labels[:length]}
            ids, labels = ids[length:], labels[length:]
