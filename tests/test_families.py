"""Families of models go down the road: trained, trained further, and merged as PEFT merges them."""

import os

import pytest
from support.families import FAMILIES, with_weights

CARRIED = ("Qwen 3 MoE", "Qwen 3 Next", "Qwen 3.5", "Gemma 3", "Gemma 4", "Gemma 4 MoE", "gpt-oss", "Llama 4 text", "Mistral Small 3.1", "Ministral 3",
           "Phi 3 and 4", "Granite 4 H", "LFM 2", "LFM 2 MoE", "GLM 4.5", "Falcon H1", "DeepSeek V3", "Mixtral")  # fmt: skip


def logits(folder, kind, ids, adapter=None):
    """What a model of a class in transformers, in float32, makes of token ids; adapter: put on by PEFT, as anyone would."""
    import torch
    import transformers
    from peft import PeftModel

    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", CARRIED)
def test_a_family_is_trained_trained_further_and_merged_as_peft_does(family, base, engine, tmp_path, capsys):
    import torch

    from autosloth.data import prepare_data
    from autosloth.export import write_merged
    from autosloth.run import Run
    from autosloth.settings import SFTSettings
    from autosloth.training import train_adapter

    folder, kind = with_weights(family, base, tmp_path / "model"), FAMILIES[family][0]
    settings = SFTSettings.load(dict(
        model=str(folder), dataset="demo", storage=str(tmp_path), run_name="first", max_steps=3, max_length=64, batch_size=2, gradient_accumulation=1,
        eval_rows=4, eval_answers=0, learning_rate=0.02, lora_r=4, lora_alpha=8, load_in_4bit=False, merged=True, quantizations=[],
    ))  # fmt: skip
    ids = list(range(5, 45))
    for run_name, adapter in (("first", None), ("second", str(tmp_path / "first"))):
        run = Run.create(settings.model_copy(update={"run_name": run_name, "adapter": adapter}))
        for stage in (prepare_data, train_adapter, write_merged):
            stage(run)
        trained = run.facts["train"]["layers"]
        assert {name for name, count in trained.items() if count["trained"]} == set(FAMILIES[family][-1].split())
        merged, expected = logits(run.path("merged"), kind, ids), logits(folder, kind, ids, run.path("adapter"))
        change = (expected - logits(folder, kind, ids)).abs().mean()
        assert change > 0.01 and (merged - expected).abs().mean() < 0.1 * change, (
            change,
            (merged - expected).abs().mean(),
        )
    assert os.listdir(run.path("merged")) and torch.isfinite(merged).all()
