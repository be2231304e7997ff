"""The GGUF is what llama.cpp's own converter makes of the merged model, without a merged copy."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autosloth import gguf
from autosloth.errors import ExportError
from autosloth.run import Run, read_json

ROOT = Path(__file__).parents[1]

READ = """
import sys
sys.path.insert(0, sys.argv[1])
import hashlib
from gguf import GGUFReader
for tensor in GGUFReader(sys.argv[2]).tensors:
    print(tensor.name, tensor.tensor_type.name, hashlib.sha256(tensor.data.tobytes()).hexdigest())
"""


def tensors(path):
    """{name: (type, hash of the bytes)} of a GGUF file, by the reader that comes with the converter."""
    command = [sys.executable, "-c", READ, gguf.fetch_converter() / "gguf-py", path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: (kind, content) for name, kind, content in map(str.split, lines)}


def test_the_converter_is_of_the_pinned_llama_cpp_python():
    assert f"llama-cpp-python=={gguf.LLAMA_CPP_PYTHON}\n" in (ROOT / "requirements.txt").read_text()
    folder = gguf.fetch_converter()
    assert (folder / "convert_hf_to_gguf.py").is_file() and (folder / "gguf-py" / "gguf" / "__init__.py").is_file()


def test_another_source_package_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOSLOTH_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(ExportError, match="could not be fetched"):
        gguf.fetch_converter()
    assert list(tmp_path.iterdir()) == []


def test_the_streamed_file_holds_the_same_bits_as_the_merged_model_converted(engine, finished, base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), finished / "adapter"
    ).merge_and_unload().save_pretrained(tmp_path)
    for path in gguf.tokenizer_of(finished / "adapter"):
        shutil.copyfile(path, tmp_path / path.name)
    command = [
        sys.executable,
        gguf.fetch_converter() / "convert_hf_to_gguf.py",
        tmp_path,
        "--outtype",
        "q8_0",
        "--outfile",
        tmp_path / "merged.gguf",
    ]
    subprocess.run(command, check=True, capture_output=True)
    ours = tensors(next((finished / "gguf").glob("*.gguf")))
    assert ours == tensors(tmp_path / "merged.gguf")
    assert {kind for kind, _ in ours.values()} == {"Q8_0", "F32"}


def test_the_facts_name_the_file_its_size_and_what_it_took(finished):
    (made,) = read_json(finished / "facts.json")["export"]["gguf"]
    path = finished / made["path"]
    assert made["type"] == "Q8_0" and path.name == "short-Q8_0.gguf"
    assert made["bytes"] == path.stat().st_size and made["seconds"] > 0 and 0.1 < made["peak_ram_gb"] < 4


def test_nothing_but_the_file_and_the_modelfile_is_left(finished):
    assert sorted(path.name for path in (finished / "gguf").iterdir()) == ["Modelfile", "short-Q8_0.gguf"]


def test_the_modelfile_speaks_the_template_that_was_trained(finished):
    text = (finished / "gguf" / "Modelfile").read_text()
    assert text.startswith("FROM ./short-Q8_0.gguf\n")
    assert "### Instruction:\n{{ .Content }}" in text and re.search(r"### Response:\n?\"\"\"", text)


def test_a_failed_conversion_is_named_and_leaves_no_file(copied):
    (copied / "adapter" / "tokenizer.json").write_text("{}")
    (copied / "adapter" / "tokenizer.model").write_bytes(b"no tokenizer")
    with pytest.raises(ExportError, match="conversion to GGUF failed"):
        gguf.write_gguf.again(Run.open(copied))
    assert list((copied / "gguf").iterdir()) == []


def test_without_quantizations_there_is_no_gguf(copied, cli):
    run = Run.open(copied)
    run.settings = run.settings.model_copy(update={"quantizations": []})
    gguf.write_gguf(run)
    assert run.facts["export"]["gguf"] == [] and list((copied / "gguf").iterdir()) == []
