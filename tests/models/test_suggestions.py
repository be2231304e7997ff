"""What the form suggests is in Unsloth's list, and the word on each is what its shape says."""

import importlib.util
import runpy
from pathlib import Path

import pytest

from autosloth.models.counts import KEPT, counts_of
from autosloth.models.memory import MARGIN, estimate, least, loss, shape_of
from autosloth.settings import ROADS

T4_GB, A100_GB = 15.8, 40.0  # 14.7 GiB of a T4 are free on Colab; the smaller A100
QWEN3 = dict(model_type="qwen3", head_dim=128, num_key_value_heads=8, vocab_size=151936)
LLAMA = dict(model_type="llama", head_dim=128, num_key_value_heads=8, vocab_size=128256)
MISTRAL = (4096, 14336, 32, 32, {**LLAMA, "vocab_size": 32000, "model_type": "mistral"}, False)
# Hidden size, size of the MLP, layers, heads, what else config.json says, and whether the embeddings are tied.
SHAPES = {
    "unsloth/mistral-7b-bnb-4bit": MISTRAL,
    "unsloth/zephyr-sft-bnb-4bit": MISTRAL,
    "unsloth/Qwen3-0.6B-unsloth-bnb-4bit": (1024, 3072, 28, 16, QWEN3, True),
    "unsloth/Qwen3-4B-Instruct-2507-unsloth-bnb-4bit": (2560, 9728, 36, 32, QWEN3, True),
    "unsloth/Qwen3-8B-unsloth-bnb-4bit": (4096, 12288, 36, 32, QWEN3, False),
    "unsloth/Qwen3-14B-unsloth-bnb-4bit": (5120, 17408, 40, 40, QWEN3, False),
    "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit": (2048, 8192, 16, 32, {**LLAMA, "head_dim": 64}, True),
    "unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit": (3072, 8192, 28, 24, LLAMA, True),
    "unsloth/Llama-3.1-8B-Instruct-unsloth-bnb-4bit": (4096, 14336, 32, 32, LLAMA, False),
    "unsloth/gemma-3-1b-it-unsloth-bnb-4bit": (1152, 6912, 26, 4, dict(model_type="gemma3_text", head_dim=256, num_key_value_heads=1, vocab_size=262144), True),
    # Mistral 3's text part has Llama's blocks; so has Granite 4 where no block is Mamba's, its gate and up projections in one.
    "unsloth/Ministral-3-3B-Instruct-2512-unsloth-bnb-4bit": (3072, 9216, 26, 32, {**LLAMA, "vocab_size": 131072}, True),
    "unsloth/granite-4.0-micro-unsloth-bnb-4bit": (2560, 8192, 40, 40, {**LLAMA, "head_dim": 64, "vocab_size": 100352}, True),
    # As if all blocks had attention, with as many heads of keys as of queries: a convolution's two projections are as large as those four.
    "unsloth/LFM2.5-1.2B-Instruct": (2048, 8192, 16, 32, {**LLAMA, "head_dim": 64, "num_key_value_heads": 32, "vocab_size": 65536}, True),
    "unsloth/phi-4-unsloth-bnb-4bit": (5120, 17920, 40, 40, {**LLAMA, "num_key_value_heads": 10, "vocab_size": 100352}, False),
}  # fmt: skip
BESIDE = {"unsloth/Ministral-3-3B-Instruct-2512-unsloth-bnb-4bit": 410_000_000}  # of the vision tower
E2B = "unsloth/gemma-4-E2B-it-unsloth-bnb-4bit"
# Layers, widths and heads of the text part as google/gemma.cpp#919 has them (ConfigGemma4_E2B), the layers that share keys and values as google/gemma-4-E2B's
# config.json; vision and audio are transformers' defaults, which are that model's. Google tells 5.1B, 2.3B of them effective, of what it makes together.
E2B_TEXT = dict(
    hidden_size=1536, intermediate_size=6144, num_hidden_layers=35, num_attention_heads=8, num_key_value_heads=1, head_dim=256, global_head_dim=512,
    vocab_size=262144, vocab_size_per_layer_input=262144, hidden_size_per_layer_input=256, num_kv_shared_layers=20, use_double_wide_mlp=True,
    layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
)  # fmt: skip
SUGGESTED = [(road, *pair) for road in ROADS for pair in ROADS[road].model_fields["model"].json_schema_extra["suggestions"].items()]  # fmt: skip


def shape(name, skipped=()):
    """The shape of a suggestion; skipped: parts of names of layers that it keeps in 16 bit."""
    hidden, inner, layers, heads, others, tied = SHAPES[name]
    sizes = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    kept = {"quantization_config": {"llm_int8_skip_modules": list(skipped)}}
    return shape_of({**others, **sizes, **kept, "tie_word_embeddings": tied})._replace(beside=BESIDE.get(name, 0))


