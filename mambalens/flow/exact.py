"""Sets of edges cut exactly, by replay: what prompts' predictions are without them.

A cut changes nothing below its first layer and nothing left of its first target, so its row is short. Rows of one
replay are of equal length; the cuts of a prompt are parted into slots by their first target, so that long rows do not
make short ones long, and slots of like length, of all prompts, share a replay: a row holds a cut of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.facts.prompts import Batch
from mambalens.flow.slots import slots_of, walks_of
from mambalens.hooks import Mixer, Values
from mambalens.hooks.knockout import Cutting, Path, Paths
from mambalens.model import LoadedModel
from mambalens.sweep.ablation import Ablation
from mambalens.sweep.checks import BREAKS, Checks
from mambalens.sweep.replay import UNCUT, Replay, Row


class Edge(NamedTuple):
    """One edge of a prompt."""

    mixer: Mixer
    path: Paths
    source: int
    target: int


SLOTS = 16
"""Slots that a replay of few prompts may have all the same."""
Cut = Sequence[Edge]
"""Edges that are cut together."""
Score = Callable[[Tensor, Tensor], Tensor]
"""Of logits [prompt, vocabulary] and scored tokens [prompt]: something for every prompt."""


class ExactCuts:
    """Answers cuts of edges, those of several prompts side by side.

    Args:
        lens: the model.
        memory: bytes to plan with.
        features: which features of every mixer are cut; None for every one.
        ablation: what stands in the place of sources; None for nothing. What they erase is cut to nothing all the same.

    Attributes:
        checks: how every replay was held against the model; where it does not reproduce it, hooked passes answer.
    """

    def __init__(
        self,
        lens: LoadedModel,
        memory: int,
        features: dict[Mixer, Tensor | None] | None = None,
        ablation: Ablation | None = None,
    ) -> None:
        self.lens, self.memory, self.ablation = lens, memory, ablation
        self.features = features or dict.fromkeys(lens.hooks.mixers)
        self.checks = Checks.inside(lens, True, "cut")

    def scores(
        self, batch: Batch, cuts: Sequence[Sequence[Cut]], score: Score, done: Callable[[int], Any] = lambda _: None
    ) -> list[Float[Tensor, " _ *rest"]]:
        """What is made of the logits behind every prompt's last token under every cut of it, each on its own.

        Args:
            batch: prompts.
            cuts: of every prompt. One without edges cuts nothing.
            score: what is made of them.
            done: told how many cuts more are answered.
        """
        found: list[list[Tensor | None]] = [[None] * len(of_prompt) for of_prompt in cuts]
        layers, slots = self.lens.n_layers, []
        for prompt, (of_prompt, time) in enumerate(zip(cuts, (batch.last + 1).tolist(), strict=True)):
            lengths = [time - min((edge.target for edge in cut), default=time - 1) for cut in of_prompt]
            starts = [min((edge.mixer.layer for edge in cut), default=0) for cut in of_prompt]
            slots += slots_of(prompt, time, lengths, starts, layers)
        for walk in walks_of(slots, layers, max(len(cuts), SLOTS)):
            part = batch.part([slot.prompt for slot in walk]).trimmed()
            of_slots = [[cuts[slot.prompt][number] for number in slot.cuts] for slot in walk]
            for row, number, value in self._answers(part, of_slots, score):
                slot = walk[row]
                found[slot.prompt][slot.cuts[number]] = value
            done(sum(map(len, of_slots)))
        return [torch.stack(cast(list[Tensor], of_prompt)) if of_prompt else torch.empty(0) for of_prompt in found]

    @torch.no_grad()
    def _answers(
        self, batch: Batch, cuts: Sequence[Sequence[Cut]], score: Score
    ) -> Iterable[tuple[int, int, Float[Tensor, " *rest"]]]:
        """Prompt, number and score of every cut, in a replay of its own."""
        answered = self._replayed(batch, cuts, score) if self.checks.works else None
        if answered is not None:
            return answered
        found = []
        for prompt, of_prompt in enumerate(cuts):
            alone = batch.part([prompt]).trimmed()
            for number, cut in enumerate(of_prompt):
                logits = self._hooked(alone, cut)
                found.append((prompt, number, score(logits, alone.targets.to(logits.device))[0]))
        return found

    def _replayed(
        self, batch: Batch, cuts: Sequence[Sequence[Cut]], score: Score
    ) -> list[tuple[int, int, Float[Tensor, " *rest"]]] | None:
        time = batch.ids.shape[1]
        sources, targets = _Sets(time), _Sets(time)
        rows = [UNCUT, *(self._row(side, sources, targets) for side in zip_longest(*cuts, fillvalue=()))]
        of_targets = targets.masks(len(cuts)) if targets.sets else None
        instead = None if self.ablation is None else self.ablation.values(batch)
        of_sources = sources.masks(len(cuts))
        replay = Replay(self.lens.hooks, batch.ids, batch.last, of_sources, of_targets, self.memory, instead)
        found = []
        try:
            for row, logits in replay.logits(rows):
                if row == 0:
                    if not self.checks.passes(batch, logits):
                        return None
                else:
                    values = score(logits, batch.targets.to(logits.device))
                    found += [(prompt, row - 1, values[prompt]) for prompt, of in enumerate(cuts) if row <= len(of)]
        except BREAKS as error:
            self.checks.broke(error)
            return None
        return found

    def _row(self, cuts: Sequence[Cut], sources: _Sets, targets: _Sets) -> Row:
        """One cut of every prompt as a row: by mixer, path and target, the sources that it does without."""
        without: dict[Mixer, list[dict[int, dict[Paths, set[int]]]]] = {}
        for prompt, cut in enumerate(cuts):
            for edge in cut:
                of_prompts = without.setdefault(edge.mixer, [{} for _ in cuts])
                of_prompts[prompt].setdefault(edge.target, {}).setdefault(edge.path, set()).add(edge.source)
        pairs: dict[tuple[Mixer, Paths], list[tuple[int, int]]] = {}
        for mixer, of_prompts in without.items():
            # The first target of every prompt side by side, then the second of those that have one, ... A target's
            # paths stay together: what it reads lacks all of them at once.
            for side in zip_longest(*(sorted(of.items()) for of in of_prompts), fillvalue=None):
                at = targets.number([set() if pair is None else {pair[0]} for pair in side])
                for path in mixer.paths:
                    read = [set() if pair is None else pair[1].get(path, set()) for pair in side]
                    if any(read):
                        pairs.setdefault((mixer, path), []).append((sources.number(read) + 1, at))
        parts = [Row(Cutting({mixer: self.features[mixer]}, path), tuple(of)) for (mixer, path), of in pairs.items()]
        return parts[0]._replace(also=tuple(parts[1:])) if parts else UNCUT

    def _hooked(self, batch: Batch, cut: Cut) -> Float[Tensor, "1 vocabulary"]:
        """By a pass of the model with hooks."""
        time = batch.ids.shape[1]
        masks: dict[tuple[Mixer, Paths], Tensor] = {}
        for edge in cut:
            mask = masks.setdefault((edge.mixer, edge.path), torch.zeros(time, time, dtype=torch.bool))
            mask[edge.target, edge.source] = True
        instead = None if self.ablation is None else self.ablation.values(batch)
        with without_edges(self.lens, masks, self.features, instead):
            return self.lens.last_logits(batch)


@contextmanager
def without_edges(
    lens: LoadedModel,
    masks: Mapping[tuple[Mixer, Paths], Bool[Tensor, "*batch time time"]],
    features: Mapping[Mixer, Bool[Tensor, " feature"] | None],
    instead: Values | None = None,
) -> Iterator[None]:
    """While the block runs, the edges of masks are cut by hooks, mixer by mixer and path by path.

    Args:
        lens: the model.
        masks: targets in rows, sources in columns.
        features: which features of a mixer are cut; None for every one.
        instead: what stands in the place of what sources hand on; what they erase is cut to nothing all the same.
    """
    with ExitStack() as stack:
        for (mixer, path), mask in masks.items():
            if bool(mask.any()):
                of_mixer = features[mixer]
                stack.enter_context(
                    lens.hooks.knockout(
                        layers=[mixer.layer], mixers=mixer.kind, path=cast(Path, path.names[0]), edges=mask,
                        features="all" if of_mixer is None else of_mixer,
                        instead=None if path is Paths.ERASE else instead,
                    )
                )  # fmt: skip
        yield


class _Sets:
    """Sets of positions of every prompt, each once."""

    def __init__(self, time: int) -> None:
        self.time = time
        self.sets: dict[tuple[frozenset[int], ...], int] = {}

    def number(self, positions: Sequence[set[int]]) -> int:
        """The number of a set, told prompt by prompt."""
        return self.sets.setdefault(tuple(map(frozenset, positions)), len(self.sets))

    def masks(self, prompts: int) -> Bool[Tensor, "positions prompt time"]:
        """All of them; at least one."""
        masks = torch.zeros(max(1, len(self.sets)), prompts, self.time, dtype=torch.bool)
        for of_prompts, number in self.sets.items():
            for prompt, positions in enumerate(of_prompts):
                masks[number, prompt, sorted(positions)] = True
        return masks
