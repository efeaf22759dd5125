"""Patches by replay: a whole heatmap of them from one base pass.

A patch puts what another prompt has at some layers and positions in the place of a prompt's own. It changes nothing
below its first layer and nothing left of its first position. So prompts and those that they are patched from go side by
side through one base pass, layer by layer, and before layer l a row of the prompt, from its first patched position to
its end, joins for every patch whose layers begin there (`groups`). All joined rows go through the layer, resume from
what the base has just left there, and have the other prompt's activation put in.

Rows of one length share a call. Where all rows of a heatmap are too many for the memory, some of them at a time get a
base pass of their own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambalens.hooks import HookManager, Mixer, Values
from mambalens.hooks.behind import beside_of, hidden_of
from mambalens.hooks.calls import bound
from mambalens.hooks.on_cpu import one_gelu
from mambalens.hooks.resume import Base
from mambalens.hooks.sublayers import sublayers_of
from mambalens.hooks.uniting import UNCUT, WAYS, Pair, RowCut, United, rows_of
from mambalens.hooks.values import Written
from mambalens.interventions.embeddings import noisy_embeddings
from mambalens.interventions.groups import Group, Prompts, Spot, begins_of, fitting
from mambalens.interventions.sites import layers_with
from mambalens.sweep.replay import SHARES, bytes_of, head_of, prompts_at_once
from mambalens.system.memory import keep_pages, widest

Score = Callable[[Tensor, Tensor], Tensor]
"""Of logits [row, vocabulary] and the prompts [row] that they belong to: some numbers for each [row, numbers]."""


class Scores(NamedTuple):
    """What patches come to."""

    base: Float[Tensor, "batch number"]
    """Of the prompts as they are."""
    patched: Float[Tensor, "spot window number"]
    uncut: tuple[list[int], Float[Tensor, "row number"]]
    """Of some prompts once more, by rows that nothing is put into: where replay is right, what `base` has of them."""


class PatchReplay:
    """Patches of some prompts, by replay.

    Args:
        hooks: the model's hook manager.
        site: see `sites.SITES`.
        windows: the layers in which something is put in at once.
        memory: bytes to plan with; a plan, not a limit that is enforced.
    """

    def __init__(self, hooks: HookManager, site: str, windows: Sequence[Sequence[int]], memory: int) -> None:
        self.hooks, self.site, self.memory = hooks, site, memory
        having = layers_with(site, hooks)
        self.windows = [set(layers) & having for layers in windows]
        self.nothing_left = len(self.windows)
        """Number of the window without a layer."""

    @torch.no_grad()
    def scores(self, prompts: Prompts, spots: Sequence[Spot], score: Score) -> Scores:
        """What becomes of the predictions behind the last tokens.

        Args:
            prompts: of the base pass.
            spots: where to patch, each in every window.
            score: what is made of logits.
        """
        host = prompts
        prompts = prompts.to(self.hooks.model.get_input_embeddings().weight.device)
        alike = begins_of(host, spots, self.windows, self.site, self.hooks.n_layers)
        values = values_of(self.hooks, prompts, self.windows) if alike and self.site == "value" else None
        checked = list(alike)[len(alike) // 2] if alike else None
        groups = [
            group
            for (length, starts), numbers in alike.items()
            for group in fitting(
                numbers, starts, length, max(1, self.memory // SHARES // self._row_bytes(length)),
                self.nothing_left if (length, starts) == checked else None,
            )
        ]  # fmt: skip
        uncut: tuple[list[int], Tensor] = ([], torch.empty(0, 0))
        base: Tensor | None = None
        patched: Tensor | None = None
        for walked in self._together(groups):
            walk = _Walk(self, prompts, host.last.tolist(), spots, walked, values)
            walk.run()
            if base is None:
                base = walk.scored(walk.base_hidden, list(range(len(prompts.last))), score)
                patched = base[[spot.prompt for spot in spots]][:, None].repeat(1, len(self.windows), 1)
            assert patched is not None
            for group, hidden in walk.found():
                for row, window in enumerate(group.windows):
                    owners = [spots[number].prompt for number in group.spots]
                    scored = walk.scored(hidden[:, row], owners, score)
                    if window == self.nothing_left:
                        uncut = (owners, scored)
                    else:
                        patched[group.spots, window] = scored
        assert base is not None and patched is not None
        return Scores(base, patched, uncut)

    def _together(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups that share a base pass; without any, one base pass alone."""
        room = self.memory // SHARES
        together: list[Group] = []
        used = 0
        for group in groups:
            size = group.rows * self._row_bytes(group.length)
            if together and used + size > room:
                yield together
                together, used = [], 0
            together.append(group)
            used += size
        if together or not groups:
            yield together

    def _row_bytes(self, length: int) -> int:
        width = self.hooks.model.get_input_embeddings().weight.shape[1]
        return 2 * length * int(width) * bytes_of(self.hooks.model)

    def patches(self, window: int, layer: int) -> bool:
        """Whether something is put in at a layer."""
        return window != self.nothing_left and layer in self.windows[window]


