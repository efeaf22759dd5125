"""The work of a sweep: rows of its table for a block of facts."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.measures import measure_of
from mambalens.model import LoadedModel
from mambalens.runs.table import COLUMNS, MEASURED, ROLE, single
from mambalens.sweep.ablation import Asked as AskedAblation
from mambalens.sweep.ablation import ablation_of
from mambalens.sweep.answers import Answerer, Asked
from mambalens.sweep.halving import Halving
from mambalens.sweep.plan import Plan
from mambalens.sweep.prediction import Prediction, change, kl_divergence
from mambalens.system.memory import budget

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.runs.folder import Part


class Work:
    """Everything a sweep needs to compute a block, looked up and checked once."""

    def __init__(
        self,
        lens: LoadedModel,
        facts: Facts,
        plan: Plan,
        batch_size: int | None,
        memory: int | str | None,
        replay: bool,
        bar: Any,
        asked: AskedAblation | None = None,
    ) -> None:
        self.lens, self.plan, self.bar = lens, plan, bar
        self.halving = Halving(lens.name, batch_size, bar)
        self.windows = plan.check(lens.hooks)
        self.measure = None if plan.measure is None else measure_of(plan.measure)
        prompts, self.unusable = read_facts(facts, lens.tokenizer)
        prompts, empty_target = _split(prompts, plan.target)
        self.unusable += empty_target
        if not prompts:
            raise none_usable(facts, self.unusable)
        asked = asked or AskedAblation.of(plan.ablation, keys=plan.keys)
        self.ablation, without = ablation_of(lens, asked, facts, prompts)
        self.unusable += without
        left_out = {skip.fact_id for skip in without}
        prompts = [prompt for prompt in prompts if str(prompt.fact.id) not in left_out]
        self.answerer = Answerer(lens, budget(memory, lens.device), replay, self.ablation)
        self.prompts = {prompt.fact.id: prompt for prompt in prompts}
        groups = list(zip(plan.features, plan.names, strict=True))
        self.combinations = [
            (
                lens.hooks.resolve(layers, features, path, plan.mixers, somewhere=True),
                (name, path, plan.ablation_name, min(layers), len(layers)),
            )
            for layers, (features, name), path in product(self.windows, groups, plan.paths)
        ]
        """Every window, group of features and path, looked up, and what the table calls it."""
        roles = len(plan.sources) + ("each" in plan.sources) * (max(len(prompt.ids) for prompt in prompts) - 1)
        self.per_prompt = roles * len(self.combinations)

    def size(self, facts: Facts) -> int:
        """How far the progress bar goes for some facts: their prompts, once for every knockout."""
        return sum(fact.id in self.prompts for fact in facts) * self.per_prompt

    def block(self, facts: Facts) -> Part:
        """The table's rows for some facts, and what is left out of them."""
        import pandas as pd

        from mambalens.runs.folder import Part

        order = {fact.id: i for i, fact in enumerate(facts)}
        prompts = [self.prompts[fact.id] for fact in facts if fact.id in self.prompts]
        skipped = [skip for skip in self.unusable if skip.fact_id in order]
        rows: list[tuple[Any, ...]] = []
        most = functools.partial(self.answerer.prompts_at_once, self.plan.sources)
        for batch in self.lens.batches(prompts, self.halving.batch_size, most):
            found, empty = self.halving.run(self._batch, batch)
            rows += found
            skipped += empty
        table = pd.DataFrame(rows, columns=[*COLUMNS, *(MEASURED if self.measure else ())])
        missing = pd.DataFrame(skipped, columns=list(Skip._fields))

        def sort(frame: pd.DataFrame) -> pd.DataFrame:
            """Batches are made by length; tables are in the order of the facts."""
            by_order = frame.fact_id.map(order)
            return frame.iloc[by_order.argsort(kind="stable")].reset_index(drop=True)

        return Part(sort(table), sort(missing), self.answerer.checks.told())

    def _batch(self, batch: Batch) -> tuple[list[tuple[Any, ...]], list[Skip]]:
        plan, lens = self.plan, self.lens
        targets = [prompt.positions(plan.target) for prompt in batch.prompts]
        sources = list(_sources(plan, batch, targets))
        skipped = [
            Skip(str(prompt.fact.id), source.name, f"the role {source.name!r} is empty")
            for source in sources
            for prompt, found in zip(batch.prompts, source.positions, strict=True)
            if not found and source.at == ROLE
        ]
        sources = [source for source in sources if any(source.positions)]
        knockouts, labels = [], []
        for (cutting, label), (number, source) in product(self.combinations, enumerate(sources)):
            knockouts.append(Asked(cutting, number))
            labels.append((lens.name, source.name, source.at, plan.target, *label))
        answers = self.answerer.answers(batch, knockouts, [source.positions for source in sources], targets)
        uncut = next(answers)[1]
        scored = batch.targets.to(uncut.device, non_blocking=True)
        base = Prediction.of(uncut, scored)
        probs = base.log_probs.exp()

        def numbers(now: Prediction, logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "number batch"]:
            """What the table says of a knockout, as float64, which holds ranks and tokens exactly."""
            found = [now.prob, now.rank, now.top, kl_divergence(base.log_probs, now.log_probs, probs)]
            if self.measure is not None:
                found.append(self.measure(logits, scored))
            return torch.stack([value.double() for value in found])

        order, found = [], [numbers(base, uncut)]
        for number, logits in answers:
            order.append(number)
            found.append(numbers(Prediction.of(logits, scored), logits))
            self.bar.update(len(batch.prompts))
        # Together: to wait for the device at every knockout would take longer than the knockouts.
        before, *after = torch.stack(found).cpu().unbind()
        rows = {
            number: list(
                _rows(batch, sources[knockouts[number].source].positions, labels[number], before, now, lens.tokenizer)
            )
            for number, now in zip(order, after, strict=True)
        }
        self.bar.update(len(batch.prompts) * (self.per_prompt - len(knockouts)))
        return [row for number in sorted(rows) for row in rows[number]], skipped


