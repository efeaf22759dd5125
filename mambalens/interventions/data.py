"""What patches and traces have found: a table, and means over facts by piece of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd

from mambalens.facts.pieces import PIECES
from mambalens.hooks.errors import MambalensError, choose
from mambalens.interventions.kept_data import KeptData
from mambalens.interventions.table import GROUP, PATCH_METRICS, TRACE_METRICS
from mambalens.runs.config import RunConfig
from mambalens.runs.data import column_of, facts_together, measured, with_unusable
from mambalens.runs.folder import PATCH, TRACE, below_each_other, no_checks
from mambalens.runs.intervals import INTERVALS, mean_intervals
from mambalens.runs.stored import Stored, folders_of, stored_in


class CellData(KeptData):
    """One number for every place of a prompt and window of layers.

    Attributes:
        table: one row for each, of every fact.
        skipped: fact_id, source (the role that is empty; '' where the whole fact was left out) and reason.
        facts: the facts that were asked for, with all their columns; of patches, with the other facts.
        prompts: model, fact_id, the prompt's tokens, the subject's positions.
        configs: what was run, one for each model.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
        checks: how replays were held against the model; columns in `runs.folder.CHECKS`.
    """

    columns: ClassVar[dict[str, str]] = {}
    """Columns that can be summarized and drawn, but for the measure; the first where nothing is said."""
    apart: ClassVar[tuple[str, ...]] = ()
    """Further columns that a mean keeps apart."""

    def __init__(
        self,
        table: pd.DataFrame,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        prompts: pd.DataFrame,
        configs: list[RunConfig],
        unfinished: int = 0,
        checks: pd.DataFrame | None = None,
    ) -> None:
        self.table, self.skipped, self.facts, self.prompts = table, skipped, facts, prompts
        self.configs, self.unfinished = configs, unfinished
        self.checks = no_checks() if checks is None else checks

    @classmethod
    def of(cls, data: CellData) -> Self:
        """The same with the faces of this class."""
        return cls(data.table, data.skipped, data.facts, data.prompts, data.configs, data.unfinished, data.checks)

    def __repr__(self) -> str:
        models, facts = ", ".join(self.table.model.unique()), self.table.fact_id.nunique()
        left = f"; {self.unfinished} block{'s' * (self.unfinished > 1)} of facts to come" if self.unfinished else ""
        return f"<{type(self).__name__}: {models}; {facts} facts, {len(self.table)} rows{left}>"

    @property
    def n_layers(self) -> dict[str, int]:
        """Layers of each model."""
        return {config.model: config.n_layers for config in self.configs}

    @property
    def metrics(self) -> dict[str, str]:
        """Columns that can be summarized and drawn, and what axes call them: those of the table, and the measure.

        Results that were put together have the column 'measure' where all have the same.
        """
        return self.columns | measured(self.configs, self.table.columns)

    def where(self, **values: Any) -> Self:
        """The part whose columns have these values, of the table or of the facts; a list means any of them.

        Raises:
            MambalensError: for a column that neither has, or if nothing is left.
        """
        table, facts = self.table, self.facts.drop_duplicates("fact_id")
        for column, value in values.items():
            wanted = {str(v) for v in (value if isinstance(value, list | tuple | set) else [value])}
            table = table[column_of(column, table, facts).astype(str).isin(wanted)]
        if not len(table):
            raise MambalensError(f"No row of the table has {', '.join(f'{k}={v!r}' for k, v in values.items())}.")
        return self._with(table.reset_index(drop=True))

    def _with(self, table: pd.DataFrame) -> Self:
        """The same with other rows."""
        left = set(table.model)
        configs = [config for config in self.configs if config.model in left]
        checks = self.checks[self.checks.model.isin(left)].reset_index(drop=True)
        return type(self)(table, self.skipped, self.facts, self.prompts, configs, self.unfinished, checks)

    def save(self, folder: str | Path) -> Path:
        """Write tables as parquet and what was run as JSON, in the format of a run's folder (`mambalens.runs.folder`).

        Returns:
            The folder.

        Raises:
            MambalensError: if it cannot be written, or holds a run of its own.
        """
        stored = Stored([self.table], self.skipped, self.facts, self.prompts, self.configs, self.checks)
        return stored.save(folder, self.kind)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run's folder, also while it is still being filled, or what `save` wrote.

        A folder with such folders in it gives them all as one.
        """
        found = folders_of(folder, cls.kind)
        if found != [Path(folder)]:
            return cls.concat([cls.load(path) for path in found])
        kept = stored_in(found[0], cls.kind)
        return cls.from_stored(kept._replace(skipped=with_unusable(kept.skipped, kept.configs)))

    @classmethod
    def from_stored(cls, stored: Stored) -> Self:
        """The result that a folder holds, or that would be in one."""
        table = below_each_other(list(stored.tables))
        return cls(
            table, stored.skipped, stored.facts, stored.prompts, stored.configs, stored.unfinished, stored.checks
        )

    def check_metric(self, metric: str | None) -> str:
        """The metric itself, or the first one.

        Raises:
            MambalensError: if there is none of that name.
        """
        name = metric or next(iter(self.metrics))
        if name not in self.metrics:
            raise MambalensError(f"metric={metric!r} is not a column to summarize: {choose(name, self.metrics)}.")
        return name

    def per_fact(self, metric: str | None = None) -> pd.DataFrame:
        """Means within facts: over the positions of a piece, and over samples.

        Returns:
            The grouping columns, fact_id and the metric.
        """
        name = self.check_metric(metric)
        keys = [*GROUP, *self.apart, "fact_id"]
        return self.table.groupby(keys, sort=False, dropna=False)[name].mean().reset_index()

    def summary(self, metric: str | None = None, interval: str = "bootstrap", seed: int = 0) -> pd.DataFrame:
        """Means over facts with 95 % intervals, one row per model, site, window and piece (or role).

        Args:
            metric: a column of `metrics`; the first by default.
            interval: 'bootstrap' (percentiles of 2,000 resamples of the facts, seeded), 't' (Student's t) or 'sem' (one
                standard error to each side).
            seed: of the bootstrap.

        Returns:
            The grouping columns, n (facts that have the piece), mean, low, high; low and high are NaN for one fact.
            Pieces come in the order in which they stand in a prompt.
        """
        if interval not in INTERVALS:
            raise MambalensError(f"interval={interval!r} is not an interval: {choose(interval, INTERVALS)}.")
        name = self.check_metric(metric)
        found, groups = [], []
        keys = [*GROUP, *self.apart]
        for key, group in self.per_fact(name).groupby(keys, sort=False, dropna=False):
            values = group[name].to_numpy(float)
            found.append(key)
            groups.append(values[~np.isnan(values)])
        intervals = mean_intervals(groups, interval, seed)
        rows = [(*key, len(group), *three) for key, group, three in zip(found, groups, intervals, strict=True)]
        table = pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high"])
        order = {piece: number for number, piece in enumerate(PIECES)}
        rank = table.piece.map(order).fillna(len(order))
        keep = [name for name in keys if name not in ("piece", "window_start")]
        table = table.assign(_rank=rank).sort_values([*keep, "_rank", "window_start"], kind="stable")
        return table.drop(columns="_rank").reset_index(drop=True)

    def peak(self, metric: str | None = None) -> pd.DataFrame:
        """The window with the largest mean, for every model, site and piece: rows of `summary()`.

        Behind the last layer the residual stream is the answer itself, so that this place is left out where there are
        others.
        """
        table = self.summary(metric)
        keys = [name for name in (*GROUP, *self.apart) if name != "window_start"]
        known = table[table["mean"].notna()]
        inside = known.window_start < known.model.map(self.n_layers)
        known = known[inside] if inside.any() else known
        return known.loc[known.groupby(keys, sort=False)["mean"].idxmax()].reset_index(drop=True)

    def tokens(self, fact_id: str) -> tuple[list[str], list[int]]:
        """A fact's tokens, as texts, and its subject's positions.

        Raises:
            MambalensError: if there is no such fact.
        """
        found = self.prompts[self.prompts.fact_id == fact_id]
        if not len(found):
            raise MambalensError(f"There is no fact {fact_id!r}: {choose(fact_id, self.prompts.fact_id)}.")
        return list(found.tokens.iloc[0]), [int(position) for position in found.subject.iloc[0]]

    @classmethod
    def concat(cls, parts: Sequence[CellData]) -> Self:
        """Several results as one, for comparing models or sites.

        Raises:
            MambalensError: if there is none, or different facts have the same id.
        """
        if not parts:
            raise MambalensError("There is no result to put together.")
        table, skipped, prompts, facts, checks = (
            below_each_other([getattr(part, name) for part in parts])
            for name in ("table", "skipped", "prompts", "facts", "checks")
        )
        facts_together([part.facts for part in parts])
        prompts = prompts.drop_duplicates(["model", "fact_id"], ignore_index=True)
        facts = facts.drop_duplicates([name for name in ("fact_id", "other_id") if name in facts], ignore_index=True)
        configs = [config for part in parts for config in part.configs]
        skipped = skipped.drop_duplicates(ignore_index=True)
        return cls(table, skipped, facts, prompts, configs, sum(part.unfinished for part in parts), checks)


