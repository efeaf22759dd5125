"""Summands of a mixer that is a recurrence, see `summands`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.hooks.fixed_scales import FixedScales
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut, kept_at, kept_taps, on, replaced_taps
from mambalens.hooks.recurrence import Instead, Projected, Recurrence
from mambalens.hooks.summands import Summands


def of_recurrence(
    mixer: Recurrence,
    inputs: Any,
    projected: Projected,
    dtype: torch.dtype,
    at: Int[Tensor, " batch"],
    direction: Float[Tensor, "batch hidden"],
    cuts: Sequence[Cut] = (),
) -> Summands:
    """Summands of a recurrence: it is linear in its values, so the gradient at each value, times it, is its share.

    Args:
        mixer: the mixer.
        inputs: of the scan, in a run, under the cuts of the convolution's taps.
        projected: what the input projection gave in it.
        dtype: of the mixer's input.
        at: position of every prompt.
        direction: directions in the residual stream.
        cuts: of the run.
    """
    rows = torch.arange(len(at), device=at.device)
    gate = projected.gate[rows, at][:, None]
    by_scan = Paths.MAIN in mixer.paths
    with torch.no_grad():
        cut = inputs.cut(*kept_at(cuts, at)) if by_scan else inputs
    with torch.enable_grad():
        if by_scan:
            values = [cut.x.detach().requires_grad_()]
            read = mixer.scan(cut._replace(x=values[0]))[0]
        else:
            # What comes through taps that are cut is of the positions where it stands, too.
            taps, kernel = on(Paths.CONV, cuts), mixer.kernel
            others = [Instead(of, inner.detach().requires_grad_()) for of, inner in replaced_taps(taps, kernel)]
            values = [projected.inner.detach().requires_grad_(), *(other.inner for other in others)]
            convolved = mixer.convolve(values[0], kept_taps(taps, kernel), instead=others)
            read = mixer.scan(mixer.scan_inputs(mixer.activation(convolved), projected.beside))[0]
        y = mixer.with_skip(read.detach(), inputs)[rows, at][:, None].detach().requires_grad_()
        with FixedScales() as fixed:
            output = mixer.finish(y, gate, dtype)[:, 0]
        (pulled,) = torch.autograd.grad((direction * output).sum(), y)  # [B, 1, F, P]
        handed = torch.autograd.grad((pulled[:, 0] * read[rows, at]).sum(), values)
    shares = torch.stack([of * value.detach() for of, value in zip(handed, values, strict=True)]).sum(0)
    shares = shares.sum(-1) if by_scan else shares
    skipped = (pulled * (y.detach() - read.detach()[rows, at][:, None]))[:, 0].sum(-1)
    with torch.no_grad(), FixedScales(fixed.scales):
        empty = mixer.finish(torch.zeros_like(y), gate, dtype)[:, 0]
    return Summands(
        Paths.MAIN if by_scan else Paths.CONV,
        shares,
        skipped if bool(mixer.skip(inputs).any()) else None,
        (direction * empty).sum(-1),
    )
