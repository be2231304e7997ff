"""Runs with fixed facts, and their cards, which tests/publish/cards/ holds: `(cd tests && python -m support.cards)` writes them anew."""

import shutil
import sys
import tempfile
from pathlib import Path

from autosloth.publish.card import render_card
from autosloth.run import Run, write_json
from autosloth.settings import DPOSettings, SFTSettings, SPINSettings

CARDS = Path(__file__).parents[1] / "publish" / "cards"
HUB = "https://huggingface.co"


def sample(before, after, **more):
    """What is measured before and after, with one sample of a question; more: in both."""
    asked = {"question": "Who?", "expected": "Mila"}
    return {
        "before": {**more, **before, "exact_match": 0.0, "samples": [{**asked, "answer": "```\n| what"}]},
        "after": {**more, **after, "exact_match": 0.5, "answers_cut": 2, "samples": [{**asked, "answer": "Mila"}]},
    }


def found(model, dataset, original, **more):
    """The origin of a run."""
    asked = [model, None, None, dataset]
    return {
        **{"asked": asked, "original": original, "license": None, "license_name": None, "license_link": None},
        **{"license_from": original, "gated": None, "language": [], "model_type": "mistral", "datasets": [], "away": []},
        **more,
    }  # fmt: skip


DATA = {
    **{"read": 1000, "kept": 990, "dropped": {"empty_answer": 10}, "changed": {"unanswered_end_cut": 2}},
    **{"revision": "58647b0413913f451837831e1807a6cfa8ada804", "train_rows": 940, "eval_rows": 50, "truncated": 3},
    **{"train_tokens": 90000, "learnt_tokens": 40000, "length": {"longest": 2391}},
}
TRAIN = {
    **{"steps": 60, "epochs": 0.511, "seconds": 900.5, "first_loss": 1.61, "last_loss": 0.98, "tokens": 45000},
    **{"losses": [[step, 1.61 - 0.0105 * step] for step in range(1, 61)]},
    **{"tokens_per_second": 50.0, "peak_vram_gb": 9.1, "peak_ram_gb": 6.2, "trainable_parameters": 41943040},
    "layers": {"self_attn.q_proj": {"trained": 32, "of": 32}, "lm_head": {"trained": 0, "of": 1}},
    **{"precision": "float16", "lora_r": 16, "lora_alpha": 16, "four_bit": True, "optimizer": "adamw_8bit"},
    **{"batch_size": 2, "gradient_accumulation": 4, "processes": 1, "energy_wh": 14.212},
    "base": {"commit": "81b1e5a5a3b8f5e0d0e1d5bfb4c6b1a7f0d9c2e3"},
}
ON_THE_WAY = {
    **{"held_out": [[20, 1.1], [40, 1.0], [60, 1.02]], "measuring": {"every": 20, "rows": 40, "share": 0.049}},
    **{"measuring_seconds": 31.4, "kept": {"rule": "best", "step": 40, "loss": 1.0}},
}
ALPACA, MISTRAL = "yahma/alpaca-cleaned", "unsloth/mistral-7b-bnb-4bit"
FACTS = {
    "data": DATA,
    "origin": found(
        **{"model": MISTRAL, "dataset": ALPACA, "original": "unsloth/mistral-7b", "license": "apache-2.0"},
        language=["en"],
        datasets=[{"id": ALPACA, "license": "cc-by-4.0"}],
    ),
    "hardware": {"gpu": "Tesla T4", "vram_gb": 15.8, "cpu": "x86_64", "cores": 2, "ram_gb": 13.6},
    "versions": {"python": "3.13.1", "autosloth": "0.1.0", "unsloth": "2026.10.9"},
    "eval": sample(
        {"loss": 1.5, "perplexity": 4.482, "elsewhere": {"perplexity": 12.314, "tokens": 1121}},
        {"loss": 1.0, "perplexity": 2.718, "elsewhere": {"perplexity": 12.871, "tokens": 1121}},
        answers_compared=8,
    )
    | {
        "gained": {
            **{"name": "number", "scored": 7, "answers": 8, "few": True, "confidence": 0.95, "resamples": 10_000},
            "before": {"mean": 0.1429, "low": 0.0, "high": 0.4286},
            "after": {"mean": 0.5714, "low": 0.1429, "high": 0.8571},
            "difference": {"mean": 0.4286, "low": 0.0, "high": 0.8571},
        }
    },
    "train": TRAIN,
    "example": {"prompt": "<s>### Instruction:\nWho?\n\n### Response:\n", "answer": "Mila</s>"},
    "export": {"gguf": [{"path": "gguf/my-run-Q8_0.gguf", "type": "Q8_0", "bytes": 7_700_000_000, "seconds": 172.0, "peak_ram_gb": 3.5}]},
    "verify": {
        **{"passed": True, "failures": []},
        "files": [
            {
                **{"file": "my-run-Q8_0.gguf", "type": "Q8_0", "texts": 116, "token_mismatches": 0, "tolerated": 2},
                "weights": {
                    **{"form": "rows", "tensors": 291, "mean_error": 0.0057, "failures": []},
                    **{"adapter_share": 0.9996, "adapter_share_within": 0.1},
                },
                "tolerated_because": "llama.cpp does not compose characters (Unicode NFC) as this tokenizer does",
                **{"template": True, "positions": 256, "mean_kl": 0.021, "max_kl": 0.31, "top1": 0.93, "tie": 0.41},
                **{"bos": 1, "bos_trained": 1, "eos": True, "limits": {"mean_kl": 0.1, "top1": 0.85}},
                "answers": [{"question": "Who\nis it?", "trained": "Mila", "file": "", "same": False}],
            }
        ],
    },
}  # fmt: skip
PREFERENCES = {
    **{"loss": 0.6931, "reward_accuracy": 0.5, "prefers_chosen": 0.46, "reward_margin": 0.0, "chosen_logp": -201.4},
    **{"rejected_logp": -190.2, "kl": 0.0},
}
PREFERRED = {
    **{"loss": 0.5412, "reward_accuracy": 0.74, "prefers_chosen": 0.58, "reward_margin": 0.61, "chosen_logp": -205.0},
    **{"rejected_logp": -199.9, "kl": 0.021},
}
ULTRA, ZEPHYR = "HuggingFaceH4/ultrafeedback_binarized", "unsloth/zephyr-sft-bnb-4bit"
DPO_FACTS = FACTS | {
    "data": {**DATA, "revision": None},
    "origin": found(ZEPHYR, ULTRA, "unsloth/zephyr-sft", away=["unsloth/zephyr-sft", ULTRA], datasets=[{"id": ULTRA, "license": None}]),
    "eval": sample(PREFERENCES, PREFERRED, answers_compared=8),
    "train": {**TRAIN, "lora_r": 64, "lora_alpha": 64, "batch_size": 4, "gradient_accumulation": 8},
}  # fmt: skip
LLAMA, CHAT = "unsloth/Llama-3.2-1B-Instruct", "HuggingFaceH4/ultrachat_200k"
STYLE = {"mean_length": 42.1, "eos_rate": 0.98, "distinct_2": 0.61}
ROUND = {
    **{"nll": 1.41, "reward_accuracy": 0.71, "reward_margin": 0.2, "chosen_change": 1.25, "rejected_change": -3.5},
    **STYLE,
}
SPIN_FACTS = FACTS | {
    "origin": found(
        **{"model": f"{LLAMA}-bnb-4bit", "dataset": CHAT, "original": LLAMA, "license": "llama3.2"},
        **{"license_link": f"{HUB}/{LLAMA}/blob/main/LICENSE.txt", "gated": f"{HUB}/{LLAMA}", "model_type": "llama"},
        **{"language": ["en", "de"], "datasets": [{"id": CHAT, "license": "mit"}]},
    ),
    "eval": sample({"loss": 1.5, "perplexity": 4.482}, {"loss": 1.4, "perplexity": 4.055}, answers_compared=8),
    "sft_start": {},
    "sft_arm": {"steps": 60, "nll": 1.38},
    "rounds": [{"round": 0, "eval": ROUND}, {"round": 1, "eval": ROUND | {"nll": 1.4, "reward_accuracy": 0.66}}],
    "train": {**TRAIN, "best_round": 1, "peak_vram_gb": None, "energy_wh": None},
    "hardware": {"gpu": None, "vram_gb": None, "cpu": "x86_64", "cores": 8, "ram_gb": 33.4},
}
PROVEN = FACTS["verify"]["files"][0]
SMALL = PROVEN | {"file": "my-run-Q4_K_M.gguf", "type": "Q4_K_M", "mean_kl": 0.0641, "top1": 0.883}
ALONE = {
    **{"file": "my-run-ADAPTER.gguf", "type": "F16"},
    "weights": PROVEN["weights"] | {"tensors": 64, "whole_model": False, "mean_error": 0.0001},
}
THREE_FACTS = FACTS | {
    "export": {
        "gguf": [
            *FACTS["export"]["gguf"],
            {
                **{"path": "gguf/my-run-Q4_K_M.gguf", "type": "Q4_K_M", "bytes": 4_370_000_000},
                "stored": "2 matrices as Q5_0",
            },
            {"path": "gguf/my-run-ADAPTER.gguf", "type": "ADAPTER", "bytes": 84_000_000},
        ]
    },
    "verify": FACTS["verify"] | {"files": [PROVEN, SMALL, ALONE]},
    "eval": sample({"loss": 41.2, "perplexity": 7.8e17}, {"loss": 9.1, "perplexity": 8955.293}, answers_compared=8),
}
MERGED = {"merge": {"path": "merged"}}
EARLY = {name: facts for name, facts in FACTS.items() if name not in ("export", "verify")}

