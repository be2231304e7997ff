"""Self-play fine-tuning (SPIN, Chen et al., ICML 2024, arXiv 2401.01335): round by round the model learns to prefer the dataset's answers to its own last ones.

A round: the model as it stands, the opponent, answers prompts; then it is trained to prefer the dataset's answers over these (eq. 4.7 of
the paper: DPO's loss with the opponent as reference). One LoRA adapter goes through all rounds; nothing is merged in between, since
a change that is small beside 4-bit weights would be rounded away. The round that serves the held-out answers best is exported.
"""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..distributed import first, of_first, part
from ..errors import DataError, ModelError
from ..hardware import hardware, versions
from ..hub_copy import keep
from ..models import (
    TEMPLATE,
    Decoding,
    choose_precision,
    end_tokens,
    load_model,
    load_tokenizer,
    origin_of,
    refuse_without_gpu,
)
from ..notebook import Interruption, progress_callback
from ..output import counted, say
from ..run import TENSORBOARD, Run, file_hash, fingerprint, read_json, write_json
from ..settings import SPINSettings
from .checkpoints import damage, seal
from .dpo import pair_arguments, pair_trainer, preferences
from .measure import ANSWERS_AT_ONCE, compare_answers, refuse_unscorable, standing, style_of
from .opponent import answers_of, listed, pair_up, questions
from .rounds_table import plot_rounds, row_of, whole_training
from .stopping import best_round, first_probe, reason_to_stop, start_check
from .train import (
    READS,
    about,
    go_on,
    plain_arguments,
    record_after,
    refuse_unfinished,
    save_trained,
    sft_trainer,
    told_by,
    training_stage,
)
from .trial import is_due, try_out


@training_stage(
    reads=(
        *READS, "rounds", "prompts_per_round", "beta", "last_beta", "last_learning_rate", "loss", "sft_weight",
        "mix_previous", "max_new_tokens", "sft_arm", "sft_steps", "sft_learning_rate", "stop_early",
    ),
    facts=("train", "trial", "eval", "hardware", "versions", "rounds", "sft_start", "sft_arm"),
    scratch=("rounds", TENSORBOARD),
)  # fmt: skip
def self_play(run: Run) -> None:
    """Play the rounds from where they stand (or from the start) and write adapter/ of the best one."""
    refuse_without_gpu(run.settings)
    if first():
        origin_of(run)  # while the Hub is known to be there
    game = Game(run)
    run.record("hardware", **hardware())
    run.record("versions", **versions())
    if is_due(run):
        game.try_out()
    game.begin()
    run.put("rounds", game.rounds)
    while len(game.rounds) < run.settings.rounds:
        if game.rounds and run.settings.stop_early and (reason := reason_to_stop(game.start, game.rounds)):
            say(f"spin: no further round after round {len(game.rounds)}: {reason}")
            game.rounds[-1] |= {"stopped": reason}
            run.put("rounds", game.rounds)
            break
        game.play(len(game.rounds))
        run.put("rounds", game.rounds)
    game.finish()


