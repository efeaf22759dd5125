"""How fast a state-space feature forgets, as the data makes it: half-lives in tokens.

The half-time is the sum of step sizes after which a write has halved; the half-life is how many tokens it takes the
step sizes to add up to it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

TILE = 2**21
"""Numbers of writes x state x features in one piece."""
STEPS = 100


def half_time(
    A: Float[Tensor, "feature state"], B: Float[Tensor, "batch time *group state"]
) -> Float[Tensor, "batch time feature"]:
    """Sum of step sizes until a write's L1 norm over the state has halved; a write of nothing spreads evenly.

    Equation: Decay
        r(tau) = sum_n |B_s[n]| exp(A[n] tau) / sum_n |B_s[n]|    tau = sum_{k=s+1..t} dt_k
        r(half-time) = 1/2

        Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2, for how a state shrinks
        Source: the L1 norm over the state as Endy et al. 2025, arXiv:2505.24244, sort features

        r is what is left at t of what was written at s, `dt_s B_s x_s`; A[n] is of one feature.

    Newton's method on log r, which is convex: from 0 it nears the solution from the left and does not overshoot. With
    one state it needs a single step, ln 2 / |A|.

    Args:
        A: rates.
        B: how positions write; of every group where there are several, whose features lie side by side.
    """
    if B.ndim == 4:
        of_groups = zip(A.chunk(B.shape[2]), B.unbind(2), strict=True)
        return torch.cat([half_time(rates, writes) for rates, writes in of_groups], -1)
    spread = B.abs() + torch.finfo(B.dtype).tiny
    spread = (spread / spread.sum(-1, keepdim=True)).flatten(0, 1)[..., None]  # [writes, N, 1]
    size = max(1, TILE // A.numel())
    found = [_solve(A.T, part) for part in spread.split(size)]
    return torch.cat(found).unflatten(0, B.shape[:2])


def _solve(A: Float[Tensor, "state feature"], spread: Float[Tensor, "write state 1"]) -> Float[Tensor, "write feature"]:
    tau = A.new_zeros(len(spread), A.shape[1])
    for _ in range(STEPS):
        left = spread * torch.exp(A * tau[:, None])  # [writes, N, F]
        total = left.sum(1)
        step = (total.log() + math.log(2)) * total / -(left * A).sum(1)
        tau += step
        if bool((step.abs() <= 8 * torch.finfo(tau.dtype).eps * tau).all()):
            break
    return tau


def half_life(
    dt: Float[Tensor, "batch time feature"],
    half: Float[Tensor, "batch time feature"],
    length: Int[Tensor, " batch"],
) -> Float[Tensor, "batch time feature"]:
    """Tokens after each position until its write has halved, a part of a token included.

    Equation: Half-life
        sum_{k=s+1..s+L} dt_k = half-time

        Source: this package; see the equation of decay

        L is the half-life of a write at s; the last token counts in part.

    Within a token the decay is spread evenly. Behind a prompt's end it goes on with the prompt's mean step size.

    Args:
        dt: step sizes.
        half: half-times, from `half_time`.
        length: tokens of every prompt; what stands behind is padding.

    Returns:
        Half-lives, NaN at padding.
    """
    inside = torch.arange(dt.shape[1], device=dt.device) < length.to(dt.device)[:, None]
    real = inside[..., None]
    mean = (dt * real).sum(1, keepdim=True) / length.to(dt.device)[:, None, None]
    steps = torch.where(real, dt, mean).transpose(1, 2).double().contiguous()  # [B, F, T]
    reached = steps.cumsum(-1)
    wanted = reached + half.transpose(1, 2)
    then = torch.searchsorted(reached, wanted.contiguous())  # the token in which it halves [B, F, T]; T: none any more
    time = dt.shape[1]
    before = reached.gather(-1, (then - 1).clamp_min(0))
    step = torch.where(then < time, steps.gather(-1, then.clamp_max(time - 1)), mean.transpose(1, 2).double())
    tokens = (then - 1 - torch.arange(time, device=dt.device)) + (wanted - before) / step
    return tokens.transpose(1, 2).to(dt.dtype).masked_fill(~real, math.nan)
