"""Causal tracing: which activation, restored in a corrupted run, brings the answer back."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.defaults import TRACE_WINDOW
from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.answers import Patcher
from mambalens.interventions.data import TraceData
from mambalens.interventions.patching import padded
from mambalens.interventions.sites import check_site, windows_with
from mambalens.interventions.spots import Place, Where, check_positions, differs, places_of
from mambalens.interventions.table import TRACES
from mambalens.interventions.walk import Prompts, Spot
from mambalens.measures import log_odds
from mambalens.model import BATCH_TOKENS, LoadedModel
from mambalens.sweep.halving import Halving
from mambalens.sweep.identity import prompt_table
from mambalens.sweep.replay import prompts_at_once
from mambalens.system.memory import budget
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd

SWAP = "swap"
WIDE = ("mixer", "mlp")
"""Sites that are restored in a window of layers where nothing is said, as Meng et al. do."""


class Tracing(NamedTuple):
    """What is corrupted and restored."""

    noise: float | str = 3.0
    restore: str = "residual"
    window: int | Sequence[Sequence[int]] | None = None
    positions: tuple[str | int, ...] = ("each",)
    samples: int = 10
    seed: int = 0

    @classmethod
    def asked(
        cls,
        noise: float | str,
        restore: str,
        window: int | Sequence[Sequence[int]] | None,
        positions: Where,
        samples: int,
        seed: int,
    ) -> Tracing:
        """What is asked for, in the words of `Lens.trace`.

        Raises:
            MambalensError: for an unknown site or role, noise that is none, or no sample.
        """
        wrong = noise != SWAP if isinstance(noise, str) else not noise > 0
        if wrong:
            raise MambalensError(f"noise={noise!r}: give a number above 0 (of standard deviations), or {SWAP!r}.")
        if samples < 1:
            raise MambalensError(f"samples={samples}: give 1 or more.")
        many = 1 if noise == SWAP else samples
        return cls(noise, check_site(restore), window, check_positions(positions), many, seed)

    @property
    def corruption(self) -> str:
        """What the table calls it."""
        return SWAP if isinstance(self.noise, str) else f"noise {self.noise:g}"

    def layers(self, n_layers: int) -> int | Sequence[Sequence[int]]:
        """The window, with its default."""
        if self.window is not None:
            return self.window
        return min(TRACE_WINDOW, n_layers) if self.restore in WIDE else 1


def trace(
    lens: LoadedModel,
    facts: Facts,
    tracing: Tracing,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    replay: bool = True,
) -> TraceData:
    """Corrupt subjects and restore one site at a time.

    Equation: Causal tracing
        E*_s = E_s + eps,  eps ~ N(0, (noise sigma)^2)     for s in the subject: the corrupted run
        TE = P[o] - P*[o]
        IE(p, l) = P*_{clean h_p^l}[o] - P*[o]

        Source: Meng et al. 2022, arXiv:2202.05262, section 2.1
        Source: Sharma, Atkinson & Bau 2024, arXiv:2404.03646, for Mamba

        E_s are embeddings, sigma the standard deviation of those of the subjects of all facts, o the answer. h_p^l is a
        site of layer l at position p (see `sites.SITES`), restored to what it is in the clean run; in a window of
        layers at once. With noise='swap' the corrupted run has another subject in the place of the noise.

    Args:
        lens: the model.
        facts: facts.
        tracing: what is corrupted and restored.
        batch_size: facts a batch at most; each has a clean run and one for every sample.
        memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
        progress: show a progress bar.
        replay: answer by replay wherever it reproduces the model, else by one hooked pass a site.

    Raises:
        MambalensError: for windows and sites that the model does not have, positions that prompts do not have, or if
            no fact can be used.
    """
    bar = tqdm(desc=f"trace {lens.name}", unit="patch", disable=not progress)
    with bar:
        work = TraceWork(lens, facts, tracing, batch_size, memory, replay, bar)
        bar.reset(total=work.size())
        table, skipped = work.run()
    return TraceData(table, skipped, prompt_table(lens, work.prompts), {lens.name: lens.n_layers})


class TraceWork:
    """Everything that traces need, looked up and checked once."""

    def __init__(
        self,
        lens: LoadedModel,
        facts: Facts,
        tracing: Tracing,
        batch_size: int | None,
        memory: int | str | None,
        replay: bool,
        bar: Any,
    ) -> None:
        self.lens, self.tracing, self.bar = lens, tracing, bar
        self.windows = windows_with(tracing.restore, tracing.layers(lens.n_layers), lens.hooks)
        self.memory = budget(memory, lens.device)
        self.patcher = Patcher(lens, tracing.restore, self.windows, self.memory, replay)
        self.halving = Halving(lens.name, batch_size, bar)
        self.prompts, self.skipped = read_facts(facts, lens.tokenizer)
        self.others: dict[int, Prompt] = {}
        """The corrupted prompt of each, where subjects are swapped."""
        if tracing.noise == SWAP:
            self._find_others(facts)
        if not self.prompts:
            raise none_usable(facts, self.skipped)
        self.places = {id(prompt): list(places_of(prompt, tracing.positions)) for prompt in self.prompts}
        self.sigma = 0.0 if tracing.noise == SWAP else float(tracing.noise) * embedding_deviation(lens, self.prompts)

    def _find_others(self, facts: Facts) -> None:
        pairs = facts.pairs(seed=self.tracing.seed, tokenizer=self.lens.tokenizer)
        other = {pair.fact.id: pair.other for pair in pairs}
        usable = []
        for prompt in self.prompts:
            if prompt.fact.id in other:
                read, wrong = read_facts([other[prompt.fact.id]], self.lens.tokenizer)
                if read:
                    self.others[id(prompt)] = read[0]
                    usable.append(prompt)
                self.skipped += [skip._replace(fact_id=str(prompt.fact.id)) for skip in wrong]
        known = {skip.fact_id for skip in self.skipped}
        self.skipped += [skip for skip in pairs.left_out if skip.fact_id not in known]
        self.prompts = usable

    def size(self) -> int:
        """Restored sites of all facts and samples."""
        return self.tracing.samples * len(self.windows) * sum(len(places) for places in self.places.values())

    def run(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The table, and what is left out of it."""
        import pandas as pd

        order = {id(prompt): number for number, prompt in enumerate(self.prompts)}
        found: dict[int, list[tuple[Any, ...]]] = {}
        skipped = list(self.skipped)
        for batch in self.lens.batches(self.prompts, self.halving.batch_size, self._facts_at_once):
            rows, empty = self.halving.run(self._batch, batch)
            for key, *row in rows:
                found.setdefault(order[key], []).append(tuple(row))
            skipped += empty
        table = pd.DataFrame([row for number in sorted(found) for row in found[number]], columns=list(TRACES))
        return table, pd.DataFrame(skipped, columns=list(Skip._fields))

    def _facts_at_once(self, time: int) -> int:
        """How many facts of so many positions may share a base pass."""
        runs = self.tracing.samples + 1
        fitting = prompts_at_once(self.lens.hooks, time, 1, self.memory) // runs
        return max(1, min(fitting, BATCH_TOKENS // (time * runs)))

    def _batch(self, batch: Batch) -> tuple[list[Any], list[Any]]:
        """Rows of a batch, each with what tells its prompt in front."""
        samples, count = self.tracing.samples, len(batch.prompts)
        # The clean runs, then the samples of the first fact, of the second, ...
        corrupted = [self.others.get(id(prompt), prompt) for prompt in batch.prompts for _ in range(samples)]
        prompts = self._noisy(padded([*batch.prompts, *corrupted]), batch.prompts)
        spots: list[Spot] = []
        at: list[tuple[int, int, Place, int | None]] = []
        skipped = []
        for fact, prompt in enumerate(batch.prompts):
            begins = min(prompt.positions("subject"))
            for place in self.places[id(prompt)]:
                if not place.positions:
                    skipped.append(Skip(str(prompt.fact.id), place.role, f"the role {place.role!r} is empty"))
                    continue
                if id(prompt) in self.others:
                    changes = differs(prompt, self.others[id(prompt)], place.positions, place.positions)
                else:
                    changes = max(place.positions) >= begins
                for sample in range(samples):
                    at.append((fact, sample, place, len(spots) if changes else None))
                    if changes:
                        spots.append(Spot(count + fact * samples + sample, fact, place.positions, place.positions))
        targets = torch.cat([batch.targets, batch.targets.repeat_interleave(samples)])
        base, patched = self.patcher.scores(prompts, spots, functools.partial(_answer, targets), self.bar.update)
        rows = []
        for fact, sample, place, spot in at:
            prompt, row = batch.prompts[fact], count + fact * samples + sample
            clean, broken = base[fact].tolist(), base[row].tolist()
            for window, layers in enumerate(self.windows):
                now = broken if spot is None else patched[spot, window].tolist()
                names = (prompt.fact.id, self.lens.name, self.tracing.corruption, sample, self.tracing.restore)
                where = (layers[0], len(layers), place.position, place.role, place.piece)
                rows.append((id(prompt), *names, *where, *clean, *broken, *now, now[0] - broken[0]))
        self.bar.update(self.size_of(batch.prompts) - len(spots) * len(self.windows))
        return rows, skipped

    def size_of(self, prompts: Sequence[Prompt]) -> int:
        """Restored sites of some facts."""
        return self.tracing.samples * len(self.windows) * sum(len(self.places[id(prompt)]) for prompt in prompts)

    def _noisy(self, runs: Prompts, facts: Sequence[Prompt]) -> Prompts:
        """Clean and corrupted runs, with the noise of the corrupted ones."""
        if not self.sigma:
            return runs
        width = self.lens.model.get_input_embeddings().weight.shape[1]
        noise = torch.zeros(*runs.ids.shape, int(width), dtype=self.lens.model.dtype)
        for fact, prompt in enumerate(facts):
            subject = prompt.positions("subject")
            # A fact's noise is the same whatever other facts are asked about.
            seed = zlib.crc32(f"{self.tracing.seed} {prompt.fact.id} {prompt.fact.prompt}".encode())
            drawn = torch.randn(
                self.tracing.samples, len(subject), int(width), generator=torch.Generator().manual_seed(seed)
            )
            begin = len(facts) + fact * self.tracing.samples
            noise[begin : begin + self.tracing.samples, subject] = (self.sigma * drawn).to(noise.dtype)
        return runs._replace(noise=noise)


@torch.no_grad()
def embedding_deviation(lens: LoadedModel, prompts: Sequence[Prompt]) -> float:
    """Standard deviation of all numbers of the embeddings of the prompts' subjects."""
    ids = torch.tensor([prompt.ids[at] for prompt in prompts for at in prompt.positions("subject")])
    return float(lens.model.get_input_embeddings()(ids.to(lens.device)).double().std())


def _answer(
    targets: Int[Tensor, " batch"], logits: Float[Tensor, "row vocabulary"], of: Int[Tensor, " row"]
) -> Float[Tensor, "row number"]:
    """Probability and log-odds of the answer."""
    odds = log_odds(logits, targets.to(logits.device)[of]).double()
    return torch.stack([odds.sigmoid(), odds], 1)
