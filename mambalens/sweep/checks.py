"""Whether a replay gives what the model gives, to within what rounding alone makes of its answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.facts.prompts import Batch
from mambalens.hooks.errors import MambalensError
from mambalens.model import LoadedModel
from mambalens.system.events import tell
from mambalens.system.memory import exhausted

if TYPE_CHECKING:
    import pandas as pd

MULTIPLE = 4.0
"""How many times the model's own noise a replay may miss it by. Replays of 360 random models of 2 to 64 layers missed
by 1.7 times the largest of three looks at most, of 480 of the bundled models none fell back; with one mixer's output a
thousandth too large it is 6.6 to 770 times in random models of 2 to 64 layers, but 2 to 4 in a Mamba-1 of 64 layers
whose weights amplify rounding from layer to layer."""
BREAKS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a model's code raises that does not take a replay's rows; see `Checks.broke`."""
TRIES = 3
"""Replays that may fail before no other is tried."""
LOOKS = 3
"""Looks at the prompt rounded otherwise, each at random, that move embeddings alone: as many as it takes to account for
the difference, at most so many."""
MOST_LOOKS = 12
"""All looks. For some prompts of a trained model the first say too little; only there others are taken, which move what
every layer gives, as rounding does."""


class Check(NamedTuple):
    """A batch's replay that cuts nothing, held against the model on the batch's shortest prompt."""

    prompts: int
    tokens: int
    """Of the longest prompt."""
    difference: float
    """Root mean square, over the vocabulary, of how the log-probabilities of replay and model differ, in nats."""
    noise: float
    """The same between the model and itself rounded otherwise; the largest of as many looks as were taken."""

    @property
    def passed(self) -> bool:
        """Whether the replay gives what the model gives."""
        return self.difference <= MULTIPLE * self.noise

    def __str__(self) -> str:
        return f"misses by {self.difference:.1e} nats, where the model's own rounding makes {self.noise:.1e}"


class Checks:
    """Whether a model's replays can be believed, batch by batch.

    Args:
        lens: the model.
        works: whether it can be replayed.
        what: what has to be answered otherwise where it cannot.

    Attributes:
        works: whether it is worth trying.
        found: every check.
    """

    def __init__(self, lens: LoadedModel, works: bool, what: str) -> None:
        self.lens, self.works, self.what = lens, works, what
        self.found: list[Check] = []
        self._warned, self._told = False, 0

    @classmethod
    def inside(cls, lens: LoadedModel, replay: bool, what: str) -> Checks:
        """Of replays under the blocks that run, if they are to be tried; if they cannot, that is said."""
        checks = cls(lens, replay and not lens.hooks.by_prompt, what)
        if replay and not checks.works:
            checks.refuse(
                "is asked inside a block whose positions, edges, values or vectors are told prompt by prompt, for the "
                "prompts of one batch"
            )
        return checks

    def passes(self, batch: Batch, uncut: Float[Tensor, "batch vocabulary"]) -> bool:
        """Whether a batch's replay gives what the model gives; if not, it is said, once."""
        return self.hear(check(self.lens, batch, uncut))

    def hear(self, found: Check) -> bool:
        """Note a check, and say, once, that one has not passed."""
        self.found.append(found)
        tell("replay checked", model=self.lens.name, passed=found.passed, **found._asdict())
        if not found.passed:
            self._say(f"is not reproduced by replaying it: without a {self.what} it {found}", f"{self.what} of a batch")
            # One batch says nothing of the others; where none has passed, no more replays are made for nothing.
            self.works = len(self.found) < TRIES or any(one.passed for one in self.found)
        return found.passed

    def told(self) -> pd.DataFrame:
        """The checks that were heard since this was asked last, with the columns of `folder.CHECKS`."""
        import pandas as pd

        from mambalens.runs.folder import CHECKS

        new = self.found[self._told :]
        self._told = len(self.found)
        return pd.DataFrame([(self.lens.name, *one, one.passed) for one in new], columns=list(CHECKS))

    def broke(self, error: Exception) -> None:
        """The model's code did not take the replay's rows.

        Raises:
            Exception: the error itself, if it says something else: a full memory, or a mistake in what was asked for.
        """
        if isinstance(error, MambalensError) or exhausted(error):
            raise error
        self.refuse(f"cannot be replayed ({type(error).__name__}: {error})")

    def refuse(self, why: str) -> None:
        """No replay is to be tried."""
        self.works = False
        tell("no replay", model=self.lens.name, why=why)
        self._say(why, self.what)

    def _say(self, why: str, whose: str) -> None:
        if not self._warned:
            warnings.warn(
                f"{self.lens.name} {why}. Every {whose} for which that is so takes a forward pass of its own instead, "
                "which is slow and exact.",
                stacklevel=4,
            )
        self._warned = True


