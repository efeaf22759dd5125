"""Linear recurrences without a loop over positions: each takes two steps a doubling of the length, not one a position.

    h_t = a_t h_{t-1} + w_t

Two positions in a row are one of the same form: (a_2, w_2) after (a_1, w_1) is (a_2 a_1, a_2 w_1 + w_2). So every
second state is a recurrence of half the length, by halves down to one position; the states between follow from their
neighbours. (Blelloch 1990, 'Prefix sums and their applications', section 1.4; Martin and Cundy 2018,
arXiv:1709.04057.) Decays are at most 1, so nothing overflows that the loop would keep.

On a GPU every step is at least one launch of a kernel, which costs what a million numbers do: there it pays. On a CPU
a loop over positions, which reads every number once, is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LOOPS = {"cpu"}
"""Devices that go position by position."""
SHORT = 3
"""Positions up to which a loop has as few steps."""


def linear_scan(
    decay: Float[Tensor, "batch time *#rest"],
    write: Float[Tensor, "batch time *rest"],
    start: Float[Tensor, "#batch *#rest"] | None = None,
    in_place: bool = False,
) -> Float[Tensor, "batch time *rest"]:
    """All states of a linear recurrence; it may be differentiated once.

    Args:
        decay, write: a and w of the recurrence above.
        start: state before the first position; zero by default.
        in_place: whether the states may stand in the place of what is written, and the decays be used up.
    """
    if write.device.type in LOOPS or write.shape[1] <= SHORT:
        return _by_position(decay, write, start, in_place)
    if start is not None:
        first = torch.addcmul(write[:, 0], decay[:, 0], start, out=write[:, 0] if in_place else None)
        write = write if in_place else torch.cat([first[:, None], write[:, 1:]], 1)
    if in_place:
        return _by_pairs(decay, write)
    return _ByPairs.apply(decay, write)


def _by_position(
    decay: Float[Tensor, "batch time *#rest"],
    write: Float[Tensor, "batch time *rest"],
    h: Float[Tensor, "#batch *#rest"] | None,
    in_place: bool,
) -> Float[Tensor, "batch time *rest"]:
    # `unbind`, not indexing: the backward of an index allocates a zero tensor of the full size at every step.
    steps = []
    for decay_t, write_t in zip(decay.unbind(1), write.unbind(1), strict=True):
        h = write_t if h is None else torch.addcmul(write_t, decay_t, h, out=write_t if in_place else None)
        steps.append(h)
    return write if in_place else torch.stack(steps, 1)


def _by_pairs(
    decay: Float[Tensor, "batch time *#rest"], write: Float[Tensor, "batch time *rest"]
) -> Float[Tensor, "batch time *rest"]:
    """The states in the place of what is written; the decays are used up."""
    time = write.shape[1]
    if time > 1:
        pairs = time // 2
        first, second = slice(0, 2 * pairs, 2), slice(1, None, 2)
        write[:, second].addcmul_(decay[:, second], write[:, first])
        if pairs > 1:
            decay[:, second] *= decay[:, first]
            _by_pairs(decay[:, second], write[:, second])
        if time > 2:
            write[:, 2::2].addcmul_(decay[:, 2::2], write[:, 1 : time - 1 : 2])
    return write


class _ByPairs(torch.autograd.Function):
    """The states in memory of their own. Their gradient is a linear recurrence too, from the end:

    v_t = dm/dh_t + a_{t+1} v_{t+1}, with dm/dw_t = v_t and dm/da_t = v_t h_{t-1}.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, write: Tensor) -> Tensor:  # type: ignore[override]
        states = _by_pairs(decay.clone(), write.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        decay, states = ctx.saved_tensors
        later = decay.flip(1).roll(1, 1)  # a_{t+1} at t, from the end; the first meets no state
        of_write = _by_pairs(later, gradient.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        return before.mul_(of_write).sum_to_size(decay.shape), of_write