class Game:
    """The model between the rounds, the rows that they draw from, and what they measured so far."""

    def __init__(self, run: Run):
        self.run, self.settings, self.held_out = run, run.settings, run.rows("eval")
        refuse_unscorable(run.settings, self.held_out)
        self.tokenizer, self.model = load_tokenizer(run.settings, run.path(TEMPLATE)), load_model(run.settings)
        self.ends = end_tokens(self.model, self.tokenizer)
        self.rows, self.measured = (questions(run.rows(name), self.ends) for name in ("train", "eval"))
        if not self.rows or not self.measured:
            todo = "Raise `max_length`, or give rows whose answers fit."
            raise DataError(f"No answer of {run.settings.dataset_name} fits whole into max_length.", todo)
        self.rounds: list[dict[str, Any]] = []
        self.later: list[Any] = []  # callbacks that the trial left

    def folder(self, number: int) -> Path:
        """Where a round is kept: folders and facts count them from 0, what is said of them from 1."""
        return self.run.path("rounds", str(number))

    def try_out(self) -> None:
        """Try this hardware by pairs of an answer and the next row's, before the first of the model's own are there."""
        from datasets import Dataset

        pairs = [{**row, "rejected_ids": other["chosen_ids"]} for row, other in pairwise([*self.rows, self.rows[0]])]
        arguments = self.arguments(self.settings, self.run.path("checkpoints"))
        arguments["disable_dropout"] = False  # which trl 1.15 does for good, and a plain SFT may come first
        rows = Dataset.from_list(pairs)
        trainer = pair_trainer(arguments, self.model, self.tokenizer, rows, rows, [])
        self.later = try_out(self.run, trainer, self.tokenizer)
        self.model.delete_adapter("ref")

    def begin(self) -> None:
        """Take up the rounds that were played before, or measure the start."""
        while facts := of_first(lambda: self.played(len(self.rounds))):
            self.clear(len(self.rounds))
            self.rounds.append(facts)
        path = self.run.path("rounds", "start.json")
        if of_first(lambda: not path.is_file() or damage(path.with_suffix(""))):
            start: dict[str, Any] = {"sft_start": {}}
            if self.settings.sft_steps:
                rate = {"learning_rate": self.settings.sft_learning_rate}
                start["sft_start"] = rate | self.plain_sft("sft_start", self.settings.sft_steps, **rate)
            self.keep(self.run.path("rounds", "start"))
            start |= {"before": self.stand(), "eval": {**standing(self.model, self.measured), **self.style(0)}}
            of_first(lambda: write_json(path, start))
        self.start = read_json(path, ("sft_start", "before", "eval"))
        self.run.record("sft_start", **self.start["sft_start"])  # empty where there was none
        self.run.record("eval", before=self.start["before"])
        if self.rounds:
            say(f"spin: going on after round {len(self.rounds)}")
            self.load(len(self.rounds) - 1)

    def played(self, number: int) -> dict[str, Any] | None:
        """The facts of a round that was played, if it was; one whose adapter a disk has lost some of is played again, said."""
        facts = read_json(self.folder(number) / "facts.json")
        fault = damage(self.folder(number) / "adapter") if facts else None
        if fault:
            say(f"spin: the adapter of round {number + 1} is damaged ({fault}); the round is played again")
        return facts if facts and not fault else None

    def clear(self, number: int) -> None:
        """Delete the checkpoints of a round whose facts are written."""
        of_first(lambda: shutil.rmtree(self.folder(number) / "checkpoints", ignore_errors=True))

    def keep(self, folder: Path) -> None:
        """Write the model's adapter as it stands, whichever process it is read by next."""

        def save() -> None:
            self.model.save_pretrained(folder)
            seal(folder)

        of_first(save)

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
        at_once = self.run.facts.get("trial", {}).get("answers_at_once", ANSWERS_AT_ONCE)
        compared, self.answers = compare_answers(self.model, self.tokenizer, self.held_out, self.settings, at_once)
        return {"loss": loss, "perplexity": round(math.exp(min(loss, 50)), 3), **compared}

    def generate(self, number: int, what: str, rows: list[dict[str, Any]]) -> list[list[int]]:
        """The answers of the model that round `number` begins with."""
        seed = int(fingerprint([self.settings.seed, number, what])[:8], 16)
        decoding = Decoding(
            self.settings.max_new_tokens, 1.0, self.settings.generation_batch, seed, self.settings.fast_inference
        )
        prompts = [row["prompt_ids"] for row in rows]
        folder, player = self.folder(number) / what, self.player(number)
        return answers_of(folder, self.model, self.tokenizer, prompts, decoding, player, lambda: keep(self.settings))

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
            raise ModelError(f"Round {number + 1} has no pairs to learn from: {listed(left_out)}.", todo)
        say(f"spin: round {number + 1}: {counted(len(pairs), 'pair')}, {listed(left_out)}")
        facts = self.train(number, Dataset.from_list(pairs), Dataset.from_list(tested))
        self.model.delete_adapter("ref")
        self.keep(self.folder(number) / "adapter")
        facts["eval"] |= {**standing(self.model, self.measured), **self.style(number + 1)}
        facts |= {"round": number, "generated": {"pairs": len(pairs), "left_out": left_out}}
        of_first(lambda: write_json(self.folder(number) / "facts.json", facts))
        self.clear(number)
        self.rounds.append(facts)
        keep(self.settings)
        say(row_of(facts, self.start))

    def train(self, number: int, pairs: Any, tested: Any) -> dict[str, Any]:
        """Train against the opponent; the facts of the training and of the held-out pairs, while the opponent is there."""
        settings, interruption = self.settings.of_round(number), Interruption()
        arguments = self.arguments(settings, self.folder(number) / "checkpoints")
        probe = first_probe(settings)
        callbacks = [progress_callback(interruption), start_check(settings), *([] if number else [probe]), *self.later]
        trainer = pair_trainer(arguments, self.model, self.tokenizer, pairs, tested, callbacks)
        probe.trainer = trainer
        with interruption:
            go_on(self.run, trainer)
        refuse_unfinished(trainer, interruption)
        trained = {"trained": about(trainer, settings), "eval": preferences(trainer, settings.beta)}
        return {**told_by(trainer), "beta": settings.beta, "learning_rate": settings.learning_rate, **trained}

    def arguments(self, settings: SPINSettings, checkpoints: Path) -> dict[str, Any]:
        """What the training of a round depends on, as DPOConfig takes it."""
        import torch

        return pair_arguments(settings, checkpoints, choose_precision(settings)[0], torch.cuda.is_available())

    def plain_sft(self, name: str, steps: int, **changed: Any) -> dict[str, Any]:
        """So many steps of plain SFT on all rows from the model as it is, with settings that are changed for it: how it stands then."""
        import torch

        settings, interruption = self.settings.model_copy(update={"max_steps": steps, **changed}), Interruption()
        checkpoints, dtype = self.run.path("rounds", name), choose_precision(self.settings)[0]
        arguments = plain_arguments(settings, checkpoints, dtype, torch.cuda.is_available())
        callbacks = [progress_callback(interruption)]
        trainer = sft_trainer(arguments, self.model, self.tokenizer, self.run.rows("train"), self.held_out, callbacks)
        with interruption:
            go_on(self.run, trainer)
        refuse_unfinished(trainer, interruption)
        of_first(lambda: shutil.rmtree(checkpoints, ignore_errors=True))
        return {"steps": steps, **standing(self.model, self.measured)}

    def compare_with_sft(self) -> dict[str, Any]:
        """The start, trained by as many steps of plain SFT as all rounds took: how it stands."""
        steps = sum(facts["steps"] for facts in self.rounds)
        say(f"spin: for comparison, {counted(steps, 'step')} of plain SFT from the start")
        self.load(-1)
        return self.plain_sft("sft", steps)

    def finish(self) -> None:
        """Write adapter/ of the best round, or of the start where no round was better, and what the export needs."""
        if self.settings.sft_arm and of_first(lambda: not self.run.facts.get("sft_arm")):
            self.run.record("sft_arm", **self.compare_with_sft())
        self.run.record("sft_arm")  # empty where there was none
        best = best_round(self.start, self.rounds)
        self.load(best)
        said = (
            f"the adapter of round {best + 1}, whose held-out loss is the lowest"
            if best >= 0
            else "the start: no round has a lower held-out loss"
        )
        say(f"spin: exporting {said}")
        arm, now = self.run.facts.get("sft_arm"), (self.rounds[best] if best >= 0 else self.start)["eval"]["nll"]
        if arm and arm["nll"] < now:
            say(f"spin: as many steps of plain SFT came lower ({arm['nll']:.4f}, not {now:.4f} nats per token)")
        record_after(self.run, self.stand())
        part()
        if not first():
            return
        self.run.record("train", **whole_training(self.rounds), best_round=best)
        plot_rounds(self.run.facts, self.start["eval"], self.run.path("rounds", "rounds.png"))
        save_trained(self.run, self.model, self.tokenizer, self.held_out, self.answers)