def test_each_suggestion_is_spelt_as_unsloths_list_spells_it():
    package = Path(importlib.util.find_spec("unsloth").origin).parent
    mapper = runpy.run_path(str(package / "models" / "mapper.py"))
    known = {*mapper["INT_TO_FLOAT_MAPPER"], *mapper["MAP_TO_UNSLOTH_16bit"].values()}
    assert {name for _, name, _ in SUGGESTED} - {"demo"} <= known
    for road in ROADS.values():
        assert road().model == next(iter(road.model_fields["model"].json_schema_extra["suggestions"]))


def test_the_size_that_is_told_is_that_of_the_shape():
    for name, word in {name: word for _, name, word in SUGGESTED if name in SHAPES}.items():
        of = shape(name)
        numbers = of.layers * sum(a * b for a, b in of.linear_layers().values())
        numbers += of.beside + of.vocabulary * of.hidden * (
            1 if of.tied else 2
        )  # norms and biases are less than one in a thousand
        assert word.startswith(f"{numbers / 1e9:.1f}B"), (name, numbers)


@pytest.mark.parametrize("road", ROADS)
def test_what_is_said_to_fit_fits_also_with_a_quarter_of_its_blocks_in_16_bit(road):
    """Unsloth's dynamic repositories keep some layers so; which ones, their config.json says, which is not at hand here."""
    for name, word in [
        (name, word) for other, name, word in SUGGESTED if other == road and name in SHAPES and "fits" in word
    ]:
        on_t4 = "T4" in word
        profile = {"profile": "t4" if on_t4 else "a100"} if road == "dpo" else {}
        settings = ROADS[road](model=name, **profile)
        kept = 1 if "-bnb-4bit" in name else 4  # all of them in one that is in 16 bit on the Hub
        skipped = [f"model.layers.{layer}" for layer in range(kept * shape(name).layers // 4)]
        gpu_gb = T4_GB if on_t4 else A100_GB
        needed = sum(part.gb for part in estimate(settings, shape(name, skipped), gpu_gb, settings.lora_r))
        assert needed < gpu_gb, (name, needed)


def test_nothing_is_said_to_fit_whose_shape_is_not_known():
    assert {name for _, name, word in SUGGESTED if "fits" in word} == {*SHAPES, E2B}


@pytest.fixture(scope="module")
def e2b(engine):
    """Gemma 4 E2B without numbers."""
    import torch
    import transformers

    config = transformers.Gemma4Config(text_config=E2B_TEXT, vision_config={}, audio_config={})
    with torch.device("meta"):
        return transformers.Gemma4ForConditionalGeneration(config)


def test_embeddings_of_each_layer_are_counted_in_16_bit_and_shared_keys_not_at_all(e2b):
    counts, word = counts_of(e2b, "all-linear"), dict(pair for road, *pair in SUGGESTED if road == "sft")[E2B]
    tables = E2B_TEXT["vocab_size"] * (1536 + 35 * 256)
    assert counts.narrow + counts.wide == e2b.num_parameters() and tables < counts.wide < tables + 5e8
    assert word.startswith(f"{e2b.num_parameters() / 1e9:.1f}B, of which 2.3B compute")
    assert (e2b.num_parameters() - tables) / 1e9 == pytest.approx(2.3, abs=0.06)
    names = [name for name, _ in e2b.named_parameters() if "language_model" in name and "self_attn.k_proj" in name]
    assert len(names) == 35 - 20


@pytest.mark.parametrize("road", [road for road, name, _ in SUGGESTED if name == E2B])
def test_gemma_4_fits_a_t4_with_a_quarter_of_its_blocks_in_16_bit_and_computed_in_32(e2b, road):
    """There Unsloth computes it in 32 bits and holds it in 16 (unsloth 2026.10, FORCE_FLOAT32). A block is counted thrice: its gradients, and what is made beside its layers."""
    settings = ROADS[road](model=E2B, **({"profile": "t4"} if road == "dpo" else {}))
    counts = counts_of(e2b, "all-linear", (*KEPT, *(f"model.layers.{layer}" for layer in range(9))))
    parts = least(settings, counts, settings.lora_r)
    block = next(part.gb for part in parts if part.name == "activations")
    head = loss(settings, shape(next(iter(SHAPES)))._replace(vocabulary=E2B_TEXT["vocab_size"]), T4_GB)
    assert MARGIN * (sum(part.gb for part in parts) + head.gb + 5 * block) < T4_GB
