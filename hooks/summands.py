"""What a token mixer's output at one position is a sum of, read along one direction.

A mixer gives a linear map of what its features read: gate, norm and output projection of sum_s alpha[t, s] v_s + D x_t.
With the norm's scale held fixed, every source's share is its own, and the shares add up to the output.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from mambalens.hooks.knockout import Paths


class Summands(NamedTuple):
    """One position's output along a direction, for every prompt of a batch.

    Equation: Contributions
        <g, m_t> = sum_s <g', alpha[t, s] v_s> + <g', D x_t> + <g, bias>    g' = J^T g

        Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, for attention
        Source: this package, from Ali et al. 2024, arXiv:2403.01590, eq. 12, for scans

        m_t is the mixer's output, g a direction in the residual stream, J the mixer's gate, norm (its scale fixed) and
        output projection at t. Keys, gates and step sizes are as they were: a source's share is what it says, not what
        it does to how others are read.
    """

    path: Paths
    """The path that sources come by: the scan or attention ('main'), or a convolution that is all there is ('conv')."""
    sources: Float[Tensor, "batch time feature"]
    skip: Float[Tensor, "batch feature"] | None
    """What the position adds of itself past the scan; None where there is no such way."""
    constant: Float[Tensor, " batch"]
    """What comes from no source: biases."""

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The output along the direction."""
        found = self.sources.double().sum((1, 2)) + self.constant.double()
        return found if self.skip is None else found + self.skip.double().sum(1)
