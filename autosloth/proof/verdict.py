"""The verdict on a GGUF: the limits that it must keep, what is wrong and what to do about it, and the table that shows it."""

from __future__ import annotations

import math
import re
from typing import Any

from ..output import or_nothing, render_html, show
from .tally import TOO_LARGE

# By bits a weight: mean Kullback-Leibler divergence in nats (at most) and share of equal most likely tokens (at least).
# llama.cpp measures 0.0014 nats for Q8_0 on Llama 3 8B, 0.0055 for Q6_K, 0.011 for Q5_K_M, 0.031 for Q4_K_M and 0.10 for Q3_K_M
# (tools/perplexity/README.md): about five times that is more than the type. On AutoSloth's demo Q8_0 measures 1e-4.
LIMITS = {8: (0.01, 0.95), 6: (0.03, 0.93), 5: (0.06, 0.90), 4: (0.15, 0.85), 3: (0.5, 0.75), 2: (1.0, 0.60)}
FOUR_BIT_BASE = (
    0.09,
    0.10,
)  # added to them where the training saw an NF4 base, whose rounding the 16-bit weights do not have


def coarsest(types: dict[str, int]) -> str:
    """The type of a file's tensors with the fewest bits."""
    return min(types, key=bits_of, default="F32")


def bits_of(kind: str) -> int:
    """Bits of a weight of this type, without those of scales.

    >>> bits_of("Q4_K"), bits_of("BF16")
    (4, 16)
    """
    return int(re.search(r"\d+", kind)[0])


def limits(kind: str, quantized: bool, rounded: bool = False) -> dict[str, float]:
    """What `mean_kl` and `top1` may be at worst.

    rounded: every weight is right and the model answers alike without rounding. Then the mean KL may be that of the next coarser
    type, and `top1` what it is: at a small divergence it tells how many positions were undecided before.
    """
    bits = max(2, min(8, bits_of(kind)))
    mean_kl, top1 = LIMITS[max((fewer for fewer in LIMITS if fewer < bits), default=2)] if rounded else LIMITS[bits]
    more, less = FOUR_BIT_BASE if quantized else (0.0, 0.0)
    return {"mean_kl": round(mean_kl + more, 4), "top1": 0.0 if rounded else round(top1 - less, 4)}


def parts_only(facts: dict[str, Any]) -> bool:
    """Whether nothing is wrong with a file but what its distributions tell."""
    failures = find_failures(facts)
    return bool(failures) and all(failure.startswith((KL, TOP1)) for failure in failures)


def find_failures(facts: dict[str, Any]) -> list[str]:
    """What differs more than it may, one phrase each."""
    weights = facts["weights"]
    where = "" if is_model(facts) else ALONE
    failures = [f"{where}{wrong_of(weights)} ({weights['failures'][0]})"] if weights["failures"] else []
    if is_another(weights):
        file, model = weights["architectures"]
        failures = [f"{ANOTHER}: that of the file is {file}, that of the model {model}; {wrong_of(weights)}"]
    if "limits" not in facts:
        return failures
    limits = facts["limits"]
    if facts.get("cause") in DEEPER:
        told = facts["unrounded"]
        found = f"without rounding ({told['type']}) the mean KL is {told['mean_kl']:.3g} nats and top-1 agreement {told['top1']:.1%}"
        failures.append(f"{DEEPER[facts['cause']]}: {found}")
    failures += wrong_tokens(facts)
    checks = [(facts["eos"] is not False, "an answer that the trained model ends goes on without an end token")]
    if "mean_kl" in facts:
        checks += [
            (
                facts["mean_kl"] <= limits["mean_kl"],
                f"{KL} is {facts['mean_kl']:.3g} nats, above {limits['mean_kl']}",
            ),
            (facts["top1"] >= limits["top1"], f"{TOP1} is {facts['top1']:.1%}, below {limits['top1']:.0%}"),
        ]
    return failures + [phrase for passed, phrase in checks if not passed]


def wrong_tokens(facts: dict[str, Any]) -> list[str]:
    """What differs of a file's tokens and chat template, one phrase each."""
    wrong = f"{facts['token_mismatches']} of {facts['texts']} texts"
    checks = [
        (facts["token_mismatches"] == 0, f"{wrong} become other tokens than in training ({facts['first_mismatch']!r})"),
        (facts["template"], "the chat template in the file is another one, or missing"),
        (facts["bos"] == facts["bos_trained"], f"a prompt has {facts['bos']} BOS, {facts['bos_trained']} in training"),
    ]
    return [phrase for passed, phrase in checks if not passed]


def wrong_of(weights: dict[str, Any]) -> str:
    """How many tensors of a file are wrong, or that other values are."""
    wrong = weights["wrong_tensors"]
    return f"{wrong} of {weights['tensors']} tensors are wrong" if wrong else "values or tensors together are wrong"


