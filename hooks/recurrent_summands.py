"""Summands of a mixer that is a recurrence, see `summands`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.hooks.fixed_scales import FixedScales
from mambalens.hooks.knockout import Paths
from mambalens.hooks.recurrence import Projected, Recurrence
from mambalens.hooks.summands import Summands


def of_recurrence(
    mixer: Recurrence,
    inputs: Any,
    projected: Projected,
    dtype: torch.dtype,
    at: Int[Tensor, " batch"],
    direction: Float[Tensor, "batch hidden"],
) -> Summands:
    """Summands of a recurrence: it is linear in its values, so the gradient at each value, times it, is its share.

    Args:
        mixer: the mixer.
        inputs: of the scan, in a run.
        projected: what the input projection gave in it.
        dtype: of the mixer's input.
        at: position of every prompt.
        direction: directions in the residual stream.
    """
    rows = torch.arange(len(at), device=at.device)
    gate = projected.gate[rows, at][:, None]
    by_scan = Paths.MAIN in mixer.paths
    with torch.enable_grad():
        values = (inputs.x if by_scan else projected.inner).detach().requires_grad_()
        if by_scan:
            read = mixer.scan(inputs._replace(x=values))[0]
        else:
            read = mixer.scan(mixer.scan_inputs(mixer.activate(mixer.convolve(values, None)), projected.beside))[0]
        y = mixer.with_skip(read.detach(), inputs)[rows, at][:, None].detach().requires_grad_()
        with FixedScales() as fixed:
            output = mixer.finish(y, gate, dtype)[:, 0]
        (pulled,) = torch.autograd.grad((direction * output).sum(), y)  # [B, 1, F, P]
        (handed,) = torch.autograd.grad((pulled[:, 0] * read[rows, at]).sum(), values)
    shares = handed * values.detach()
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
