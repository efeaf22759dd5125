"""Which cuts of edges go into a replay together: a plan by what rows cost.

Rows of a replay are of equal length, and as many for every prompt in it. So the cuts of a prompt are parted into slots
by the length of their rows, and slots of like length share a replay: a walk through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

WALK = 100
"""Tokens that take as long as a walk takes beside its tokens: reading all weights, and many small calls. A rough
figure: with 300 the shapes of mamba-130m and gpt2-medium took longer on two cores, in one run each."""


class Slot(NamedTuple):
    """Some cuts of a prompt whose rows are of like length."""

    prompt: int
    """Number of the prompt."""
    length: int
    """Positions of the longest row."""
    cuts: list[int]
    """Numbers of the cuts, those in the lowest layers first."""
    starts: list[int]
    """The first layers that they cut."""


def slots_of(prompt: int, time: int, lengths: Sequence[int], starts: Sequence[int], layers: int) -> list[Slot]:
    """A prompt's cuts, parted so that what their rows are too long and what the slots cost is least together.

    A slot costs a base pass, all tokens through all layers, and for every cut the positions of its longest row through
    the layers from the first on that is cut.

    Args:
        prompt: number of the prompt.
        time: its tokens.
        lengths: positions of the row that each cut needs.
        starts: the first layer that each cuts.
        layers: of the model.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    depth = np.cumsum([0, *(layers - starts[number] for number in order)])
    longest = [lengths[number] for number in order]

    def cost(begin: int, end: int) -> float:
        return time * layers + longest[end - 1] * float(depth[end] - depth[begin])

    slots = []
    for begin, end in _cheapest(_bounds(longest), cost):
        cuts = sorted(order[begin:end], key=starts.__getitem__)
        slots.append(Slot(prompt, longest[end - 1], cuts, [starts[number] for number in cuts]))
    return slots


def walks_of(slots: Sequence[Slot], layers: int, most: int) -> Iterator[list[Slot]]:
    """Slots that share a walk, at most so many of them.

    All rows of a walk are as long as its longest. Row by row the slots' cuts go side by side, from the lowest layer on
    that one of them cuts; a slot with fewer cuts than another has rows that nobody reads.
    """
    if not slots:
        return
    ordered = sorted(slots, key=lambda slot: slot.length)
    longest = [slot.length for slot in ordered]
    depth = np.zeros((len(ordered), max(len(slot.starts) for slot in ordered)))
    for number, slot in enumerate(ordered):
        depth[number, : len(slot.starts)] = layers - np.array(slot.starts)

    def cost(begin: int, end: int) -> float:
        return WALK * layers + (end - begin) * longest[end - 1] * float(depth[begin:end].max(0).sum())

    for begin, end in _cheapest(_bounds(longest), cost):
        for first in range(begin, end, most):
            yield ordered[first : min(first + most, end)]


def _bounds(ordered: Sequence[int]) -> list[int]:
    """Where a list in ascending order may be parted: between values that differ."""
    return [n for n in range(len(ordered) + 1) if n in (0, len(ordered)) or ordered[n - 1] < ordered[n]]


def _cheapest(bounds: Sequence[int], cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """The cheapest way to part a list, as beginnings and ends."""
    best, parted = {0: 0.0}, {0: 0}  # of everything before a bound
    for n, end in enumerate(bounds[1:], 1):
        best[end], parted[end] = min((best[begin] + cost(begin, end), begin) for begin in bounds[:n])
    found, end = [], bounds[-1]
    while end:
        found.append((parted[end], end))
        end = parted[end]
    return found[::-1]
