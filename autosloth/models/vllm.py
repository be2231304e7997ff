"""Answers by vLLM in place of the batches of generate.py, where Unsloth loaded the model with it (`fast_inference`).

Written to Unsloth 2026.10.9's and vLLM's documented interfaces; on a machine without a GPU it cannot run, so `generate.checked` compares
its answers with the model's own before it is trusted.
"""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

from ..errors import ModelError
from ..hardware import first_gpu
from ..settings import SPINSettings
from .decoding import Decoding


def refuse_without_vllm(settings: SPINSettings) -> None:
    """Raises ModelError where `fast_inference` is set and vLLM is not installed, or there is no GPU."""
    if not settings.fast_inference:
        return
    gpu = first_gpu()
    if gpu is None or not importlib.util.find_spec("vllm"):
        what = "there is no GPU" if gpu is None else "vLLM is not installed"
        raise ModelError(f"`fast_inference` is set, and {what}.", "Set `fast_inference: false`, or install vllm on a GPU machine.")  # fmt: skip


def vllm_answers(model: Any, prompts: list[list[int]], decoding: Decoding, ends: list[int]) -> list[list[int]]:
    """The ids after each prompt, up to and with the end token; of the adapter as it is now, which vLLM knows nothing of unless it is named."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=decoding.temperature, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, seed=decoding.seed + number,
            max_tokens=decoding.max_new_tokens, stop_token_ids=ends, detokenize=False,
        )
        for number in range(len(prompts))
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answered = model.vllm_engine.generate(asked, sampling, lora_request=model.load_lora(folder), use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in answered]
