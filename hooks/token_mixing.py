"""A token mixer read as one operator per feature: what positions hand to each other, and what they keep for themselves.

`output[t, f] = sum_{s<t} alpha[t, s, f] values[s, f]  +  (alpha[t, t, f] + skip[f]) values[t, f]`: the first part is
exchange between tokens, the second enriches a token from itself. Neither needs a T x T matrix; where the matrix itself
is asked for, it is made for some features at a time (Ali et al. 2024, eq. 12; Dao & Gu 2024, eq. 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.hooks import decay
from mambalens.hooks.errors import MambalensError, choose

CHUNK = 2**23
"""Numbers of effective attention that are made at a time."""
REDUCTIONS = ("mean", "mean_abs")


class Decay(NamedTuple):
    """How a state-space mixer forgets."""

    dt: Float[Tensor, "batch time feature"]
    """Step sizes."""
    A: Float[Tensor, "feature state"]
    """One state where A is a scalar (Mamba-2)."""
    B: Float[Tensor, "batch time *group state"]
    """How a position's write spreads over the state; of every group where there are several."""


@dataclass(frozen=True, eq=False)
class TokenMixing:
    """One call of a token mixer, feature by feature.

    Equation: Exchange and enrichment
        y_t = exchange_t + enrichment_t
        exchange_t = sum_{s<t} alpha[t, s] x_s
        enrichment_t = (alpha[t, t] + D) x_t

        Source: Ali et al. 2024, arXiv:2403.01590, eq. 12
        Source: Dao & Gu 2024, arXiv:2405.21060, eq. 16
        Source: the split is this package's

        Of one feature. In attention x are the values and D is 0.
    """

    values: Float[Tensor, "batch time feature width"]
    """What positions offer; width is 1 in Mamba-1."""
    skip: Float[Tensor, " feature"]
    """The skip D; zero in attention."""
    output: Float[Tensor, "batch time feature width"]
    """What the mixer's own code gave, before gate, norm and output projection."""
    diagonal: Float[Tensor, "batch time feature"]
    """alpha[t, t]."""
    alpha_of: Callable[[Int[Tensor, " some"]], Float[Tensor, "batch some time time"]]
    """Effective attention of the features with these numbers."""
    decay: Decay | None
    """None where nothing decays (attention)."""

    @property
    def n_features(self) -> int:
        """Channels or heads."""
        return self.values.shape[2]

    @property
    def alpha(self) -> Float[Tensor, "batch feature time time"]:
        """Effective attention of every feature."""
        return self.attention(torch.arange(self.n_features))

    @property
    def enrichment(self) -> Float[Tensor, "batch time feature width"]:
        """What a position adds to itself: own entry of effective attention and skip."""
        return (self.diagonal + self.skip)[..., None] * self.values

    @property
    def exchange(self) -> Float[Tensor, "batch time feature width"]:
        """What arrives from other positions; with `enrichment` it is `output`."""
        return self.output - self.enrichment

    def chunks(self, features: Int[Tensor, " some"]) -> Iterator[tuple[slice, Float[Tensor, "batch those time time"]]]:
        """Effective attention of the features with these numbers, a few at a time.

        Yields:
            Which of the numbers, and their alpha.
        """
        batch, time = self.values.shape[:2]
        size = max(1, CHUNK // (batch * time * time))
        for begin in range(0, len(features), size):
            now = slice(begin, min(begin + size, len(features)))
            yield now, self.alpha_of(features[now].to(self.values.device))

    def attention(
        self, features: Int[Tensor, " some"], reduce: str | None = None
    ) -> Float[Tensor, "batch some time time"] | Float[Tensor, "batch time time"]:
        """Effective attention of the n features with these numbers, in O(n T^2) memory; reduced, in O(T^2).

        Args:
            features: numbers of features.
            reduce: None, 'mean' over the features, or 'mean_abs', the mean of absolute values (the scan's entries have
                signs, which cancel in a mean).
        """
        if reduce is not None and reduce not in REDUCTIONS:
            raise MambalensError(f"reduce={reduce!r} is not a reduction: {choose(reduce, REDUCTIONS)}, or None.")
        if not len(features):
            raise MambalensError("features names no feature: effective attention of nothing has no value.")
        batch, time = self.values.shape[:2]
        if reduce is None:
            whole = self.values.new_empty(batch, len(features), time, time, dtype=self.diagonal.dtype)
            for now, alpha in self.chunks(features):
                whole[:, now] = alpha
            return whole
        total = self.diagonal.new_zeros(batch, time, time)
        for _, alpha in self.chunks(features):
            total += (alpha.abs() if reduce == "mean_abs" else alpha).sum(1)
        return total / len(features)

    def half_life(self, length: Int[Tensor, " batch"]) -> Float[Tensor, "batch time feature"]:
        """Tokens until what a position wrote has decayed to half, see `decay.half_life`.

        Args:
            length: tokens of every prompt.

        Returns:
            NaN behind the prompts' ends, and everywhere in attention.
        """
        if self.decay is None:
            return torch.full_like(self.diagonal, math.nan)
        dt, A, B = self.decay
        return decay.half_life(dt, decay.half_time(A, B), length)
