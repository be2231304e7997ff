"""Every GGUF is held against the trained model: tokens, tensors, next-token distributions, answers.

What may differ, and by how much, is decided here too.
"""

from .behaviour import opened
from .reference import teacher_forced, write_reference
from .tensors import compare_weights
from .verdict import proof_rows
from .verify import refuse_other_tokens, refuse_unproven, verify_file, verify_gguf

__all__ = [
    "compare_weights",
    "opened",
    "proof_rows",
    "refuse_other_tokens",
    "refuse_unproven",
    "teacher_forced",
    "verify_file",
    "verify_gguf",
    "write_reference",
]
