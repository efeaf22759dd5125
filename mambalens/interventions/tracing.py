"""Causal tracing: which activation, restored in a corrupted run, brings the answer back."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.defaults import CELL_BLOCK, TRACE_WINDOW
from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.answers import Patcher
from mambalens.interventions.data import TraceData
from mambalens.interventions.groups import Prompts, Spot
from mambalens.interventions.patching import padded
from mambalens.interventions.run import check_kept, configuration, found_or_kept
from mambalens.interventions.sites import check_site, windows_with
from mambalens.interventions.spots import Place, Where, check_positions, differs, places_of
from mambalens.interventions.table import TRACE_MEASURED, TRACES
from mambalens.interventions.walk import prompts_fitting
from mambalens.measures import Measure, log_odds, measure_of, name_of
from mambalens.model import BATCH_TOKENS, LoadedModel
from mambalens.runs.folder import Part
from mambalens.sweep.halving import Halving
from mambalens.sweep.identity import model_and_facts
from mambalens.system.memory import budget
from mambalens.system.progress import tqdm

SWAP = "swap"
WIDE = ("mixer", "mlp", "value")
"""Sites that are restored in a window of layers where nothing is said, as Meng et al. do."""


class Tracing(NamedTuple):
    """What is corrupted and restored."""

    noise: float | str = 3.0
    restore: str = "residual"
    window: int | Sequence[Sequence[int]] | None = None
    positions: tuple[str | int, ...] = ("each",)
    samples: int = 10
    seed: int = 0
    measure: str | Measure | None = None

    @classmethod
    def asked(
        cls,
        noise: float | str,
        restore: str,
        window: int | Sequence[Sequence[int]] | None,
        positions: Where,
        samples: int,
        seed: int,
        measure: str | Measure | None = None,
    ) -> Tracing:
        """What is asked for, in the words of `Lens.trace`.

        Raises:
            MambalensError: for an unknown site, role or measure, noise that is none, or no sample.
        """
        if measure is not None:
            measure_of(measure)
        wrong = noise != SWAP if isinstance(noise, str) else not noise > 0
        if wrong:
            raise MambalensError(f"noise={noise!r}: give a number above 0 (of standard deviations), or {SWAP!r}.")
        if samples < 1:
            raise MambalensError(f"samples={samples}: give 1 or more.")
        many = 1 if noise == SWAP else samples
        return cls(noise, check_site(restore), window, check_positions(positions), many, seed, measure)

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
    out: str | Path | None = None,
    block_size: int = CELL_BLOCK,
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
        out: folder to keep finished blocks in; those that are there already are not computed again.
        block_size: facts a block.

    Raises:
        MambalensError: for windows and sites that the model does not have, positions that prompts do not have, or if
            no fact can be used.
    """
    check_kept(out, tracing.measure)
    with tqdm(desc=f"trace {lens.name}", unit="patch", disable=not progress) as bar:
        work = TraceWork(lens, facts, tracing, batch_size, memory, replay, bar)
        config = configuration(lens, facts, work.windows, tracing.measure)
        return cast(TraceData, found_or_kept(work, facts, config, TraceData, out, block_size))


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
        self.lens, self.facts, self.tracing, self.bar = lens, facts, tracing, bar
        self.measure = None if tracing.measure is None else measure_of(tracing.measure)
        self.windows = windows_with(tracing.restore, tracing.layers(lens.n_layers), lens.hooks)
        self.memory = budget(memory, lens.device)
        self.patcher = Patcher(lens, tracing.restore, self.windows, self.memory, replay)
        self.halving = Halving(lens.name, batch_size, bar)
        self.prompts, self.unusable = read_facts(facts, lens.tokenizer)
        self.others: dict[int, Prompt] = {}
        """The corrupted prompt of each, where subjects are swapped."""
        if tracing.noise == SWAP:
            self._find_others(facts)
        if not self.prompts:
            raise none_usable(facts, self.unusable)
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
                self.unusable += [skip._replace(fact_id=str(prompt.fact.id)) for skip in wrong]
        known = {skip.fact_id for skip in self.unusable}
        self.unusable += [skip for skip in pairs.left_out if skip.fact_id not in known]
        self.prompts = usable

    def definition(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON, but for the block's size."""
        tracing = self.tracing
        return {
            "noise": tracing.noise, "restore": tracing.restore, "window": self.windows,
            "positions": list(tracing.positions), "samples": tracing.samples, "seed": tracing.seed,
            "measure": None if tracing.measure is None else name_of(tracing.measure),
            "model": self.lens.name, "dtype": str(self.lens.model.dtype).removeprefix("torch."),
            "facts": self.facts.name, "n_facts": len(self.facts),
        } | model_and_facts(self.lens, self.facts)  # fmt: skip

    def prompts_read(self) -> list[Prompt]:
        """The prompts that are traced."""
        return self.prompts

    def size(self, facts: Facts) -> int:
        """Restored sites of some facts and all samples."""
        asked = {fact.id for fact in facts}
        return self._sites([prompt for prompt in self.prompts if prompt.fact.id in asked])

    def block(self, facts: Facts) -> Part:
        """The table's rows for some facts, and what is left out of them."""
        import pandas as pd

        asked = {fact.id for fact in facts}
        prompts = [prompt for prompt in self.prompts if prompt.fact.id in asked]
        order = {id(prompt): number for number, prompt in enumerate(prompts)}
        found: dict[int, list[tuple[Any, ...]]] = {}
        skipped = [skip for skip in self.unusable if skip.fact_id in asked]
        for batch in self.lens.batches(prompts, self.halving.batch_size, self._facts_at_once):
            rows, empty = self.halving.run(self._batch, batch)
            for key, *row in rows:
                found.setdefault(order[key], []).append(tuple(row))
            skipped += empty
        columns = [*TRACES, *(TRACE_MEASURED if self.measure else ())]
        table = pd.DataFrame([row for number in sorted(found) for row in found[number]], columns=columns)
        return Part(table, pd.DataFrame(skipped, columns=list(Skip._fields)), self.patcher.checks.told())

    def _facts_at_once(self, time: int) -> int:
        """How many facts of so many positions may share a base pass."""
        runs = self.tracing.samples + 1
        fitting = prompts_fitting(self.lens.hooks, self.tracing.restore, time, self.memory) // runs
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
        score = functools.partial(_answer, targets, self.measure)
        base, patched = self.patcher.scores(prompts, spots, score, self.bar.update)
        rows = []
        for fact, sample, place, spot in at:
            prompt, row = batch.prompts[fact], count + fact * samples + sample
            clean, broken = base[fact].tolist(), base[row].tolist()
            for window, layers in enumerate(self.windows):
                now = broken if spot is None else patched[spot, window].tolist()
                names = (prompt.fact.id, self.lens.name, self.tracing.corruption, sample, self.tracing.restore)
                where = (layers[0], len(layers), place.position, place.role, place.piece)
                measured = (clean[2], broken[2], now[2]) if self.measure else ()
                numbers = (*clean[:2], *broken[:2], *now[:2], now[0] - broken[0], *measured)
                rows.append((id(prompt), *names, *where, *numbers))
        self.bar.update(self._sites(batch.prompts) - len(spots) * len(self.windows))
        return rows, skipped

    def _sites(self, prompts: Sequence[Prompt]) -> int:
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
    targets: Int[Tensor, " batch"],
    measure: Measure | None,
    logits: Float[Tensor, "row vocabulary"],
    of: Int[Tensor, " row"],
) -> Float[Tensor, "row number"]:
    """Probability and log-odds of the answer; its measure, if any."""
    own = targets.to(logits.device)[of]
    odds = log_odds(logits, own).double()
    return torch.stack([odds.sigmoid(), odds, *([] if measure is None else [measure(logits, own).double()])], 1)
