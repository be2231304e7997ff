"""The proof that an exported GGUF is the model that was trained: the same tokens, the same weights, the same distributions, the same end."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from .base import export_base
from .errors import VerifyError
from .gguf import lay_source
from .llama import llama_cpp
from .reference import reference_of
from .run import Run, say, stage
from .tokens import compare_tokens
from .weights import compare_weights

# By bits a weight: mean Kullback-Leibler divergence in nats (at most) and share of equal most likely tokens (at least).
# llama.cpp measures 0.0014 nats for Q8_0 on Llama 3 8B, 0.0055 for Q6_K, 0.011 for Q5_K_M, 0.031 for Q4_K_M and 0.10 for Q3_K_M
# (tools/perplexity/README.md): about five times that is more than the type. On AutoSloth's demo Q8_0 measures 1e-4.
LIMITS = {8: (0.01, 0.95), 6: (0.03, 0.93), 5: (0.06, 0.90), 4: (0.15, 0.85), 3: (0.5, 0.75), 2: (1.0, 0.60)}
FOUR_BIT_BASE = (
    0.09,
    0.10,
)  # added to them where the training saw an NF4 base, whose rounding the 16-bit weights do not have
NEAR_TIE = 0.02  # nats by which the file's most likely token may be less likely in the trained model and still agree
ANSWERS, ANSWER_TOKENS = 4, 64  # prompts that the file answers greedily; of the shortest that the trained model ended
SPARE_TOKENS = 8  # how much later than the trained model the file may end its answer
SHORT_FROM = 2e9  # bytes of a file beyond which a token takes seconds on two cores:
SHORT_POSITIONS = 48  # fewer positions, and an end that is looked for without generating


@stage("verify", reads=("publish_unverified",), after=("gguf",), facts=("verify",), outputs=("verify",))
def verify_gguf(run: Run) -> None:
    """Hold every GGUF against reference/ and the merged weights and record the figures. Raises VerifyError, unless the settings publish unverified files."""
    made = run.facts["export"]["gguf"]
    if not made:
        run.record("verify", passed=None, files=[])
        return say("verify: there is no GGUF to verify")
    base, told, files = export_base(run.settings, "verify"), run.fresh("verify"), []
    for file in made:
        path = run.path(file["path"])
        files.append(prove(path, run.path("reference"), base, run.path("adapter"), told / f"{path.stem}.weights.json"))
        say(verdict(files[-1]))
    facts = worst_of(files)
    run.record("verify", **facts)
    run.record("versions", llama_cpp_python=llama_cpp().__version__)  # compiled, maybe, after the training began
    if facts["passed"]:
        return say("verify: passed")
    failure = VerifyError(
        f"The GGUF does not answer like the trained model: {'; '.join(facts['failures'])}.",
        f"{cure(facts['failures'])} The adapter is sound; set `publish_unverified: true` to publish all the same.",
    )
    if not run.settings.publish_unverified:
        raise failure
    say(str(failure))


def verify_against(file: Path, model: str, adapter: Path | None) -> dict[str, Any]:
    """Hold any GGUF against any model in the transformers format, with an adapter of PEFT if one is given; the figures. Raises VerifyError, ModelError."""
    if not file.is_file():
        raise VerifyError(f"There is no file {file}.", "Give the path of a GGUF file.")
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        reference = Path(temporary, "reference")
        reference.mkdir()
        base = reference_of(model, adapter, reference)
        return prove(file, reference, base, adapter)


def prove(file: Path, reference: Path, base: Path, adapter: Path | None, told: Path | None = None) -> dict[str, Any]:
    """All figures of one file. told: where those of each tensor go. Raises VerifyError when the file cannot be read."""
    started = time.perf_counter()
    known = json.loads((reference / "rows.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        source = Path(temporary, "model")
        lay_source(source, base, adapter if adapter and (adapter / "tokenizer_config.json").is_file() else base)
        weights = compare_weights(file, source, adapter, told)
    facts = {"file": file.name, "type": coarsest(weights["types"]), "weights": weights}
    if weights["whole_model"]:
        facts |= compare_answers(file, known, reference / "logprobs.npy", short=file.stat().st_size > SHORT_FROM)
        facts["limits"] = limits(facts["type"], known["quantized"])
    failures = find_failures(facts)
    return {**facts, "failures": failures, "passed": not failures, "seconds": round(time.perf_counter() - started, 2)}


def coarsest(types: dict[str, int]) -> str:
    """The type of a file's tensors with the fewest bits."""
    return min(types, key=bits_of, default="F32")


