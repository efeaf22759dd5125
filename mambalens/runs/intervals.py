"""Means over facts and their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

INTERVALS = ("bootstrap", "t", "sem")
RESAMPLES = 2000
_AT_ONCE = 100
LEVEL = 0.95


def mean_intervals(
    groups: Sequence[Float[np.ndarray, " _"]], interval: str, seed: int = 0
) -> list[tuple[float, float, float]]:
    """Mean, low and high of every group of values; see `SweepResult.summary`.

    The bootstrap draws the same facts for all groups of one size: what `scipy.stats.bootstrap` draws for each, which
    the tests hold it against. The resamples' means of many groups are one matrix product.
    """
    by_size: dict[int, list[int]] = {}
    for number, values in enumerate(groups):
        by_size.setdefault(len(values), []).append(number)
    found = [(float("nan"),) * 3] * len(groups)
    for n, numbers in by_size.items():
        if n == 0:
            continue
        values = np.stack([groups[number] for number in numbers])  # [G, n]
        mean = values.mean(1)
        if n == 1:
            low = high = np.full(len(values), np.nan)
        else:
            error = values.std(1, ddof=1) / np.sqrt(n)
            if interval == "bootstrap":
                low, high = _percentiles(values, seed)
            else:
                reach = error * (1.0 if interval == "sem" else _t(n))
                low, high = mean - reach, mean + reach
            low, high = np.where(error == 0.0, mean, low), np.where(error == 0.0, mean, high)
        for number, *three in zip(numbers, mean, low, high, strict=True):
            found[number] = tuple(float(value) for value in three)  # type: ignore[assignment]
    return found


def _t(n: int) -> float:
    """How many standard errors a mean of n values may be off."""
    from scipy import stats  # takes as long to import as a model takes to load

    return float(stats.t.ppf(0.5 + LEVEL / 2, n - 1))


def _percentiles(
    values: Float[np.ndarray, "group value"], seed: int
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Low and high of the means of bootstrap resamples of values."""
    rng, (groups, n) = np.random.default_rng(seed), values.shape
    means = np.empty((groups, RESAMPLES))
    for begin in range(0, RESAMPLES, _AT_ONCE):
        drawn = rng.integers(0, n, (_AT_ONCE, n))
        drawn += n * np.arange(_AT_ONCE)[:, None]
        times = np.bincount(drawn.ravel(), minlength=_AT_ONCE * n).reshape(_AT_ONCE, n)  # how often each fact is drawn
        means[:, begin : begin + _AT_ONCE] = values @ times.T / n
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=1)
    return low, high
