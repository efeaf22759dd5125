"""Activation patching: what another prompt's activation in a prompt's place does to the answer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.defaults import CELL_BLOCK
from mambalens.facts.fact import Fact
from mambalens.facts.pairs import Pair, Pairs, aligned
from mambalens.facts.prompts import Batch, Prompt, Skip, read_facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.answers import Patcher
from mambalens.interventions.data import PatchData
from mambalens.interventions.groups import Prompts, Spot
from mambalens.interventions.run import check_kept, configuration, found_or_kept
from mambalens.interventions.sites import check_site, windows_with
from mambalens.interventions.spots import Place, Where, check_positions, differs, places_of
from mambalens.interventions.table import PATCH_MEASURED, PATCHES
from mambalens.interventions.walk import prompts_fitting
from mambalens.measures import Measure, log_odds, measure_of, name_of
from mambalens.model import LoadedModel
from mambalens.runs.folder import Part
from mambalens.sweep.halving import Halving
from mambalens.sweep.identity import model_and_facts
from mambalens.system.memory import budget
from mambalens.system.progress import tqdm


class Patching(NamedTuple):
    """What is patched."""

    site: str = "residual"
    window: int | Sequence[Sequence[int]] = 1
    positions: tuple[str | int, ...] = ("each",)
    measure: str | Measure | None = None

    @classmethod
    def asked(
        cls,
        site: str,
        window: int | Sequence[Sequence[int]],
        positions: Where,
        measure: str | Measure | None = None,
    ) -> Patching:
        """What is asked for, in the words of `Lens.patch`.

        Raises:
            MambalensError: for an unknown site, role or measure.
        """
        if measure is not None:
            measure_of(measure)
        return cls(check_site(site), window, check_positions(positions), measure)


def patch(
    lens: LoadedModel,
    pairs: Sequence[Pair],
    patching: Patching,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    replay: bool = True,
    out: str | Path | None = None,
    block_size: int = CELL_BLOCK,
) -> PatchData:
    """Put other prompts' activations into prompts.

    Equation: Patching
        h~_p^l = h'_{p'}^l                      the other prompt's activation in the place of a prompt's own
        y~_t = y_t - sum_{p in P} alpha[t, p] (v_p - v'_{p'})    for every t, at the site 'value'
        moved = (D - D~) / (D - D')             D = z_target - z_other

        Source: Zhang & Nanda 2024, arXiv:2309.16042, for the setting and the logit difference
        Source: Meng et al. 2022, arXiv:2202.05262, section 2, for the restored activation
        Source: this package, for values, which are those of an ablation

        h^l is a site of layer l (see `sites.SITES`), p a position of the prompt and p' the one of the other prompt that
        stands for it; v are values, P the patched positions, alpha the prompt's own effective attention. z are logits
        behind the last token; D is the prompt's logit difference, D~ that under the patch, D' the other prompt's. With
        the residual stream of every position before layer 0 put in, or that of the last one behind the last layer,
        moved is 1.

    Args:
        lens: the model.
        pairs: facts, each with the one that it is patched from.
        patching: what is patched.
        batch_size: pairs a batch at most.
        memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
        progress: show a progress bar.
        replay: answer by replay wherever it reproduces the model, else by one hooked pass a patch.
        out: folder to keep finished blocks in; those that are there already are not computed again.
        block_size: pairs a block.

    Raises:
        MambalensError: for windows and sites that the model does not have, positions that prompts do not have, or if
            no pair can be used.
    """
    check_kept(out, patching.measure)
    asked = Pairs.of(pairs)
    with tqdm(desc=f"patch {lens.name}", unit="patch", disable=not progress) as bar:
        work = PatchWork(lens, asked, patching, batch_size, memory, replay, bar)
        config = configuration(lens, asked, work.windows, patching.measure)
        return cast(PatchData, found_or_kept(work, asked, config, PatchData, out, block_size))


class PatchWork:
    """Everything that patches need, looked up and checked once."""

    def __init__(
        self,
        lens: LoadedModel,
        pairs: Pairs,
        patching: Patching,
        batch_size: int | None,
        memory: int | str | None,
        replay: bool,
        bar: Any,
    ) -> None:
        self.lens, self.pairs, self.patching, self.bar = lens, pairs, patching, bar
        self.windows = windows_with(patching.site, patching.window, lens.hooks)
        self.memory = budget(memory, lens.device)
        self.patcher = Patcher(lens, patching.site, self.windows, self.memory, replay)
        self.halving = Halving(lens.name, batch_size, bar)
        self.measure = None if patching.measure is None else measure_of(patching.measure)
        self.read, self.unusable = _read(lens, pairs, patching.site)
        if not self.read:
            skipped = [*self.unusable.values(), *pairs.left_out]
            reasons = "; ".join(f"{skip.fact_id}: {skip.reason}" for skip in skipped[:3])
            raise MambalensError(f"None of the {len(pairs)} pairs can be used ({reasons or 'there are none'}).")
        self.places = {pair: list(places_of(prompt, patching.positions)) for pair, (prompt, _) in self.read.items()}

    def definition(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON, but for the block's size."""
        patching = self.patching
        return {
            "site": patching.site, "window": self.windows, "positions": list(patching.positions),
            "measure": None if patching.measure is None else name_of(patching.measure),
            "model": self.lens.name, "dtype": str(self.lens.model.dtype).removeprefix("torch."),
            "facts": self.pairs.name, "pairs": len(self.pairs),
        } | model_and_facts(self.lens, [fact for pair in self.pairs for fact in pair])  # fmt: skip

    def prompts_read(self) -> list[Prompt]:
        """The prompts that are patched."""
        return [prompt for prompt, _ in self.read.values()]

    def size(self, pairs: Pairs) -> int:
        """Patches of some pairs."""
        return len(self.windows) * sum(len(self.places[pair]) for pair in pairs if pair in self.read)

    def block(self, pairs: Pairs) -> Part:
        """The table's rows for some pairs, and what is left out of them."""
        import pandas as pd

        found: dict[int, list[tuple[Any, ...]]] = {}
        skipped = [self.unusable[pair] for pair in pairs if pair in self.unusable] + list(pairs.left_out)
        usable = list(dict.fromkeys(pair for pair in pairs if pair in self.read))
        number = {id(self.read[pair][0]): at for at, pair in enumerate(usable)}
        most = functools.partial(_pairs_at_once, self.lens, self.patching.site, self.memory)
        for batch in self.lens.batches([self.read[pair][0] for pair in usable], self.halving.batch_size, most):
            pair_of = functools.partial(self._batch, number, usable)
            rows, empty = self.halving.run(pair_of, batch)
            for at, *row in rows:
                found.setdefault(at, []).append(tuple(row))
            skipped += empty
        columns = [*PATCHES, *(PATCH_MEASURED if self.measure else ())]
        table = pd.DataFrame([row for at in sorted(found) for row in found[at]], columns=columns)
        return Part(table, pd.DataFrame(skipped, columns=list(Skip._fields)), self.patcher.checks.told())

    def _batch(self, number: Mapping[int, int], pairs: Sequence[Pair], batch: Batch) -> tuple[list[Any], list[Any]]:
        """Rows of a batch, each with the number of its pair in front."""
        numbers = [number[id(prompt)] for prompt in batch.prompts]
        count = len(numbers)
        of_batch = [self.read[pairs[at]] for at in numbers]
        side_by_side = [prompt for prompt, _ in of_batch] + [other for _, other in of_batch]
        spots: list[Spot] = []
        at: list[tuple[int, Place, int | None]] = []
        skipped = []
        for row, (prompt, other) in enumerate(of_batch):
            stands_for = aligned(prompt, other)
            for place in self.places[pairs[numbers[row]]]:
                if not place.positions:
                    skipped.append(Skip(str(prompt.fact.id), place.role, f"the role {place.role!r} is empty"))
                    continue
                others = tuple(stands_for[position] for position in place.positions)
                changes = differs(prompt, other, place.positions, others)
                at.append((row, place, len(spots) if changes else None))
                if changes:
                    spots.append(Spot(row, count + row, place.positions, others))
        targets = torch.tensor([[prompt.target_id, other.target_id] for prompt, other in of_batch])
        score = functools.partial(_both, targets.repeat(2, 1), self.measure)
        base, patched = self.patcher.scores(padded(side_by_side), spots, score, self.bar.update)
        rows = []
        for row, place, spot in at:
            prompt, other = of_batch[row]
            theirs = base[count + row].tolist()
            for window, layers in enumerate(self.windows):
                now = base[row].tolist() if spot is None else patched[spot, window].tolist()
                names = (prompt.fact.id, other.fact.id, self.lens.name, self.patching.site, layers[0], len(layers))
                where = (place.position, place.role, place.piece)
                rows.append((numbers[row], *names, *where, *_columns(base[row].tolist(), now, theirs)))
        places = sum(len(self.places[pairs[at]]) for at in numbers)
        self.bar.update(len(self.windows) * (places - len(spots)))
        return rows, skipped


def padded(prompts: Sequence[Prompt]) -> Prompts:
    """Prompts of any length as those of one pass."""
    ids = torch.zeros(len(prompts), max(len(prompt.ids) for prompt in prompts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
    return Prompts(ids, torch.tensor([len(prompt.ids) - 1 for prompt in prompts]))


def _read(
    lens: LoadedModel, pairs: Sequence[Pair], site: str
) -> tuple[dict[Pair, tuple[Prompt, Prompt]], dict[Pair, Skip]]:
    """The pairs' prompts, and why the others cannot be used."""
    found, skipped = {}, {}
    for pair in pairs:
        fact, other = pair
        read, wrong = read_facts([fact, other], lens.tokenizer, subject=False)
        if wrong:
            skipped[pair] = Skip(str(fact.id), "", "; ".join(skip.reason for skip in wrong))
            continue
        one, two = read
        if site == "state" and aligned(one, two) != list(range(len(one.ids))):
            skipped[pair] = Skip(str(fact.id), "", _unequal(fact, other, one, two))
        else:
            found[pair] = (one, two)
    return found, skipped


def _unequal(fact: Fact, other: Fact, one: Prompt, two: Prompt) -> str:
    return (
        f"the prompt {fact.prompt!r} has {len(one.ids)} tokens and {other.prompt!r} has {len(two.ids)}, or their "
        "subjects stand at other positions: a state is put in between prompts that are aligned token by token "
        "(facts.pairs(tokenizer=lens.tokenizer))"
    )


def _both(
    targets: Int[Tensor, "batch 2"],
    measure: Measure | None,
    logits: Float[Tensor, "row vocabulary"],
    of: Int[Tensor, " row"],
) -> Float[Tensor, "row number"]:
    """Probability, log-odds and logit of the own answer, then of the other fact's; the own one's measure, if any."""
    found = []
    for target in targets.to(logits.device)[of].unbind(1):
        odds = log_odds(logits, target)
        found += [odds.double().sigmoid(), odds.double(), logits.gather(1, target[:, None])[:, 0].double()]
    if measure is not None:
        found.append(measure(logits, targets[:, 0].to(logits.device)[of]).double())
    return torch.stack(found, 1)


def _columns(base: Sequence[float], now: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """The numbers of a row, in the order of `PATCHES`, and the measure's, if there is one."""
    before, after, whole = (of[2] - of[5] for of in (base, now, theirs))
    moved = (before - after) / (before - whole) if before != whole else float("nan")
    measured = (base[6], now[6]) if len(base) > 6 else ()
    return (base[0], base[1], base[3], base[4], before, now[0], now[1], now[3], now[4], after, moved, *measured)


def _pairs_at_once(lens: LoadedModel, site: str, memory: int, time: int) -> int:
    """How many pairs of so many positions a base pass may take."""
    return max(1, prompts_fitting(lens.hooks, site, time, memory) // 2)