def check(lens: LoadedModel, batch: Batch, uncut: Float[Tensor, "batch vocabulary"]) -> Check:
    """Hold a batch's replay against the model, on its shortest prompt run alone: what fills it up must not matter.

    Args:
        lens: the model.
        batch: prompts.
        uncut: logits that a replay without a cut gives.
    """
    shortest = int(batch.last.argmin())
    held = held_against(lens, batch.ids[shortest], int(batch.last[shortest]), uncut[shortest], batch.ids.numel())
    return Check(len(batch.last), batch.ids.shape[1], *held)


@torch.no_grad()
def held_against(
    lens: LoadedModel, ids: Int[Tensor, " time"], last: int, uncut: Float[Tensor, " vocabulary"], tokens: int
) -> tuple[float, float]:
    """How far a replay of one prompt is from the model, and how far the model is from itself.

    What a model is off by for rounding alone grows with its depth and depends on its weights, so it is measured: the
    embeddings of a prompt are changed by one rounding step up or down at random, which goes through all layers as the
    rounding of every layer does. Where that does not account for the difference, so is what every layer gives. (Half
    precision rounds away small mistakes too; what is below the model's noise cannot be seen.)

    Args:
        lens: the model.
        ids: the prompt, and what fills it up.
        last: its last position.
        uncut: logits behind it that a replay without a cut gives.
        tokens: how many fit a pass, if the prompt itself has no more.

    Returns:
        `Check.difference` and `Check.noise`.
    """
    # What is cut or added by a running block may lie behind a prompt's end: the model then gets the batch's columns.
    ids = ids if lens.hooks.cutting or lens.hooks.steering else ids[: last + 1]

    def rows(count: int) -> Float[Tensor, "row vocabulary"]:
        at = torch.full((count,), last)
        return lens.last_logits(Batch([], ids.expand(count, -1), at, at)).double().log_softmax(-1)

    # Twice as many tokens take hardly longer: the first look goes along, where the memory has room for it.
    with _rounded_otherwise(lens, 0, everywhere=False, own=1):
        own, *looks = rows(2 if 2 * len(ids) <= tokens else 1)
    difference = _difference(uncut.to(own.device).double().log_softmax(-1), own)
    # The head rounds too, at least by this.
    noise = 2 * _step(lens) * float((own - own.nanmean()).nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt())
    noise = max([noise, *(_difference(look, own) for look in looks)])
    for look in range(len(looks), MOST_LOOKS):
        if difference <= MULTIPLE * noise:  # more looks would find no less
            break
        with _rounded_otherwise(lens, look, everywhere=look >= LOOKS):
            noise = max(noise, _difference(rows(1)[0], own))
    return difference, noise


def _step(lens: LoadedModel) -> float:
    """The relative rounding step; transformers rounds to float32 in places whatever the model's dtype."""
    return max(torch.finfo(lens.model.dtype).eps, torch.finfo(torch.float32).eps)


def _difference(ours: Float[Tensor, " vocabulary"], theirs: Float[Tensor, " vocabulary"]) -> float:
    """Root mean square of a difference; a token that is impossible to both is no difference."""
    return float(torch.where(ours == theirs, 0.0, ours - theirs).square().mean().sqrt())


@contextmanager
def _rounded_otherwise(lens: LoadedModel, seed: int, everywhere: bool, own: int = 0) -> Iterator[None]:
    """While the block runs, embeddings, or all that layers give, are moved by a rounding step; `own` rows are not."""
    generator = torch.Generator().manual_seed(seed)
    step = _step(lens)

    def moved(hidden: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        ways = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
        ways[:own] = 0
        ways = ways.to(hidden.device)
        return hidden + (hidden.double() * step * ways).to(hidden.dtype)

    def move(module: Any, args: Any, output: Any) -> Any:
        return (moved(output[0]), *output[1:]) if isinstance(output, tuple) else moved(output)

    modules = [lens.model.get_input_embeddings(), *(lens.hooks.layers if everywhere else ())]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(move).remove)
        yield