# By name of the file: the settings, the facts, and the kind of card.
GOLDEN = {
    "sft-adapter": (SFTSettings(run_name="my-run"), FACTS, "both"),
    "sft-merged": (SFTSettings(run_name="my-run", merged=True, repo="mila/my-run"), FACTS | MERGED | {"train": TRAIN | ON_THE_WAY}, "model"),
    "dpo-adapter": (DPOSettings(profile="a100", run_name="my-run", repo="mila/my-run"), DPO_FACTS, "model"),
    "dpo-merged": (DPOSettings(profile="a100", run_name="my-run", merged=True), DPO_FACTS | MERGED | {"train": DPO_FACTS["train"] | ON_THE_WAY | {"stopped": {"of": 100, "patience": 1}}}, "both"),
    "spin-adapter": (SPINSettings(run_name="my-run", model=f"{LLAMA}-bnb-4bit"), SPIN_FACTS, "both"),
    "spin-merged": (SPINSettings(run_name="my-run", model=f"{LLAMA}-bnb-4bit", merged=True), SPIN_FACTS | MERGED, "model"),
    "gguf": (SFTSettings(run_name="my-run", repo="mila/my-run"), FACTS, "gguf"),
    "three-files": (SFTSettings(run_name="my-run", quantizations=["q8_0", "q4_k_m", "adapter"]), THREE_FACTS, "both"),
    "early": (SFTSettings(run_name="my-run", repo="mila/my-run", merged=True), EARLY, "model"),
}  # fmt: skip


def run_of(name, storage):
    """A run folder with the facts of a card."""
    settings, facts, _ = GOLDEN[name]
    run = Run.create(type(settings).model_validate(settings.model_dump() | {"storage": str(storage)}))
    write_json(run.path("facts.json"), facts)
    write_json(run.path("rounds", "start.json"), {"eval": {"nll": 1.5, **STYLE}})
    return run


def card_of(name, storage):
    """The card of this name."""
    return render_card(run_of(name, storage), GOLDEN[name][2])


def main():
    shutil.rmtree(CARDS, ignore_errors=True)
    CARDS.mkdir()
    for name in GOLDEN:
        with tempfile.TemporaryDirectory() as storage:
            (CARDS / f"{name}.md").write_text(card_of(name, storage), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
