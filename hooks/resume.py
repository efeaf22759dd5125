"""Rows of a replay: ends of prompts that resume from a base pass, each under its own cut or none.

The contract between the replay engine and the mixers (see `Mixer.keeping` and `Mixer.resuming`). A knockout changes
nothing to the left of its first target, so a row is the prompt from there on: one token where the target is the last.
The rows of one prompt lie side by side, `[batch, cuts x length, width]`: layers work on each token alone, and an
attention layer reads the prompt's keys for all of its rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut
from mambalens.hooks.values import Written


class Replaced(NamedTuple):
    """What stands in the place of what some sources hand on in one mixer."""

    written: Written
    """Over the prompts' columns [batch, T, ...]."""
    sources: Bool[Tensor, "sourceset batch time"]
    """Where it is read, source set by source set."""

    def to(self, device: torch.device) -> Replaced:
        """The same on a device."""
        return Replaced(self.written.each(lambda part: part.to(device)), _over(self.sources, device))


@dataclass(frozen=True, eq=False)
class Base:
    """What a base pass of right-padded prompts has in common: for all layers, or as one mixer has to know it.

    It is made on the CPU and copied to where a layer is. What has to be known to go on (how many tokens, whether any)
    is looked up on the CPU, since to ask a device for it is to wait until it has done all before.
    """

    first: Int[Tensor, " batch"]
    """First position that is replayed, of every prompt."""
    targets: Bool[Tensor, "targetset batch length"]
    """Which of the replayed positions are targets, target set by target set."""
    sources: Bool[Tensor, "sourceset batch time"]
    """Source sets: what is read as nothing. Set 0 is empty."""
    instead: tuple[Replaced, ...] = ()
    """What is read in the place of other sources of the same sets. No source of a set is named twice."""
    around: tuple[Cut, ...] = ()
    """What is cut of the base pass itself, left of what is replayed. Rows have it among their own cuts."""
    host: Base | None = None
    """The same on the CPU, where this is a copy of it."""
    copies: dict[torch.device, Base] = field(default_factory=dict, repr=False)
    """Those that were made, by device."""

    @property
    def known(self) -> Base:
        """The same where masks are looked up without waiting for a device."""
        return self.host or self

    @classmethod
    def uncut(cls, first: Int[Tensor, " batch"], length: int, time: int) -> Base:
        """Rows of one length that nothing is cut from."""
        batch = len(first)
        targets = torch.zeros(1, batch, length, dtype=torch.bool, device=first.device)
        return cls(first, targets, torch.zeros(1, batch, time, dtype=torch.bool, device=first.device))

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.targets.shape[2]

    @cached_property
    def columns(self) -> Int[Tensor, "batch length"]:
        """The replayed positions."""
        return self.first[:, None] + torch.arange(self.length, device=self.first.device)

    @cached_property
    def before(self) -> Bool[Tensor, "batch time"]:
        """Positions left of the first that is replayed."""
        return torch.arange(self.sources.shape[2], device=self.first.device) < self.first[:, None]

    @cached_property
    def reach(self) -> int:
        """Columns that hold every position left of the first that is replayed; at least one."""
        return max(1, int(self.known.first.max()))

    @cached_property
    def tokens(self) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """Prompt and column of every position left of the first that is replayed."""
        prompts, columns = self.known.before.nonzero(as_tuple=True)
        return _over(prompts, self.first.device), _over(columns, self.first.device)

    @cached_property
    def own_sources(self) -> Bool[Tensor, "sourceset batch length"]:
        """Which of the replayed positions are sources."""
        return self.own(self.sources)

    @cached_property
    def sources_before(self) -> Bool[Tensor, " sourceset"]:
        """Which source sets have a position left of what is replayed: a state without them is another."""
        of = self.known
        return ((of.sources | of.any_instead) & of.before).flatten(1).any(1)

    @cached_property
    def all_targets(self) -> bool:
        """Whether every replayed position is a target in every target set."""
        return bool(self.known.targets.all())

    def at_rows(self, value: Any, cuts: int) -> Any:
        """What belongs to positions [1 or batch, T, ...], such as rotary angles, for rows; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(self.at_rows(part, cuts) for part in value)
        time = self.sources.shape[2]
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != time:
            return value
        if value.shape[0] not in (1, len(self.first)):
            return value
        value = value.expand(len(self.first), *value.shape[1:])
        columns = self.columns.to(value.device)
        picked = value[torch.arange(len(columns), device=value.device)[:, None], columns]  # [B, L, ...]
        return picked[:, None].expand(-1, cuts, *picked.shape[1:]).flatten(1, 2)

    def own_columns(self, values: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch length *rest"]:
        """What belongs to positions, of those that are replayed."""
        return values[torch.arange(len(values), device=values.device)[:, None], self.columns]

    @cached_property
    def any_instead(self) -> Bool[Tensor, "sourceset batch time"]:
        """Sources in whose place something is read."""
        found = torch.zeros_like(self.sources)
        for other in self.instead:
            found = found | other.sources
        return found

    def own(self, sources: Bool[Tensor, "sourceset batch time"]) -> Bool[Tensor, "sourceset batch length"]:
        """Source sets, of the replayed positions."""
        return sources.gather(2, self.columns.expand(len(sources), -1, -1))

    def to(self, device: torch.device) -> Base:
        """The same on a device."""
        if device == self.first.device:
            return self
        of = self.known
        if device not in of.copies:
            first, targets, sources = (_over(part, device) for part in (of.first, of.targets, of.sources))
            instead = tuple(other.to(device) for other in of.instead)
            around = tuple(cut.to(device) for cut in of.around)
            of.copies[device] = Base(first, targets, sources, instead, around, of)
        return of.copies[device]


class Seen(Protocol):
    """What a mixer has seen of whole prompts in a base pass: rows may begin at any of their positions."""

    def kept(self, base: Base, prompts: Int[Tensor, " batch"]) -> Any:
        """What rows resume from (see `Mixer.keeping`).

        Args:
            base: where they begin. It has as many prompts as are named here.
            prompts: which prompts of the base pass; one may be named several times.
        """


@dataclass(frozen=True)
class Rows:
    """The cuts of rows in one layer; every cut has a row for every prompt.

    A row loses what one or several source sets hand to a target set each, path by path: sources x targets is one such
    pair, edges are as many as they have different rows. No two pairs of a row have a target and a feature in common.
    """

    main: Int[Tensor, "pair cut"]
    """Source set of every pair that the scan or attention does without, 0 for none."""
    conv: Int[Tensor, "pair cut"]
    """Source set whose taps the convolution does without."""
    erase: Int[Tensor, "pair cut"]
    """Source set that removes nothing from the state."""
    target: Int[Tensor, "pair cut"]
    """Target set of every pair."""
    features: Bool[Tensor, "pair cut feature"] | None
    """Which features are cut; None for all."""
    host: Rows | None = None
    """The same on the CPU, where this is a copy of it."""

    @property
    def known(self) -> Rows:
        """The same where numbers are looked up without waiting for a device; see `Base`."""
        return self.host or self

    def __len__(self) -> int:
        return self.target.shape[1]

    def on(self, path: Paths) -> Int[Tensor, "pair cut"]:
        """Source set of every pair on one path, 0 where that is not cut."""
        return {Paths.MAIN: self.main, Paths.CONV: self.conv, Paths.ERASE: self.erase}[path]

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        if device == self.target.device:
            return self
        features = None if self.features is None else _over(self.features, device)
        together = _over(torch.stack([self.main, self.conv, self.erase, self.target]), device)
        main, conv, erase, target = together.unbind()
        return Rows(main, conv, erase, target, features, self.known)


def _over(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for it: one of ordinary memory may change behind such a copy."""
    return tensor.to(device, non_blocking=True)
