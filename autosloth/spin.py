"""Self-play fine-tuning (SPIN, Chen et al., ICML 2024, arXiv 2401.01335): round by round a model learns to tell the dataset's answers from its own last ones.

A round: the model as it stands, the opponent, answers prompts; then it is trained to prefer the dataset's answers over these (eq. 4.7 of
the paper: DPO's loss with the opponent as reference). One LoRA adapter goes through all rounds; nothing is merged in between, since
a change that is small beside 4-bit weights would be rounded away. The round that serves the held-out answers best is exported.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from .base import refuse_without_gpu
from .dpo import pair_arguments, pair_trainer, preferences
from .encode import IGNORED
from .errors import DataError, ModelError
from .generate import Decoding, end_tokens
from .live import Interruption, progress_callback
from .measure import compare_answers, held_out_loss
from .model import answering, choose_precision, load_model, load_tokenizer
from .opponent import answers_of
from .rounds import plot_rounds
from .run import Run, file_hash, fingerprint, read_json, say, write_json
from .settings import SPINSettings
from .train import (
    READS,
    about,
    go_on,
    hardware,
    last_checkpoint,
    memory_errors,
    plain_arguments,
    refuse_unfinished,
    save_trained,
    sft_trainer,
    told_by,
    training_stage,
    versions,
)

AT_START = {"sigmoid": math.log(2), "hinge": 1.0}  # the loss of a model that is its own opponent
NEAR_START = 0.02
CHANCE = 0.55  # share of held-out pairs told apart, at or below which there is nothing left to learn
PROBE_STEPS, GAIN, NO_GAIN = 10, 0.63, 0.52  # of held-out pairs told apart after so many steps from the warm-up on
WORSE = 1.02  # growth of the held-out loss of real answers that ends the rounds
DRIFT = 1.5  # factor by which the length of answers may change


@training_stage(
    reads=(
        *READS, "rounds", "prompts_per_round", "beta", "last_beta", "last_learning_rate", "loss", "sft_weight",
        "mix_previous", "max_new_tokens", "sft_arm",
    ),
    facts=("train", "eval", "hardware", "versions", "rounds", "sft_arm"),
    scratch=("rounds",),
)  # fmt: skip
def self_play(run: Run) -> None:
    """Play the rounds from where they stand (or from the start) and write adapter/ of the best one."""
    refuse_without_gpu(run.settings)
    game = Game(run)
    run.record("hardware", **hardware())
    run.record("versions", **versions())
    game.begin()
    run.put("rounds", game.rounds)
    while len(game.rounds) < run.settings.rounds:
        if game.rounds and (reason := reason_to_stop(game.start, game.rounds)):
            say(f"spin: no further round after round {len(game.rounds) - 1}: {reason}")
            break
        game.play(len(game.rounds))
        run.put("rounds", game.rounds)
    game.finish()


class Game:
    """The model between the rounds, the rows that they draw from, and what they measured so far."""

    def __init__(self, run: Run):
        self.run, self.settings = run, run.settings
        self.tokenizer, self.model = load_tokenizer(run.settings), load_model(run.settings)
        self.ends = end_tokens(self.model, self.tokenizer)
        self.held_out = run.rows("eval")
        self.rows, self.measured = (questions(run.rows(name), self.ends) for name in ("train", "eval"))
        if not self.rows or not self.measured:
            todo = "Raise `max_length`, or give rows whose answers fit."
            raise DataError(f"No answer of {run.settings.dataset} fits whole into max_length.", todo)
        self.rounds: list[dict[str, Any]] = []

    def folder(self, number: int) -> Path:
        """Where a round is kept."""
        return self.run.path("rounds", str(number))

    def begin(self) -> None:
        """Take up the rounds that were played before, or measure the start."""
        while facts := read_json(self.folder(len(self.rounds)) / "facts.json"):
            self.rounds.append(facts)
        path = self.run.path("rounds", "start.json")
        if not path.is_file():
            self.model.save_pretrained(self.run.path("rounds", "start"))
            self.run.record("eval", before=self.stand())
            write_json(path, {"eval": {**standing(self.model, self.measured), **self.style(0)}})
        self.start = read_json(path)
        if self.rounds:
            say(f"spin: going on after round {len(self.rounds) - 1}")
            self.load(len(self.rounds) - 1)

    def load(self, number: int) -> None:
        """Give the model the adapter of a round; of round -1, the one it began with."""
        from peft import load_peft_weights, set_peft_model_state_dict

        folder = self.run.path("rounds", "start") if number < 0 else self.folder(number) / "adapter"
        set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))

    def player(self, number: int) -> str:
        """What tells the weights that a round begins with from all others."""
        folder = self.run.path("rounds", "start") if number == 0 else self.folder(number - 1) / "adapter"
        return file_hash(folder / "adapter_model.safetensors")

    def stand(self) -> dict[str, Any]:
        """How well the model answers now, as `measure_answers` tells it of other roads."""
        loss = standing(self.model, self.measured)["nll"]
        compared, self.answers = compare_answers(self.model, self.tokenizer, self.held_out, self.settings)
        return {"loss": loss, "perplexity": round(math.exp(min(loss, 50)), 3), **compared}

    def generate(self, number: int, what: str, rows: list[dict[str, Any]]) -> list[list[int]]:
        """The answers of the model that round `number` begins with."""
        seed = int(fingerprint([self.settings.seed, number, what])[:8], 16)
        decoding = Decoding(self.settings.max_new_tokens, 1.0, self.settings.generation_batch, seed)
        prompts = [row["prompt_ids"] for row in rows]
        return answers_of(
            self.folder(number) / what, self.model, self.tokenizer, prompts, decoding, self.player(number)
        )

    def style(self, number: int) -> dict[str, float]:
        """How the model that round `number` begins with answers held-out prompts."""
        return style_of(self.generate(number, "held_out", self.measured), self.ends)

    def pairs(self, number: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The pairs of a round, and how many answers were left out, by reason."""
        rows = self.drawn(number)
        return pair_up(rows, self.generate(number, "train", rows), self.ends)

    def drawn(self, number: int) -> list[dict[str, Any]]:
        """The rows that are asked in a round: fresh ones, as long as there are such."""
        import numpy

        size = self.settings.prompts_per_round
        order = numpy.random.default_rng(self.settings.seed).permutation(len(self.rows))
        places = range(number * size, number * size + min(size, len(self.rows)))
        return [self.rows[order[place % len(order)]] for place in places]

    def play(self, number: int) -> None:
        """One round: answers, pairs, training, measurement; its adapter and its facts, which are written last, are kept."""
        from datasets import Dataset

        pairs, left_out = self.pairs(number)
        tested, _ = pair_up(self.measured, self.generate(number, "held_out", self.measured), self.ends)
        if self.settings.mix_previous and number:
            pairs += self.pairs(number - 1)[0]
        if not pairs or not tested:
            todo = "Raise `max_new_tokens`, or start from an adapter that ends its answers."
            raise ModelError(
                f"Round {number} has no pairs to learn from: all answers were left out ({left_out}).", todo
            )
        say(f"spin: round {number}: {len(pairs)} pairs; answers left out: {left_out or 'none'}")
        facts = self.train(number, Dataset.from_list(pairs), Dataset.from_list(tested))
        self.model.delete_adapter("ref")
        self.model.save_pretrained(self.folder(number) / "adapter")
        facts["eval"] |= {**standing(self.model, self.measured), **self.style(number + 1)}
        facts |= {"round": number, "generated": {"pairs": len(pairs), "left_out": left_out}}
        write_json(self.folder(number) / "facts.json", facts)
        shutil.rmtree(self.folder(number) / "checkpoints", ignore_errors=True)
        self.rounds.append(facts)
        say(row_of(facts, self.start))

    def train(self, number: int, pairs: Any, tested: Any) -> dict[str, Any]:
        """Train against the opponent; the facts of the training and of the held-out pairs, while the opponent is there."""
        import torch

        settings, interruption = self.settings.of_round(number), Interruption()
        checkpoints = self.folder(number) / "checkpoints"
        dtype, _ = choose_precision(settings)
        arguments = pair_arguments(settings, checkpoints, dtype, torch.cuda.is_available())
        probe = first_probe(settings)
        callbacks = [progress_callback(interruption), start_check(settings), *([] if number else [probe])]
        trainer = pair_trainer(arguments, self.model, self.tokenizer, pairs, tested, callbacks)
        probe.trainer = trainer
        with memory_errors(settings), interruption:
            go_on(trainer, last_checkpoint(checkpoints))
        refuse_unfinished(trainer, interruption)
        measured = {"loss": held_out_loss(trainer), **preferences(trainer, settings.beta)}
        trained = {"trained": about(trainer, settings), "eval": measured}
        return {**told_by(trainer), "beta": settings.beta, "learning_rate": settings.learning_rate, **trained}

    def compare_with_sft(self) -> dict[str, Any]:
        """The start, trained by as many steps of plain SFT as all rounds took, on all rows: how it stands."""
        import torch

        steps = sum(facts["steps"] for facts in self.rounds)
        say(f"spin: for comparison, {steps} steps of plain SFT from the start")
        self.load(-1)
        settings, interruption = self.settings.model_copy(update={"max_steps": steps}), Interruption()
        checkpoints, dtype = self.run.path("rounds", "sft"), choose_precision(self.settings)[0]
        arguments = plain_arguments(settings, checkpoints, dtype, torch.cuda.is_available())
        callbacks = [progress_callback(interruption)]
        trainer = sft_trainer(arguments, self.model, self.tokenizer, self.run.rows("train"), self.held_out, callbacks)
        with memory_errors(settings), interruption:
            go_on(trainer, last_checkpoint(checkpoints))
        refuse_unfinished(trainer, interruption)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return {"steps": steps, **standing(self.model, self.measured)}

    def finish(self) -> None:
        """Write adapter/ of the best round, or of the start where no round was better, and what the export needs."""
        if self.settings.sft_arm and not self.run.facts.get("sft_arm"):
            self.run.record("sft_arm", **self.compare_with_sft())
        self.run.record("sft_arm")  # empty where nothing was compared
        best = best_round(self.start, self.rounds)
        self.load(best)
        said = f"round {best}" if best >= 0 else "the start: no round answers the held-out questions better"
        say(f"spin: what is exported is {said}")
        self.run.record("eval", after=self.stand())
        self.run.record("train", **whole_training(self.rounds), best_round=best)
        plot_rounds(self.run.facts, self.start["eval"], self.run.path("rounds", "rounds.png"))
        save_trained(self.run, self.model, self.tokenizer, self.held_out, self.answers)


