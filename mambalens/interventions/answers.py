"""Who answers patches: the replay engine where it reproduces the model, else one hooked pass for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.hooks.errors import MambalensError
from mambalens.interventions.embeddings import noisy_embeddings
from mambalens.interventions.hooked import hooked_scores
from mambalens.interventions.walk import PatchReplay, Prompts, Score, Scores, Spot
from mambalens.model import LoadedModel
from mambalens.sweep.answers import UNCUT_TOLERANCE
from mambalens.sweep.replay import can_replay
from mambalens.system.memory import exhausted


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
        self.works = replay and can_replay(lens.hooks)

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
        found = self._replayed(prompts, spots, score) if self.works else None
        if found is None:
            found = hooked_scores(self.lens.hooks, self.site, self.windows, prompts, spots, score, done)
        else:
            done(len(spots) * len(self.windows))
        return found.base, found.patched

    def _replayed(self, prompts: Prompts, spots: Sequence[Spot], score: Score) -> Scores | None:
        """None where the model cannot be replayed, or replaying it without a patch misses its prediction."""
        shortest = int(prompts.last.argmin())
        own = self._own(prompts, shortest)

        def watched(logits: Tensor, of: Tensor) -> Tensor:
            """The scores; behind them the probability of the token that is on top without a patch."""
            tops.setdefault("of", logits.argmax(-1).cpu())  # the first that are scored are the base's
            top = tops["of"].to(logits.device)[of]
            probability = logits.softmax(-1).gather(1, top[:, None])
            return torch.cat([score(logits, of).to(probability), probability], 1)

        tops: dict[str, Tensor] = {}
        try:
            found = self.engine.scores(prompts, spots, watched)
        except MambalensError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if exhausted(error):
                raise
            self._give_up(f"cannot be replayed ({type(error).__name__}: {error})")
            return None
        top = tops["of"][shortest]
        rows, again = found.uncut
        misses = [float((found.base[shortest, -1] - own[top]).abs())]
        misses += [float((again[:, -1] - found.base[rows, -1]).abs().max())] if rows else []
        if not max(misses) < UNCUT_TOLERANCE.get(self.lens.model.dtype, 0.05):
            self._give_up(f"is not reproduced by replaying it: without a patch it misses by {max(misses):.1e}")
            return None
        return Scores(found.base[:, :-1], found.patched[..., :-1], (rows, again[:, :-1] if rows else again))

    @torch.no_grad()
    def _own(self, prompts: Prompts, number: int) -> Float[Tensor, " vocabulary"]:
        """The model's own prediction of one prompt, run alone."""
        length = int(prompts.last[number]) + 1
        noise = None if prompts.noise is None else prompts.noise[number : number + 1, :length]
        with noisy_embeddings(self.lens.model, noise):
            ids = prompts.ids[number : number + 1, :length].to(self.lens.device)
            return self.lens.model(input_ids=ids, use_cache=False).logits[0, -1].double().softmax(-1).cpu()

    def _give_up(self, why: str) -> None:
        self.works = False
        warnings.warn(f"{self.lens.name} {why}. Every patch takes a forward pass of its own instead.", stacklevel=2)
