"""Rows that resume from a state of Mamba-2's scan, which is kept as what positions have left in it.

The state is a sum over positions, so reading it is one too:

    h = sum_s B_s left_s^T        C . h = sum_s (C . B_s) left_s        left_s = exp(A sum_{k>s} dt_k) dt_s x_s

Dao & Gu 2024, arXiv:2405.21060, section 3 (state space duality). The sum over C . B_s costs a row as much as attention
over the positions, and every source set shares B and left: only which positions count differs. Adding the state up
costs every source set a product over all positions, and a row one over the whole state (Mamba-2 130M: 128 x 1,536
numbers), which pays for many rows of a long prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks.indices import having
from mambalens.hooks.scan import CHUNK, even, own_entry, ssd_scan, sum_of_later, tile


class Left(NamedTuple):
    """What positions have left in a state."""

    B: Float[Tensor, "batch group time state"]
    x: Float[Tensor, "batch group time lane"]
    """Values, decayed to where they are read; a group's heads side by side."""
    keep: Float[Tensor, "batch time"]
    """1 for the positions that count."""


class SSDState:
    """A state of Mamba-2's scan.

    Attributes:
        parts: what adds up to it.
    """

    def __init__(self, *parts: Left) -> None:
        self.parts = parts

    def __add__(self, other: SSDState) -> SSDState:
        return SSDState(*self.parts, *other.parts)

    @cached_property
    def whole(self) -> Float[Tensor, "batch group state lane"]:
        """The state itself, a group's heads side by side."""
        first, *others = ((part.B * part.keep[:, None, :, None]).mT @ part.x for part in self.parts)
        return sum(others, first)

    def heads(self, features: int) -> Float[Tensor, "batch feature state width"]:
        """The state itself, head by head."""
        return _in_groups(self.whole, features)


def ssd_states(
    x: Float[Tensor, "batch time feature width"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    keep: Bool[Tensor, "sets batch time"],
) -> list[SSDState]:
    """Mamba-2's states after the last position from the inputs that are kept, for several choices of these at once.

    Equation: Knockout
        h^-S_t = sum_{s<=t, s not in S} exp(A sum_{k=s+1..t} dt_k) dt_s B_s x_s^T

        Source: Endy et al. 2025, arXiv:2505.24244, eq. 5

        Of one head of Mamba-2, the sources S left out.
    """
    left = (torch.exp(sum_of_later(dt) * A) * dt)[..., None] * x  # [B, T, H, P]
    left = rearrange(left, "batch time (group head) width -> batch group time (head width)", group=B.shape[2])
    B = rearrange(B, "batch time group state -> batch group time state")
    return [SSDState(Left(B, left, kept)) for kept in keep.to(x.dtype)]


def ssd_resume(
    x: Float[Tensor, "batch rows time feature width"],
    dt: Float[Tensor, "batch rows time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch rows time group state"],
    C: Float[Tensor, "batch rows time group state"],
    states: Sequence[SSDState],
    number: Int[Tensor, " rows"],
) -> Float[Tensor, "batch rows time feature width"]:
    """Mamba-2's scan for many rows, each from one of its prompt's states, without the skip.

    Args:
        x, dt, A, B, C: as for `scan.ssd_scan`, `rows` for every prompt. There may be a B and C for every head.
        states: states before the first position, from `ssd_states`.
        number: which of them each row resumes from; on the CPU.
    """
    time, features = x.shape[2:4]
    y = own_entry(B, C, dt)[..., None] * x if time == 1 else _from_nothing(x, dt, A, B, C)
    read = _read(C.flatten(1, 2), states, number.repeat_interleave(time), features)
    return y.addcmul_(torch.exp((dt * A).cumsum(2))[..., None], read.unflatten(1, (-1, time)))


def _from_nothing(
    x: Float[Tensor, "batch rows time feature width"],
    dt: Float[Tensor, "batch rows time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch rows time group state"],
    C: Float[Tensor, "batch rows time group state"],
) -> Float[Tensor, "batch rows time feature width"]:
    """What rows read of their own positions, some rows at a time."""
    batch, rows, time, features, _ = x.shape
    length = even(time, CHUNK)
    at_once = even(rows, max(1, tile(x.device) // 4 // (batch * features * length * length)))
    found = []
    for some in zip(*(t.split(at_once, 1) for t in (x, dt, B, C)), strict=True):
        of_x, of_dt, of_B, of_C = (t.flatten(0, 1) for t in some)
        found.append(ssd_scan(of_x, of_dt, A, of_B, of_C, end=False)[0].unflatten(0, (batch, -1)))
    return torch.cat(found, 1)


def adding_up_pays(rows: int, time: int, states: int, size: int, lanes: int) -> bool:
    """Whether the states themselves take fewer multiply-adds than sums over positions."""
    return rows * time * (size + lanes) > (states * time + rows) * size * lanes


def _read(
    C: Float[Tensor, "batch rows group state"], states: Sequence[SSDState], number: Int[Tensor, " rows"], features: int
) -> Float[Tensor, "batch rows feature width"]:
    """`C . h` of the state that each row resumes from."""
    C = rearrange(C, "batch row group state -> batch group row state")
    parts, groups = states[0].parts, C.shape[1]
    if parts[0].B.shape[1] > groups:  # each head had a B of its own before, where taps were cut for some of them
        C = C.repeat_interleave(parts[0].B.shape[1] // groups, 1)
        groups = C.shape[1]
    _, _, rows, size = C.shape
    lanes = parts[0].x[0, :, 0].numel() // groups
    time = sum(part.x.shape[2] for part in parts)
    shared = all(one.x is other.x for state in states for one, other in zip(state.parts, parts, strict=True))
    if shared and not adding_up_pays(rows, time, len(states), size, lanes):
        read = _over_positions(C, states, number)
    else:
        read = C.new_empty(*C.shape[:3], lanes)
        for index in number.unique().tolist():
            here: Any = having(number, index, C.device)
            read[:, :, here] = C[:, :, here] @ _in_groups(states[index].whole, groups)
    return rearrange(read, "batch group row (head width) -> batch row (group head) width", head=features // groups)


def _over_positions(
    C: Float[Tensor, "batch group rows state"], states: Sequence[SSDState], number: Int[Tensor, " rows"]
) -> Float[Tensor, "batch group rows lane"]:
    """`_read` as a sum over positions, for states that differ only in what counts."""
    batch, groups, rows, _ = C.shape
    found: list[Tensor] = []
    for of_part in zip(*(state.parts for state in states), strict=True):
        B, x, _ = of_part[0]
        B, x = B.repeat_interleave(groups // B.shape[1], 1), _in_groups(x, groups)
        keep = torch.stack([part.keep for part in of_part], 1)  # [B, sets, T]
        at_once = even(rows, max(1, tile(C.device) // (batch * groups * B.shape[2])))
        of_rows = []
        for some, numbers in zip(C.split(at_once, 2), number.split(at_once), strict=True):
            scores = some @ B.mT  # [B, G, R, T]
            of_rows.append((scores * keep[:, numbers.to(C.device, non_blocking=True)][:, None]) @ x)
        found.append(torch.cat(of_rows, 2))
    return sum(found[1:], found[0])


def _in_groups(values: Float[Tensor, "batch group any lane"], groups: int) -> Float[Tensor, "batch parts any part"]:
    """What belongs to the lanes of groups, of as many or more groups."""
    if values.shape[1] == groups:
        return values
    apart = "batch group any (part lane) -> batch (group part) any lane"
    return rearrange(values, apart, part=groups // values.shape[1])
