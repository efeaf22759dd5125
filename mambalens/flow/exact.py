"""Sets of edges cut exactly, by replay: what a prompt's prediction is without them.

A cut changes nothing below its first layer and nothing left of its first target, so its row is short. Rows of one
replay are of equal length; cuts are grouped by their first target so that long rows do not make short ones long.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.facts.prompts import Batch
from mambalens.hooks import Mixer
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Cutting, Path, Paths
from mambalens.model import LoadedModel
from mambalens.sweep.answers import UNCUT_TOLERANCE
from mambalens.sweep.replay import UNCUT, Replay, Row, can_replay
from mambalens.system.memory import exhausted


class Edge(NamedTuple):
    """One edge of a prompt."""

    mixer: Mixer
    path: Paths
    source: int
    target: int


Cut = Sequence[Edge]
"""Edges that are cut together."""


class ExactCuts:
    """Answers cuts of edges, prompt by prompt.

    Args:
        lens: the model.
        memory: bytes to plan with.
        features: which features of every mixer are cut; None for every one.

    Attributes:
        replays: whether replay answers; where it does not reproduce the model, hooked passes do.
    """

    def __init__(self, lens: LoadedModel, memory: int, features: dict[Mixer, Tensor | None] | None = None) -> None:
        self.lens, self.memory = lens, memory
        self.features = features or dict.fromkeys(lens.hooks.mixers)
        self.replays = can_replay(lens.hooks)

    def logits(self, batch: Batch, cuts: Sequence[Cut]) -> Float[Tensor, "cut vocabulary"]:
        """Logits behind one prompt's last token under every cut, each on its own.

        Args:
            batch: one prompt, without columns behind it.
            cuts: edges that are cut together. One without edges cuts nothing.
        """
        assert len(batch.prompts) == 1 and batch.ids.shape[1] == int(batch.last[0]) + 1
        found: Tensor | None = None
        own = self.lens.last_logits(batch).softmax(-1)  # what every replay has to reproduce
        for numbers in self._groups(cuts, batch.ids.shape[1]):
            of_group = self._answers(batch, [cuts[number] for number in numbers], own)
            found = of_group.new_zeros(len(cuts), of_group.shape[1]) if found is None else found
            found[numbers] = of_group
        if found is None:
            raise MambalensError("There is no cut to answer.")
        return found

    def _groups(self, cuts: Sequence[Cut], time: int) -> Iterator[list[int]]:
        """Numbers of the cuts that share a replay: those that make its base pass worth while.

        A replay costs its base pass, all tokens through all layers, and for every cut the positions from the group's
        first target on, through the layers from the cut's first on.
        """
        layers = self.lens.n_layers
        first = [min((edge.target for edge in cut), default=time - 1) for cut in cuts]
        depth = [layers - min((edge.mixer.layer for edge in cut), default=0) for cut in cuts]
        order = sorted(range(len(cuts)), key=lambda number: -first[number])
        # The cheapest way to part the ordered cuts: `best[n]` is that of the first n of them.
        starts = [n for n in range(len(order)) if n == 0 or first[order[n]] != first[order[n - 1]]] + [len(order)]
        best, parted = {0: 0.0}, {0: 0}
        for end in starts[1:]:
            length = time - first[order[end - 1]]
            for begin in starts[: starts.index(end)]:
                rows = sum(depth[number] for number in order[begin:end]) * length
                cost = best[begin] + time * layers + rows
                if cost < best.get(end, float("inf")):
                    best[end], parted[end] = cost, begin
        end = len(order)
        while end:
            yield order[parted[end] : end]
            end = parted[end]

    @torch.no_grad()
    def _answers(
        self, batch: Batch, cuts: Sequence[Cut], own: Float[Tensor, "1 vocabulary"]
    ) -> Float[Tensor, "cut vocabulary"]:
        if self.replays:
            answered = self._replayed(batch, cuts, own)
            if answered is not None:
                return answered
        return torch.cat([self._hooked(batch, cut) for cut in cuts])

    def _replayed(
        self, batch: Batch, cuts: Sequence[Cut], own: Float[Tensor, "1 vocabulary"]
    ) -> Float[Tensor, "cut vocabulary"] | None:
        time = batch.ids.shape[1]
        sources, targets = _Sets(time), _Sets(time)
        rows = [UNCUT, *(self._row(cut, sources, targets) for cut in cuts)]
        of_targets = targets.masks() if targets.sets else None
        replay = Replay(self.lens.hooks, batch.ids, batch.last, sources.masks(), of_targets, self.memory)
        try:
            found = dict(replay.logits(rows))
        except MambalensError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if exhausted(error):
                raise
            self._give_up(f"cannot be replayed ({type(error).__name__}: {error})")
            return None
        difference = float((found[0].softmax(-1) - own.to(found[0].device)).abs().max())
        if not difference < UNCUT_TOLERANCE.get(self.lens.model.dtype, 0.05):
            self._give_up(f"is not reproduced by replaying it: without a cut it misses by {difference:.1e}")
            return None
        return torch.cat([found[number] for number in range(1, len(rows))])

    def _give_up(self, why: str) -> None:
        self.replays = False
        warnings.warn(f"{self.lens.name} {why}. Every cut takes a forward pass of its own instead.", stacklevel=2)

    def _row(self, cut: Cut, sources: _Sets, targets: _Sets) -> Row:
        """A cut as a row of the replay: by mixer, path and target, the sources that it does without."""
        without: dict[tuple[Mixer, Paths], dict[int, set[int]]] = {}
        for edge in cut:
            without.setdefault((edge.mixer, edge.path), {}).setdefault(edge.target, set()).add(edge.source)
        parts = [
            Row(
                Cutting({mixer: self.features[mixer]}, path),
                tuple((sources.number(read) + 1, targets.number({target})) for target, read in of.items()),
            )
            for (mixer, path), of in without.items()
        ]
        return parts[0]._replace(also=tuple(parts[1:])) if parts else UNCUT

    def _hooked(self, batch: Batch, cut: Cut) -> Float[Tensor, "1 vocabulary"]:
        """By a pass of the model with hooks."""
        time = batch.ids.shape[1]
        masks: dict[tuple[Mixer, Paths], Tensor] = {}
        for edge in cut:
            mask = masks.setdefault((edge.mixer, edge.path), torch.zeros(time, time, dtype=torch.bool))
            mask[edge.target, edge.source] = True
        with without_edges(self.lens, masks, self.features):
            return self.lens.last_logits(batch)


@contextmanager
def without_edges(
    lens: LoadedModel,
    masks: Mapping[tuple[Mixer, Paths], Bool[Tensor, "*batch time time"]],
    features: Mapping[Mixer, Bool[Tensor, " feature"] | None],
) -> Iterator[None]:
    """While the block runs, the edges of masks are cut by hooks, mixer by mixer and path by path.

    Args:
        lens: the model.
        masks: targets in rows, sources in columns.
        features: which features of a mixer are cut; None for every one.
    """
    with ExitStack() as stack:
        for (mixer, path), mask in masks.items():
            if bool(mask.any()):
                of_mixer = features[mixer]
                stack.enter_context(
                    lens.hooks.knockout(
                        layers=[mixer.layer], mixers=mixer.kind, path=cast(Path, path.names[0]), edges=mask,
                        features="all" if of_mixer is None else of_mixer,
                    )
                )  # fmt: skip
        yield


class _Sets:
    """Sets of positions, each once."""

    def __init__(self, time: int) -> None:
        self.time = time
        self.sets: dict[frozenset[int], int] = {}

    def number(self, positions: set[int]) -> int:
        """The number of a set."""
        return self.sets.setdefault(frozenset(positions), len(self.sets))

    def masks(self) -> Tensor:
        """All of them, of one prompt [set, 1, T]; at least one."""
        masks = torch.zeros(max(1, len(self.sets)), 1, self.time, dtype=torch.bool)
        for positions, number in self.sets.items():
            masks[number, 0, sorted(positions)] = True
        return masks
