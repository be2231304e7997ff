"""The proof that an exported GGUF is the trained model: the same tokens, weights, next-token distributions, and ends of answers."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import StorageError, VerifyError
from ..export import lay_source, llama_cpp
from ..models import adapter_folder, encode_prompt, export_base
from ..output import say
from ..run import Run, file_hash, stage
from .behaviour import SHORT_FROM, behaviour_of, vocabulary_of
from .reference import reference_of, write_reference
from .rounding import explain
from .tensors import compare_weights
from .verdict import (
    coarsest,
    cure,
    find_failures,
    is_another,
    is_model,
    limits,
    parts_only,
    show_proof,
    verdict,
    worst_of,
    wrong_tokens,
)


@stage("verify", reads=("publish_unverified",), after=("train", "gguf"), facts=("verify",), outputs=("verify",))
def verify_gguf(run: Run) -> None:
    """Hold every GGUF against reference/ and the merged weights and record the figures. Raises VerifyError, unless the settings publish unverified files."""
    made = run.facts["export"]["gguf"]
    if not made:
        run.record("verify", passed=None, files=[])
        return say("verify: there is no GGUF to verify")
    told, files = run.fresh("verify"), []
    with export_base(run.settings, trained=run.facts.get("train", {}).get("base", {})) as base:
        for file in made:
            path = run.path(file["path"])
            figures = told / f"{path.stem}.weights.json"
            files.append(
                prove(
                    path,
                    run.path("reference"),
                    base,
                    run.path("adapter"),
                    figures,
                    named=run.settings.sixteen_bit_model is not None,
                )
            )
            show_proof(files[-1], file.get("stored", ""))
    facts = worst_of(files)
    run.record("verify", **facts)
    run.record("versions", llama_cpp_python=llama_cpp().__version__)  # compiled, maybe, after the training began
    if facts["passed"] is None:
        return say(f"verify: no verdict: {facts['no_verdict']}; raise `learning_rate` or `max_steps`")
    if facts["passed"]:
        return say("verify: passed" + ("" if all(map(is_model, files)) else f": {run.settings.passed_means()}"))
    wrong = "answer like the trained model" if any(map(is_model, files)) else "hold the trained adapter"
    what, todo = f"The GGUF does not {wrong}: {'; '.join(facts['failures'])}.", cure(facts["failures"])
    if not run.settings.publish_unverified:
        all_the_same = (
            f"set `publish_unverified: true` and run `autosloth {run.settings.road}` again to publish all the same"
        )
        raise VerifyError(what, f"{todo} The adapter is sound; {all_the_same}.")
    say(f"verify: NOT passed. {what} {todo} It goes on all the same, because `publish_unverified` is set.")


def refuse_unproven(run: Run, folder: Path) -> None:
    """Raises StorageError when a GGUF in this folder of the run is not the one that was proven, by its SHA-256."""
    for proof in run.facts.get("verify", {}).get("files", []):
        path = folder / proof["file"]
        if "sha256" in proof and file_hash(path) != proof["sha256"]:
            raise StorageError(
                f"{path} is not the file that was proven: its content has changed since.",
                f"Run `autosloth export {run.folder}`, which makes it again, then `autosloth verify {run.folder}`.",
            )


def verify_file(file: Path, model: str, adapter: str | None = None) -> dict[str, Any]:
    """Hold any GGUF against any model in the transformers format, with an adapter of PEFT if one is named, and show the figures.

    model, adapter: folders or Hub ids. Raises VerifyError when it is another one, ModelError when there is no such model.
    """
    if not file.is_file():
        raise VerifyError(f"There is no file {file}.", "Give the path of a GGUF file.")
    folder = adapter_folder(adapter) if adapter else None
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        reference = Path(temporary, "reference")
        reference.mkdir()
        base = reference_of(model, folder, reference)
        facts = prove(file, reference, base, folder)
    show_proof(facts)
    if failures := facts["failures"]:
        todo = cure(failures)
        if adapter is None and facts["weights"]["failures"] and not is_another(facts["weights"]):
            todo = f"If a trained adapter is in the file, name it with `--adapter`. If not: {todo[0].lower()}{todo[1:]}"
        made = f"{model} with the adapter {adapter}" if adapter else f"{model} as it stands"
        if adapter and any("the adapter does" in failure for failure in failures):
            todo = f"Name the adapter that is in the file, if it is another than {adapter}; if it is not, export again: it is not in the file as it was trained."
        raise VerifyError(f"{file.name} is not {made}: {'; '.join(failures)}.", todo)
    return facts


def refuse_other_tokens(head: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> int:
    """How many texts become the same tokens by a GGUF's head as by the tokenizer of the training, these held-out rows and their prompts among them.

    Raises VerifyError where one does not, or the chat template is another.
    """
    prompts = [encode_prompt(tokenizer, row["messages"][:-1], row["tools"]) for row in rows if row["messages"]]
    texts = [{name: row[name] for name in ("messages", "tools", "text", "input_ids")} for row in rows]
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        write_reference(Path(temporary), tokenizer, texts, [{"prompt": prompt} for prompt in prompts], ends=[])
        try:
            facts = vocabulary_of(head, Path(temporary))
        except VerifyError as error:
            raise VerifyError(
                f"llama.cpp does not read what its converter makes of this model: {error.what}",
                "Set `quantizations: []` to train it without a GGUF, or choose another model.",
            ) from None
    if failures := wrong_tokens(facts):
        raise VerifyError(
            f"A GGUF of this model would not be it: {'; '.join(failures)}.",
            f"{cure(failures)} Or set `quantizations: []` to train it without a GGUF.",
        )
    return facts["texts"]


def prove(
    file: Path, reference: Path, base: Path, adapter: Path | None, told: Path | None = None, named: bool = False
) -> dict[str, Any]:
    """All figures of one file. told: where those of each tensor go; named: whether the user named the base, which may be another than was trained. Raises VerifyError when the file cannot be read."""
    started = time.perf_counter()
    quantized = json.loads((reference / "rows.json").read_text(encoding="utf-8"))["quantized"]
    with tempfile.TemporaryDirectory(prefix="autosloth-") as temporary:
        source = Path(temporary, "model")
        lay_source(source, base, adapter if adapter and (adapter / "tokenizer_config.json").is_file() else base)
        weights = compare_weights(file, source, adapter, told)
        facts = {"file": file.name, "sha256": file_hash(file), "type": coarsest(weights["types"]), "weights": weights}
        if weights["whole_model"] and not is_another(weights):
            facts["limits"] = limits(facts["type"], quantized)
            facts |= behaviour_of(file, reference, file.stat().st_size > SHORT_FROM, facts["limits"]["mean_kl"])
            if parts_only(facts):
                facts |= explain(facts, source, adapter, reference, quantized)
            if named and facts.get("cause") in ("arithmetic", "base"):
                facts["cause"] = "named"
    facts |= {"failures": find_failures(facts)}
    return {**facts, "passed": verdict(facts), "seconds": round(time.perf_counter() - started, 2)}
