"""Which rows a replay of patches has: where each begins, and which of them go through the layers together.

A patch changes nothing below the first layer in which it puts something in, and nothing left of its first position.
Where it puts in what stands there already, or what nobody reads any more, it has no row at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Prompts(NamedTuple):
    """Right-padded prompts of one base pass: those that are patched, and those that they are patched from."""

    ids: Int[Tensor, "batch time"]
    last: Int[Tensor, " batch"]
    """Last position of every prompt."""
    noise: Float[Tensor, "batch time hidden"] | None = None
    """What is added to the embeddings."""

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        noise = None if self.noise is None else self.noise.to(device)
        return Prompts(self.ids.to(device), self.last.to(device), noise)


class Spot(NamedTuple):
    """Where a prompt is patched: at several positions at once, or at one."""

    prompt: int
    """Number of the prompt among those of the pass."""
    other: int
    """Number of the prompt that it is patched from."""
    positions: tuple[int, ...]
    others: tuple[int, ...]
    """The position in the other prompt that stands for each."""


class Group(NamedTuple):
    """Rows of one length that begin in the same layers: so many for every spot."""

    spots: list[int]
    windows: list[int]
    """By the layer in which they begin."""
    starts: list[int]
    """Before which layer the rows of each window join."""
    length: int

    @property
    def rows(self) -> int:
        """All of them."""
        return len(self.spots) * len(self.windows)


def rows_of(
    prompts: Prompts, spots: Sequence[Spot], windows: Sequence[set[int]], site: str, behind: int
) -> dict[tuple[int, tuple[int | None, ...]], list[int]]:
    """Numbers of the spots whose rows are alike, by the rows' length and by where those of every window begin.

    Args:
        prompts: of the base pass.
        spots: where to patch.
        windows: the layers of each in which something is put in.
        site: see `sites.SITES`.
        behind: number of the place behind the last layer, which the residual stream alone has.
    """
    found: dict[tuple[int, tuple[int | None, ...]], list[int]] = {}
    ids, last, noise = prompts.ids.tolist(), prompts.last.tolist(), prompts.noise
    for number, spot in enumerate(spots):
        # Behind the last position nobody reads a state.
        first = max(spot.positions) + 1 if site == "state" else min(spot.positions)
        nowhere = set()
        if site == "residual":
            if _same_embeddings(ids, noise, spot):
                nowhere.add(0)
            if last[spot.prompt] not in spot.positions:
                nowhere.add(behind)
        length = last[spot.prompt] + 1 - first
        starts = tuple(min(layers - nowhere, default=None) if length else None for layers in windows)
        if any(start is not None for start in starts):
            found.setdefault((length, starts), []).append(number)
    return dict(sorted(found.items(), key=lambda one: one[0][0]))


def _same_embeddings(ids: Sequence[Sequence[int]], noise: Tensor | None, spot: Spot) -> bool:
    """Whether both prompts have the same tokens, with the same noise, at the same positions."""
    if spot.positions != spot.others:
        return False
    one, two = ids[spot.prompt], ids[spot.other]
    if any(one[at] != two[at] for at in spot.positions):
        return False
    at = list(spot.positions)
    return noise is None or bool(torch.equal(noise[spot.prompt, at], noise[spot.other, at]))


def fitting(
    spots: list[int], starts: Sequence[int | None], length: int, most: int, checked: int | None = None
) -> Iterator[Group]:
    """Rows that begin in the same layers, in groups of as many as fit.

    Args:
        spots: numbers of the spots.
        starts: where the rows of every window begin; None for those that have none.
        length: of a row.
        most: how many fit.
        checked: a window without a layer, of which the first group has rows too.
    """
    begins = {window: start for window, start in enumerate(starts) if start is not None}
    windows = sorted(begins, key=begins.__getitem__)
    across = max(1, min(len(windows), most - 1))
    down = max(1, most // (across + 1))
    for begin in range(0, len(spots), down):
        for first in range(0, len(windows), across):
            some = windows[first : first + across]
            if checked is not None and not first and not begin:
                some, begins = [checked, *some], begins | {checked: 0}
            yield Group(spots[begin : begin + down], some, [begins[window] for window in some], length)