def is_model(facts: dict[str, Any]) -> bool:
    """Whether a file holds a whole model, and not an adapter alone."""
    return facts["weights"].get("whole_model", True)


def is_another(weights: dict[str, Any]) -> bool:
    """Whether a file of which something is wrong is of another architecture than the model."""
    file, model = weights["architectures"]
    return file != model and bool(weights["failures"])


# What it may be, where the same model parts from the trained one without rounding too.
DEEPER = {
    "named": "the base named as `sixteen_bit_model` answers otherwise than the one that was trained, or llama.cpp computes it otherwise",
    "arithmetic": "llama.cpp computes this model otherwise than it was trained",
    "base": "the 16-bit base answers otherwise than its 4-bit form that was trained, or llama.cpp computes it otherwise",
}
KL, TOP1 = "mean KL", "top-1 agreement"  # how the failures begin that the distributions tell
ANOTHER = "it is of another architecture"
ALONE = "in the adapter's own file "
# (what a failure's phrase holds, what to do about it), the deepest cause first
CURES = [
    (ANOTHER, "Name the model that the file was made of; or make the file again, of this one."),
    (ALONE, "Export again; if it fails again, llama.cpp cannot make one of this model's adapter: leave `adapter` out of `quantizations`, a GGUF of the whole model can be made."),
    (TOO_LARGE, "Take `bf16` or `q8_0` in place of `f16` in `quantizations`."),
    ("the adapter does", "Export again: the adapter is not in the file as it was trained. If `sixteen_bit_model` is set, check that it is the base."),
    ("are wrong", "Export again, from the model that the file is held against; if it fails again, the converter does not handle it: please report it."),
    ("other tokens", "Convert from the model's own tokenizer files, tokenizer.model and tokenizer_config.json whole; or choose a base whose repository has them."),
    ("chat template", "Export again with the chat template of the training, adapter/chat_template.jinja."),
    ("the base named as", "See that `sixteen_bit_model` names the weights that were trained, or those that their 4-bit form was made of, and export again."),
    ("than its 4-bit form", "Train with `load_in_4bit: false` where the memory allows it, or publish the adapter alone (`quantizations: []`), for that 4-bit base."),
    ("computes this model otherwise", "Publish merged/ or the adapter instead (`quantizations: []`): no type of GGUF helps before llama.cpp is mended; please report it there."),
    (KL, "Choose a type of more bits, such as q8_0; if it was q8_0, bf16."),
    (TOP1, "Choose a type of more bits, such as q8_0; if it was q8_0, bf16."),
]  # fmt: skip


def cure(failures: list[str]) -> str:
    """What to do about the first of the causes that is among these failures."""
    every = "; ".join(failures)
    return next((todo for phrase, todo in CURES if phrase in every), "Do not use the file.")


# How a proof is called: None where nothing failed, and the adapter's change is too small to be looked for.
VERDICTS = {True: "passed", False: "NOT passed", None: "no verdict"}


def verdict(facts: dict[str, Any]) -> bool | None:
    """Whether a file passed; None where it holds what the base does and nothing tells whether the adapter is in it."""
    return False if facts["failures"] else None if facts["weights"].get("adapter_unseen") else True


def unseen(files: list[dict[str, Any]]) -> str:
    """Why there is no verdict on files, by those that have none."""
    kinds = ", ".join(dict.fromkeys(each["type"] for each in files if each["passed"] is None))
    return f"the training changed the weights by less than {kinds} rounds them, so nothing tells whether the adapter is in the file"


