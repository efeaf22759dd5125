"""What positions hand on, mixer by mixer: values that a knockout may put in the place of others (ablations).

Nothing here knows whose values they are: those of another prompt (resampling), means over many, or any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Written(NamedTuple):
    """What the positions of one mixer hand on, in one pass."""

    main: Float[Tensor, "batch time ..."] | None
    """What its scan or attention reads of each: the values that it is linear in (x behind convolution and activation,
    v), by feature [batch, T, features, width], in attention by head of the values. None where it has no such path."""
    conv: Float[Tensor, "batch time channel"] | None
    """Inputs of the causal convolution. None where it has none."""
    keys: Float[Tensor, "batch time group width"] | None = None
    """Keys of attention that are put in with the values; None where the own ones are kept, and where there are none.
    Of rotary models, with their positions in them."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Written:
        """The same with every tensor changed."""
        return Written(*(None if part is None else change(part) for part in self))


@dataclass(frozen=True, eq=False)
class Values:
    """What the mixers of a model hand on at every position, as `HookManager.values` finds it."""

    of: Mapping[Any, Written]
    """For every mixer, what it hands on [batch, T, ...]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Prompts and columns."""
        first = next(part for written in self.of.values() for part in written if part is not None)
        return int(first.shape[0]), int(first.shape[1])

    def each(self, change: Callable[[Tensor], Tensor]) -> Values:
        """The same with every tensor [batch, T, ...] changed."""
        return Values({mixer: written.each(change) for mixer, written in self.of.items()})

    def plus(self, other: Values) -> Values:
        """Tensor by tensor the sum with others of the same shape."""

        def add(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None or two is None else one + two

        return Values({mixer: Written(*map(add, written, other.of[mixer])) for mixer, written in self.of.items()})

    def at(self, prompts: Int[Tensor, "batch time"], columns: Int[Tensor, "batch time"]) -> Values:
        """Those of other prompts and columns, such as the ones that are aligned with a prompt's.

        Args:
            prompts: which of these prompts.
            columns: which of its columns stands at [batch, T].
        """
        return self.each(lambda part: part[prompts.to(part.device), columns.to(part.device)])

    def sums(self, group: Int[Tensor, "batch time"], groups: int) -> Values:
        """Sums over the positions of every group [1, groups, ...], for means.

        Args:
            group: number of each position's group; -1 for those that belong to none, such as padding.
            groups: how many there are.
        """
        flat = group.flatten()
        inside = flat >= 0

        def add(part: Tensor) -> Tensor:
            there = flat[inside].to(part.device)
            wide = part.flatten(0, 1)[inside.to(part.device)].double()
            return wide.new_zeros(groups, *part.shape[2:]).index_add_(0, there, wide)[None]

        return self.each(add)


def standing_in(
    taken: list[Bool[Tensor, " ..."]], instead: list[Float[Tensor, " ..."] | None]
) -> Float[Tensor, " ..."] | None:
    """What stands in the place of values that several knockouts take away at once; None where that is nothing.

    What one of them zeroes is zero. Otherwise the last that takes a value away says what stands there.

    Args:
        taken: what each takes away, in masks that go with the values.
        instead: what each puts in, None for nothing.
    """
    found: Tensor | None = None
    for mask, value in zip(taken, instead, strict=True):
        if value is not None:
            found = value * mask if found is None else torch.where(mask, value, found)
    if found is None:
        return None
    for mask, value in zip(taken, instead, strict=True):
        if value is None:
            found = found.masked_fill(mask, 0.0)
    return found


def kept_values(
    x: Float[Tensor, "*batch time feature width"],
    keep: Bool[Tensor, "*#batch time #feature"],
    instead: Shaped[Tensor, "*#batch time feature width"] | None,
) -> Float[Tensor, "*batch time feature width"]:
    """Values where they are kept; elsewhere zero, or what stands in their place.

    Equation: Ablation
        y_t = sum_{s<=t} alpha[t, s] x_s - sum_{s in S} alpha[t, s] (x_s - x~_s)    for t in T

        Source: this package; with x~ = 0 the knockout of Endy et al. 2025, arXiv:2505.24244, eq. 5
        Source: Wang et al. 2022, arXiv:2211.00593, for means in the place of what is knocked out
        Source: Chan et al. 2022, Causal scrubbing (Alignment Forum), for another prompt's values

        x~_s stands in the place of what the source writes. Every mixer that is linear in its values does so: scans,
        delta rules, linear attention, and softmax attention, whose weights alpha stay as they are.
    """
    if instead is None:
        return x * keep[..., None]
    return torch.where(keep[..., None], x, instead.to(x.dtype))