def bits_of(kind: str) -> int:
    """Bits of a weight of this type, without those of scales.

    >>> bits_of("Q4_K"), bits_of("BF16")
    (4, 16)
    """
    return int(re.search(r"\d+", kind)[0])


def limits(kind: str, quantized: bool) -> dict[str, float]:
    """What `mean_kl` and `top1` may be at worst."""
    mean_kl, top1 = LIMITS[max(2, min(8, bits_of(kind)))]
    more, less = FOUR_BIT_BASE if quantized else (0.0, 0.0)
    return {"mean_kl": round(mean_kl + more, 4), "top1": round(top1 - less, 4)}


def compare_answers(file: Path, known: dict[str, Any], logprobs: Path, short: bool) -> dict[str, Any]:
    """How the file's tokens, distributions and answers compare with what is known of the model. Raises VerifyError when llama.cpp cannot read it."""
    import numpy

    rows, ended = known["rows"], shortest_ended(known)[: 1 if short else None]
    if short:
        rows = first_positions(rows, SHORT_POSITIONS)
    # All logits of the context are kept, so it is no longer than what is evaluated: 33 MB per 256 tokens of a 32k vocabulary.
    length = SPARE_TOKENS + max(
        [1, *map(len, rows), *(len(known["answers"][i]["prompt"]) + ANSWER_TOKENS for i in ended)]
    )
    options = {"n_ctx": length, "n_batch": length, "n_threads": os.cpu_count(), "logits_all": True, "verbose": False}
    try:
        model = llama_cpp().Llama(str(file), **options)
    except ValueError as error:
        raise VerifyError(f"{file} cannot be read by llama.cpp ({error}).", "Run `autosloth export` again.") from None
    try:
        facts = {"form": "short" if short else "full", **compare_tokens(model, known)}
        if rows:
            facts |= compare_distributions(model, rows, numpy.load(logprobs, mmap_mode="r"))
        answers = [] if short else [answer_alike(model, known, i) for i in ended]
        ends = [each["ended"] for each in answers] or [ends_next(model, known, i) for i in ended]
        seen = [end for end in ends if end is not None]  # one alone may hang on a near tie
        return facts | {"answers": answers, "eos": any(seen) if seen else None}
    finally:
        model.close()


def first_positions(rows: list[list[int]], count: int) -> list[list[int]]:
    """The first `count` positions of rows.

    >>> first_positions([[1, 2], [3, 4]], 3)
    [[1, 2], [3]]
    """
    kept, left = [], count
    for ids in rows:
        kept, left = [*kept, ids[:left]] if left > 0 else kept, left - len(ids)
    return kept


def compare_distributions(model: Any, rows: list[list[int]], logprobs: Any) -> dict[str, Any]:
    """Mean and greatest KL(trained || file) in nats and the share of equal most likely tokens, over all positions of the rows."""
    import numpy

    divergences, agreements, start = [], [], 0
    for ids in rows:
        trained = logprobs[start : start + len(ids)].astype(numpy.float64)
        start += len(ids)
        found = next_token_logprobs(model, ids)
        trained, found = trained[:, : found.shape[1]], found[:, : trained.shape[1]]  # either may be padded
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


def shortest_ended(known: dict[str, Any]) -> list[int]:
    """The numbers of the ANSWERS shortest answers that the trained model ended soon enough; where there are none, of the first answers."""
    answers = known["answers"]
    ended = [i for i, each in enumerate(answers) if each["answer"][-1:] and each["answer"][-1] in known["ends"]]
    short = [i for i in ended if len(answers[i]["answer"]) + SPARE_TOKENS <= ANSWER_TOKENS]
    ordered = sorted(short, key=lambda i: len(answers[i]["prompt"] + answers[i]["answer"]))
    return (ordered or list(range(len(answers))))[:ANSWERS]


def answer_alike(model: Any, known: dict[str, Any], number: int) -> dict[str, Any]:
    """One question, and the greedy answers of the trained model and of the file, side by side.

    ended: whether the file ends its answer at most SPARE_TOKENS later; None where the trained model did not.
    """
    prompt, answer = (known["answers"][number][part] for part in ("prompt", "answer"))
    answer = answer[:ANSWER_TOKENS]
    made: list[int] = []
    model.reset()
    for token in islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), len(answer) + SPARE_TOKENS - 1):
        made.append(token)
        if token in known["ends"]:
            break
    chats = [row["messages"] for row in known["texts"] if row["messages"]]
    texts = [model.detokenize(ids).decode(errors="replace").strip() for ids in (answer, made[: len(answer)])]
    trained_ended = answer[-1:] and answer[-1] in known["ends"]
    return {
        "question": chats[number][-2]["content"] if number < len(chats) else None,
        "trained": texts[0],
        "file": texts[1],
        "same": made[: len(answer)] == answer,
        "ended": made[-1] in known["ends"] if trained_ended else None,
    }


