"""Who answers patches: the replay engine where it reproduces the model, else one hooked pass for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.interventions.embeddings import noisy_embeddings
from mambalens.interventions.groups import Prompts, Spot
from mambalens.interventions.hooked import hooked_scores
from mambalens.interventions.walk import PatchReplay, Score, Scores
from mambalens.model import LoadedModel
from mambalens.sweep.checks import BREAKS, Check, Checks, held_against
from mambalens.sweep.replay import can_replay

OF_ONE_TOKEN = 5.0
"""The log-probability of one token may be so many times farther off than the root mean square of all."""


class Patcher:
    """Answers patches.

    Args:
        lens: the model.
        site: see `sites.SITES`.
        windows: the layers of each.
        memory: bytes to plan with.
        replay: answer by replay, as long as it reproduces the model.
    """

    def __init__(
        self, lens: LoadedModel, site: str, windows: Sequence[Sequence[int]], memory: int, replay: bool = True
    ) -> None:
        self.lens, self.site, self.windows = lens, site, windows
        self.engine = PatchReplay(lens.hooks, site, windows, memory)
        # Rows of patches do not know of vectors that are added behind layers.
        self.checks = Checks(lens, replay and can_replay(lens.hooks) and not lens.hooks.steering, "patch")
        if replay and not self.checks.works:
            self.checks.refuse("is patched while a knockout or a steering is running")

    def scores(
        self, prompts: Prompts, spots: Sequence[Spot], score: Score, done: Callable[[int], Any] = lambda _: None
    ) -> tuple[Float[Tensor, "batch number"], Float[Tensor, "spot window number"]]:
        """What becomes of the predictions behind the last tokens, without a patch and with each.

        Args:
            prompts: of one pass.
            spots: where to patch, each in every window.
            score: of logits [row, vocabulary] and the prompts [row] that they belong to: numbers of each.
            done: told how many patches more are answered.
        """
        found = self._replayed(prompts, spots, score) if self.checks.works else None
        if found is None:
            found = hooked_scores(self.lens.hooks, self.site, self.windows, prompts, spots, score, done)
        else:
            done(len(spots) * len(self.windows))
        return found.base, found.patched

    def _replayed(self, prompts: Prompts, spots: Sequence[Spot], score: Score) -> Scores | None:
        """None where the model cannot be replayed, or replaying it without a patch misses its prediction."""
        shortest = int(prompts.last.argmin())
        tops = torch.full((len(prompts.last),), -1)
        uncut: list[Tensor] = []

        def watched(logits: Tensor, of: Tensor) -> Tensor:
            """The scores; behind them the log-probability of the token that is on top without a patch."""
            rows = of.cpu()
            if bool((tops[rows] < 0).any()):  # the base's own predictions are scored first
                tops[rows] = logits.argmax(-1).cpu()
                uncut.extend(logits[of == shortest])
            log_prob = logits.log_softmax(-1).gather(1, tops[rows].to(logits.device)[:, None])
            return torch.cat([score(logits, of).to(log_prob), log_prob], 1)

        try:
            found = self.engine.scores(prompts, spots, watched)
        except BREAKS as error:
            self.checks.broke(error)
            return None
        length = int(prompts.last[shortest]) + 1
        noise = None if prompts.noise is None else prompts.noise[shortest : shortest + 1, :length]
        with noisy_embeddings(self.lens.model, noise):
            ids = prompts.ids[shortest, :length]
            difference, own = held_against(self.lens, ids, uncut[0], prompts.ids.numel())
        rows, again = found.uncut
        if rows:  # rows that patch nothing, held against the base's pass
            apart = float((again[:, -1] - found.base[rows, -1]).abs().max()) / OF_ONE_TOKEN
            difference = max(difference, apart)
        if not self.checks.hear(Check(len(prompts.last), prompts.ids.shape[1], difference, own)):
            return None
        return Scores(found.base[:, :-1], found.patched[..., :-1], (rows, again[:, :-1] if rows else again))