def worst_of(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the run: of each the worst over its files, and all files beside them."""
    failures = [
        f"{each['file']}: {phrase}" if len(files) > 1 else phrase for each in files for phrase in each["failures"]
    ]
    without = [each for each in files if each["passed"] is None]
    worst = {"passed": False if failures else None if without else True, "failures": failures, "files": files}
    worst["no_verdict"] = unseen(without) if without else None
    for key, choose in (("token_mismatches", max), ("texts", max), ("mean_kl", max), ("max_kl", max), ("top1", min), ("positions", min)):  # fmt: skip
        found = [each[key] for each in files if key in each]
        worst[key] = choose(found) if found else None
    return worst


def proof_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(check, found, limit) of one file, for the card, the notebook and the terminal."""
    rows = weight_rows(facts)
    if not is_model(facts):
        return [*rows, ("tokens, chat template and answers", "not compared: they are the base file's", "-")]
    limits = facts.get("limits", {})
    if "texts" in facts:
        wrong = f"{facts['token_mismatches']} of {facts['texts']}"
        rows.append(("texts, prompts and special tokens that become other tokens", wrong, "0"))
        if facts["tolerated"]:
            rows.append((f"such texts that do not count: {facts['tolerated_because']}", f"{facts['tolerated']}", "-"))
        rows.append(("chat template", "the same" if facts["template"] else "another", "the same"))
    if "mean_kl" in facts:
        kl = f"{facts['mean_kl']:.2g}, the mean of {facts['positions']} positions; the largest of one is {facts['max_kl']:.2g}"
        rows.append(("mean KL divergence of the next-token distributions (nats)", kl, f"{limits['mean_kl']}"))
        agree = f"positions whose most likely token agrees; one at most {facts.get('tie', 0.02):.2g} nats behind it counts too"
        rows.append((agree, f"{facts['top1']:.1%}", f"{limits['top1']:.0%}" if limits["top1"] else "-"))
        rows += unrounded_rows(facts)
    if facts.get("bos") is not None:
        rows.append(("BOS tokens at the start of a prompt", f"{facts['bos']}", f"{facts['bos_trained']}"))
    if "eos" in facts:
        ends = {True: "yes", False: "no", None: "not seen: the trained model ended no answer"}
        rows.append(("ends its answer", ends[facts["eos"]], "yes"))
    if answers := facts.get("answers"):
        same = sum(answer["same"] for answer in answers)
        rows.append(
            (
                "greedy answers that are the same, token for token; at such a near tie they may part",
                f"{same} of {len(answers)}",
                "-",
            )
        )
    return rows


def weight_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of `proof_rows` that tell of the weights."""
    weights = facts["weights"]
    how = "every weight" if weights["form"] == "whole" else "a sample of rows"
    wrong = weights.get("wrong_tensors", len(weights["failures"]))
    bad = f"{wrong} of {weights['tensors']} ({how}; worst mean error {weights['mean_error']:.2%})"
    rows = [("tensors that differ more than their type allows", bad, "0")]
    if weights.get("wrong_values"):
        rows.append(("values of the model's shape", "; ".join(weights["wrong_values"]), "as in the model"))
    share = "share of the adapter's change that is in the weights"
    if weights["adapter_share"] is not None:
        allowed = share_limits(weights.get("adapter_share_within", 0.1))
        rows.append((share, f"{weights['adapter_share']:z.3f}", allowed))
    elif weights.get("adapter_unseen"):
        rows.append((share, f"not to be seen: the change is smaller than what {facts['type']} rounds", "-"))
    return rows


def share_limits(within: float) -> str:
    """Between which shares of an adapter a file passes, no wider than it is.

    >>> share_limits(0.1), share_limits(0.1204)
    ('0.9 to 1.1', '0.88 to 1.12')
    """
    low, high = math.ceil(100 * (1 - within) - 1e-9) / 100, math.floor(100 * (1 + within) + 1e-9) / 100
    return f"{low:g} to {high:g}"


def unrounded_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The row that tells how the same model answers without rounding, where it was asked."""
    if "cause" not in facts:
        return []
    told = facts["unrounded"]
    if facts["cause"] is None:
        return [("the same model without rounding", f"not made: {told['not_made']}", "-")]
    wanted = told["limits"]
    why = {
        "rounding": f"it is the rounding of {facts['type']} that this model minds",
        "named": "it is another base, or llama.cpp's arithmetic",
        "arithmetic": "it is llama.cpp's arithmetic",
        "base": "it is the base's 4 bits, or llama.cpp's arithmetic",
    }
    found = f"mean KL {told['mean_kl']:.2g}, {told['top1']:.1%} agree: {why[facts['cause']]}"
    return [(f"the same model without rounding ({told['type']})", found, f"{wanted['mean_kl']}, {wanted['top1']:.0%}")]


def show_proof(facts: dict[str, Any], stored: str = "") -> None:
    """The proof of one file as a table, in a notebook or a terminal, with some answers of both side by side; stored: as export tells it of types that are not the name's."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    kind = stored or facts["type"]
    title = f"{facts['file']} ({kind}): {VERDICTS[facts['passed']]}, in {facts['seconds']:.0f} s"
    table = Table("check", "found", "limit", title=title, title_justify="left")
    for row in proof_rows(facts):
        table.add_row(*row)
    console = Console(file=StringIO(), width=120)
    console.print(table)
    text = console.file.getvalue()
    for answer in facts.get("answers", [])[:2]:
        text += f"question | {answer['question']}\n   model | {or_nothing(answer['trained'])}\n    file | {or_nothing(answer['file'])}\n"
    html = render_html("proof/templates/proof.html.j2", title=title, passed=facts["passed"], rows=proof_rows(facts), answers=facts.get("answers", [])[:2], failures=facts["failures"])  # fmt: skip
    show(text.rstrip(), html)