def questions(rows: Any, ends: list[int]) -> list[dict[str, Any]]:
    """The rows as {"prompt_ids", "chosen_ids"}: all up to the last answer, and that answer; rows whose answer was cut are left out."""
    found = []
    for row in rows:
        learnt = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        first = next(p for p in reversed(learnt) if p - 1 not in learnt)  # of the last stretch
        ids = row["input_ids"]
        if row["messages"] and ids[learnt[-1]] in ends:
            found.append({"prompt_ids": ids[:first], "chosen_ids": ids[first : learnt[-1] + 1]})
    return found


def pair_up(
    rows: list[dict[str, Any]], answers: list[list[int]], ends: list[int]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows with the opponent's answers as `rejected_ids`, and how many were left out, by reason.

    An answer that hit the length cap has no end; given one, it would be told apart by that alone.

    >>> row = {"prompt_ids": [5], "chosen_ids": [6, 2]}
    >>> pair_up([row] * 4, [[7, 2], [7, 7], [2], [6, 2]], [2])[1]
    {'too_long': 1, 'empty': 1, 'equal': 1}
    """
    pairs, left_out = [], Counter()
    for row, ids in zip(rows, answers, strict=True):
        reason = "too_long" if ids[-1] not in ends else "empty" if len(ids) == 1 else "equal" if ids == row["chosen_ids"] else None  # fmt: skip
        if reason:
            left_out[reason] += 1
        else:
            pairs.append({**row, "rejected_ids": ids})
    return pairs, dict(left_out)


def standing(model: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """nll: mean negative log-likelihood of the dataset's answers, in nats per token; perplexity."""
    import torch

    total, tokens = 0.0, 0
    with answering(model):
        for row in rows:
            ids, start = (
                torch.tensor([row["prompt_ids"] + row["chosen_ids"]], device=model.device),
                len(row["prompt_ids"]),
            )
            logps = torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1].float(), dim=-1)
            total -= logps.gather(-1, ids[0, start:, None]).sum().item()
            tokens += len(row["chosen_ids"])
    return {"nll": round(total / tokens, 4), "perplexity": round(math.exp(min(total / tokens, 50)), 3)}