def prompts_fitting(hooks: HookManager, site: str, time: int, memory: int) -> int:
    """How many prompts of so many positions a base pass may take."""
    fitting = prompts_at_once(hooks, time, 1, memory)
    if site != "value":
        return fitting
    # What mixers hand on is known of all layers before the base pass begins.
    numbers = time * sum(widest([layer]) for layer in hooks.layers)
    return max(1, min(fitting, memory // SHARES // (numbers * bytes_of(hooks.model))))


def values_of(hooks: HookManager, prompts: Prompts, windows: Sequence[Collection[int]]) -> Values:
    """What the mixers of some windows' layers hand on at every position."""
    with noisy_embeddings(hooks.model, prompts.noise):
        return hooks.values(prompts.ids, layers=sorted(set[int]().union(*windows)))


class _Side(NamedTuple):
    """A group of rows on its way through the layers."""

    group: Group
    base: Base
    prompts: Int[Tensor, " spot"]
    others: Int[Tensor, " spot"]
    spot: Int[Tensor, " put"]
    """Number of the spot in the group, of everything that is put in."""
    offset: Int[Tensor, " put"]
    """Its place in a row."""
    giver: Int[Tensor, " put"]
    """Prompt that it is taken from."""
    given: Int[Tensor, " put"]
    """Position that it is taken from."""
    around: dict[Mixer, tuple[Base, list[Pair]]]
    """What running knockouts cut of every row, by mixer, where they do."""
    whose: Int[Tensor, "two spot"]
    """`prompts` and `others` on the CPU."""
    puts: Int[Tensor, "four put"]
    """`spot`, `offset`, `giver` and `given` on the CPU."""

    def reading(self, mixer: Mixer, values: Written) -> tuple[Base, list[Pair]]:
        """Rows that read the other prompts' values where something is put in.

        Args:
            mixer: the mixer that reads.
            values: what it hands on in the base pass.
        """
        base, time = self.base, self.base.sources.shape[2]
        giver = self.whose[0][:, None].expand(-1, time).clone()
        given = torch.arange(time).expand(len(giver), -1).clone()
        spot, offset = self.puts[:2]
        at = spot, base.first[spot] + offset
        giver[at], given[at] = self.puts[2:]
        sources = base.sources.new_zeros(2, *given.shape)
        sources[1][at] = True
        taken = torch.stack([giver, given])

        def of_others(part: Tensor) -> Tensor:
            there = taken.to(part.device, non_blocking=True)
            return part[there[0], there[1]]

        united = United(Base(base.first, torch.ones_like(base.targets), sources), (), values.each(of_others))
        main, conv, erase = (int(mixer.value_path is way) for way in WAYS)
        pairs = united.pairs(RowCut((Pair(main, conv, erase, 0),)))
        return united.base(), pairs

    def put(
        self,
        into: Float[Tensor, "spot row length hidden"],
        rows: Sequence[int],
        values: Float[Tensor, "batch time hidden"],
    ) -> None:
        """Put the other prompts' values into some rows."""
        if rows and len(self.spot):
            taken = values[self.giver.to(values.device), self.given.to(values.device)].to(into.dtype)  # [K, W]
            at = torch.tensor(rows, device=into.device)
            into[self.spot.to(at.device)[:, None], at, self.offset.to(at.device)[:, None]] = taken[:, None]


class _Walk:
    """One base pass with some groups of rows beside it."""

    def __init__(
        self,
        replay: PatchReplay,
        prompts: Prompts,
        last: Sequence[int],
        spots: Sequence[Spot],
        groups: Sequence[Group],
        values: Values | None,
    ) -> None:
        self.replay, self.prompts, self.last, self.hooks, self.values = replay, prompts, last, replay.hooks, values
        self.around = self.hooks.cuts_around(torch.tensor(last), prompts.ids.shape[1])
        self.sides = [self._side(group, spots) for group in groups]
        self.hidden: list[Tensor | None] = [None] * len(groups)
        self.beside: list[tuple[Any, ...] | None] = []  # what each layer returns beside its hidden states
        self.seen: dict[Mixer, list[Any]] = {}
        self.given: list[Tensor] = []
        """What the running layer's sublayers of the site gave in the base pass."""
        self.in_rows: tuple[_Side, list[int], int] | None = None
        """The running rows, which of them something is put into, and how many they are."""
        self.base_hidden: Tensor

    def _side(self, group: Group, spots: Sequence[Spot]) -> _Side:
        device, ids = self.prompts.ids.device, self.prompts.ids
        of = [spots[number] for number in group.spots]
        begins = [self.last[spot.prompt] + 1 - group.length for spot in of]
        puts = [
            (number, position - begins[number], spot.other, there)
            for number, spot in enumerate(of)
            for position, there in zip(spot.positions, spot.others, strict=True)
        ]
        whose, where = torch.tensor([(spot.prompt, spot.other) for spot in of]).T, torch.tensor(puts).T
        prompts, others = whose.to(device, non_blocking=True)
        spot_of, offset, giver, given = where.to(device, non_blocking=True)
        base = Base.uncut(torch.tensor(begins), group.length, ids.shape[1])
        around = {}
        for mixer, cuts in self.around.items():
            united = United(base, [cut.of_prompts(whose[0]) for cut in cuts])
            pairs = united.pairs(UNCUT)
            around[mixer] = (united.base(), pairs)
        return _Side(group, base, prompts, others, spot_of, offset, giver, given, around, whose, where)

    def run(self) -> None:
        """Walk through the layers."""
        hooks = self.hooks
        for mixer in hooks.mixers:
            mixer.expect(sum(side.group.rows * side.group.length for side in self.sides) // 2)
        keep_pages()
        with ExitStack() as stack:
            stack.enter_context(one_gelu(hooks.layers))
            for mixer in hooks.mixers:
                self.seen[mixer] = stack.enter_context(mixer.watching(self.around.get(mixer, ())))
            for number, layer in enumerate(hooks.layers):
                stack.callback(layer.register_forward_hook(self._behind(number, layer), with_kwargs=True).remove)
            if self.replay.site in ("mixer", "mlp"):
                for sublayer in itertools.chain(*sublayers_of(hooks.layers, hooks.mixers)):
                    if sublayer.part == self.replay.site:
                        stack.enter_context(sublayer.changing(self._sublayer()))
            stack.enter_context(noisy_embeddings(hooks.model, self.prompts.noise))
            hooks.trunk(input_ids=self.prompts.ids, use_cache=False)

    def _behind(self, number: int, layer: nn.Module) -> Callable[..., None]:
        """A hook behind a layer of the base pass: the rows go through it too."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.in_rows is not None:
                return
            given = bound(module, args, kwargs)
            names = list(given)
            self.beside.append(beside_of(output))
            seen = [(mixer, self.seen[mixer].pop()) for mixer in self.hooks.mixers if mixer.layer == number]
            others = {name: given[name] for name in names[2:]}
            for at in range(len(self.sides)):
                self._through(number, layer, at, given[names[1]], others, seen)
            self.given.clear()
            if number == self.hooks.n_layers - 1:
                whole = hidden_of(output)
                for at, side in enumerate(self.sides):
                    self.hidden[at] = hidden = self._joined(number + 1, at, whole)
                    if hidden is not None and self.replay.site == "residual":
                        side.put(hidden, self._patched(number + 1, side.group, hidden.shape[1]), whole)
                rows = torch.arange(len(whole), device=whole.device)
                self.base_hidden = whole[rows, self.prompts.last.to(whole.device)]

        return hook

    def _sublayer(self) -> Callable[[Tensor], Tensor | None]:
        """What a sublayer of the site gives: kept in the base pass, and put into rows in the order of their calls."""

        def change(value: Tensor) -> Tensor | None:
            if self.in_rows is None:
                self.given.append(value.clone())  # Falcon adds to it in place
                mine.append(len(self.given) - 1)
                return None
            side, rows, count = self.in_rows
            if not rows:
                return None
            changed = value.clone().view(len(side.group.spots), count, side.group.length, -1)
            side.put(changed, rows, self.given[mine[-1]])
            return changed.view(value.shape)

        mine: list[int] = []
        return change

    def _through(
        self,
        number: int,
        layer: nn.Module,
        at: int,
        base: Float[Tensor, "batch time hidden"],
        kwargs: dict[str, Any],
        seen: Sequence[tuple[Mixer, Any]],
    ) -> None:
        """Rows of a group join before a layer, and go through it."""
        side, site = self.sides[at], self.replay.site
        hidden = self._joined(number, at, base)
        if hidden is None:
            return
        here = self._patched(number, side.group, hidden.shape[1])
        if site in ("residual", "mixer", "mlp"):
            if site == "residual":
                side.put(hidden, here, base)
            self.hidden[at] = self._in_tiles(layer, side, hidden, here, kwargs, seen)
            return
        theirs = set(here)
        own = [row for row in range(hidden.shape[1]) if row not in theirs]
        after: Tensor | None = None
        for rows, put in ((own, False), (here, True)):
            if rows:
                found = self._in_tiles(layer, side, hidden[:, rows], [], kwargs, seen, put)
                after = found.new_empty(hidden.shape) if after is None else after  # where the layer is
                after[:, rows] = found
        self.hidden[at] = after

    def _joined(
        self, number: int, at: int, base: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "spot row length hidden"] | None:
        """The rows of a group before a layer, or behind the last, with those that join there; None without any."""
        side, before = self.sides[at], self.hidden[at]
        joined = sum(start <= number for start in side.group.starts)
        if not joined:
            return None
        new = joined - (0 if before is None else before.shape[1])
        hidden = None if before is None else before.to(base.device)  # [G, R, L, W]
        if new:
            columns, prompts = side.base.to(base.device).columns, side.prompts.to(base.device)
            own = base[prompts[:, None], columns][:, None].expand(-1, new, -1, -1)
            hidden = own.clone() if hidden is None else torch.cat([hidden, own], 1)
        return hidden

    def _patched(self, number: int, group: Group, joined: int) -> list[int]:
        """Which of the joined rows something is put into at a layer."""
        return [row for row in range(joined) if self.replay.patches(group.windows[row], number)]

    def _in_tiles(
        self,
        layer: nn.Module,
        side: _Side,
        hidden: Float[Tensor, "spot row length hidden"],
        here: Sequence[int],
        kwargs: dict[str, Any],
        seen: Sequence[tuple[Mixer, Any]],
        put: bool = False,
    ) -> Float[Tensor, "spot row length hidden"]:
        """Rows through a layer, as many at a time as fit.

        Args:
            layer: the layer.
            side: their group.
            hidden: their residual streams.
            here: into which of them a sublayer's output is put.
            kwargs: what the base pass gave the layer beside its input.
            seen: what its mixers have seen in the base pass.
            put: whether they resume from the other prompts' states, or read the other prompts' values.
        """
        spots, count, length = hidden.shape[:3]
        base = side.base.to(hidden.device)
        resumed = side.others if put and self.replay.site == "state" else side.prompts
        values = self.values if put else None
        inside = [
            side.around.get(mixer, (base, [])) if values is None else side.reading(mixer, values.of[mixer])
            for mixer, _ in seen
        ]
        kept = [
            of_layer.kept((base if values is not None else under).to(hidden.device), resumed)
            for (_, of_layer), (under, _) in zip(seen, inside, strict=True)
        ]
        per_row = 4 * (widest([layer]) + hidden.shape[-1]) * spots * length * bytes_of(self.hooks.model)
        size = max(1, self.replay.memory // SHARES // per_row)
        size = min([size, *(of_layer.most_cuts for of_layer in kept)])
        batch, time = self.prompts.ids.shape
        prompts = side.prompts.to(hidden.device)
        of_spots = {name: _of_prompts(value, prompts, batch, time) for name, value in kwargs.items()}
        parts = []
        for begin in range(0, count, size):
            part = hidden[:, begin : begin + size]
            rows = part.shape[1]
            given = {name: base.at_rows(value, rows) for name, value in of_spots.items()}
            self.in_rows = (side, [row - begin for row in here if begin <= row < begin + rows], rows)
            try:
                with ExitStack() as stack:
                    stack.enter_context(self.hooks.rows(functools.partial(_at_rows, base, prompts, batch, rows)))
                    for (mixer, _), of_layer, (under, pairs) in zip(seen, kept, inside, strict=True):
                        cut = rows_of([pairs] * rows, mixer.n_features)
                        stack.enter_context(mixer.resuming(of_layer, under.to(hidden.device), cut))
                    found = hidden_of(layer(part.flatten(1, 2), **given))
            finally:
                self.in_rows = None
            parts.append(found.unflatten(1, (rows, length)))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def found(self) -> Iterator[tuple[Group, Float[Tensor, "spot row hidden"]]]:
        """Hidden states behind the layers at the last position, group by group."""
        for side, hidden in zip(self.sides, self.hidden, strict=True):
            assert hidden is not None
            yield side.group, hidden[:, :, -1]

    def scored(
        self, hidden: Float[Tensor, "row hidden"], owners: Sequence[int], score: Score
    ) -> Float[Tensor, "row number"]:
        """What the rows of some prompts come to, behind the head."""
        vocabulary = self.hooks.model.get_output_embeddings().weight.shape[0]
        at_once = max(1, self.replay.memory // SHARES // (3 * 4 * int(vocabulary)))
        of, parts = torch.tensor(owners), []
        for begin in range(0, len(hidden), at_once):
            logits = head_of(self.hooks, self.beside, hidden[begin : begin + at_once, None])
            parts.append(score(logits, of[begin : begin + at_once].to(logits.device)).double().cpu())
        return torch.cat(parts)


def _at_rows(base: Base, prompts: Int[Tensor, " spot"], batch: int, rows: int, value: Any) -> Any:
    """What belongs to positions of all prompts, for the rows of spots."""
    return base.at_rows(_of_prompts(value, prompts, batch, base.sources.shape[2]), rows)


def _of_prompts(value: Any, prompts: Int[Tensor, " spot"], batch: int, time: int) -> Any:
    """What belongs to positions of all prompts [batch, T, ...], for those of spots; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_of_prompts(part, prompts, batch, time) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != (batch, time):
        return value
    return value[prompts.to(value.device)]
