"""Whether it is the file, its type's rounding or llama.cpp's arithmetic, where every weight is right and the distributions part all the same.

The same model is written as a GGUF that does not round, and run beside. A model that was hardly trained, or one that sends tokens to
experts, answers otherwise at some positions after the least rounding; one that llama.cpp computes otherwise does so in any type.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..child_process import run_apart
from ..export import fetch_converter
from ..output import say
from ..weights import TOLD
from .behaviour import SHORT_FROM, behaviour_of
from .verdict import limits


def explain(
    facts: dict[str, Any], source: Path, adapter: Path | None, reference: Path, quantized: bool
) -> dict[str, Any]:
    """What `facts` lack: `cause` (rounding, arithmetic, base, or None where it could not be found out) and `unrounded` (type, mean_kl, top1, or why it was not made).

    source: as `lay_source` makes it; quantized: whether the model was trained in 4 bit, whose rounding the 16-bit base does not have. Where rounding is the cause, `limits` are wider: see `limits`. Raises VerifyError.
    """
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    kind = "f32" if size <= SHORT_FROM else "auto"
    say(
        f"verify: every weight of {facts['file']} is right, and it answers otherwise: asking the same model without rounding"
    )
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        path = Path(temporary, "unrounded.gguf")
        request = {
            "converter": fetch_converter(),
            "source": source,
            "adapter": adapter,
            "name": source.name,
            "files": {kind: path},
        }
        ended = run_apart("autosloth.export.convert", request, online=(source / TOLD).is_file())
        if ended.status:
            what = (ended.answer.get("error") or [ended.reason])[0]
            return {"cause": None, "unrounded": {"not_made": what}}
        allowed = limits("F32", quantized)
        found = behaviour_of(path, reference, facts["form"] == "short", allowed["mean_kl"])
    alike = found["mean_kl"] <= allowed["mean_kl"] and found["top1"] >= allowed["top1"]
    told = {
        "type": "F32" if kind == "f32" else "16 bit",
        "mean_kl": found["mean_kl"],
        "top1": found["top1"],
        "limits": allowed,
    }
    if not alike:
        return {"cause": "base" if quantized else "arithmetic", "unrounded": told}
    return {"cause": "rounding", "unrounded": told, "limits": limits(facts["type"], quantized, rounded=True)}
