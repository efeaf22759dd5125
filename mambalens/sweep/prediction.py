"""What a model predicts behind a prompt, and how far two predictions are apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALL = 2**13
"""Vocabularies that are not worth blocks."""


class Prediction(NamedTuple):
    """What a batch predicts behind its last tokens."""

    log_probs: Float[Tensor, "batch vocabulary"]
    """In the logits' precision."""
    prob: Float[Tensor, " batch"]
    """The target's probability."""
    rank: Int[Tensor, " batch"]
    """The target's rank, 1 for the top."""
    top: Int[Tensor, " batch"]
    """The most probable token."""

    @classmethod
    def of(cls, logits: Float[Tensor, "batch vocabulary"], targets: Int[Tensor, " batch"]) -> Prediction:
        """Log-probabilities, and the targets' probability and rank.

        Args:
            logits: float32 or better.
            targets: scored tokens.
        """
        log_probs = logits.log_softmax(-1)
        target = log_probs.gather(1, targets.to(logits.device)[:, None])
        # Counted in the logits' own kind of number, which is exact below 2**24 and several times as fast as in bools.
        above = torch.gt(log_probs, target, out=torch.empty_like(log_probs)).sum(1).long()
        return cls(log_probs, target[:, 0].double().exp(), above + 1, top_of(log_probs))


def top_of(values: Float[Tensor, "batch vocabulary"]) -> Int[Tensor, " batch"]:
    """The index of the largest value, the first of equals; where some are NaN, of the first of these: `argmax`.

    On a CPU the largest value of a block is found in a tenth of the time of its index: one block is looked through.
    """
    count = values.shape[1]
    if values.device.type != "cpu" or count < SMALL:
        return values.argmax(-1)
    blocks = math.isqrt(count) // 8
    size = count // blocks
    best = values[:, : blocks * size].unflatten(1, (blocks, size)).amax(-1)
    rest = values[:, blocks * size :]
    if rest.shape[1]:
        best = torch.cat([best, rest.amax(-1, keepdim=True)], 1)
    # The last block may be short; it is looked through from as far left, where nothing is as large.
    first = (best.argmax(-1) * size).clamp_max(count - size)
    within = values.gather(1, first[:, None] + torch.arange(size))
    return first + within.argmax(-1)


def target_probability(
    logits: Float[Tensor, "batch vocabulary"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Probability of scored tokens, in float64."""
    target = logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
    return (target.double() - logits.logsumexp(-1)).exp()


def change(base: Float[Tensor, " batch"], knocked_out: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """How much of a probability is lost or won, in %.

    Equation: Measures
        change_pct = 100 (prob - base_prob) / base_prob

        Source: Endy et al. 2025, arXiv:2505.24244, section 4

    Args:
        base, knocked_out: probabilities.
    """
    return 100 * (knocked_out - base) / base


def kl_divergence(
    base: Float[Tensor, "batch vocabulary"],
    knocked_out: Float[Tensor, "batch vocabulary"],
    probs: Float[Tensor, "batch vocabulary"] | None = None,
) -> Float[Tensor, " batch"]:
    """KL(base || knocked out) in nats, of log-probabilities; rounding never makes it negative.

    Equation: Measures
        KL(base || knocked out) = sum_v p_v (log p_v - log q_v)

        Source: Kullback & Leibler 1951, Annals of Mathematical Statistics 22

        p are the base's probabilities of the tokens v, q those of the run with the knockout.

    Args:
        base, knocked_out: log-probabilities.
        probs: `base.exp()`, where many are compared with one base.
    """
    probs = base.exp() if probs is None else probs
    # In the difference's own memory: as much anew for every knockout would take longer than the arithmetic.
    return (base - knocked_out).mul_(probs).sum(-1).clamp_min(0.0)
