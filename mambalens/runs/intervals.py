"""Means over facts and their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Float, Integer

INTERVALS = ("bootstrap", "t", "sem")
RESAMPLES = 2000
_AT_ONCE = 100
"""Resamples that are drawn in one go: with another number, others would be."""
LEVEL = 0.95
KEPT = 2**28
"""Bytes of draws that are kept at most."""
_PRODUCT = 2**27
"""Bytes of draws in one matrix product."""
_EXACT = 2**24
"""Whole numbers up to here are exact in 32 bits."""


class Draws:
    """How often every resample draws each of n values; kept for further columns with as many.

    Args:
        seed: with the same, the same is drawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._kept: dict[int, list[np.ndarray]] = {}

    def times(self, n: int) -> Iterable[Integer[np.ndarray, "resample value"]]:
        """The draws of n values out of n, `_AT_ONCE` resamples after another."""
        if n in self._kept:
            return self._kept[n]
        size = sum(len(pieces) * pieces[0].size for pieces in self._kept.values()) + RESAMPLES * n
        if size > KEPT:
            return self._drawn(n)
        return self._kept.setdefault(n, list(self._drawn(n)))

    def _drawn(self, n: int) -> Iterator[Integer[np.ndarray, "resample value"]]:
        rng = np.random.default_rng(self._seed)
        for _ in range(0, RESAMPLES, _AT_ONCE):
            drawn = rng.integers(0, n, (_AT_ONCE, n))
            drawn += n * np.arange(_AT_ONCE)[:, None]
            times = np.bincount(drawn.ravel(), minlength=_AT_ONCE * n).reshape(_AT_ONCE, n)
            yield times.astype(np.min_scalar_type(times.max()))  # a value is hardly ever drawn more than ten times


def mean_intervals(
    groups: Sequence[Float[np.ndarray, " _"]], interval: str, seed: int = 0, draws: Draws | None = None
) -> list[tuple[float, float, float]]:
    """Mean, low and high of every group of values; see `SweepResult.summary`.

    The bootstrap draws the same facts for all groups of one size: what `scipy.stats.bootstrap` draws for each, which
    the tests hold it against. The resamples' means of many groups are one matrix product.

    Args:
        groups: the values of each.
        interval: one of `INTERVALS`.
        seed: of the bootstrap.
        draws: those of the same seed, which other columns have had already.
    """
    draws = Draws(seed) if draws is None else draws
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
            error = _deviations(values) / np.sqrt(n)
            if interval == "bootstrap":
                low, high = _percentiles(values, draws)
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


def _deviations(values: Float[np.ndarray, "group value"]) -> Float[np.ndarray, " group"]:
    """Standard deviations, a few groups at a time, which stay in the processor's cache."""
    some = max(1, 2**17 // values.shape[1])
    return np.concatenate([values[at : at + some].std(1, ddof=1) for at in range(0, len(values), some)])


def _percentiles(
    values: Float[np.ndarray, "group value"], draws: Draws
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Low and high of the means of bootstrap resamples of values."""
    groups, n = values.shape
    kind = np.float32 if _is_exact(values) else np.float64
    values, means, begin = values.astype(kind, copy=False), np.empty((RESAMPLES, groups)), 0
    pieces, together = iter(draws.times(n)), max(1, _PRODUCT // (8 * _AT_ONCE * n))
    while some := list(islice(pieces, together)):
        times = np.concatenate(some, dtype=kind)
        means[begin : begin + len(times)] = times @ values.T
        begin += len(times)
    low, high = np.percentile(means / n, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    return low, high


def _is_exact(values: Float[np.ndarray, "group value"]) -> bool:
    """Whether all sums of resampled values are whole numbers that 32 bits hold, such as those of hits."""
    most = np.abs(values[:, :1]).max() * values.shape[1]  # looked at first: other values seldom begin with whole ones
    if not most < _EXACT or (values[:, :1] % 1).any():
        return False
    return bool(np.abs(values).max() * values.shape[1] < _EXACT and not (values % 1).any())
