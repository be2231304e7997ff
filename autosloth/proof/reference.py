"""reference/: what the trained model answers and how its tokenizer splits texts, saved while it is loaded, so that a file can be compared later.

rows.json: `strings` (texts of every kind and their ids), `texts` (held-out rows: `messages`, `tools`, `text`, `input_ids`), the
model's own greedy `answers` (`prompt`, `answer`, as ids), `template`, `bos`, `ends` (ids that end an answer), `end`, `quantized`
(loaded in 4 bit), and `rows`, the ids that logprobs.npy goes with. logprobs.npy: float32 (positions, vocabulary), natural log of
each next token's probability; missing where the model was never loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..demo import demo_base
from ..errors import ModelError
from ..hardware import GB
from ..hub_client import model_errors
from ..models import end_tokens, growth, model_files, opening, render_chat, stored_as, text_class, weights_gb
from ..output import hush_libraries, say
from ..run import write_json
from ..weights import whole_blocks
from .tokens import encoded, token_strings

POSITIONS = 256  # next-token distributions kept for the proof: 33 MB with a vocabulary of 32,000
QUESTIONS = [
    "What is the capital of France?", "Write one sentence about sloths.", "Add 17 and 25.", "Translate to German: good morning.",
    "Name three primary colours.", "Write a Python function that reverses a list.", "Why is the sky blue?", "List the days of the week.",
]  # fmt: skip
ANSWER_TOKENS = 32  # of each question to a model that nothing else is known of


def write_reference(
    folder: Path,
    tokenizer: Any,
    texts: list,
    answers: list,
    ends: list[int],
    quantized: bool = False,
    rows: Iterable = (),
) -> None:
    """Write the folder, which exists. rows: (ids, log-probabilities) as they are computed, one row at a time."""
    import numpy

    rows = list(rows)
    if rows:
        numpy.save(folder / "logprobs.npy", numpy.concatenate([logprobs for _, logprobs in rows]))
    known = {"strings": encoded(tokenizer, token_strings(tokenizer)), "texts": texts, "rows": [ids for ids, _ in rows]}
    known |= {"answers": answers, "template": tokenizer.chat_template, "bos": tokenizer.bos_token_id, "ends": ends}
    write_json(folder / "rows.json", known | {"end": tokenizer.eos_token, "quantized": quantized})


def teacher_forced(model: Any, rows: Iterable[list[int]]) -> Iterable[tuple[list[int], Any]]:
    """(ids, log-probabilities of each next token) of rows, POSITIONS in all; the model in the state in which it is given."""
    import torch

    left = POSITIONS
    for ids in rows:
        ids = ids[:left]
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        yield ids, torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
        left -= len(ids)
        if left <= 0:
            return


def reference_of(model: str, adapter: Path | None, folder: Path) -> Path:
    """Write the reference of any model (a folder or a Hub id) with an adapter, if one is given; returns the model's folder. Raises ModelError.

    Its answers to QUESTIONS are what is compared; where the memory is too small to load it, only its tokens are.
    """
    hush_libraries()
    import psutil
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    source = demo_base() if model == "demo" else model_files(model)
    own = adapter and (adapter / "tokenizer_config.json").is_file()
    with model_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(adapter if own else source, trust_remote_code=False)
    free, size = psutil.virtual_memory().available / GB, weights_gb(str(source)) * growth(str(source))
    if size * 1.2 > free:
        say(
            f"verify: {model} ({size:.1f} GB) does not fit into memory ({free:.1f} GB free), so its answers are not compared"
        )
        write_reference(folder, tokenizer, questions(tokenizer), [], ends=[])
        return source
    with model_errors(model), torch.no_grad():
        loaded = load_to_answer(source, adapter)
        texts = questions(tokenizer)
        answers = [{"prompt": row["input_ids"], "answer": answer_greedily(loaded, row["input_ids"])} for row in texts]
        rows = teacher_forced(loaded, (pair["prompt"] + pair["answer"] for pair in answers))
        write_reference(folder, tokenizer, texts, answers, end_tokens(loaded, tokenizer), rows=rows)
    return source


def questions(tokenizer: Any) -> list[dict[str, Any]]:
    """QUESTIONS as held-out rows: rendered by the tokenizer's chat template where it has one."""
    rows = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = (
            render_chat(tokenizer, chat, answer_next=True) if tokenizer.chat_template else opening(tokenizer) + question
        )
        answer = {"role": "assistant", "content": ""}
        rows.append({"messages": [*chat, answer] if tokenizer.chat_template else None, "tools": None, "text": text})
    return [{**row, **one} for row, one in zip(rows, encoded(tokenizer, [row["text"] for row in rows]), strict=True)]


def load_to_answer(source: Path, adapter: Path | None) -> Any:
    """The model by transformers, as the class that its config.json names, in the precision of its weights, unpacked where they are packed, with the adapter of PEFT on it.

    Raises ModelError where the adapter has a matrix for which the model has no layer: PEFT would leave it out with a warning.
    """
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    loader = text_class(source, str(source)) or AutoModelForCausalLM
    kind = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}.get(stored_as(str(source)))
    unpacked = {"quantization_config": kind(dequantize=True)} if kind else {}
    with whole_blocks():
        model = loader.from_pretrained(source, dtype="auto", trust_remote_code=False, **unpacked)
    if adapter:
        from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

        model = PeftModel.from_pretrained(model, adapter)
        held, taken = load_peft_weights(str(adapter), device="cpu"), get_peft_model_state_dict(model)
        if lost := sorted(name for name in held if ".lora_" in name and name not in taken):
            raise ModelError(
                f"The adapter {adapter} does not fit {source}, which has no layer for {lost[0]} ({len(lost)} of {len(held)} matrices).",
                "Name the model that the adapter was trained on.",
            )
    return model.eval()


def answer_greedily(model: Any, prompt: list[int]) -> list[int]:
    """The ANSWER_TOKENS most likely ids after the prompt, or fewer where the model ends."""
    import torch

    ids = torch.tensor([prompt])
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, pad_token_id=0, **plain
    )
    return made[0, len(prompt) :].tolist()
