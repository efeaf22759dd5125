"""Cuts of rows, united with those of knockouts that run around their replay.

Knockouts add up: under those that run around, a row's position does without what they take from it and what its own cut
takes, feature by feature and path by path. So the positions of a row are parted by which knockouts they are a target of
and features by which knockouts cut them; each part is a pair of a source set, the union, and a target set. What mixers
are told is such pairs alone, and where no knockout runs around they are the row's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut
from mambalens.hooks.resume import Base, Replaced, Rows
from mambalens.hooks.values import Written

WAYS = (Paths.MAIN, Paths.CONV, Paths.ERASE)


class Pair(NamedTuple):
    """What some positions of a row do without, by numbers of source sets; 0 for nothing."""

    main: int
    conv: int
    erase: int
    target: int
    """Number of the target set."""
    features: Bool[Tensor, " feature"] | None = None
    """None for every one."""

    def on(self, path: Paths) -> int:
        """Number of the source set on a path."""
        return {Paths.MAIN: self.main, Paths.CONV: self.conv, Paths.ERASE: self.erase}[path]


class RowCut(NamedTuple):
    """What is cut of one row in one mixer."""

    pairs: tuple[Pair, ...]


UNCUT = RowCut(())


class _Part(NamedTuple):
    """A part of a source set: sources of the row's own cut, or of a knockout that runs around."""

    order: int
    """Of the knockout that they are of, the outermost first; the row's own comes last."""
    number: int
    """Of its source set."""
    replaced: bool
    """Whether something stands in their place."""


