"""llama.cpp's own converter and quantiser, and what a GGUF file holds, each in a process of its own."""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys

from autosloth.export import llama

CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
options, name, files = sys.argv[2].split(), sys.argv[3], sys.argv[4:]
for source, target, kind in zip(files[::3], files[1::3], files[2::3]):
    sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", target, "--outtype", kind, *options, "--model-name", name]
    runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""

QUANTIZE = """
import ctypes, sys
import llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""

READ = """
import sys
sys.path.insert(0, sys.argv[1])
import hashlib
from autosloth.proof.tensors import read_gguf
for path in sys.argv[2:]:
    file = read_gguf(path)
    tensors = {tensor.name: (tensor.tensor_type.name, hashlib.sha256(tensor.data.tobytes()).hexdigest()) for tensor in file.tensors}
    fields = [field for field in file.fields.values() if not field.name.startswith("GGUF.")]
    ends = [field.offset for field in fields[1:]] + [file.tensors[0].field.offset]
    known = []
    for field, end in zip(fields, ends):
        content = file.data[field.offset:end].tobytes()
        known.append([field.name, hashlib.sha256(content).hexdigest() if field.types[0].name == "ARRAY" else field.contents()])
    print((tensors, sorted(known)))
"""

GENERAL = """
import sys
sys.path.insert(0, sys.argv[1])
from gguf import GGUFReader
print({name: field.contents() for name, field in GGUFReader(sys.argv[2]).fields.items() if name.startswith("general.")})
"""

NAMED = '        res = json.loads((Path(__file__).parents[1] / "named.json").read_text()).get(chkhsh)\n'


def naming(folder, model, pre):
    """A copy of the converter that knows how the tokenizer of a model splits words (`pre`, in llama.cpp's words), as its authors enter a new one.

    It knows published byte-level tokenizers by the hash of what they make of one text; a small one is not among them.
    """
    from transformers import AutoTokenizer

    shutil.copytree(llama.fetch_converter(), folder)
    base = folder / "conversion" / "base.py"
    source = base.read_text(encoding="utf-8")
    assert source.count("        res = None\n") == 1
    base.write_text(source.replace("        res = None\n", NAMED), encoding="utf-8")
    text = ast.literal_eval(re.search(r"chktxt = ('.*')\n", source)[1])
    ids = AutoTokenizer.from_pretrained(model).encode(text)
    (folder / "named.json").write_text(json.dumps({hashlib.sha256(str(ids).encode()).hexdigest(): pre}))
    return folder


def converted(*files, options="", name="tiny", converter=None):
    """Make GGUF files by llama.cpp's converter: (source folder, target, type) each."""
    parts = [part for file in files for part in file]
    run(CONVERT, converter or llama.fetch_converter(), options, name, *parts)


def quantized(source, target, kind):
    """Make a GGUF file of a type of another one, by llama.cpp's quantiser."""
    run(QUANTIZE, source, target, kind)


def held(*paths):
    """What each GGUF file holds, by the reader that comes with the converter: {name: (type, hash of the bytes)}, and what it says of itself.

    Of lists, which that reader is slow to read, the hash is told.
    """
    return list(map(ast.literal_eval, run(READ, llama.fetch_converter() / "gguf-py", *paths).splitlines()))


def tensors(path):
    """{name: (type, hash of the bytes)} of a GGUF file."""
    return held(path)[0][0]


def metadata(path):
    """What a GGUF file says of itself."""
    return held(path)[0][1]


def general(path):
    """What a GGUF file says of whose it is and what it was made from: its fields `general.*`, by the converter's reader."""
    return ast.literal_eval(run(GENERAL, llama.fetch_converter() / "gguf-py", path))


def run(script, *arguments):
    """What a script says."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
