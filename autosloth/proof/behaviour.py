"""What a GGUF answers, run by llama.cpp, compared with the trained model: tokens, next-token distributions, answers and their ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..child_process import run_apart
from ..errors import VerifyError
from ..export import listening, llama_cpp
from .tokens import compare_tokens

NEAR_TIE = 0.02  # nats by which a token may be less likely than another and still count as alike, at the least
ANSWERS, ANSWER_TOKENS = 4, 64  # prompts that the file answers greedily; of the shortest that the trained model ended
SPARE_TOKENS = 8  # how much later than the trained model the file may end its answer
SHORT_FROM = 2e9  # bytes of a file beyond which a token takes seconds on two cores:
SHORT_POSITIONS = 48  # fewer positions, and an end that is looked for without generating


def behaviour_of(file: Path, reference: Path, short: bool, mean_kl: float) -> dict[str, Any]:
    """What `compare_behaviour` finds, in a process of its own, which llama.cpp may end. Raises VerifyError."""
    return apart(file, {"file": file, "reference": reference, "short": short, "mean_kl": mean_kl})


def vocabulary_of(file: Path, reference: Path) -> dict[str, Any]:
    """What `compare_tokens` finds of a file, which may be a GGUF's head alone, in a process of its own. Raises VerifyError."""
    return apart(file, {"file": file, "reference": reference, "vocabulary": True})


