"""The verdict on a round of self-play: whether its opponent was right, whether another round would help, which round was best."""

from __future__ import annotations

import math
from typing import Any

from ..errors import ModelError
from ..output import counted, say
from ..settings import SPINSettings
from .batches import evaluated
from .dpo import rewarded

AT_START = {"sigmoid": math.log(2), "hinge": 1.0}  # the loss of a model that is its own opponent
NEAR_START = 0.02
CHANCE = 0.55  # accuracy on held-out pairs at or below which there is nothing left to learn
PROBE_STEPS, GAIN, NO_GAIN = 10, 0.63, 0.52  # accuracy on held-out pairs after so many steps from the warm-up on
WORSE = 1.02  # growth of the held-out loss of real answers that ends the rounds
CERTAIN = 2  # standard errors by which real answers have to fall in probability for it to count
MANY = 30  # sampled answers whose mean length tells something
DRIFT = 1.5  # factor by which the length of answers may change


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
                    f"The first step of a round has the loss {loss:.4f} and the margin {margin:z.4f}, not {expected:.4f} and 0: the opponent is not the model that the round began with.",
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
            share = evaluated(self.trainer, lambda: rewarded(self.trainer, settings.beta))["reward_accuracy"]
            self.trainer.model.train()  # by which TRL tells which of its figures belong to the step's own log
            said = (
                "there is something to gain" if share >= GAIN
                else "hardly anything is left to gain; you may stop it here, it then ends with a checkpoint" if share <= NO_GAIN
                else "there may be a little to gain"
            )  # fmt: skip
            say(
                f"spin: after {counted(state.global_step, 'step')} the accuracy on held-out pairs is {share:.0%}: {said}"
            )

    return Probe()


def reason_to_stop(start: dict[str, Any], rounds: list[dict[str, Any]]) -> str | None:
    """Why another round would not help, by the last one; None when it may."""
    before, now = (rounds[-2] if len(rounds) > 1 else start)["eval"], rounds[-1]["eval"]
    if now["nll"] > WORSE * before["nll"]:
        return f"the dataset's answers became less likely ({before['nll']:.4f} to {now['nll']:.4f} nats per token)"
    if now["reward_accuracy"] <= CHANCE and now["nll"] >= before["nll"]:  # with few pairs chance alone means little
        return f"its accuracy on held-out pairs is {now['reward_accuracy']:.0%}, which is chance, and the held-out loss did not fall: it cannot tell its own answers from the dataset's, the paper's optimum"
    if now["chosen_change"] < -CERTAIN * now["chosen_error"] and now["reward_margin"] > 0:
        return f"the dataset's answers became less likely, by {-now['chosen_change']:.2f} nats an answer, while the margin grew: it only unlearns its own"
    drifted = not 1 / DRIFT <= now["mean_length"] / start["eval"]["mean_length"] <= DRIFT
    if drifted and now.get("answers", MANY) >= MANY:  # of few sampled answers the length varies by chance alone
        return f"the length of its sampled answers drifted from {start['eval']['mean_length']:.0f} to {now['mean_length']:.0f} tokens"
    return None


def best_round(start: dict[str, Any], rounds: list[dict[str, Any]]) -> int:
    """The round after which the dataset's held-out answers are likeliest; -1 for the start.

    >>> best_round({"eval": {"nll": 2.0}}, [{"eval": {"nll": 1.5}}, {"eval": {"nll": 1.6}}])
    0
    """
    losses = [start["eval"]["nll"], *(facts["eval"]["nll"] for facts in rounds)]
    return losses.index(min(losses)) - 1
