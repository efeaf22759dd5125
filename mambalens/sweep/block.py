"""The work of a sweep: rows of its table for a block of facts, and what defines them."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambalens.facts.fact import Facts
from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_facts
from mambalens.model import LoadedModel
from mambalens.runs.config import RunConfig
from mambalens.runs.table import COLUMNS
from mambalens.sweep.answers import Asked, Engine
from mambalens.sweep.plan import Plan
from mambalens.sweep.prediction import Prediction, kl_divergence
from mambalens.system.events import tell
from mambalens.system.memory import budget, exhausted

if TYPE_CHECKING:
    import pandas as pd


DEFINING = (
    "model",
    "n_layers",
    "facts",
    "n_facts",
    "sources",
    "target",
    "window",
    "features",
    "paths",
    "mixers",
    "dtype",
)
"""Keys of a run's configuration that define it."""


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
        self.lens, self.facts, self.plan, self.batch_size, self.bar = lens, facts, plan, batch_size, bar
        self.halved = False
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
        bar.reset(total=len(prompts) * self.per_prompt)

    def pass_over(self, facts: Facts) -> None:
        """A block is finished without this process's doing."""
        self.bar.update(sum(fact.id in self.prompts for fact in facts) * self.per_prompt)

    def block(self, facts: Facts) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The table's rows for some facts, and what is left out of them."""
        import pandas as pd

        order = {fact.id: i for i, fact in enumerate(facts)}
        prompts = [self.prompts[fact.id] for fact in facts if fact.id in self.prompts]
        skipped = [skip for skip in self.unusable if skip.fact_id in order]
        rows: list[tuple[Any, ...]] = []
        most = functools.partial(self.engine.prompts_at_once, self.plan.sources)
        for batch in self.lens.batches(prompts, self.batch_size, most):
            found, empty = self._halving(batch)
            rows += found
            skipped += empty
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        missing = pd.DataFrame(skipped, columns=list(Skip._fields))

        def sort(frame: pd.DataFrame) -> pd.DataFrame:
            """Batches are made by length; tables are in the order of the facts."""
            by_order = frame.fact_id.map(order)
            return frame.iloc[by_order.argsort(kind="stable")].reset_index(drop=True)

        return sort(table), sort(missing)

    def _halving(self, batch: Batch) -> tuple[list[tuple[Any, ...]], list[Skip]]:
        """A batch; where it does not fit the memory after all, its halves."""
        before = self.bar.n
        try:
            return self._batch(batch)
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error) or len(batch.prompts) == 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self.halved:
            size = len(batch.prompts)
            warnings.warn(
                f"A batch of {size} prompts does not fit the memory: going on with smaller ones.", stacklevel=2
            )
        self.halved = True
        tell("memory full", model=self.lens.name, prompts=len(batch.prompts))
        self.bar.update(before - self.bar.n)
        half = (len(batch.prompts) + 1) // 2
        self.batch_size = half
        parts = [batch.part(range(half)), batch.part(range(half, len(batch.prompts)))]
        found = [self._halving(part.trimmed()) for part in parts]
        return [row for rows, _ in found for row in rows], [skip for _, skips in found for skip in skips]

    def _batch(self, batch: Batch) -> tuple[list[tuple[Any, ...]], list[Skip]]:
        plan, lens = self.plan, self.lens
        targets = [prompt.positions(plan.target) for prompt in batch.prompts]
        sources = list(_sources(plan, batch, targets))
        skipped = [
            Skip(str(prompt.fact.id), role, f"the role {role!r} is empty")
            for role, positions in sources
            for prompt, found in zip(batch.prompts, positions, strict=True)
            if not found and not role.startswith("each:")
        ]
        knockouts = [
            Asked(layers, features, name, path, source, positions, plan.mixers)
            for layers, (features, name), path in self.combinations
            for source, positions in sources
            if any(positions)
        ]
        answers = self.engine.answers(batch, knockouts, targets)
        base = Prediction.of(next(answers)[1], batch.targets)
        probs = base.log_probs.exp()
        rows: dict[int, list[tuple[Any, ...]]] = {}
        for number, logits in answers:
            now = Prediction.of(logits, batch.targets)
            asked = knockouts[number]
            window = (min(asked.layers), len(asked.layers))
            labels = (lens.name, asked.source, plan.target, asked.name, asked.path, *window)
            kl = kl_divergence(base.log_probs, now.log_probs, probs)
            rows[number] = list(_rows(batch, asked.positions, labels, base, now, kl, lens.tokenizer))
            self.bar.update(len(batch.prompts))
        self.bar.update(len(batch.prompts) * (self.per_prompt - len(knockouts)))
        return [row for number in sorted(rows) for row in rows[number]], skipped

    @property
    def tokens(self) -> pd.DataFrame:
        """The prompts as the model reads them, with the columns of `folder.PROMPT`."""
        import pandas as pd

        from mambalens.runs.folder import PROMPT

        rows = [
            (self.lens.name, fact_id, prompt.tokens, prompt.positions("subject"))
            for fact_id, prompt in self.prompts.items()
        ]
        return pd.DataFrame(rows, columns=list(PROMPT))

    @property
    def config(self) -> RunConfig:
        """What was run."""
        lens, plan = self.lens, self.plan
        return RunConfig(
            model=lens.name,
            n_layers=lens.n_layers,
            kinds=tuple(lens.hooks.kinds),
            facts=self.facts.name,
            n_facts=len(self.facts),
            answered=self.facts.answered,
            sources=tuple(plan.sources),
            target=plan.target,
            window=plan.window if isinstance(plan.window, int) else tuple(map(tuple, self.windows)),
            features=plan.names,
            paths=tuple(plan.paths),
            mixers=plan.mixers,
            dtype=str(lens.model.dtype).removeprefix("torch."),
        )

    @property
    def definition(self) -> dict[str, Any]:
        """Everything that the numbers depend on."""
        config, model = self.config.to_json(), self.lens.model
        masks = [
            None if isinstance(features, str) else [
                [mixer.layer, mixer.kind, None if mask is None else mask.nonzero().flatten().tolist()]
                for layers in self.windows
                for mixer, mask in self.lens.hooks.feature_masks(features, layers, self.plan.mixers).items()
            ]
            for features in self.plan.features
        ]  # fmt: skip
        weights = [
            (name, list(value.shape), str(value.dtype), _first_numbers(value))
            for name, value in model.state_dict().items()
        ]
        asked = [(f.id, f.prompt, f.subject, f.target) for f in self.facts]
        return {key: config[key] for key in DEFINING} | {
            "windows": _digest(self.windows),
            "feature masks": _digest(masks),
            "model config": _digest(model.config.to_json_string()),
            "weights": _digest(sorted(weights)),
            "revision": getattr(model.config, "_commit_hash", None),
            "facts digest": _digest(asked),
        }


def _first_numbers(value: Tensor) -> list[float]:
    """A few of a weight's numbers: another checkpoint of the same shape has others. None where they lie on disk."""
    return [] if value.device.type == "meta" else value.flatten()[:8].double().tolist()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


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


def _sources(plan: Plan, batch: Batch, targets: list[list[int]]) -> Iterator[tuple[str, list[list[int]]]]:
    """Name and positions for every row, of every source; 'each' becomes one source for every position."""
    for role in plan.sources:
        if role != "each":
            yield role, [p.positions(role, t) for p, t in zip(batch.prompts, targets, strict=True)]
            continue
        for position in range(batch.ids.shape[1]):
            yield f"each:{position}", [[position] if position < len(p.ids) else [] for p in batch.prompts]
