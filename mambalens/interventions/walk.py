"""Patches by replay: a whole heatmap of them from one base pass.

A patch puts what another prompt has at some layers and positions in the place of a prompt's own. It changes nothing
below its first layer and nothing left of its first position. So prompts and those that they are patched from go side by
side through one base pass, layer by layer, and before layer l a row of the prompt, from its first patched position to
its end, joins for every patch whose layers begin there. All joined rows go through the layer, resume from what the base
has just left there, and have the other prompt's activation put in.

Rows of one length share a call. Where all rows of a heatmap are too many for the memory, some of them at a time get a
base pass of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambalens.hooks import HookManager, Mixer
from mambalens.hooks.behind import beside_of, hidden_of
from mambalens.hooks.calls import bound
from mambalens.hooks.resume import Base, Rows
from mambalens.hooks.sublayers import sublayers_of
from mambalens.interventions.embeddings import noisy_embeddings
from mambalens.interventions.sites import layers_with
from mambalens.sweep.replay import SHARES, bytes_of, head_of
from mambalens.system.memory import widest

Score = Callable[[Tensor, Tensor], Tensor]
"""Of logits [row, vocabulary] and the prompts [row] that they belong to: some numbers for each [row, numbers]."""


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
        self.windows = [frozenset(layers) for layers in windows]
        self.having = layers_with(site, hooks)
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
        last = prompts.last.tolist()
        prompts = prompts.to(self.hooks.model.get_input_embeddings().weight.device)
        # Behind the last position nobody reads a state.
        lengths = [last[s.prompt] - (max(s.positions) if self.site == "state" else min(s.positions) - 1) for s in spots]
        by_length: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            by_length.setdefault(length, []).append(number)
        changing = [length for length in sorted(by_length) if length > 0]
        checked = changing[len(changing) // 2] if changing else 0
        groups = [group for length in changing for group in self._fitting(by_length[length], length, length == checked)]
        uncut: tuple[list[int], Tensor] = ([], torch.empty(0, 0))
        base: Tensor | None = None
        patched: Tensor | None = None
        for walked in self._together(groups):
            walk = _Walk(self, prompts, last, spots, walked)
            walk.run()
            if base is None:
                base = walk.scored(walk.base_hidden, list(range(len(last))), score)
                patched = base[[spot.prompt for spot in spots]][:, None].repeat(1, len(self.windows), 1)
            assert patched is not None
            for group, hidden in walk.found():
                for row, window in enumerate(group.windows):
                    owners = [spots[number].prompt for number in group.spots]
                    values = walk.scored(hidden[:, row], owners, score)
                    if window == self.nothing_left:
                        uncut = (owners, values)
                    else:
                        patched[group.spots, window] = values
        assert base is not None and patched is not None
        return Scores(base, patched, uncut)

    def _fitting(self, spots: list[int], length: int, checked: bool) -> Iterator[_Group]:
        """Rows of one length, in groups that fit the memory; the first with a row that nothing is put into."""
        windows = sorted(range(len(self.windows)), key=lambda number: min(self.windows[number]))
        most = max(1, self.memory // SHARES // self._row_bytes(length))
        across = max(1, min(len(windows), most - 1))
        down = max(1, most // (across + 1))
        for begin in range(0, len(spots), down):
            for first in range(0, len(windows), across):
                some = windows[first : first + across]
                some = [self.nothing_left, *some] if checked and not first and not begin else some
                yield _Group(spots[begin : begin + down], some, length)

    def _together(self, groups: Sequence[_Group]) -> Iterator[list[_Group]]:
        """Groups that share a base pass; without any, one base pass alone."""
        room = self.memory // SHARES
        together: list[_Group] = []
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

    def start(self, window: int) -> int:
        """The layer before which the rows of a window join."""
        return 0 if window == self.nothing_left else min(self.windows[window])

    def patches(self, window: int, layer: int) -> bool:
        """Whether something is put in at a layer."""
        return window != self.nothing_left and layer in self.windows[window] and layer in self.having


class _Group(NamedTuple):
    """Rows of one length: so many for every spot."""

    spots: list[int]
    windows: list[int]
    """By the layer in which they begin."""
    length: int

    @property
    def rows(self) -> int:
        return len(self.spots) * len(self.windows)


class _Side(NamedTuple):
    """A group of rows on its way through the layers."""

    group: _Group
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
        groups: Sequence[_Group],
    ) -> None:
        self.replay, self.prompts, self.last, self.hooks = replay, prompts, last, replay.hooks
        self.sides = [self._side(group, spots) for group in groups]
        self.hidden: list[Tensor | None] = [None] * len(groups)
        self.beside: list[tuple[Any, ...] | None] = []  # what each layer returns beside its hidden states
        self.seen: dict[Mixer, list[Any]] = {}
        self.given: list[Tensor] = []
        """What the running layer's sublayers of the site gave in the base pass."""
        self.in_rows: tuple[_Side, list[int], int] | None = None
        """The running rows, which of them something is put into, and how many they are."""
        self.base_hidden: Tensor

    def _side(self, group: _Group, spots: Sequence[Spot]) -> _Side:
        device, ids = self.prompts.ids.device, self.prompts.ids
        of = [spots[number] for number in group.spots]
        begins = [self.last[spot.prompt] + 1 - group.length for spot in of]
        puts = [
            (number, position - begins[number], spot.other, there)
            for number, spot in enumerate(of)
            for position, there in zip(spot.positions, spot.others, strict=True)
        ]
        whose = torch.tensor([(spot.prompt, spot.other) for spot in of]).to(device, non_blocking=True).T
        where = torch.tensor(puts).to(device, non_blocking=True).T
        return _Side(group, Base.uncut(torch.tensor(begins), group.length, ids.shape[1]), *whose, *where)

    def run(self) -> None:
        """Walk through the layers."""
        hooks = self.hooks
        for mixer in hooks.mixers:
            mixer.expect(sum(side.group.rows * side.group.length for side in self.sides) // 2)
        with ExitStack() as stack:
            for mixer in hooks.mixers:
                self.seen[mixer] = stack.enter_context(mixer.watching())
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
        replay, side = self.replay, self.sides[at]
        group = side.group
        joined = sum(replay.start(window) <= number for window in group.windows)
        if not joined:
            return
        before = self.hidden[at]
        new = joined - (0 if before is None else before.shape[1])
        hidden = None if before is None else before.to(base.device)  # [G, R, L, W]
        if new:
            columns, prompts = side.base.to(base.device).columns, side.prompts.to(base.device)
            own = base[prompts[:, None], columns][:, None].expand(-1, new, -1, -1)
            hidden = own.clone() if hidden is None else torch.cat([hidden, own], 1)
        assert hidden is not None
        here = [row for row in range(joined) if replay.patches(group.windows[row], number)]
        if replay.site == "residual":
            side.put(hidden, here, base)
        if replay.site != "state":
            self.hidden[at] = self._in_tiles(layer, side, hidden, here, kwargs, seen, side.prompts)
            return
        theirs = set(here)
        own_rows = [row for row in range(joined) if row not in theirs]
        after: Tensor | None = None
        for rows, prompts in ((own_rows, side.prompts), (here, side.others)):
            if rows:
                found = self._in_tiles(layer, side, hidden[:, rows], [], kwargs, seen, prompts)
                after = found.new_empty(hidden.shape) if after is None else after  # where the layer is
                after[:, rows] = found
        self.hidden[at] = after

    def _in_tiles(
        self,
        layer: nn.Module,
        side: _Side,
        hidden: Float[Tensor, "spot row length hidden"],
        here: Sequence[int],
        kwargs: dict[str, Any],
        seen: Sequence[tuple[Mixer, Any]],
        resumed: Int[Tensor, " spot"],
    ) -> Float[Tensor, "spot row length hidden"]:
        """Rows through a layer, as many at a time as fit."""
        spots, count, length = hidden.shape[:3]
        base = side.base.to(hidden.device)
        kept = [of_layer.kept(base, resumed) for _, of_layer in seen]
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
                    for (mixer, _), of_layer in zip(seen, kept, strict=True):
                        stack.enter_context(mixer.resuming(of_layer, base, Rows.uncut(rows)))
                    found = hidden_of(layer(part.flatten(1, 2), **given))
            finally:
                self.in_rows = None
            parts.append(found.unflatten(1, (rows, length)))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def found(self) -> Iterator[tuple[_Group, Float[Tensor, "spot row hidden"]]]:
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


def _of_prompts(value: Any, prompts: Int[Tensor, " spot"], batch: int, time: int) -> Any:
    """What belongs to positions of all prompts [batch, T, ...], for those of spots; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_of_prompts(part, prompts, batch, time) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != (batch, time):
        return value
    return value[prompts.to(value.device)]
