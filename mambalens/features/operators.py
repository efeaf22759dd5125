"""Token mixing read as operators: the same few numbers for a Mamba channel and an attention head.

All functions take effective attention `alpha` [..., T, T], targets in rows and sources in columns, lower triangular
(`HookManager.effective_attention`), and give one value for each operator [...]. A scan's entries have signs and its
rows do not add up to 1; where a diagnostic speaks of shares of attention it uses the row-normalized magnitudes w, which
for softmax attention are the weights themselves (`weights`). A row of zeros (a cut or silent target) counts for
nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.hooks.errors import MambalensError

RANK_TOLERANCE = 1e-3
"""Singular values below this part of the largest count as zero in an interaction rank."""
LAG_BINS = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, None))
"""Distances from target to source that a recency profile sums over; from and to, both included."""


def weights(alpha: Float[Tensor, "*op time time"]) -> Float[Tensor, "*op time time"]:
    """Row-normalized magnitudes w; rows of zeros stay zero.

    Equation: Operator diagnostics
        w[t, s] = |alpha[t, s]| / sum_s |alpha[t, s]|

        Source: this package; in softmax attention the weights themselves
    """
    magnitude = alpha.abs()
    total = magnitude.sum(-1, keepdim=True)
    return magnitude / total.where(total > 0, 1)


def sink_share(alpha: Float[Tensor, "*op time time"]) -> Float[Tensor, "*op"]:
    """How much of what targets read comes from the first token, an attention sink.

    Equation: Operator diagnostics
        sink share = mean of w[t, 0] over t >= 1

        Source: Xiao et al. 2023, arXiv:2309.17453, for attention sinks
        Source: Gu et al. 2024, arXiv:2410.10781, for the mean weight on the first token

    The first token itself has nothing else to read and is left out. NaN for one token alone.
    """
    return _mean_over_targets(weights(alpha)[..., 1:, 0], alpha[..., 1:, :])


def effective_rank(alpha: Float[Tensor, "*op time time"]) -> Float[Tensor, "*op"]:
    """Exponential of the entropy of the singular values, normalized to sum to 1.

    Equation: Operator diagnostics
        effective rank = exp(-sum_i p_i log p_i)    p_i = sigma_i / sum_j sigma_j

        Source: Roy & Vetterli 2007, EUSIPCO, eq. 4

        sigma are the singular values of alpha.

    T for the identity, 1 for an operator in which every target reads the same; NaN for zero.
    """
    values = torch.linalg.svdvals(alpha)
    share = values / values.sum(-1, keepdim=True)
    return torch.exp(torch.special.entr(share).sum(-1))


def by_lag(alpha: Float[Tensor, "*op time time"]) -> Float[Tensor, "*op time"]:
    """Mean entry at each distance, for lag = 0 .. T-1.

    Equation: Operator diagnostics
        lags[lag] = mean of alpha[t, t - lag] over t >= lag

        Source: this package; the lag operators of Ghodsi 2025, arXiv:2512.15115
    """
    time = alpha.shape[-1]
    return torch.stack([alpha.diagonal(-lag, -2, -1).mean(-1) for lag in range(time)], -1)


def interaction_rank(lags: Float[Tensor, "feature lag"], tolerance: float = RANK_TOLERANCE) -> int:
    """How many linearly independent operators the features' lag operators span.

    The lag operator at a distance is diagonal over features, with the mean entries `by_lag` gives; the dimension of
    what all distances span is the number of attention heads that a linear recurrence with these lag operators needs
    (the head-count theorem). Each feature is scaled to norm 1, so that a quiet one counts as much as a loud one.

    Equation: Operator diagnostics
        interaction rank = number of sigma_i > tolerance sigma_1 of M    M[f, lag] = lags_f[lag] / |lags_f|

        Source: Ghodsi 2025, arXiv:2512.15115, the head-count theorem

        sigma are the singular values of M, the largest first.

    Args:
        lags: mean entries by distance, from `by_lag`, of some features.
        tolerance: singular values below this part of the largest count as zero.
    """
    norm = lags.norm(dim=-1, keepdim=True)
    values = torch.linalg.svdvals(lags / norm.where(norm > 0, 1))
    return int((values > tolerance * values[0]).sum()) if bool(values[0] > 0) else 0


class PositionDependence:
    """Share of the variance of `alpha[t, s]` that the relative position t - s explains alone, over prompts.

    Equation: Operator diagnostics
        position dependence = Var(E[alpha[t, s] | t - s]) / Var(alpha[t, s])    over s <= t and prompts

        Source: this package; for positional heads Voita et al. 2019, arXiv:1905.09418

    1 where the operator is the same whatever the tokens (a convolution, a positional head), 0 where distance says
    nothing of it. Sums are kept from prompt to prompt, in float64.

    Args:
        features: how many operators.
        time: the longest prompt.
    """

    def __init__(self, features: int, time: int) -> None:
        self.count = torch.zeros(time, dtype=torch.float64)
        self.sum = torch.zeros(features, time, dtype=torch.float64)
        self.square = torch.zeros(features, dtype=torch.float64)

    def add(self, alpha: Float[Tensor, "feature time time"], features: slice = slice(None)) -> None:
        """Count one prompt in, for some of the features; the slices of a prompt cover every feature once."""
        alpha, time = alpha.double().cpu(), alpha.shape[-1]
        if features.start in (None, 0):
            self.count[:time] += torch.arange(time, 0, -1)
        totals = torch.stack([alpha.diagonal(-lag, -2, -1).sum(-1) for lag in range(time)], -1)
        self.sum[features, :time] += totals
        self.square[features] += alpha.square().sum((-2, -1))

    def lags(self) -> Float[Tensor, "feature lag"]:
        """Mean entry at each distance, over all prompts."""
        return self.sum / self.count.clamp_min(1)

    def value(self) -> Float[Tensor, " feature"]:
        """Explained share [features]; NaN where the entries do not vary at all."""
        explained = (self.sum.square() / self.count.clamp_min(1)).sum(-1)
        whole = self.sum.sum(-1).square() / self.count.sum()
        variance = self.square - whole
        constant = variance <= 1e-12 * self.square
        return ((explained - whole) / variance).clamp(0, 1).masked_fill(constant, torch.nan)


def recency_profile(alpha: Float[Tensor, "*op time time"]) -> Float[Tensor, "*op time"]:
    """Where targets read, by distance; adds up to 1.

    Equation: Operator diagnostics
        profile[lag] = sum_{t>=lag} w[t, t - lag] / sum_{t, s} w[t, s]

        Source: this package; Ali et al. 2024, arXiv:2403.01590, read Mamba's recency off the same matrices
    """
    time, w = alpha.shape[-1], weights(alpha)
    total = torch.stack([w.diagonal(-lag, -2, -1).sum(-1) for lag in range(time)], -1)
    return total / total.sum(-1, keepdim=True)


def in_bins(profile: Float[Tensor, "*op time"]) -> dict[str, Float[Tensor, "*op"]]:
    """A recency profile summed over `LAG_BINS`: '0', '1', '2-3', '4-7', '8-15', '16+'."""
    found = {}
    for low, high in LAG_BINS:
        name = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        found[name] = profile[..., low : None if high is None else high + 1].sum(-1)
    return found


def mean_distance(alpha: Float[Tensor, "*op time time"]) -> Float[Tensor, "*op"]:
    """Mean of `t - s` under w, over targets.

    Equation: Operator diagnostics
        mean distance = sum_lag lag profile[lag]

        Source: this package
    """
    lags = torch.arange(alpha.shape[-1], device=alpha.device, dtype=alpha.dtype)
    return (recency_profile(alpha) * lags).sum(-1)


def induction_score(alpha: Float[Tensor, "*op time time"]) -> Float[Tensor, "*op"]:
    """How much a token reads what followed its earlier occurrence, on a random sequence that stands there twice.

    Equation: Operator diagnostics
        induction score = mean of w[t, t - (T/2 - 1)] over t >= T/2

        Source: Olsson et al. 2022, arXiv:2209.11895, prefix matching

    Raises:
        MambalensError: if T is odd.
    """
    time = alpha.shape[-1]
    if time % 2:
        raise MambalensError(f"alpha has {time} positions, but a sequence that stands there twice has an even number.")
    half = time // 2
    targets = torch.arange(half, time, device=alpha.device)
    return _mean_over_targets(weights(alpha)[..., targets, targets - (half - 1)], alpha[..., half:, :])


def _mean_over_targets(
    values: Float[Tensor, "*op target"], rows: Float[Tensor, "*op target source"]
) -> Float[Tensor, "*op"]:
    """Mean over the targets whose row of alpha is not zero."""
    counts = (rows != 0).any(-1)
    return (values * counts).sum(-1) / counts.sum(-1)
