"""What a sweep found: the table, what was left out, summaries with intervals, and the folder they are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from mambalens.hooks.errors import MambalensError, choose
from mambalens.runs.config import RunConfig
from mambalens.runs.folder import PROMPT, SKIPPED, SWEEP, below_each_other, no_checks
from mambalens.runs.intervals import INTERVALS, mean_intervals
from mambalens.runs.stored import Stored, folders_of, stored_in
from mambalens.runs.table import GROUP, MEASURES, METRICS, with_all_columns


class SweepData:
    """What a finished sweep found, or several put together: tables, and what is reckoned from them.

    Attributes:
        table: one row per fact, source, features, path and window; columns in `runs.table.COLUMNS`.
        skipped: fact_id, source ('' where the whole fact was left out) and reason.
        facts: the facts that were asked for, with all their columns.
        configs: what was run, one for each model.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
        prompts: one row per model and fact: the prompt's tokens, as texts, and the subject's positions.
        checks: how replays were held against the model; columns in `runs.folder.CHECKS`.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        configs: list[RunConfig],
        unfinished: int = 0,
        prompts: pd.DataFrame | None = None,
        checks: pd.DataFrame | None = None,
    ) -> None:
        self.table, self.skipped, self.facts, self.configs = table, skipped, facts, configs
        self.unfinished = unfinished
        self.prompts = pd.DataFrame(columns=list(PROMPT)) if prompts is None else prompts
        self.checks = no_checks() if checks is None else checks

    def __repr__(self) -> str:
        facts = self.table.fact_id.nunique()
        left = f"; {self.unfinished} block{'s' * (self.unfinished > 1)} of facts to come" if self.unfinished else ""
        return f"<SweepResult: {', '.join(self.models)}; {facts} facts, {len(self.table)} rows{left}>"

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(dict.fromkeys(config.model for config in self.configs))

    @property
    def n_layers(self) -> dict[str, int]:
        """Layers of each model."""
        return {config.model: config.n_layers for config in self.configs}

    @property
    def metrics(self) -> dict[str, str]:
        """Columns that can be summarized and drawn, and what axes call them: `METRICS`, and the sweep's measure.

        Sweeps that were put together have the column 'measure' where all have the same.
        """
        return METRICS | measured(self.configs, self.table)

    @classmethod
    def concat(cls, results: Sequence[SweepData]) -> Self:
        """Several results as one, for comparing models."""
        if not results:
            raise MambalensError("There is no result to put together.")
        tables = [result.table for result in results]
        skipped = [result.skipped for result in results]
        facts = facts_together([result.facts for result in results])
        configs = [config for result in results for config in result.configs]
        unfinished = sum(result.unfinished for result in results)
        prompts = pd.concat([result.prompts for result in results], ignore_index=True)
        prompts = prompts.drop_duplicates(["model", "fact_id"], ignore_index=True)
        table, missing = pd.concat(tables, ignore_index=True), pd.concat(skipped).drop_duplicates(ignore_index=True)
        checks = below_each_other([result.checks for result in results])
        return cls(table, missing, facts, configs, unfinished, prompts, checks)

    def where(self, **values: Any) -> Self:
        """The part of the sweep whose columns have these values; a list means any of them.

        Raises:
            MambalensError: for a column that neither the table nor the facts have, or if nothing is left.
        """
        table = self.table
        for column, value in values.items():
            wanted = {str(v) for v in (value if isinstance(value, list | tuple | set) else [value])}
            table = table[self.column(column, table).astype(str).isin(wanted)]
        if not len(table):
            raise MambalensError(f"No row of the sweep has {', '.join(f'{k}={v!r}' for k, v in values.items())}.")
        configs = [config for config in self.configs if config.model in set(table.model)]
        return self._with(table, configs)

    def roles(self) -> Self:
        """The part without sources of `each`: what is a mean over facts, where positions of prompts are not."""
        table = self.table
        return self._with(table[table.position < 0], self.configs)

    def _with(self, table: pd.DataFrame, configs: list[RunConfig]) -> Self:
        """The same with other rows."""
        table = table.reset_index(drop=True)
        checks = self.checks[self.checks.model.isin([config.model for config in configs])].reset_index(drop=True)
        return type(self)(table, self.skipped, self.facts, configs, self.unfinished, self.prompts, checks)

    def column(self, name: str, table: pd.DataFrame | None = None) -> pd.Series:
        """A column of the table, or of the facts, for every row of the table."""
        return column_of(name, self.table if table is None else table, self.facts)

    def summary(
        self, interval: str = "bootstrap", metric: str = "change_pct", by: Sequence[str] = (), seed: int = 0
    ) -> pd.DataFrame:
        """Means over facts with 95 % intervals, one row per model, source, features, path and window.

        Args:
            interval: 'bootstrap' (percentiles of 2,000 resamples of the facts, seeded), 't' (Student's t) or 'sem' (one
                standard error to each side).
            metric: a column of `METRICS`, or 'measure' where the sweep has one.
            by: columns of the facts to split by, such as 'wording' or 'relation'.

        Returns:
            The grouping columns, n (facts), mean, low, high; low and high are NaN for a single fact.
        """
        if interval not in INTERVALS:
            raise MambalensError(f"interval={interval!r} is not an interval: {choose(interval, INTERVALS)}.")
        if metric not in self.metrics:
            raise MambalensError(f"metric={metric!r} is not a column to summarize: {choose(metric, self.metrics)}.")
        table = self.table.assign(**{name: self.column(name) for name in by})
        keys = [*by, *GROUP]
        found, groups = [], []
        for key, group in table.groupby(keys, sort=False, dropna=False):
            values = group[metric].to_numpy(float)
            found.append(key)
            groups.append(values[~np.isnan(values)])
        intervals = mean_intervals(groups, interval, seed)
        rows = [(*key, len(group), *three) for key, group, three in zip(found, groups, intervals, strict=True)]
        return pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high"])

    def dearest(self) -> pd.DataFrame:
        """The window that costs the target most probability, for every source, group of features and path.

        Returns:
            The lowest rows of `summary()`, in the order of the sweep.
        """
        keys = [name for name in GROUP if name != "window_start"]
        return dearest_rows(self.summary(), keys).reset_index(drop=True)

    def save(self, folder: str | Path) -> Path:
        """Write tables as parquet and what was run as JSON, in the format of a run's folder (`mambalens.runs.folder`).

        Returns:
            The folder.

        Raises:
            MambalensError: if it cannot be written, or holds a run of its own.
        """
        stored = Stored([self.table], self.skipped, self.facts, self.prompts, self.configs, self.checks)
        return stored.save(folder, SWEEP)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run's folder, also while it is still being filled, or what `save` wrote.

        A folder with such folders in it gives them all as one. Parts that are damaged are left out with a warning;
        `unfinished` says how many blocks are missing.
        """
        found = folders_of(folder, SWEEP)
        if found != [Path(folder)]:
            return cls.concat([cls.load(path) for path in found])
        stored = stored_in(found[0], SWEEP)
        table = pd.concat([with_all_columns(table) for table in stored.tables], ignore_index=True)
        skipped = with_unusable(stored.skipped, stored.configs)
        return cls(table, skipped, stored.facts, stored.configs, stored.unfinished, stored.prompts, stored.checks)


def measured(configs: Sequence[RunConfig], table: pd.DataFrame) -> dict[str, str]:
    """The column of a measure that all runs of a table have, and what axes call it; nothing where they have none."""
    names = {config.measure for config in configs}
    if len(names) != 1 or "" in names or "measure" not in table:
        return {}
    (name,) = names
    return {"measure": MEASURES.get(name, name)}


def column_of(name: str, table: pd.DataFrame, facts: pd.DataFrame) -> pd.Series:
    """A column of a table, or of its facts, for every row of the table.

    Raises:
        MambalensError: if neither has it.
    """
    if name in table.columns:
        return table[name]
    if name not in facts.columns:
        raise MambalensError(f"{name!r} is no column of the facts: {choose(name, facts.columns)}.")
    return table.fact_id.map(facts.set_index("fact_id")[name])


def facts_together(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The facts of several results, each once.

    Raises:
        MambalensError: if different facts have the same id.
    """
    facts = pd.concat(tables, ignore_index=True)
    asked = facts[["fact_id", "prompt", "target"]].drop_duplicates()
    other = asked.fact_id[asked.fact_id.duplicated()]
    if len(other):
        raise MambalensError(
            f"Different facts have the id {other.iloc[0]!r} in these results: give the facts ids of their own."
        )
    return facts.drop_duplicates("fact_id", ignore_index=True)


def dearest_rows(rows: pd.DataFrame, keys: Sequence[str], value: str = "mean") -> pd.DataFrame:
    """Of the rows that have the same in `keys`, the one that costs most: the first with the lowest value.

    Args:
        rows: a summary, or a sweep's table.
        keys: columns that are kept apart.
        value: column of the change. NaN counts as the highest.

    Returns:
        One row for every value of the keys, in their order in `rows`, under its old index.
    """
    known = rows.assign(**{value: rows[value].fillna(np.inf)})
    return rows.loc[known.groupby(list(keys), sort=False)[value].idxmin().to_list()]


def with_unusable(skipped: pd.DataFrame, configs: Sequence[RunConfig]) -> pd.DataFrame:
    """What was left out, and the facts that could not be asked when known ones were chosen."""
    rows = [
        (fact_id, "", reason)
        for config in configs
        for answered in config.answered
        for fact_id, reason in answered.unusable
    ]
    return pd.concat([pd.DataFrame(rows, columns=list(SKIPPED)), skipped]).drop_duplicates(ignore_index=True)
