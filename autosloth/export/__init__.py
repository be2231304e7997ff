"""The adapter is merged into the 16-bit base while it is written as 16-bit safetensors or as GGUF files.

llama.cpp, whose converter decides the form of a GGUF, is fetched and compiled here.
"""

from .convert import untie
from .converter import converter_class, unpacked
from .gguf import adapter_alone, gguf_before, head_of, lay_source, refuse_unconvertible, size_in_bases, write_gguf
from .llama import compile_llama_cpp, compiled, fetch_converter, listening, llama_cpp, refuse_unknown_architecture
from .merge import refuse_unreadable, write_merged

__all__ = [
    "adapter_alone",
    "compile_llama_cpp",
    "compiled",
    "converter_class",
    "fetch_converter",
    "gguf_before",
    "head_of",
    "lay_source",
    "listening",
    "llama_cpp",
    "refuse_unconvertible",
    "refuse_unknown_architecture",
    "refuse_unreadable",
    "size_in_bases",
    "unpacked",
    "untie",
    "write_gguf",
    "write_merged",
]