def style_of(answers: list[list[int]], ends: list[int]) -> dict[str, float]:
    """mean_length in tokens; eos_rate, the share that ended; distinct_2, different pairs of tokens per pair (arXiv 1510.03055)."""
    pairs = [pair for ids in answers for pair in pairwise(ids)]
    return {
        "mean_length": round(sum(map(len, answers)) / len(answers), 2),
        "eos_rate": round(sum(ids[-1] in ends for ids in answers) / len(answers), 4),
        "distinct_2": round(len(set(pairs)) / max(1, len(pairs)), 4),
    }


def start_check(settings: SPINSettings) -> Any:
    """A trainer callback that stops a round whose first step does not begin at the opponent: then the reference is another model."""
    from transformers import TrainerCallback

    expected = AT_START[settings.loss]

    class StartCheck(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if state.global_step != 1 or "rewards/margins" not in logs:
                return
            margin, loss = float(logs["rewards/margins"]), float(logs["loss"])
            if abs(margin) > NEAR_START or (not settings.sft_weight and abs(loss - expected) > NEAR_START):
                raise ModelError(
                    f"The first step of a round has the loss {loss:.4f} and the margin {margin:.4f}, not {expected:.4f} and 0: the opponent is not the model that the round began with.",
                    "Please report it; the rounds before are kept.",
                )

    return StartCheck()


def first_probe(settings: SPINSettings) -> Any:
    """A trainer callback that tells, a few steps into the first round, whether there is anything to gain.

    Beforehand it cannot be known: at its first step a model cannot be told from its opponent. The thresholds are those of
    experiments with a tiny model: starts from GAIN on gained, those up to NO_GAIN did not.
    """
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step != args.get_warmup_steps(state.max_steps) + PROBE_STEPS:
                return
            share = preferences(self.trainer, settings.beta)["reward_accuracy"]
            said = (
                "there is something to gain" if share >= GAIN
                else "hardly anything is left to gain; stop it here, if you like: it ends with a checkpoint" if share <= NO_GAIN
                else "there may be a little to gain"
            )  # fmt: skip
            say(f"spin: after {state.global_step} steps it tells {share:.0%} of the held-out pairs apart: {said}")

    return Probe()


def reason_to_stop(start: dict[str, Any], rounds: list[dict[str, Any]]) -> str | None:
    """Why another round would not help, by the last one; None when it may."""
    before, now = (rounds[-2] if len(rounds) > 1 else start)["eval"], rounds[-1]["eval"]
    if now["reward_accuracy"] <= CHANCE:
        return f"it tells {now['reward_accuracy']:.0%} of held-out pairs apart, which is chance: its answers are like the dataset's, the paper's optimum"
    if now["nll"] > WORSE * before["nll"]:
        return f"the dataset's answers became less likely ({before['nll']:.4f} to {now['nll']:.4f} nats per token)"
    if not 1 / DRIFT <= now["mean_length"] / start["eval"]["mean_length"] <= DRIFT:
        return f"the length of its answers drifted from {start['eval']['mean_length']:.0f} to {now['mean_length']:.0f} tokens"
    return None


def best_round(start: dict[str, Any], rounds: list[dict[str, Any]]) -> int:
    """The round after which the dataset's held-out answers are likeliest; -1 for the start.

    >>> best_round({"eval": {"nll": 2.0}}, [{"eval": {"nll": 1.5}}, {"eval": {"nll": 1.6}}])
    0
    """
    losses = [start["eval"]["nll"], *(facts["eval"]["nll"] for facts in rounds)]
    return losses.index(min(losses)) - 1


def whole_training(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all rounds as those of one training."""
    seconds, tokens = (sum(facts[name] for facts in rounds) for name in ("seconds", "tokens"))
    return {
        "steps": sum(facts["steps"] for facts in rounds),
        "epochs": round(sum(facts["epochs"] for facts in rounds), 3),
        "seconds": round(seconds, 2),
        "first_loss": rounds[0]["first_loss"],
        "last_loss": rounds[-1]["last_loss"],
        "losses": [loss for facts in rounds for loss in facts["losses"]],
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        **rounds[-1]["trained"],
    }


def row_of(facts: dict[str, Any], start: dict[str, Any]) -> str:
    """A round in one line."""
    now = facts["eval"]
    return (
        f"spin: round {facts['round']}: held-out answers {start['eval']['nll']:.4f} at the start, {now['nll']:.4f} now (nats per token); "
        f"told apart {now['reward_accuracy']:.1%}, margin {now['reward_margin']:.3f}; {now['mean_length']:.1f} tokens an answer, {now['eos_rate']:.1%} end"
    )
