"""Which direction in the residual stream makes the answer: a score's gradient, averaged on the way from nothing.

A score such as the log-odds is not linear in the logits: its gradient at the answer says little where the model is
sure. So it is averaged along the ray from no residual stream to the whole one, the final norm's scale held fixed. What
a part of the stream has along that mean gradient is its contribution, and the contributions add up to what the score
gains on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.hooks.errors import MambalensError
from mambalens.hooks.fixed_scales import FixedScales

NODES = 8
"""Nodes of a Gauss-Legendre rule on a panel."""
PANELS = (1, 4, 8, 16, 32)
"""Panels of equal length that are tried, until the integral closes."""
CLOSES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""How far, relative to the score's size, an integral may be from what it is known to be."""
REFUSED = {torch.float64: 1e-4, torch.float32: 1e-3}
"""From where on it is refused: norms of several models round to float32 whatever the model's dtype."""

Score = Callable[[Float[Tensor, "row vocabulary"]], Float[Tensor, " row"]]
"""A number of logits, that can be differentiated."""


class Ray(NamedTuple):
    """A score along the ray that ends in a residual stream."""

    direction: Float[Tensor, " hidden"]
    """Mean gradient, in float64."""
    start: float
    """The score of no residual stream at all: what biases alone say."""
    score: float
    """The score of the whole stream."""


def ray(
    head: Callable[[Float[Tensor, "row 1 hidden"]], Float[Tensor, "row vocabulary"]],
    stream: Float[Tensor, " hidden"],
    score: Score,
) -> Ray:
    """Average a score's gradient along the ray that ends in a residual stream.

    Equation: Contributions
        c_i = <g, r_i>    g = int_0^1 dm/dr(s r) ds    sum_i c_i = m(r) - m(0)

        Source: Sundararajan et al. 2017, arXiv:1703.01365, eq. 1, from the baseline 0
        Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, where m is linear in the logits

        r = sum_i r_i is the residual stream behind the layers at the last position, m the score of what the model's
        code makes of it, the scale of its final norm held fixed at that of r; soft-capping goes along. m(0) is what
        biases say.

    Args:
        head: the model's code behind its layers.
        stream: the residual stream behind the layers at one position.
        score: what is measured, of logits in float64.

    Raises:
        MambalensError: if the integral does not close.
    """
    dtype, precise = stream.dtype, stream.double()
    with torch.no_grad(), FixedScales() as fixed:
        whole = score(head(stream[None, None]).double())
    with torch.no_grad(), FixedScales(fixed.scales):
        nothing = score(head(torch.zeros_like(stream)[None, None]).double())
    gained = float(whole - nothing)
    size = max(1.0, abs(float(whole)), abs(float(nothing)))
    added = off = np.inf
    for panels in PANELS:
        direction = torch.zeros_like(precise)
        for places, weights in _rule(panels):
            at = torch.tensor(places, dtype=torch.float64, device=stream.device)
            with torch.enable_grad(), FixedScales(fixed.scales):
                rows = (at[:, None] * precise).to(dtype)[:, None].requires_grad_()  # [nodes, 1, hidden]
                found = score(head(rows).double())
                (gradient,) = torch.autograd.grad(found.sum(), rows)
            direction += torch.tensor(weights, device=stream.device) @ gradient[:, 0].double()
        added = float(direction @ precise)
        off = abs(added - gained) / size
        if off < CLOSES.get(dtype, 1e-2):
            break
    if not off < REFUSED.get(dtype, 5e-2):
        raise MambalensError(
            f"The contributions add up to {added:.6g} instead of {gained:.6g}: what is behind the layers "
            "is not smooth along the ray, or has a norm whose scale cannot be held fixed."
        )
    return Ray(direction, float(nothing), float(whole))


def _rule(panels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Composite Gauss-Legendre quadrature from 0 to 1: nodes and weights of every panel."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return [((nodes + 1 + 2 * panel) / (2 * panels), weights / (2 * panels)) for panel in range(panels)]
