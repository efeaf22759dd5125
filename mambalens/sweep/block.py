"""The work of a sweep: rows of its table for a block of facts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mambalens.facts.fact import Facts
from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_facts
from mambalens.model import LoadedModel
from mambalens.runs.table import COLUMNS, ROLE, single
from mambalens.sweep.answers import Asked, Engine
from mambalens.sweep.halving import Halving
from mambalens.sweep.plan import Plan
from mambalens.sweep.prediction import Prediction, kl_divergence
from mambalens.system.memory import budget

if TYPE_CHECKING:
    import pandas as pd


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
    ) -> None:
        self.lens, self.plan, self.bar = lens, plan, bar
        self.halving = Halving(lens.name, batch_size, bar)
        self.windows = plan.check(lens.hooks)
        self.engine = Engine(lens, budget(memory, lens.device), replay)
        prompts, self.unusable = read_facts(facts, lens.tokenizer)
        prompts, empty_target = _split(prompts, plan.target)
        self.unusable += empty_target
        if not prompts:
            raise none_usable(facts, self.unusable)
        self.prompts = {prompt.fact.id: prompt for prompt in prompts}
        groups = list(zip(plan.features, plan.names, strict=True))
        self.combinations = list(product(self.windows, groups, plan.paths))
        roles = len(plan.sources) + ("each" in plan.sources) * (max(len(prompt.ids) for prompt in prompts) - 1)
        self.per_prompt = roles * len(self.combinations)

    def size(self, facts: Facts) -> int:
        """How far the progress bar goes for some facts: their prompts, once for every knockout."""
        return sum(fact.id in self.prompts for fact in facts) * self.per_prompt

    def block(self, facts: Facts) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The table's rows for some facts, and what is left out of them."""
        import pandas as pd

        order = {fact.id: i for i, fact in enumerate(facts)}
        prompts = [self.prompts[fact.id] for fact in facts if fact.id in self.prompts]
        skipped = [skip for skip in self.unusable if skip.fact_id in order]
        rows: list[tuple[Any, ...]] = []
        most = functools.partial(self.engine.prompts_at_once, self.plan.sources)
        for batch in self.lens.batches(prompts, self.halving.batch_size, most):
            found, empty = self.halving.run(self._batch, batch)
            rows += found
            skipped += empty
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        missing = pd.DataFrame(skipped, columns=list(Skip._fields))

        def sort(frame: pd.DataFrame) -> pd.DataFrame:
            """Batches are made by length; tables are in the order of the facts."""
            by_order = frame.fact_id.map(order)
            return frame.iloc[by_order.argsort(kind="stable")].reset_index(drop=True)

        return sort(table), sort(missing)

    def _batch(self, batch: Batch) -> tuple[list[tuple[Any, ...]], list[Skip]]:
        plan, lens = self.plan, self.lens
        targets = [prompt.positions(plan.target) for prompt in batch.prompts]
        sources = list(_sources(plan, batch, targets))
        skipped = [
            Skip(str(prompt.fact.id), role, f"the role {role!r} is empty")
            for role, at, positions in sources
            for prompt, found in zip(batch.prompts, positions, strict=True)
            if not found and at == ROLE
        ]
        knockouts = [
            Asked(layers, features, name, path, source, positions, plan.mixers)
            for layers, (features, name), path in self.combinations
            for source, _, positions in sources
            if any(positions)
        ]
        position_of = {source: position for source, position, _ in sources}
        answers = self.engine.answers(batch, knockouts, targets)
        base = Prediction.of(next(answers)[1], batch.targets)
        probs = base.log_probs.exp()
        rows: dict[int, list[tuple[Any, ...]]] = {}
        for number, logits in answers:
            now = Prediction.of(logits, batch.targets)
            asked = knockouts[number]
            window = (min(asked.layers), len(asked.layers))
            labels = (lens.name, asked.source, position_of[asked.source], plan.target, asked.name, asked.path, *window)
            kl = kl_divergence(base.log_probs, now.log_probs, probs)
            rows[number] = list(_rows(batch, asked.positions, labels, base, now, kl, lens.tokenizer))
            self.bar.update(len(batch.prompts))
        self.bar.update(len(batch.prompts) * (self.per_prompt - len(knockouts)))
        return [row for number in sorted(rows) for row in rows[number]], skipped


def _rows(
    batch: Batch,
    positions: list[list[int]],
    labels: tuple[Any, ...],
    base: Prediction,
    now: Prediction,
    kl: Tensor,
    tokenizer: Any,
) -> Iterator[tuple[Any, ...]]:
    """One knockout's rows of the table, in the order of `COLUMNS`; none for a prompt whose source is empty."""
    change = 100 * (now.prob - base.prob) / base.prob
    broken = now.prob.isnan()  # recorded as it is: no number, no rank, nothing on top
    for i, prompt in enumerate(batch.prompts):
        if positions[i]:
            top, bad = int(now.top[i]), bool(broken[i])
            base_rank = 0 if bool(base.prob[i].isnan()) else int(base.rank[i])
            yield (
                prompt.fact.id, *labels, float(base.prob[i]), float(now.prob[i]), float(change[i]), base_rank,
                0 if bad else int(now.rank[i]), not bad and top == prompt.target_id,
                "" if bad else tokenizer.decode([top]), float(kl[i]),
            )  # fmt: skip


def _split(prompts: list[Prompt], target: str) -> tuple[list[Prompt], list[Skip]]:
    """Prompts that have the target role, and those that do not."""
    usable = [prompt for prompt in prompts if prompt.positions(target)]
    empty = [prompt for prompt in prompts if not prompt.positions(target)]
    return usable, [Skip(str(prompt.fact.id), "", f"the target role {target!r} is empty") for prompt in empty]


def _sources(plan: Plan, batch: Batch, targets: list[list[int]]) -> Iterator[tuple[str, int, list[list[int]]]]:
    """Name, own position (`ROLE` where it has none) and positions in every row, of every source; 'each' is many."""
    for role in plan.sources:
        if role != "each":
            yield role, ROLE, [p.positions(role, t) for p, t in zip(batch.prompts, targets, strict=True)]
            continue
        for position in range(batch.ids.shape[1]):
            yield single(position), position, [[position] if position < len(p.ids) else [] for p in batch.prompts]
