"""What a model predicts behind a prompt, and how far two predictions are apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """What a batch predicts behind its last tokens."""

    log_probs: Tensor
    """[batch, vocabulary], in the logits' precision."""
    prob: Tensor
    """The target's probability [batch]."""
    rank: Tensor
    """The target's rank, 1 for the top [batch]."""
    top: Tensor
    """The most probable token [batch]."""

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Prediction:
        """Log-probabilities, and the targets' probability and rank.

        Args:
            logits: [batch, vocabulary], float32 or better.
            targets: scored tokens [batch].
        """
        log_probs = logits.log_softmax(-1)
        target = log_probs.gather(1, targets.to(logits.device)[:, None])
        # Counted in the logits' own kind of number, which is exact below 2**24 and several times as fast as in bools.
        above = torch.gt(log_probs, target, out=torch.empty_like(log_probs)).sum(1).long()
        return cls(log_probs, target[:, 0].double().exp(), above + 1, log_probs.argmax(-1))


def target_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability of scored tokens [batch], in float64, of logits [batch, vocabulary]."""
    target = logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
    return (target.double() - logits.logsumexp(-1)).exp()


def change(base: Tensor, knocked_out: Tensor) -> Tensor:
    """How much of a probability is lost or won, in % [batch].

    Equation: Measures
        change_pct = 100 (prob - base_prob) / base_prob

        Source: Endy et al. 2025, arXiv:2505.24244, section 4

    Args:
        base, knocked_out: probabilities.
    """
    return 100 * (knocked_out - base) / base


def kl_divergence(base: Tensor, knocked_out: Tensor, probs: Tensor | None = None) -> Tensor:
    """KL(base || knocked out) in nats, of log-probabilities [batch, vocabulary]; rounding never makes it negative.

    Equation: Measures
        KL(base || knocked out) = sum_v p_v (log p_v - log q_v)

        Source: Kullback & Leibler 1951, Annals of Mathematical Statistics 22

        p are the base's probabilities of the tokens v, q those of the run with the knockout.

    Args:
        base, knocked_out: log-probabilities.
        probs: `base.exp()`, where many are compared with one base.
    """
    return torch.linalg.vecdot(base.exp() if probs is None else probs, base - knocked_out).clamp_min(0.0)
