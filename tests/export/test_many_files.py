"""From an adapter to files that are proven: many files of one run, and a real vocabulary. Every family is in tests/test_families.py."""

import json
import shutil

import pytest
from support.tiny_models import fast_sentencepiece, tiny_adapter, tiny_model

from autosloth.export.gguf import write_gguf
from autosloth.models.template import named_template
from autosloth.proof.reference import reference_of
from autosloth.proof.verify import verify_gguf
from autosloth.run import Run
from autosloth.settings import SFTSettings

pytestmark = pytest.mark.slow


def proven(folder, base, kinds, **lora):
    """The facts of the proof of a run folder in which these files were exported; whatever is wrong is raised."""
    settings = SFTSettings(model=str(base), storage=str(folder), run_name="run", quantizations=kinds)
    run = Run.create(settings)
    tiny_adapter(base, run.path("adapter"), **lora)
    reference_of(str(base), run.path("adapter"), run.fresh("reference"))
    write_gguf.__wrapped__(run)
    verify_gguf.__wrapped__(run)
    return run.facts["verify"]


def test_many_files_of_one_run_are_each_proven(tmp_path, engine):
    """Rows of 256, the least that k-quants pack; and the adapter alone."""
    base = tiny_model("llama", tmp_path / "base", hidden_size=256, intermediate_size=512)
    kinds = ["q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "adapter"]
    proof = proven(tmp_path, base, kinds)
    types = {file["file"].removeprefix("run-").removesuffix(".gguf"): file["type"] for file in proof["files"]}
    assert len(types) == 8 and (types["Q8_0"], types["Q4_K_M"], types["Q3_K_M"]) == ("Q8_0", "Q4_K", "Q3_K")
    assert [file["weights"]["whole_model"] for file in proof["files"]] == [True] * 7 + [False]
    assert all(file["weights"]["adapter_share"] == pytest.approx(1, abs=0.1) for file in proof["files"])


def test_the_real_vocabulary_of_llama_2_is_proven(tmp_path, engine, real_data):
    tokenizer = tmp_path / "tokenizer"
    fast_sentencepiece(real_data("llama2-tokenizer.model"), prefix=True).save_pretrained(tokenizer)
    shutil.copyfile(real_data("llama2-tokenizer.model"), tokenizer / "tokenizer.model")
    (tokenizer / "chat_template.jinja").write_text(named_template("mistral"))
    config = tokenizer / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_prefix_space": True}))
    base = tiny_model("mistral", tmp_path / "base", "float16", tokenizer=tokenizer)
    assert proven(tmp_path, base, ["q8_0"])["passed"]
