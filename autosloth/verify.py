"""The proof that an exported GGUF answers like the model that was trained: same tokens, same distributions, same end."""

from __future__ import annotations

import json
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import VerifyError
from .llama import llama_cpp
from .run import Run, say, stage

# Mean Kullback-Leibler divergence in nats (at most) and share of equal most likely tokens (at least). Q8_0 of
# the very weights that were trained measures about 1e-4 and 0.98 to 1.00; the wide pair is for a base trained in
# 4 bit, whose NF4 rounding the 16-bit GGUF does not have.
LIMITS = {"exact": {"mean_kl": 0.01, "top1": 0.95}, "quantized": {"mean_kl": 0.10, "top1": 0.85}}
NEAR_TIE = 0.02  # nats by which the file's most likely token may be less likely in the trained model and still agree
ENDINGS = 3  # answers that are generated to see one end; a single one may hang on a near-tie
SPARE_TOKENS = 8  # how much later than the trained model the file may end its answer


@stage("verify", reads=("publish_unverified",), after=("gguf",), facts=("verify",))
def verify_gguf(run: Run) -> None:
    """Hold the GGUF against reference/ and record the figures. Raises VerifyError, unless the settings publish unverified files."""
    made = run.facts["export"]["gguf"]
    if not made:
        run.record("verify", passed=None)
        return say("verify: there is no GGUF to verify")
    facts = compare(run.path(made[0]["path"]), run.path("reference"))
    run.record("verify", **facts)
    run.record("versions", llama_cpp_python=llama_cpp().__version__)  # compiled, maybe, after the training began
    say(
        f"verify: {facts['token_mismatches']} of {facts['texts']} texts tokenised differently, mean KL {facts['mean_kl']:.2g} nats and top-1 {facts['top1']:.1%} over {facts['positions']} positions"
    )
    if facts["passed"]:
        return say("verify: passed")
    failure = VerifyError(
        f"The GGUF does not answer like the trained model: {'; '.join(facts['failures'])}.",
        "Do not use gguf/; the adapter is sound. Set `publish_unverified: true` to publish all the same.",
    )
    if not run.settings.publish_unverified:
        raise failure
    say(str(failure))


def compare(gguf: Path, reference: Path) -> dict[str, Any]:
    """The figures of one file: `token_mismatches`, `mean_kl`, `max_kl` (nats), `top1`, `bos`, `eos`, `failures`, `passed`."""
    import numpy

    started = time.perf_counter()
    known = json.loads((reference / "rows.json").read_text(encoding="utf-8"))
    logprobs = numpy.load(reference / "logprobs.npy", mmap_mode="r")
    ended = shortest_ended(known)
    # All logits of the context are kept, so it is no longer than what is evaluated: 33 MB per 256 tokens of a 32k vocabulary.
    context = SPARE_TOKENS + max(
        [len(ids) for ids in known["rows"]] + [len(prompt + answer) for prompt, answer in ended]
    )
    threads = os.cpu_count()
    try:
        model = llama_cpp().Llama(
            str(gguf), n_ctx=context, n_batch=context, n_threads=threads, logits_all=True, verbose=False
        )
    except ValueError as error:
        raise VerifyError(f"{gguf} cannot be read by llama.cpp ({error}).", "Run `autosloth export` again.") from None
    try:
        tokens = compare_tokens(model, known)
        figures = compare_distributions(model, known["rows"], logprobs)
        eos = any(ends_like(model, *pair, known["ends"]) for pair in ended) if ended else None
    finally:
        model.close()
    limits = LIMITS["quantized" if known["quantized"] else "exact"]
    facts = {"file": gguf.name, **tokens, **figures, "eos": eos, "limits": limits}
    failures = find_failures(facts)
    return {**facts, "failures": failures, "passed": not failures, "seconds": round(time.perf_counter() - started, 2)}


def find_failures(facts: dict[str, Any]) -> list[str]:
    """What differs more than it may, one phrase each."""
    limits, wrong = facts["limits"], f"{facts['token_mismatches']} of {facts['texts']} texts"
    checks = [
        (facts["token_mismatches"] == 0, f"{wrong} become other tokens than in training ({facts['first_mismatch']!r})"),
        (facts["bos"] == facts["bos_trained"], f"a prompt has {facts['bos']} BOS, {facts['bos_trained']} in training"),
        (facts["mean_kl"] <= limits["mean_kl"], f"mean KL is {facts['mean_kl']:.3g} nats, above {limits['mean_kl']}"),
        (facts["top1"] >= limits["top1"], f"top-1 agreement is {facts['top1']:.1%}, below {limits['top1']:.0%}"),
        (facts["eos"] is not False, "an answer that the trained model ends goes on without an end token"),
    ]
    return [phrase for passed, phrase in checks if not passed]


