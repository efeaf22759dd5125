"""Activation patching: what another prompt's activation in a prompt's place does to the answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.facts.fact import Fact
from mambalens.facts.pairs import Pair, aligned
from mambalens.facts.prompts import Batch, Prompt, Skip, read_facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.answers import Patcher
from mambalens.interventions.data import PatchData
from mambalens.interventions.sites import check_site, windows_with
from mambalens.interventions.spots import Place, Where, check_positions, differs, places_of
from mambalens.interventions.table import PATCHES
from mambalens.interventions.walk import Prompts, Spot
from mambalens.measures import log_odds
from mambalens.model import LoadedModel
from mambalens.sweep.halving import Halving
from mambalens.sweep.identity import prompt_table
from mambalens.sweep.replay import prompts_at_once
from mambalens.system.memory import budget
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd


class Patching(NamedTuple):
    """What is patched."""

    site: str = "residual"
    window: int | Sequence[Sequence[int]] = 1
    positions: tuple[str | int, ...] = ("each",)

    @classmethod
    def asked(cls, site: str, window: int | Sequence[Sequence[int]], positions: Where) -> Patching:
        """What is asked for, in the words of `Lens.patch`.

        Raises:
            MambalensError: for an unknown site or role.
        """
        return cls(check_site(site), window, check_positions(positions))


def patch(
    lens: LoadedModel,
    pairs: Sequence[Pair],
    patching: Patching,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    replay: bool = True,
) -> PatchData:
    """Put other prompts' activations into prompts.

    Equation: Patching
        h~_p^l = h'_{p'}^l                      the other prompt's activation in the place of a prompt's own
        moved = (D - D~) / (D - D')             D = z_target - z_other

        Source: Zhang & Nanda 2024, arXiv:2309.16042, for the setting and the logit difference
        Source: Meng et al. 2022, arXiv:2202.05262, section 2, for the restored activation

        h^l is a site of layer l (see `sites.SITES`), p a position of the prompt and p' the one of the other prompt that
        stands for it. z are logits behind the last token; D is the prompt's logit difference, D~ that under the patch,
        D' the other prompt's. With the residual stream of every position before layer 0 put in, moved is 1.

    Args:
        lens: the model.
        pairs: facts, each with the one that it is patched from.
        patching: what is patched.
        batch_size: pairs a batch at most.
        memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
        progress: show a progress bar.
        replay: answer by replay wherever it reproduces the model, else by one hooked pass a patch.

    Raises:
        MambalensError: for windows and sites that the model does not have, positions that prompts do not have, or if
            no pair can be used.
    """
    bar = tqdm(desc=f"patch {lens.name}", unit="patch", disable=not progress)
    with bar:
        work = PatchWork(lens, pairs, patching, batch_size, memory, replay, bar)
        bar.reset(total=work.size())
        table, skipped = work.run()
    prompts = prompt_table(lens, [prompt for prompt, _ in work.read])
    return PatchData(table, skipped, prompts, {lens.name: lens.n_layers})


class PatchWork:
    """Everything that patches need, looked up and checked once."""

    def __init__(
        self,
        lens: LoadedModel,
        pairs: Sequence[Pair],
        patching: Patching,
        batch_size: int | None,
        memory: int | str | None,
        replay: bool,
        bar: Any,
    ) -> None:
        self.lens, self.patching, self.bar = lens, patching, bar
        self.windows = windows_with(patching.site, patching.window, lens.hooks)
        self.memory = budget(memory, lens.device)
        self.patcher = Patcher(lens, patching.site, self.windows, self.memory, replay)
        self.halving = Halving(lens.name, batch_size, bar)
        self.read, self.skipped = _read(lens, pairs, patching.site)
        self.skipped += getattr(pairs, "left_out", ())
        if not self.read:
            reasons = "; ".join(f"{skip.fact_id}: {skip.reason}" for skip in self.skipped[:3])
            raise MambalensError(f"None of the {len(pairs)} pairs can be used ({reasons or 'there are none'}).")
        self.places = [list(places_of(prompt, patching.positions)) for prompt, _ in self.read]
        self.number = {id(prompt): number for number, (prompt, _) in enumerate(self.read)}

    def size(self) -> int:
        """Patches of all pairs."""
        return len(self.windows) * sum(map(len, self.places))

    def run(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The table, and what is left out of it."""
        import pandas as pd

        found: dict[int, list[tuple[Any, ...]]] = {}
        skipped = list(self.skipped)
        most = functools.partial(_pairs_at_once, self.lens, self.memory)
        for batch in self.lens.batches([prompt for prompt, _ in self.read], self.halving.batch_size, most):
            rows, empty = self.halving.run(self._batch, batch)
            for number, *row in rows:
                found.setdefault(number, []).append(tuple(row))
            skipped += empty
        table = pd.DataFrame([row for number in sorted(found) for row in found[number]], columns=list(PATCHES))
        return table, pd.DataFrame(skipped, columns=list(Skip._fields))

    def _batch(self, batch: Batch) -> tuple[list[Any], list[Any]]:
        """Rows of a batch, each with the number of its pair in front."""
        numbers = [self.number[id(prompt)] for prompt in batch.prompts]
        count = len(numbers)
        side_by_side = [prompt for prompt, _ in map(self.read.__getitem__, numbers)]
        side_by_side += [other for _, other in map(self.read.__getitem__, numbers)]
        spots: list[Spot] = []
        at: list[tuple[int, Place, int | None]] = []
        skipped = []
        for row, number in enumerate(numbers):
            prompt, other = self.read[number]
            stands_for = aligned(prompt, other)
            for place in self.places[number]:
                if not place.positions:
                    skipped.append(Skip(str(prompt.fact.id), place.role, f"the role {place.role!r} is empty"))
                    continue
                others = tuple(stands_for[position] for position in place.positions)
                changes = differs(prompt, other, place.positions, others)
                at.append((row, place, len(spots) if changes else None))
                if changes:
                    spots.append(Spot(row, count + row, place.positions, others))
        targets = torch.tensor([[self.read[n][0].target_id, self.read[n][1].target_id] for n in numbers])
        score = functools.partial(_both, targets.repeat(2, 1))
        base, patched = self.patcher.scores(padded(side_by_side), spots, score, self.bar.update)
        rows = []
        for row, place, spot in at:
            prompt, other = self.read[numbers[row]]
            theirs = base[count + row].tolist()
            for window, layers in enumerate(self.windows):
                now = base[row].tolist() if spot is None else patched[spot, window].tolist()
                names = (prompt.fact.id, other.fact.id, self.lens.name, self.patching.site, layers[0], len(layers))
                where = (place.position, place.role, place.piece)
                rows.append((numbers[row], *names, *where, *_columns(base[row].tolist(), now, theirs)))
        self.bar.update(len(self.windows) * (sum(len(self.places[number]) for number in numbers) - len(spots)))
        return rows, skipped


def padded(prompts: Sequence[Prompt]) -> Prompts:
    """Prompts of any length as those of one pass."""
    ids = torch.zeros(len(prompts), max(len(prompt.ids) for prompt in prompts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
    return Prompts(ids, torch.tensor([len(prompt.ids) - 1 for prompt in prompts]))


def _read(lens: LoadedModel, pairs: Sequence[Pair], site: str) -> tuple[list[tuple[Prompt, Prompt]], list[Skip]]:
    """The pairs' prompts, and the facts whose pair cannot be used."""
    found, skipped = [], []
    for fact, other in pairs:
        read, wrong = read_facts([fact, other], lens.tokenizer, subject=False)
        if wrong:
            skipped.append(Skip(str(fact.id), "", "; ".join(skip.reason for skip in wrong)))
            continue
        one, two = read
        if site == "state" and aligned(one, two) != list(range(len(one.ids))):
            skipped.append(Skip(str(fact.id), "", _unequal(fact, other, one, two)))
        else:
            found.append((one, two))
    return found, skipped


def _unequal(fact: Fact, other: Fact, one: Prompt, two: Prompt) -> str:
    return (
        f"the prompt {fact.prompt!r} has {len(one.ids)} tokens and {other.prompt!r} has {len(two.ids)}, or their "
        "subjects stand at other positions: a state is put in between prompts that are aligned token by token "
        "(facts.pairs(tokenizer=lens.tokenizer))"
    )


def _both(
    targets: Int[Tensor, "batch 2"], logits: Float[Tensor, "row vocabulary"], of: Int[Tensor, " row"]
) -> Float[Tensor, "row number"]:
    """Probability, log-odds and logit of the own answer, then of the other fact's."""
    found = []
    for target in targets.to(logits.device)[of].unbind(1):
        odds = log_odds(logits, target)
        found += [odds.double().sigmoid(), odds.double(), logits.gather(1, target[:, None])[:, 0].double()]
    return torch.stack(found, 1)


def _columns(base: Sequence[float], now: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """The numbers of a row, in the order of `PATCHES`."""
    before, after, whole = (of[2] - of[5] for of in (base, now, theirs))
    moved = (before - after) / (before - whole) if before != whole else float("nan")
    return (base[0], base[1], base[3], base[4], before, now[0], now[1], now[3], now[4], after, moved)


def _pairs_at_once(lens: LoadedModel, memory: int, time: int) -> int:
    """How many pairs of so many positions a base pass may take."""
    return max(1, prompts_at_once(lens.hooks, time, 1, memory) // 2)
