"""Who answers knockouts: the replay engine where it reproduces the model, else one hooked forward pass for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.facts.prompts import Batch
from mambalens.hooks import Values
from mambalens.hooks.knockout import Cutting, Knockout
from mambalens.hooks.on_cpu import Room
from mambalens.model import LoadedModel
from mambalens.sweep.ablation import Ablation
from mambalens.sweep.checks import BREAKS, Checks


class Asked(NamedTuple):
    """One knockout of a batch."""

    cutting: Cutting
    source: int
    """Which of the batch's sources it blocks."""


Positions = Sequence[Sequence[int]]
"""Positions in every prompt of a batch."""

Answers = Iterator[tuple[int, Float[Tensor, "batch vocabulary"]]]
"""Logits [batch, vocabulary] with the number of the knockout they belong to, in any order; first the base's, -1.

They hold until the next are asked for."""


class Answerer:
    """Answers knockouts.

    Args:
        lens: model and tokenizer.
        memory: bytes to plan with.
        replay: answer by replay, wherever it reproduces the model.
        ablation: what stands in the place of sources; None for nothing.

    Attributes:
        checks: how the replay of every batch was held against the model.
    """

    def __init__(self, lens: LoadedModel, memory: int, replay: bool = True, ablation: Ablation | None = None) -> None:
        self.lens, self.memory, self.ablation = lens, memory, ablation
        self.checks = Checks.inside(lens, replay, "knockout")
        self.room = Room()

    def prompts_at_once(self, sources: Sequence[str], time: int) -> int | None:
        """How many prompts of a length fit the memory; None: any number."""
        from mambalens.sweep.replay import SHARES, prompts_at_once

        found = []
        if self.checks.works:
            sets = len(sources) + ("each" in sources) * (time - 1)
            found.append(prompts_at_once(self.lens.hooks, time, sets, self.memory))
        if self.ablation is not None:  # found of as many positions, and brought to those of the prompts
            of_prompt = 2 * time * self.ablation.numbers * max(4, self.lens.model.dtype.itemsize)
            found.append(max(1, self.memory // SHARES // of_prompt))
        return min(found, default=None)

    def answers(
        self, batch: Batch, knockouts: Sequence[Asked], sources: Sequence[Positions], targets: Positions
    ) -> Answers:
        """Predictions of a batch without a knockout and under each.

        Args:
            batch: prompts.
            knockouts: what to knock out of them, each on its own.
            sources: what they may block.
            targets: what is not to read it.
        """
        masks, target = [batch.mask(positions) for positions in sources], batch.mask(targets)
        instead = None if self.ablation is None else self.ablation.values(batch)
        replayed = self._replayed(batch, knockouts, masks, target, instead)
        return replayed if replayed is not None else self._eager(batch, knockouts, masks, target, instead)

    @torch.no_grad()
    def _eager(
        self,
        batch: Batch,
        knockouts: Sequence[Asked],
        sources: Sequence[Bool[Tensor, "batch time"]],
        targets: Bool[Tensor, "batch time"],
        instead: Values | None,
    ) -> Answers:
        """One hooked forward pass for every knockout."""
        lens = self.lens
        yield -1, lens.last_logits(batch)
        for number, asked in enumerate(knockouts):
            with lens.hooks.apply(Knockout(sources[asked.source], targets, instead=instead), asked.cutting):
                yield number, lens.last_logits(batch)

    def _replayed(
        self,
        batch: Batch,
        knockouts: Sequence[Asked],
        sources: Sequence[Bool[Tensor, "batch time"]],
        targets: Bool[Tensor, "batch time"],
        instead: Values | None,
    ) -> Answers | None:
        """None where the model cannot be replayed, or replaying the uncut prompts misses its prediction."""
        from mambalens.sweep.replay import UNCUT, Replay, Row

        if not self.checks.works or not knockouts:
            return None
        cuttings = [asked.cutting if instead is None else asked.cutting.replacing() for asked in knockouts]
        rows = [
            UNCUT,
            *(Row(cutting, ((asked.source + 1, 0),)) for cutting, asked in zip(cuttings, knockouts, strict=True)),
        ]
        sets = torch.stack(list(sources))
        replay = Replay(self.lens.hooks, batch.ids, batch.last, sets, targets, self.memory, instead, self.room)
        found = ((number - 1, logits) for number, logits in replay.logits(rows))
        try:
            first = next(found)
        except BREAKS as error:
            self.checks.broke(error)
            return None
        return itertools.chain([first], found) if self.checks.passes(batch, first[1]) else None
