"""The replay engine: a whole sweep from one base pass.

A knockout whose first target is at position t, in a window that starts at layer a, changes nothing below a and nothing
left of t. So the base runs once, layer by layer, and beside it a row that nothing is cut from goes on from t. Before
layer l, a copy of that row joins for every knockout whose window starts there; then all joined rows go through the
layer in one call and resume from what the base has just left there. The layers' norms, MLPs and residuals stay the
model's own code; what mixers keep and how rows resume is the adapters' part (`Mixer.keeping`, `Mixer.resuming`).

Knockouts and additions that run around a replay are the base's too: the base pass is of the model under them, and rows
do without what they cut as well as without their own (`hooks.uniting`).

Memory is bounded: of the base only the running layer is kept, rows go through a layer and through the head in tiles,
and where even their hidden states are too many, a few knockouts at a time get a base pass of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mambalens.hooks import HookManager, Mixer, Values
from mambalens.hooks.behind import Beside, beside_of, hidden_of, logits_behind
from mambalens.hooks.calls import bound
from mambalens.hooks.knockout import Cutting, Paths
from mambalens.hooks.masks import distinct_rows
from mambalens.hooks.on_cpu import Room, one_gelu, tokens_alone
from mambalens.hooks.resume import Base
from mambalens.hooks.uniting import UNCUT as NOTHING
from mambalens.hooks.uniting import Pair, RowCut, United, rows_of
from mambalens.hooks.values import Written
from mambalens.system.memory import keep_pages, widest

SHARES = 4
"""Hidden states of rows, their passage through a layer, the base pass and the head each have a share of the memory."""

TEMPORARY = 3 * 2**22
"""Bytes a thread of what a layer makes of rows on a CPU: with 2**24, more than `keep_pages` keeps, memory came from the
system as fresh pages again, twice as many in a sweep of GPT-2 medium."""


class Row(NamedTuple):
    """One knockout of every prompt of a batch, or several at once."""

    cutting: Cutting
    pairs: tuple[tuple[int, int], ...]
    """What it blocks: number of a source set (from 1; 0 blocks nothing) and of the target set that does without it."""
    also: tuple[Row, ...] = ()
    """What else is cut, in other mixers or on other paths, or for other target sets."""

    @property
    def parts(self) -> tuple[Row, ...]:
        """All that is cut, one by one."""
        return (self, *self.also)

    @property
    def start(self) -> int:
        """The layer before which it joins."""
        return min(part.cutting.start for part in self.parts)

    @property
    def sources(self) -> tuple[int, ...]:
        """Numbers of its source sets."""
        return tuple(source for part in self.parts for source, _ in part.pairs)


UNCUT = Row(Cutting({}, Paths.NONE), ((0, 0),))
"""Replays the prompts as they are."""


def edge_sets(
    edges: Sequence[Bool[Tensor, "batch time source"]],
) -> tuple[
    Bool[Tensor, "sourceset batch source"], Bool[Tensor, "targetset batch time"], list[tuple[tuple[int, int], ...]]
]:
    """Masks of edges as source sets and target sets: one pair for every different row of a mask.

    Returns:
        Source sets, target sets, and the pairs of every mask, for `Row`.
    """
    sources, targets, pairs = [], [], []
    for mask in edges:
        code, rows = distinct_rows(mask.tril())
        of_mask = []
        for number in range(1, len(rows)):
            sources.append(rows[number])
            targets.append(code == number)
            of_mask.append((len(sources), len(targets) - 1))
        pairs.append(tuple(of_mask) or UNCUT.pairs)
    none = torch.zeros(1, *edges[0].shape[:2], dtype=torch.bool)
    return torch.stack(sources or [none[0]]), torch.stack(targets or [none[0]]), pairs


class Replay:
    """One batch of right-padded prompts, ready to answer knockouts of the same targets.

    Args:
        hooks: the model's hook manager.
        ids: tokens.
        last: last position of every prompt, behind which the prediction is asked for.
        sources: source sets.
        targets: target positions, or target sets; the last positions by default.
        memory: bytes to plan tiles with; a plan, not a limit that is enforced.
        instead: what stands in the place of what sources hand on; nothing by default. What they erase is not replaced.
        room: memory for logits, which then hold until the next are asked for. Each has its own by default.

    What the hook manager's running blocks cut and add is cut and added under every knockout.
    """

    def __init__(
        self,
        hooks: HookManager,
        ids: Int[Tensor, "batch time"],
        last: Int[Tensor, " batch"],
        sources: Bool[Tensor, "sourceset batch time"],
        targets: Bool[Tensor, "batch time"] | Bool[Tensor, "targetset batch time"] | None = None,
        memory: int = 2**30,
        instead: Values | None = None,
        room: Room | None = None,
    ) -> None:
        self.hooks, self.model, self.memory, self.instead, self.room = hooks, hooks.model, memory, instead, room
        self.layers = hooks.layers
        device = self.model.get_input_embeddings().weight.device
        self.ids, self.last, self.sources = ids.to(device, non_blocking=True), last.cpu(), sources.cpu()
        time = ids.shape[1]
        every = torch.arange(time)
        if targets is None:
            targets = every == self.last[:, None]
        targets = targets.cpu() & (every <= self.last[:, None])
        self.around = hooks.cuts_around(self.last, time)
        targets = targets[None] if targets.ndim == 2 else targets
        first = torch.where(targets.any(0), every, time).amin(1).minimum(self.last)
        length = int((self.last - first).max()) + 1
        self.first = first.clamp_max(time - length)  # rows of equal length, none of them past the last column
        columns = self.first[:, None] + torch.arange(length)
        self.targets = targets.gather(2, columns.expand(len(targets), -1, -1))  # [target sets, B, L]

    def logits(self, cuts: Sequence[Row]) -> Iterator[tuple[int, Float[Tensor, "batch vocabulary"]]]:
        """Logits behind the last token under every cut, by source set: what cuts nothing comes first.

        Yields:
            Number of the cut, and its logits in float32 or better.
        """
        batch = len(self.last)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        at_once = max(1, self.memory // SHARES // (3 * 4 * batch * vocabulary))
        for group in self._groups(cuts):
            walk = _Walk(self, [cuts[number] for number in group])
            hidden = walk.run()  # [batch, cuts, width]
            for begin in range(0, len(group), at_once):
                part = hidden[:, begin : begin + at_once].transpose(0, 1)
                logits = head_of(self.hooks, walk.beside, part.flatten(0, 1)[:, None], self.room)
                yield from zip(group[begin : begin + at_once], logits.unflatten(0, (len(part), batch)), strict=True)

    def _groups(self, cuts: Sequence[Row]) -> Iterator[list[int]]:
        """Numbers of the cuts that share a base pass: as many as fit, with few source sets among them."""
        width = self.model.get_input_embeddings().weight.shape[1]
        per_cut = 2 * self.targets[0].numel() * width * bytes_of(self.model)
        most = max(1, self.memory // SHARES // per_cut)
        time, mixers = self.ids.shape[1], self.hooks.mixers
        per_set = max(mixer.kept_numbers(time, 2) - mixer.kept_numbers(time, 1) for mixer in mixers)
        room = self.memory // SHARES // (max(1, per_set) * len(self.last) * bytes_of(self.model))
        # The untouched state is one more, and a set is united with what runs around in several ways.
        sets = max(
            1, room // max((1 + sum(len(cut.rows) - 1 for cut in of) for of in self.around.values()), default=1) - 1
        )
        group: list[int] = []
        inside: dict[Mixer, set[int]] = {}
        of = [cut.sources for cut in cuts]
        for number in sorted(range(len(cuts)), key=of.__getitem__):
            added = _joined(inside, cuts[number])
            grows = any(len(of_mixer) > len(inside.get(mixer, ())) for mixer, of_mixer in added.items())
            if group and (len(group) == most or (grows and max(map(len, added.values())) > sets)):
                yield group
                group, inside = [], {}
                added = _joined(inside, cuts[number])
            group.append(number)
            inside.update(added)
        if group:
            yield group


def _joined(inside: Mapping[Mixer, set[int]], cut: Row) -> dict[Mixer, set[int]]:
    """The source sets of the mixers that a cut is in, its own among them."""
    added: dict[Mixer, set[int]] = {}
    for part in cut.parts:
        for mixer in part.cutting.features:
            added.setdefault(mixer, set(inside.get(mixer, ()))).update(source for source, _ in part.pairs)
    return added


class _Walk:
    """One base pass with the rows of some cuts beside it."""

    def __init__(self, replay: Replay, cuts: Sequence[Row]) -> None:
        self.replay, self.model = replay, replay.model
        # The uncut row, then the others in the order in which they join, so that joined rows stand in front.
        order = sorted((i for i in range(len(cuts)) if cuts[i] is not UNCUT), key=lambda i: cuts[i].start)
        self.cuts = [UNCUT, *(cuts[i] for i in order)]
        self.starts = [cut.start for cut in self.cuts]
        nothing = torch.zeros_like(replay.sources[:1])
        self.base = Base(replay.first, replay.targets, torch.cat([nothing, replay.sources]))
        instead = {} if replay.instead is None else replay.instead.of
        shared: dict[Any, Base] = {}
        self.of_mixer = {mixer: self._in(mixer, instead.get(mixer), shared) for mixer in replay.hooks.mixers}
        row = {i: row for row, i in enumerate(order, 1)}
        self.rows = torch.tensor([row.get(i, 0) for i in range(len(cuts))])
        """Row of each cut, in the order in which they were given."""
        self.hidden: Float[Tensor, "batch row_time hidden"] | None = None
        self.beside: list[tuple[Any, ...] | None] = []  # what each layer returns beside its hidden states
        self.kept: dict[Mixer, list[Any]] = {}
        self.in_rows = False

    def _in(self, mixer: Mixer, instead: Written | None, shared: dict[Any, Base]) -> _InMixer:
        """The cuts in one mixer, united with what runs around; `shared`: of others, which go to a device once."""
        around = self.replay.around.get(mixer, [])
        united = United(self.base, around, instead)
        pairs = [united.pairs(_own(cut, mixer)) for cut in self.cuts]
        key = (id(instead), *map(id, around), united.sets)
        if key not in shared:
            shared[key] = united.base()
        return _InMixer(shared[key], pairs)

    @torch.no_grad()
    def run(self) -> Float[Tensor, "batch cut hidden"]:
        """Hidden states behind the layers at the last position, in the order of the cuts."""
        mixers = self.replay.hooks.mixers
        for mixer in mixers:
            joined = sum(start <= mixer.layer for start in self.starts)
            mixer.expect(joined * self.replay.targets[0].numel())
        keep_pages()
        with ExitStack() as stack:
            layers, ids = self.replay.layers, self.replay.ids
            stack.enter_context(tokens_alone(layers, self.base.tokens, ids.shape, now=lambda: not self.in_rows))
            stack.enter_context(one_gelu(layers))
            for mixer in mixers:
                self.kept[mixer] = stack.enter_context(mixer.keeping(self.of_mixer[mixer].base))
            for number, layer in enumerate(layers):
                stack.callback(layer.register_forward_hook(self._behind(number, layer), with_kwargs=True).remove)
            self.replay.hooks.trunk(input_ids=ids, use_cache=False)
        assert self.hidden is not None
        hidden = self.hidden.unflatten(1, (len(self.cuts), self.base.length))  # [B, R, L, W]
        at = (self.replay.last - self.replay.first).to(hidden.device, non_blocking=True)
        hidden = hidden[torch.arange(len(at), device=hidden.device), :, at]
        return hidden[:, self.rows.to(hidden.device, non_blocking=True)]

    def _behind(self, number: int, layer: nn.Module) -> Callable[..., None]:
        """A hook behind a layer of the base pass: the rows go through it too."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.in_rows:
                return
            given = bound(module, args, kwargs)
            names = list(given)
            self.beside.append(beside_of(output))
            self.in_rows = True
            try:
                self._through(number, layer, given[names[1]], {name: given[name] for name in names[2:]})
            finally:
                self.in_rows = False

        return hook

    def _through(
        self, number: int, layer: nn.Module, whole: Float[Tensor, "batch time hidden"], kwargs: dict[str, Any]
    ) -> None:
        """Rows join before a layer, and go through it."""
        joined = sum(start <= number for start in self.starts)
        new = self.starts.count(number)
        length = self.base.length
        if self.hidden is None:
            hidden = self.base.to(whole.device).at_rows(whole, new)  # [B, new L, W]
        else:
            hidden = self.hidden.to(whole.device)
            hidden = torch.cat([hidden, hidden[:, :length].repeat(1, new, 1)], 1) if new else hidden
        here = [mixer for mixer in self.replay.hooks.mixers if mixer.layer == number]
        kept = [self.kept[mixer].pop() for mixer in here]
        per_cut = 4 * (widest([layer]) + hidden.shape[-1]) * len(whole) * length * bytes_of(self.model)
        room = self.replay.memory // SHARES
        if whole.device.type == "cpu":
            room = min(room, 4 * TEMPORARY * torch.get_num_threads())
        size = min([max(1, room // per_cut), *(of_layer.most_cuts for of_layer in kept)])
        parts = []
        of_base = self.base.to(whole.device)
        for begin in range(0, joined, size):
            end = min(begin + size, joined)
            given = {name: of_base.at_rows(value, end - begin) for name, value in kwargs.items()}
            with ExitStack() as stack:
                stack.enter_context(self.replay.hooks.rows(functools.partial(of_base.at_rows, cuts=end - begin)))
                for mixer, of_layer in zip(here, kept, strict=True):
                    base, pairs = self.of_mixer[mixer]
                    rows = rows_of(pairs[begin:end], mixer.n_features)
                    stack.enter_context(mixer.resuming(of_layer, base, rows))
                part = hidden[:, begin * length : end * length]
                parts.append(hidden_of(layer(part, **given)))
        self.hidden = torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class _InMixer(NamedTuple):
    """The cuts of a walk in one mixer: what it keeps grows with their source sets."""

    base: Base
    pairs: list[list[Pair]]
    """Of every row, in the order in which they join."""


def _own(cut: Row, mixer: Mixer) -> RowCut:
    """What a row's own cut is in one mixer."""
    here = [part for part in cut.parts if mixer in part.cutting.features]
    if not here:
        return NOTHING
    of_target: dict[int, dict[Paths, int]] = {}
    for part in here:
        for source, target in part.pairs:
            ways_cut = of_target.setdefault(target, {})
            for path in part.cutting.paths & mixer.paths:
                assert ways_cut.setdefault(path, source) == source, "two source sets of one target set"
    features = here[0].cutting.features[mixer]
    main, conv, erase = Paths.MAIN, Paths.CONV, Paths.ERASE
    return RowCut(
        tuple(
            Pair(of.get(main, 0), of.get(conv, 0), of.get(erase, 0), target, features)
            for target, of in of_target.items()
            if any(of.values())
        )
    )


def prompts_at_once(hooks: HookManager, time: int, sets: int, memory: int) -> int:
    """How many prompts of so many positions, with so many source sets, a base pass may take."""
    model = hooks.model
    width = model.get_input_embeddings().weight.shape[1]
    sets *= 1 + hooks.depth  # each united with what runs around
    numbers = 4 * time * (widest(hooks.layers) + width) + max(
        mixer.kept_numbers(time, 1 + sets) for mixer in hooks.mixers
    )
    return max(1, memory // SHARES // (numbers * bytes_of(model)))


@torch.no_grad()
def head_of(
    hooks: HookManager, beside: Beside, hidden: Float[Tensor, "row 1 hidden"], room: Room | None = None
) -> Float[Tensor, "row vocabulary"]:
    """What a model's own code behind its layers makes of rows.

    Args:
        hooks: the model's hook manager.
        beside: what each layer has returned beside its hidden states.
        hidden: hidden states behind the last layer.
        room: where the head may write, over what was there.
    """
    with hooks.aside():
        return logits_behind(hooks.model, hooks.layers, beside, hidden, room)


def bytes_of(model: Any) -> int:
    """Bytes of a number in a pass; scans take float32 whatever the model's dtype."""
    return max(4, model.dtype.itemsize)
