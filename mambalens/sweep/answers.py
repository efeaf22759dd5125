"""Who answers knockouts: the replay engine where it reproduces the model, else one hooked forward pass for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.facts.prompts import Batch
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Cutting, Knockout
from mambalens.model import LoadedModel
from mambalens.sweep.checks import Checks
from mambalens.system.memory import exhausted


class Asked(NamedTuple):
    """One knockout of a batch."""

    cutting: Cutting
    source: int
    """Which of the batch's sources it blocks."""


Positions = Sequence[Sequence[int]]
"""Positions in every prompt of a batch."""

Answers = Iterator[tuple[int, Float[Tensor, "batch vocabulary"]]]
"""Logits [batch, vocabulary] with the number of the knockout they belong to, in any order; first the base's, -1."""


class Answerer:
    """Answers knockouts.

    Args:
        lens: model and tokenizer.
        memory: bytes to plan with.
        replay: answer by replay, wherever it reproduces the model.

    Attributes:
        checks: how the replay of every batch was held against the model.
    """

    def __init__(self, lens: LoadedModel, memory: int, replay: bool = True) -> None:
        from mambalens.sweep.replay import can_replay

        self.lens, self.memory = lens, memory
        self.checks = Checks(lens, replay and can_replay(lens.hooks), "knockout")
        if replay and not self.checks.works:
            self.checks.refuse("is swept while a knockout is running")

    def prompts_at_once(self, sources: Sequence[str], time: int) -> int | None:
        """How many prompts of a length fit the memory; None: any number."""
        from mambalens.sweep.replay import prompts_at_once

        if not self.checks.works:
            return None
        sets = len(sources) + ("each" in sources) * (time - 1)
        return prompts_at_once(self.lens.hooks, time, sets, self.memory)

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
        replayed = self._replayed(batch, knockouts, masks, target)
        return replayed if replayed is not None else self._eager(batch, knockouts, masks, target)

    @torch.no_grad()
    def _eager(
        self,
        batch: Batch,
        knockouts: Sequence[Asked],
        sources: Sequence[Bool[Tensor, "batch time"]],
        targets: Bool[Tensor, "batch time"],
    ) -> Answers:
        """One hooked forward pass for every knockout."""
        lens = self.lens
        yield -1, lens.last_logits(batch)
        for number, asked in enumerate(knockouts):
            with lens.hooks.apply(Knockout(sources[asked.source], targets), asked.cutting):
                yield number, lens.last_logits(batch)

    def _replayed(
        self,
        batch: Batch,
        knockouts: Sequence[Asked],
        sources: Sequence[Bool[Tensor, "batch time"]],
        targets: Bool[Tensor, "batch time"],
    ) -> Answers | None:
        """None where the model cannot be replayed, or replaying the uncut prompts misses its prediction."""
        from mambalens.sweep.replay import UNCUT, Replay, Row

        if not self.checks.works or not knockouts:
            return None
        rows = [UNCUT, *(Row(asked.cutting, ((asked.source + 1, 0),)) for asked in knockouts)]
        replay = Replay(self.lens.hooks, batch.ids, batch.last, torch.stack(list(sources)), targets, self.memory)
        found = ((number - 1, logits) for number, logits in replay.logits(rows))
        try:
            first = next(found)
        except MambalensError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, LookupError) as error:
            if exhausted(error):
                raise
            self.checks.broke(error)
            return None
        return itertools.chain([first], found) if self.checks.passes(batch, first[1]) else None
