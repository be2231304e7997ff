"""The benchmark of a GPU works where none is, and takes nothing that it did not measure for a measurement."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(benchmarks, tmp_path):
    """A bench for tiny sizes."""
    import gpu

    return gpu.Bench(tmp_path, smoke=True)


def test_a_row_that_does_not_exist_is_refused_with_the_names_of_those_that_do():
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "sfd"], capture_output=True, text=True, cwd=BENCHMARKS.parent,
        env={"PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert result.returncode == 2 and "no such row: sfd" in result.stderr and "sft-t4" in result.stderr


def test_a_smoke_test_prints_no_figure_and_stands_in_for_no_measurement(benchmarks, tmp_path, capsys):
    import gpu

    gpu.show([gpu.Line("SFT", "1234 tokens/s", "at least 1.5 x", True)], measured=False)
    assert "not measured" in (said := capsys.readouterr().out) and "1234" not in said and "yes" not in said
    path, measured, smoke = tmp_path / "gpu.json", {"measured": True, "table": [1]}, {"measured": False}
    for result, kept in ((smoke, smoke), (measured, measured), (smoke, measured)):
        gpu.keep(path, "sft", result)
        assert json.loads(path.read_text()) == {"sft": kept}


def test_the_results_in_the_repository_hold_figures_of_a_gpu_only(benchmarks):
    import gpu

    results = json.loads((BENCHMARKS / "results" / "gpu.json").read_text())
    assert set(results) <= set(gpu.ROWS)
    for result in results.values():
        assert result["hardware"]["gpu"] if result["measured"] else "runs" not in result


def test_the_estimate_of_memory_agrees_with_what_a_gpu_measured(benchmarks):
    """Within 15 %: SFT of a 7B, an 8B and a 3B in NF4 and of a 1B in 16 bit, and DPO, on an H200 or an H100."""
    import gpu
    from gpu_models import SHAPES

    from autosloth.models.memory import estimate, shape_of
    from autosloth.settings import ROADS

    results = json.loads((BENCHMARKS / "results" / "gpu.json").read_text())
    measured = {name: (run, results[row]["hardware"]) for row in ("memory-7b", "memory-others") for name, run in results[row]["runs"].items()}  # fmt: skip
    assert len(measured) == 6
    for name, (run, hardware) in measured.items():
        road, model, four_bit, given = gpu.MEMORY_SHAPES[name]
        given = {"model": model, "dataset": "rows.json", "load_in_4bit": four_bit, **given}
        settings = ROADS[road].from_values(given, "the test")
        shape = shape_of({"tie_word_embeddings": False, **SHAPES[model]})
        expected = sum(part.gb for part in estimate(settings, shape, hardware["vram_gb"], settings.lora_r))
        assert expected == pytest.approx(run["peak_vram_gb"], rel=0.15), name


@pytest.fixture(scope="module")
def tiny(benchmarks, engine, tmp_path_factory):
    """A function from a kind of head to a tiny model of random weights with it, loaded by transformers; in NF4 if asked."""
    from gpu_models import make_model
    from transformers import AutoModelForCausalLM

    def load(head, four_bit=False):
        folder = tmp_path_factory.mktemp("model") / head
        return AutoModelForCausalLM.from_pretrained(make_model(folder, "tiny", four_bit, head, "float32"))

    return load


def test_weights_written_in_nf4_are_read_as_such(tiny):
    from bitsandbytes.functional import dequantize_4bit

    layer = tiny("random", four_bit=True).model.layers[1].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit"
    values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert values.shape == (64, 128) and values.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_counting_model_counts_and_the_ending_one_ends_once_in_87_tokens(tiny):
    import torch

    ids = torch.arange(4, 2048)[:, None]
    with torch.no_grad():
        following = tiny("counting")(input_ids=ids).logits[:, -1].argmax(dim=-1)
        assert (following == ids[:, 0] - 1).float().mean() > 0.99
        ends = tiny("ending")(input_ids=ids).logits[:, -1].softmax(dim=-1)[:, 2].mean().item()
    assert 1 / 110 < ends < 1 / 70


def test_answers_are_as_long_as_alpacas(benchmarks, base, tmp_path):
    from gpu_models import write_instructions
    from transformers import AutoTokenizer

    write_instructions(tmp_path / "rows.json", 1000)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = json.loads((tmp_path / "rows.json").read_text())
    lengths = sorted(len(tokenizer(row["output"], add_special_tokens=False).input_ids) for row in rows)
    assert 50 < statistics.median(lengths) < 70 and lengths[-10] > 300


@pytest.mark.slow
def test_autosloth_has_the_losses_of_plain_transformers_step_by_step(bench):
    import gpu

    (line,) = gpu.losses(bench)
    assert line.met, line