def compare_tokens(model: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Whether the file's tokenizer and chat template make the ids of training, of the held-out texts and of the prompts rendered by the file itself."""
    render = chat_renderer(model)
    pairs = [(row["text"], row["input_ids"]) for row in known["texts"]]
    prompts = [
        (render(row["messages"][:-1], row["tools"]), answer["prompt"])
        for row, answer in zip(known["texts"], known["answers"], strict=False)
    ]
    made = {text: model.tokenize(text.encode(), add_bos=False, special=True) for text, _ in pairs + prompts}
    wrong = [text for text, ids in pairs if made[text][: len(ids)] != ids] + [
        text for text, ids in prompts if made[text] != ids
    ]
    first = made[(prompts or pairs)[0][0]]
    trained = (prompts or pairs)[0][1]
    return {
        "texts": len(pairs) + len(prompts),
        "token_mismatches": len(wrong),
        "first_mismatch": wrong[0][:80] if wrong else None,
        "bos": leading(first, known["bos"]),
        "bos_trained": leading(trained, known["bos"]),
    }


def leading(ids: list[int], bos: int | None) -> int:
    """How many BOS tokens stand at the beginning."""
    return next((i for i, token in enumerate(ids) if token != bos), len(ids))


def chat_renderer(model: Any) -> Any:
    """A function from messages and tools to the text of a prompt, by the chat template that is in the file."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = model.metadata.get("tokenizer.chat_template")
    if template is None:
        raise VerifyError("The GGUF has no chat template.", "Set `chat_template` and export again.")
    text_of = {
        name: model.detokenize([token], special=True).decode() if token >= 0 else ""
        for name, token in (("bos", model.token_bos()), ("eos", model.token_eos()))
    }
    formatter = Jinja2ChatFormatter(template, eos_token=text_of["eos"], bos_token=text_of["bos"])

    def render(messages: list[dict[str, Any]], tools: list[dict] | None) -> str:
        text = formatter(messages=messages, tools=tools).prompt
        adds_bos = model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
        return text_of["bos"] + text if adds_bos and not text.startswith(text_of["bos"]) else text

    return render


def compare_distributions(model: Any, rows: list[list[int]], logprobs: Any) -> dict[str, Any]:
    """Mean and greatest KL(trained || file) in nats and the share of equal most likely tokens, over all positions of the rows."""
    import numpy

    divergences, agreements, start = [], [], 0
    for ids in rows:
        trained = logprobs[start : start + len(ids)].astype(numpy.float64)
        start += len(ids)
        found = next_token_logprobs(model, ids)[:, : trained.shape[1]]
        divergences.append((numpy.exp(trained) * (trained - found)).sum(-1))
        chosen = numpy.take_along_axis(trained, found.argmax(-1)[:, None], -1)[:, 0]
        agreements.append(trained.max(-1) - chosen <= NEAR_TIE)
    divergence, agreement = numpy.concatenate(divergences), numpy.concatenate(agreements)
    return {
        "positions": len(divergence),
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "top1": float(agreement.mean()),
    }


def next_token_logprobs(model: Any, ids: list[int]) -> Any:
    """float64 (len(ids), vocabulary): natural log of the probability of each token to come after each position."""
    import numpy

    model.reset()
    model.eval(ids)
    scores = numpy.asarray(model.scores[: len(ids)], dtype=numpy.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - numpy.log(numpy.exp(scores).sum(-1, keepdims=True))


def shortest_ended(known: dict[str, Any]) -> list[list[list[int]]]:
    """The prompts and answers, as ids, of the ENDINGS shortest answers that the trained model ended."""
    ended = [[a["prompt"], a["answer"]] for a in known["answers"] if a["answer"] and a["answer"][-1] in known["ends"]]
    return sorted(ended, key=lambda pair: len(pair[0] + pair[1]))[:ENDINGS]


def ends_like(model: Any, prompt: list[int], answer: list[int], ends: list[int]) -> bool:
    """Whether the file, generating greedily, ends an answer that the trained model ended, at most SPARE_TOKENS later."""
    model.reset()
    generated = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
    return any(token in ends for token in islice(generated, len(answer) + SPARE_TOKENS - 1))
