"""Adapters that start inside the base: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) take s B0 A0 out of each weight and train it.

What is trained belongs to that rest of the base, not to the base: the start (A0, B0) stays with each checkpoint, and the finished adapter is
saved as a plain one on the base itself, of twice the rank: W + s (B A - B0 A0).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .adapter import NAME

# Names of PEFT. A whole singular value decomposition of a 7B's weights takes many minutes; in these the rest of the base takes up what the quick one misses.
STARTS = {"default": True, "pissa": "pissa_niter_16", "olora": "olora"}
FILE = "start.safetensors"  # in a checkpoint


def keep_start(model: Any) -> None:
    """Note where the adapter of a model starts; PEFT, which has taken it out of the base by now, is told that it is plain, lest a copy of it were taken out again."""
    from peft import get_peft_model_state_dict

    model.peft_config[NAME].init_lora_weights = True
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    model.adapter_start = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}


def save_start(model: Any, checkpoint: Path) -> None:
    """Write the start into a checkpoint, where the model has one."""
    from safetensors.torch import save_file

    if start := getattr(model, "adapter_start", None):
        save_file(start, checkpoint / FILE)


def take_start(model: Any, checkpoint: Path) -> None:
    """Let the base be the rest that a checkpoint was trained on: what this machine took out of it goes back, and what was taken out then is taken out.

    On the same machine both are the same to the bit. Raises ModelError where the checkpoint tells of no start.
    """
    from safetensors.torch import load_file

    now = getattr(model, "adapter_start", None)
    if now is None:
        return
    if not (checkpoint / FILE).is_file():
        raise ModelError(f"{checkpoint} does not tell where its adapter started.", "Delete it and run again: the training goes on from the checkpoint before.")  # fmt: skip
    then = load_file(checkpoint / FILE)
    if any(not weight.equal(then[name]) for name, weight in now.items()):
        exchange(model, now, then)
        model.adapter_start = then


def exchange(model: Any, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Add s (B0 A0 of now - B0 A0 of then) to the weights of the base, summed in float32."""
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                product = [start[f"{path}.lora_B.weight"] @ start[f"{path}.lora_A.weight"] for start in (now, then)]
                change = (product[0] - product[1]).to(weight.device) * layer.scaling[NAME]
                weight.copy_(weight.float() + (change.T if layer.fan_in_fan_out else change))


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT does, as a plain one on the base, wherever it started."""
    from safetensors.torch import save_file

    start = getattr(model, "adapter_start", None)
    if not start:
        model.save_pretrained(folder)
        return
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        kept = Path(temporary, "start")  # which PEFT takes for an adapter's name
        kept.mkdir()
        save_file(start, kept / "adapter_model.safetensors")
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(kept))
