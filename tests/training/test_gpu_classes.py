"""The class tree that Unsloth takes on a GPU, as far as a machine without one can import it; one process for all, since loading it takes long."""

import json
import subprocess
import sys
from pathlib import Path

import support.gpu_classes

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


def rows_of(epoch):
    """The rows that batches of one line each hold, one behind the other."""
    for batch in epoch:
        (ids,), (labels,), lengths = batch["input_ids"], batch["labels"], batch["packed_seq_lengths"]
        assert len(ids) == sum(lengths)
        for length in lengths:
            yield {"input_ids": ids[:length], "labels": labels[:length]}
            ids, labels = ids[length:], labels[length:]