class United:
    """The rows of a replay in one mixer, under the knockouts that run around it.

    Args:
        base: source sets and target sets of the rows' own cuts; set 0 is empty.
        around: what is cut of the mixer by knockouts that run, the outermost first; nothing behind the prompts' ends.
        instead: what stands in the place of what the rows' own source sets hand on; None for nothing.
    """

    def __init__(self, base: Base, around: Sequence[Cut] = (), instead: Written | None = None) -> None:
        self._given, self._around = base.known, [_known(cut) for cut in around]
        self._device = base.first.device
        self._instead = instead
        self._sets: dict[tuple[_Part, ...], int] = {(): 0}
        self._targets: dict[bytes, int] = {}
        self._masks: list[Tensor] = []
        self._of_targets: dict[tuple[tuple[int, ...], int, int], int | None] = {}
        self._atoms: dict[tuple[tuple[int, ...], int | None], list[tuple[Tensor | None, tuple[int, ...]]]] = {}
        self._found: dict[tuple[tuple[int, ...], ...], list[Pair]] = {}
        self._ways = self._patterns()

    def _patterns(self) -> list[tuple[tuple[int, ...], Bool[Tensor, "batch length"] | None]]:
        """The ways in which replayed positions are cut by what runs around: a row of sources of each, and where."""
        if not self._around:
            return [((), None)]
        codes = torch.stack([cut.code.gather(1, self._given.columns) for cut in self._around], -1)  # [B, L, cuts]
        found = [tuple(way) for way in codes.flatten(0, 1).unique(dim=0).tolist()]
        if not any(map(any, found)):
            return [((0,) * len(self._around), None)]
        return [(way, (codes == torch.tensor(way)).all(-1)) for way in found]

    def pairs(self, own: RowCut) -> list[Pair]:
        """What a row does without, its own cut and what runs around together."""
        key = tuple((*pair[:4], id(pair.features)) for pair in own.pairs)
        if key not in self._found:
            self._found[key] = self._united(own.pairs)
        return self._found[key]

    def _united(self, own: Sequence[Pair]) -> list[Pair]:
        found = []
        targets = tuple(pair.target for pair in own)
        rest = [None] if any(any(way) for way, _ in self._ways) else []
        for (number, (way, _)), pair in product(enumerate(self._ways), [*own, *rest]):
            target = self._target(targets, -1 if pair is None else pair.target, number)
            if target is None:
                continue
            here = tuple(order for order, row in enumerate(way) if row)
            for features, members in self._parted(here, pair):
                main, conv, erase = (self._set(path, way, members, pair) for path in WAYS)
                if main or conv or erase:
                    found.append(Pair(main, conv, erase, target, features))
        return found

    def _target(self, own: tuple[int, ...], target: int, way: int) -> int | None:
        """Number of the target set of those of a target set (-1: of none of the row's own) that are cut in a way."""
        key = (own if target < 0 else (), target, way)
        if key not in self._of_targets:
            masks, where = self._given.targets, self._ways[way][1]
            mask = masks[target] if target >= 0 else ~masks[list(own)].any(0)
            mask = mask if where is None else mask & where
            # The row's own pairs stay as they are; one without a target among those that run around falls away.
            empty = where is not None and not bool(mask.any())
            self._of_targets[key] = None if empty else self._number(mask)
        return self._of_targets[key]

    def _number(self, mask: Bool[Tensor, "batch length"]) -> int:
        name = mask.numpy().tobytes()
        if name not in self._targets:
            self._targets[name] = len(self._masks)
            self._masks.append(mask)
        return self._targets[name]

    def _parted(self, here: tuple[int, ...], own: Pair | None) -> list[tuple[Tensor | None, tuple[int, ...]]]:
        """Features by which of the knockouts cut them, `len(around)` for the row's own."""
        mine = () if own is None else (len(self._around),)
        masks = [self._around[order].features for order in here] + ([] if own is None else [own.features])
        if all(mask is None for mask in masks):
            return [(None, (*here, *mine))]
        key = (here, None if own is None else id(own.features))
        if key not in self._atoms:
            count = next(len(mask) for mask in masks if mask is not None)
            every = torch.ones(count, dtype=torch.bool)
            of_each = torch.stack([every if mask is None else mask.cpu() for mask in masks], 1)  # [F, knockouts]
            orders = torch.tensor([*here, *mine])
            self._atoms[key] = [
                ((of_each == combination).all(1), tuple(orders[combination].tolist()))
                for combination in of_each.unique(dim=0)
                if combination.any()
            ]
        return self._atoms[key]

    def _set(self, path: Paths, way: tuple[int, ...], members: tuple[int, ...], own: Pair | None) -> int:
        """Number of the source set that some positions do without on a path, in some features."""
        parts = []
        for order in members:
            if order < len(self._around):
                cut = self._around[order]
                if path in cut:
                    replaced = cut.instead is not None and path is not Paths.ERASE
                    parts.append(_Part(order, way[order], replaced))
            elif own is not None and own.on(path):
                replaced = self._instead is not None and path is not Paths.ERASE
                parts.append(_Part(order, own.on(path), replaced))
        return self._sets.setdefault(tuple(parts), len(self._sets))

    @property
    def sets(self) -> tuple[Any, ...]:
        """The source sets and target sets so far: what tells its base from another of the same given things."""
        return tuple(self._sets), tuple(self._targets)

    def base(self) -> Base:
        """What the mixer has to know, when all rows have been asked for."""
        base = self._given
        nothing = torch.zeros_like(base.sources[0])
        zero, others = [], {order: [nothing] * len(self._sets) for order in range(1 + len(self._around))}
        for parts, number in self._sets.items():
            taken = nothing
            for part in parts:
                if not part.replaced:
                    taken = taken | self._sources(part)
            zero.append(taken)
            # Where several put something in the same place, it is the innermost one's.
            for part in reversed(parts):
                if part.replaced:
                    sources = self._sources(part)
                    others[part.order][number] = sources & ~taken
                    taken = taken | sources
        written = [*(cut.instead for cut in self._around), self._instead]
        instead = tuple(
            Replaced(found, masks)
            for order, of_sets in others.items()
            if (found := written[order]) is not None and bool((masks := torch.stack(of_sets)).any())
        )
        before = base.before
        around = self._around if any(bool((cut.targets & before).any()) for cut in self._around) else ()
        targets = torch.stack(self._masks) if self._masks else base.targets[:1]
        return Base(base.first, targets, torch.stack(zero), instead, tuple(around)).to(self._device)

    def _sources(self, part: _Part) -> Bool[Tensor, "batch time"]:
        own = part.order == len(self._around)
        return (self._given.sources if own else self._around[part.order].rows)[part.number]


def _known(cut: Cut) -> Cut:
    """A cut whose masks are on the CPU; what it puts in stays where it is."""
    features = None if cut.features is None else cut.features.cpu()
    return replace(cut, code=cut.code.cpu(), rows=cut.rows.cpu(), features=features)


def rows_of(cuts: Sequence[Sequence[Pair]], count: int) -> Rows:
    """The cuts of rows as tensors.

    Args:
        cuts: the pairs of each row.
        count: features of the mixer.
    """
    most = max(1, *map(len, cuts))
    nothing = Pair(0, 0, 0, 0)
    filled = [[*pairs, *[nothing] * (most - len(pairs))] for pairs in cuts]
    numbers = torch.tensor([[pair[:4] for pair in pairs] for pairs in filled])  # [cuts, pairs, 4]
    main, conv, erase, target = numbers.permute(2, 1, 0)
    features = None
    if any(pair.features is not None for pairs in filled for pair in pairs):
        everything = torch.ones(count, dtype=torch.bool)
        masks = [
            torch.stack([everything if pair.features is None else pair.features.cpu() for pair in pairs])
            for pairs in filled
        ]
        features = torch.stack(masks, 1)
    return Rows(main, conv, erase, target, features)
