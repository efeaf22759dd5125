"""What a model predicts behind a prompt, and how far two predictions are apart."""

from __future__ import annotations

from typing import NamedTuple

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
        return cls(log_probs, target[:, 0].double().exp(), (log_probs > target).sum(1) + 1, log_probs.argmax(-1))


def target_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability of scored tokens [batch], in float64, of logits [batch, vocabulary]."""
    target = logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
    return (target.double() - logits.logsumexp(-1)).exp()


def kl_divergence(base: Tensor, knocked_out: Tensor) -> Tensor:
    """KL(base || knocked out) in nats, of log-probabilities [batch, vocabulary]; rounding never makes it negative."""
    return (base.exp() * (base - knocked_out)).sum(-1).clamp_min(0.0)
