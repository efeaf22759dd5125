"""What an answer is measured by: one number of every prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.hooks.errors import MambalensError, choose
from mambalens.runs.table import MEASURES

Measure = Callable[[Tensor, Tensor], Tensor]
"""Of logits [batch, vocabulary] and scored tokens [batch]: a number for every prompt."""


PAIRED = "logit_difference"
"""Measure of a pair of answers."""


def measure_of(name: str | Measure, more: tuple[str, ...] = ()) -> Measure:
    """A measure by its name, or a function that is seen to give a number for every prompt.

    Args:
        name: the name, or the function.
        more: what else may be said in this place, for the sentence.

    Raises:
        MambalensError: if there is none of that name; by the measure itself, if the function gives anything else.
    """
    if callable(name):
        return _checked(name)
    if name == PAIRED:
        raise MambalensError(f"measure={name!r} is of pairs of answers: name {choose('', MEASURES)}, or a function.")
    if name not in MEASURES:
        raise MambalensError(f"measure={name!r} is not a measure: {choose(name, (*MEASURES, *more))}, or a function.")
    return {"log_odds": log_odds, "log_prob": log_prob, "logit": logit, "prob": prob}[name]


def name_of(measure: str | Measure) -> str:
    """What tables call a measure: its name, or the function's."""
    return measure if isinstance(measure, str) else getattr(measure, "__name__", "measure")


def _checked(measure: Measure) -> Measure:
    @functools.wraps(measure, updated=())
    def checked(logits: Tensor, targets: Tensor) -> Tensor:
        found = measure(logits, targets)
        if not isinstance(found, Tensor) or found.shape != targets.shape:
            what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise MambalensError(
                f"The measure {name_of(measure)!r} gives {what} for logits of shape {list(logits.shape)}: give a "
                f"tensor of shape {list(targets.shape)}, a number for every prompt."
            )
        return found

    return checked


def log_odds(logits: Float[Tensor, "batch vocabulary"], targets: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Log-odds of the targets, in nats; unlike the log-probability they do not saturate where the model is sure.

    Equation: Measures
        log-odds = log(p / (1 - p)) = z_target - log sum_{v != target} exp(z_v)

        Source: this package

        p is the target's probability, z are the logits.
    """
    at = targets[:, None]
    return logits.gather(1, at)[:, 0] - logits.scatter(1, at, -torch.inf).logsumexp(-1)


def log_prob(logits: Float[Tensor, "batch vocabulary"], targets: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Log-probabilities of the targets, in nats."""
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def logit(logits: Float[Tensor, "batch vocabulary"], targets: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Logits of the targets."""
    return logits.gather(1, targets[:, None])[:, 0]


def prob(logits: Float[Tensor, "batch vocabulary"], targets: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Probabilities of the targets."""
    return log_prob(logits, targets).exp()


def logit_difference(
    logits: Float[Tensor, "batch vocabulary"], targets: Int[Tensor, " batch"], others: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """How far the targets' logits are above those of other answers, in nats: the log of how many times as likely.

    Equation: Measures
        logit difference = z_target - z_other = log(p_target / p_other)

        Source: Wang et al. 2022, arXiv:2211.00593

        z are the logits of the answers to a prompt and to its counterfactual.
    """
    return logit(logits, targets) - logit(logits, others)