def apart(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The figures of a file by `main` in another process. Raises VerifyError."""
    llama_cpp()  # waits here, where it is said
    ended = run_apart("autosloth.proof.behaviour", request, online=False, GGML_NO_BACKTRACE="1")
    if ended.status:
        otherwise = (
            f"llama.cpp could not run {file.name} ({ended.reason}).",
            "The adapter and merged/ are sound; please report the model to llama.cpp, or leave this type out of `quantizations`.",
        )
        raise VerifyError(*ended.answer.get("error", otherwise))
    return ended.answer


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The figures of a file, found in this process. Raises VerifyError."""
    reference = Path(request["reference"])
    known = json.loads((reference / "rows.json").read_text(encoding="utf-8"))
    if request.get("vocabulary"):
        with opened(Path(request["file"]), vocab_only=True) as model:
            return compare_tokens(model, known)
    return compare_behaviour(
        Path(request["file"]), known, reference / "logprobs.npy", request["short"], request["mean_kl"]
    )


def compare_behaviour(file: Path, known: dict[str, Any], logprobs: Path, short: bool, mean_kl: float) -> dict[str, Any]:
    """How the file's tokens, distributions and answers compare with what is known of the model; mean_kl: nats that its type allows.

    Raises VerifyError when llama.cpp cannot read it.
    """
    import numpy

    rows, ended = known["rows"], shortest_ended(known)[: 1 if short else None]
    if short:
        rows = first_positions(rows, SHORT_POSITIONS)
    # All logits of the context are kept, so it is no longer than what is evaluated: 33 MB per 256 tokens of a 32k vocabulary.
    length = SPARE_TOKENS + max([1, *map(len, rows), *(room_for(known, i) for i in ended)])
    options = {"n_ctx": length, "n_batch": length, "n_threads": os.cpu_count(), "logits_all": True}
    with opened(file, **options) as model:
        facts = {"form": "short" if short else "full", **compare_tokens(model, known)}
        if rows:
            facts |= compare_distributions(model, rows, numpy.load(logprobs, mmap_mode="r"), mean_kl)
        answers = [] if short else [answer_alike(model, known, i) for i in ended]
        # An answer that took another turn on the way may end elsewhere, or not at all; after the trained model's own it has to.
        ends = [*(each["ended"] for each in answers), *(ends_next(model, known, i, mean_kl) for i in ended)]
        seen = [end for end in ends if end is not None]
        return facts | {"answers": answers, "eos": any(seen) if seen else None}


@contextlib.contextmanager
def opened(file: Path, **options: Any) -> Iterator[Any]:
    """A file as llama-cpp-python loads it. Raises VerifyError when it cannot be read."""
    try:
        with listening() as said:
            model = llama_cpp().Llama(str(file), verbose=False, **options)
    except ValueError as error:
        reasons = [line.strip() for line in said if "error" in line] or [str(error)]
        raise VerifyError(
            f"{file} cannot be read by llama.cpp ({reasons[0]}).", "Run `autosloth export` again."
        ) from None
    try:
        yield model
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


def compare_distributions(model: Any, rows: list[list[int]], logprobs: Any, mean_kl: float) -> dict[str, Any]:
    """KL(trained || file) in nats, mean and greatest, and the share of equal most likely tokens, over all positions of the rows, and what counts as a `tie`.

    A token that the trained model finds as likely as its first one, but for `near_tie`, is equal to it. mean_kl: nats that the file's type allows.
    """
    import numpy

    divergences, behind, start = [], [], 0
    for ids in rows:
        trained = logprobs[start : start + len(ids)].astype(numpy.float64)
        start += len(ids)
        found = next_token_logprobs(model, ids)
        trained, found = trained[:, : found.shape[1]], found[:, : trained.shape[1]]  # either may be padded
        divergence = (numpy.exp(trained) * (trained - found)).sum(-1)
        divergences.append(
            numpy.nan_to_num(divergence, nan=1e9, posinf=1e9)
        )  # where the file gives no numbers; JSON has none
        behind.append(trained.max(-1) - numpy.take_along_axis(trained, found.argmax(-1)[:, None], -1)[:, 0])
    divergence = numpy.concatenate(divergences)
    tie = near_tie(min(divergence.mean(), mean_kl))
    agreement = numpy.concatenate(behind) <= tie
    return {
        "positions": len(divergence),
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "top1": float(agreement.mean()),
        "tie": float(tie),
    }


def near_tie(mean_kl: float) -> float:
    """Nats by which two alike tokens part where the distributions diverge by mean_kl nats.

    Two tokens, one as likely as the other, whose logits are parted by d, diverge by d^2 / 8 nats, to second order.
    A model trained for a few steps has many such ties: it must not fail for them.

    >>> near_tie(0.0), near_tie(0.005)
    (0.02, 0.2)
    """
    return max(NEAR_TIE, math.sqrt(8 * max(mean_kl, 0.0)))


def next_token_logprobs(model: Any, ids: list[int]) -> Any:
    """float64 (len(ids), vocabulary): natural log of the probability of each token to come after each position."""
    import numpy

    model.reset()
    model.eval(ids)
    scores = numpy.asarray(model.scores[: len(ids)], dtype=numpy.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - numpy.log(numpy.exp(scores).sum(-1, keepdims=True))


def shortest_ended(known: dict[str, Any]) -> list[int]:
    """The numbers of the ANSWERS shortest answers that the trained model ended soon enough, else of its shortest that it ended; where there are none, of the first answers."""
    answers = known["answers"]
    ended = [i for i in range(len(answers)) if is_ended(known, i)]
    ordered = sorted(ended, key=lambda i: len(answers[i]["prompt"] + answers[i]["answer"]))
    short = [i for i in ordered if len(answers[i]["answer"]) + SPARE_TOKENS <= ANSWER_TOKENS]
    return (short or ordered[:1] or list(range(len(answers))))[:ANSWERS]


def is_ended(known: dict[str, Any], number: int) -> bool:
    """Whether the trained model ended this answer."""
    answer = known["answers"][number]["answer"]
    return bool(answer) and answer[-1] in known["ends"]


def room_for(known: dict[str, Any], number: int) -> int:
    """Tokens of this prompt with what the file answers, or with the trained model's whole answer, if its end is looked for."""
    prompt, answer = (len(known["answers"][number][part]) for part in ("prompt", "answer"))
    return prompt + max(ANSWER_TOKENS, answer if is_ended(known, number) else 0)


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
    texts = [
        model.detokenize(ids).decode(errors="replace").strip() for ids in (answer, made[: len(answer)], prompt[-40:])
    ]
    trained_ended = answer[-1:] and answer[-1] in known["ends"]
    return {
        "question": chats[number][-2]["content"] if number < len(chats) else texts[2],
        "trained": texts[0],
        "file": texts[1],
        "same": made[: len(answer)] == answer,
        "ended": made[-1] in known["ends"] if trained_ended else None,
    }


def ends_next(model: Any, known: dict[str, Any], number: int, mean_kl: float) -> bool | None:
    """Whether, after the trained model's answer, the file finds an end token the likeliest; None where that answer has no end.

    Another token may be likelier by `near_tie`. A file that knows no end is tens of nats away.
    """
    prompt, answer = (known["answers"][number][part] for part in ("prompt", "answer"))
    if is_ended(known, number):
        last = next_token_logprobs(model, prompt + answer[:-1])[-1]
        return bool(last[known["ends"]].max() >= last.max() - near_tie(mean_kl))
    return None