def _rows(
    batch: Batch,
    positions: list[list[int]],
    labels: tuple[Any, ...],
    base: Float[Tensor, "number batch"],
    now: Float[Tensor, "number batch"],
    tokenizer: Any,
) -> Iterator[tuple[Any, ...]]:
    """One knockout's rows of the table, in the order of its columns; none for a prompt whose source is empty."""
    changed = change(base[0], now[0]).tolist()
    before, after = base.T.tolist(), now.T.tolist()
    for i, prompt in enumerate(batch.prompts):
        if positions[i]:
            base_prob, base_rank, _, _, *measured = before[i]
            prob, rank, top, kl, *then = after[i]
            bad = math.isnan(prob)  # recorded as it is: no number, no rank, nothing on top
            top_token = "" if bad else tokenizer.decode([int(top)])
            yield (
                prompt.fact.id, *labels, base_prob, prob, changed[i], 0 if math.isnan(base_prob) else int(base_rank),
                0 if bad else int(rank), not bad and top == prompt.target_id, top_token, kl, *measured, *then,
            )  # fmt: skip


def _split(prompts: list[Prompt], target: str) -> tuple[list[Prompt], list[Skip]]:
    """Prompts that have the target role, and those that do not."""
    usable = [prompt for prompt in prompts if prompt.positions(target)]
    empty = [prompt for prompt in prompts if not prompt.positions(target)]
    return usable, [Skip(str(prompt.fact.id), "", f"the target role {target!r} is empty") for prompt in empty]


class _Source(NamedTuple):
    """What a batch's knockouts may block."""

    name: str
    at: int
    """Its own position, or `ROLE` where it is a role."""
    positions: list[list[int]]
    """Its positions in every prompt."""


def _sources(plan: Plan, batch: Batch, targets: list[list[int]]) -> Iterator[_Source]:
    """Every source; 'each' becomes one for every position."""
    for role in plan.sources:
        if role != "each":
            yield _Source(role, ROLE, [p.positions(role, t) for p, t in zip(batch.prompts, targets, strict=True)])
            continue
        for position in range(batch.ids.shape[1]):
            positions = [[position] if position < len(p.ids) else [] for p in batch.prompts]
            yield _Source(single(position), position, positions)