def ends_next(model: Any, known: dict[str, Any], number: int) -> bool | None:
    """Whether, after the trained model's answer, the file finds an end token the likeliest; None where that answer has no end."""
    prompt, answer = (known["answers"][number][part] for part in ("prompt", "answer"))
    if answer[-1:] and answer[-1] in known["ends"]:
        last = next_token_logprobs(model, prompt + answer[:-1])[-1]
        return bool(last[known["ends"]].max() >= last.max() - NEAR_TIE)
    return None


def find_failures(facts: dict[str, Any]) -> list[str]:
    """What differs more than it may, one phrase each."""
    weights = facts["weights"]["failures"]
    failures = [f"{len(weights)} tensors or values are wrong ({weights[0]})"] if weights else []
    if "limits" not in facts:
        return failures
    limits, wrong = facts["limits"], f"{facts['token_mismatches']} of {facts['texts']} texts"
    checks = [
        (facts["token_mismatches"] == 0, f"{wrong} become other tokens than in training ({facts['first_mismatch']!r})"),
        (facts["template"], "the chat template in the file is another one, or missing"),
        (facts["bos"] == facts["bos_trained"], f"a prompt has {facts['bos']} BOS, {facts['bos_trained']} in training"),
        (facts["eos"] is not False, "an answer that the trained model ends goes on without an end token"),
    ]
    if "mean_kl" in facts:
        checks += [
            (
                facts["mean_kl"] <= limits["mean_kl"],
                f"mean KL is {facts['mean_kl']:.3g} nats, above {limits['mean_kl']}",
            ),
            (facts["top1"] >= limits["top1"], f"top-1 agreement is {facts['top1']:.1%}, below {limits['top1']:.0%}"),
        ]
    return failures + [phrase for passed, phrase in checks if not passed]


# (what a failure's phrase holds, what to do about it), the deepest cause first
CURES = [
    ("the adapter does", "Export again: the adapter is not in the file as it was trained. If `sixteen_bit_model` is set, check that it is the base."),
    ("tensors or values", "Export again; if it fails again, the converter does not handle this model: please report it."),
    ("other tokens", "The tokenizer's files in adapter/ are not those of the base: train again with its repository whole, or choose another base."),
    ("chat template", "Export again: adapter/chat_template.jinja has changed, or was not there."),
    ("mean KL", "Choose a type of more bits, such as q8_0; if it was q8_0, llama.cpp does not compute this model right."),
    ("top-1", "Choose a type of more bits, such as q8_0; if it was q8_0, llama.cpp does not compute this model right."),
]  # fmt: skip


def cure(failures: list[str]) -> str:
    """What to do about the first of the causes that is among these failures."""
    every = "; ".join(failures)
    return next((todo for phrase, todo in CURES if phrase in every), "Do not use the file.")


def worst_of(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the run: of each the worst over its files, and all files beside them."""
    failures = [
        f"{each['file']}: {phrase}" if len(files) > 1 else phrase for each in files for phrase in each["failures"]
    ]
    worst = {"passed": not failures, "failures": failures, "files": files}
    for key, choose in (("token_mismatches", max), ("texts", max), ("mean_kl", max), ("max_kl", max), ("top1", min), ("positions", min)):  # fmt: skip
        found = [each[key] for each in files if key in each]
        worst[key] = choose(found) if found else None
    return worst


def verdict(facts: dict[str, Any]) -> str:
    """The figures of one file in a line."""
    weights = facts["weights"]
    share = "" if weights["adapter_share"] is None else f", {weights['adapter_share']:.3f} of the adapter"
    parts = [f"{weights['tensors']} tensors off by {weights['mean_error']:.2%} at worst{share}"]
    if "texts" in facts:
        parts.append(f"{facts['token_mismatches']} of {facts['texts']} texts tokenised differently")
    if "mean_kl" in facts:
        parts.append(
            f"mean KL {facts['mean_kl']:.2g} nats and top-1 {facts['top1']:.1%} over {facts['positions']} positions"
        )
    return f"verify: {facts['file']}: {', '.join(parts)}, in {facts['seconds']:.0f} s"
