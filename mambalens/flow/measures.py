"""What a flow is of: one number of every prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.flow.table import MEASURES
from mambalens.hooks.errors import MambalensError, choose

Measure = Callable[[Tensor, Tensor], Tensor]
"""Of logits [batch, vocabulary] and scored tokens [batch]: a number for every prompt."""


def measure_of(name: str | Measure) -> Measure:
    """A measure by its name, or itself.

    Raises:
        MambalensError: if there is none of that name.
    """
    if callable(name):
        return name
    if name not in MEASURES:
        raise MambalensError(f"measure={name!r} is not a measure: {choose(name, MEASURES)}, or a function.")
    return {"log_odds": log_odds, "log_prob": log_prob, "logit": logit}[name]


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