class PatchData(CellData):
    """What patches come to; columns of the table in `interventions.table.PATCHES`."""

    kind: ClassVar[str] = PATCH
    columns: ClassVar[dict[str, str]] = PATCH_METRICS


class TraceData(CellData):
    """What restored sites come to; columns of the table in `interventions.table.TRACES`."""

    kind: ClassVar[str] = TRACE
    columns: ClassVar[dict[str, str]] = TRACE_METRICS
    apart: ClassVar[tuple[str, ...]] = ("corruption",)

    def spread(self, metric: str | None = None) -> pd.DataFrame:
        """How far samples of the noise differ: the standard deviation between samples of the mean over facts.

        Returns:
            The grouping columns, samples, mean and sd; NaN for a single sample.
        """
        name = self.check_metric(metric)
        keys = [*GROUP, *self.apart]
        one = self.table.groupby([*keys, "sample"], sort=False)[name].mean().reset_index()
        return one.groupby(keys, sort=False)[name].agg(samples="count", mean="mean", sd="std").reset_index()

    def totals(self) -> pd.DataFrame:
        """The total effect of the corruption on every fact: the clean run's probability less the corrupted one's.

        Returns:
            model, fact_id, corruption, samples, clean_prob, corrupted_prob (mean over samples), total_effect.
        """
        keys = ["model", "fact_id", "corruption"]
        one = self.table.drop_duplicates([*keys, "sample"])
        found = one.groupby(keys, sort=False).agg(
            samples=("sample", "count"), clean_prob=("clean_prob", "mean"), corrupted_prob=("corrupted_prob", "mean")
        )
        return found.assign(total_effect=found.clean_prob - found.corrupted_prob).reset_index()
