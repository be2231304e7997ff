"""The GGUF is what llama.cpp's own converter makes of the merged model, without a merged copy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autosloth import gguf, llama
from autosloth.errors import ExportError
from autosloth.run import Run, read_json

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
    command = [sys.executable, "-c", READ, llama.fetch_converter() / "gguf-py", path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: (kind, content) for name, kind, content in map(str.split, lines)}


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
        llama.fetch_converter() / "convert_hf_to_gguf.py",
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


def test_the_modelfile_names_the_file_and_the_end_token(finished):
    text = (finished / "gguf" / "Modelfile").read_text()
    assert text.startswith("FROM ./short-Q8_0.gguf\n") and text.endswith('PARAMETER stop "</s>"\n')
    assert '### Response:\n"""' in text, "the prompt must end as in training, with a line break"


CHATS = [
    [{"role": "user", "content": "One?"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
    ],
]


@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "system", "two turns"])
@pytest.mark.parametrize("name", ["alpaca", "mistral", "zephyr"])
def test_the_template_for_ollama_renders_what_was_trained(name, chat):
    """Go's template language is read as far as these templates use it; Ollama adds the BOS token itself."""
    import jinja2

    folder = Path(gguf.__file__).parent / "templates" / "chat"
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (folder / f"{name}.jinja").read_text().rstrip("\n")
    )
    trained = jinja.render(messages=chat, bos_token="", eos_token="</s>", add_generation_prompt=True)
    assert render_go((folder / f"{name}.ollama").read_text(), chat) == trained


def render_go(text, messages):
    """A Go template of range, if, else, eq, assignment of $system and fields, by way of jinja2."""
    import jinja2

    swaps = {
        "{{ range .Messages }}": "{% for m in messages %}",
        '{{ if eq .Role "system" }}': "{% if m.role == 'system' %}",
        '{{ else if eq .Role "user" }}': "{% elif m.role == 'user' %}",
        '{{ else if eq .Role "assistant" }}': "{% elif m.role == 'assistant' %}",
        "{{ end }}{{ end }}": "{% endif %}{% endfor %}",
        "{{ end }}": "{% endfor %}",
        "{{ .Content }}": "{{ m.content }}",
        "{{ .Role }}": "{{ m.role }}",
        '{{ $system := "" }}': "{% set ns = namespace(system='') %}",
        '{{ $system = "" }}': "{% set ns.system = '' %}",
        '{{ $system = printf "%s\\n\\n" .Content }}': "{% set ns.system = m.content + '\\n\\n' %}",
        "{{ $system }}": "{{ ns.system }}",
    }
    for go, jinja in swaps.items():
        text = text.replace(go, jinja)
    return jinja2.Environment(keep_trailing_newline=True).from_string(text).render(messages=messages)


def test_the_file_does_not_carry_the_name_of_a_temporary_folder(finished):
    assert b".source-" not in next((finished / "gguf").glob("*.gguf")).read_bytes()


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
