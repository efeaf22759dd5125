"""Mamba-1's scan on the CPU by compiled code, where numba is installed (the extra `cpu`); see `numba_kernels`.

In float32 and without gradients; elsewhere `scan` goes by PyTorch's operations. Prompts go to as many threads as
PyTorch has. The code of a kernel is compiled when it runs first, in about half a second, and kept on disk.
`pointwise` runs compiled code in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mambalens.hooks import team

log = logging.getLogger(__name__)


@cache
def kernels() -> ModuleType | None:
    """The compiled code; None where there is no numba, or none that works."""
    if find_spec("numba") is None:
        return None
    try:
        from mambalens.hooks import numba_kernels
    except Exception as error:  # built for another numpy, or a machine that it cannot compile for
        log.info("The CPU's code runs without numba: %s", error)
        return None
    return numba_kernels


def fits(*tensors: Float[Tensor, " ..."]) -> bool:
    """Whether compiled code takes these tensors."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return plain and not torch.is_grad_enabled() and kernels() is not None


def scan(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    rate: Float[Tensor, "state feature"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    start: Float[Tensor, "#batch state feature"] | None = None,
) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch state feature"]]:
    """`scan.selective_scan`; `rate` is A in powers of two."""
    y, state = torch.empty_like(dt), dt.new_zeros(len(dt), *rate.shape)
    if start is not None:
        state += start
    dtx, of_dt, of_rate, of_B, of_C, of_state, of_y = _arrays(dt * x, dt, rate, B, C, state, y)
    run = the_kernels().scan
    team.each(len(dt), lambda p: run(dtx[p], of_dt[p], of_rate, of_B[p], of_C[p], of_state[p], of_y[p]))
    return torch.from_numpy(of_y), state


def scan_and_states(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    rate: Float[Tensor, "state feature"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    keep: Float[Tensor, "batch sets time"],
) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch sets state feature"]]:
    """What is read where the first of several choices is kept, and `scan.selective_states` of all.

    1 is kept, else 0; the choices are as there.
    """
    y, found = torch.empty_like(dt), dt.new_zeros(*keep.shape[:2], *rate.shape)
    dtx, of_dt, of_rate, of_B, of_C, kept, of_found, of_y = _arrays(dt * x, dt, rate, B, C, keep, found, y)
    run = the_kernels().scan_and_states
    team.each(len(dt), lambda p: run(dtx[p], of_dt[p], of_rate, of_B[p], of_C[p], kept[p], of_found[p], of_y[p]))
    return torch.from_numpy(of_y), found


def step(
    x: Float[Tensor, "batch rows feature"],
    dt: Float[Tensor, "batch rows feature"],
    rate: Float[Tensor, "state feature"],
    B: Float[Tensor, "batch rows state"],
    C: Float[Tensor, "batch rows state"],
    starts: Sequence[Float[Tensor, "batch state feature"]],
    number: Int[Tensor, " rows"],
) -> Float[Tensor, "batch rows feature"]:
    """`scan.selective_step`; `number` says which of the states before them each row has."""
    of_x, of_dt, of_rate, of_B, of_C, of_y = _arrays(x, dt, rate, B, C, torch.empty_like(dt))
    of_state = [(_arrays(start)[0], np.flatnonzero(number.numpy() == index)) for index, start in enumerate(starts)]
    run = the_kernels().step

    def of_prompt(p: int) -> None:
        for start, rows in of_state:
            run(of_x[p], of_dt[p], of_rate, of_B[p], of_C[p], np.ascontiguousarray(start[p]), rows, of_y[p])

    team.each(len(dt), of_prompt)
    return torch.from_numpy(of_y)


def the_kernels() -> Any:
    """The compiled code, where it `fits`."""
    found = kernels()
    assert found is not None, "see `fits`"
    return found


def _arrays(*tensors: Float[Tensor, " ..."]) -> list[Shaped[np.ndarray, " ..."]]:
    """Arrays that the kernels take: a tensor's own memory where that lies in one piece, prompt by prompt."""
    in_pieces = [t.ndim > 2 and len(t) > 0 and t[0].is_contiguous() for t in tensors]
    return [(t if fits else t.contiguous()).detach().numpy() for t, fits in zip(tensors, in_pieces, strict=True)]
