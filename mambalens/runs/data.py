"""What a sweep found: the table, what was left out, summaries with intervals, and the folder they are kept in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Bool

from mambalens.hooks.errors import MambalensError, choose
from mambalens.runs.config import RunConfig
from mambalens.runs.folder import PROMPT, SKIPPED, SWEEP, below_each_other, no_checks
from mambalens.runs.intervals import INTERVALS, Draws, mean_intervals
from mambalens.runs.rows import HELD, Groups, Held, Kept, Rows
from mambalens.runs.stored import Stored, folders_of, rows_in, stored_in
from mambalens.runs.table import GROUP, MEASURES, METRICS, with_all_columns
from mambalens.system.progress import tqdm


class SweepData:
    """What a finished sweep found, or several put together: tables, and what is reckoned from them.

    Attributes:
        rows: the rows of the table; those of a long one (`runs.rows.HELD`) stay in their folder, and columns of them
            are read where they are asked for.
        skipped: fact_id, source ('' where the whole fact was left out) and reason.
        facts: the facts that were asked for, with all their columns.
        configs: what was run, one for each model.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
        prompts: one row per model and fact: the prompt's tokens, as texts, and the subject's positions.
        checks: how replays were held against the model; columns in `runs.folder.CHECKS`.
    """

    def __init__(
        self,
        table: pd.DataFrame | Rows,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        configs: list[RunConfig],
        unfinished: int = 0,
        prompts: pd.DataFrame | None = None,
        checks: pd.DataFrame | None = None,
    ) -> None:
        self.rows = table if isinstance(table, Rows) else Rows([Held(table)])
        self.skipped, self.facts, self.configs = skipped, facts, configs
        self.unfinished = unfinished
        self.prompts = pd.DataFrame(columns=list(PROMPT)) if prompts is None else prompts
        self.checks = no_checks() if checks is None else checks

    def __repr__(self) -> str:
        facts = len(self.rows.first(["fact_id"]))
        left = f"; {self.unfinished} block{'s' * (self.unfinished > 1)} of facts to come" if self.unfinished else ""
        return f"<SweepResult: {', '.join(self.models)}; {facts} facts, {len(self.rows)} rows{left}>"

    @property
    def table(self) -> pd.DataFrame:
        """One row per fact, source, features, path and window; columns in `runs.table.COLUMNS`.

        Raises:
            MambalensError: if it has more rows than the memory that is free can hold.
        """
        return self.rows.frame()

    @table.setter
    def table(self, table: pd.DataFrame) -> None:
        self.rows = Rows([Held(table)])

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
        return METRICS | measured(self.configs, self.rows.columns)

    @classmethod
    def concat(cls, results: Sequence[SweepData]) -> Self:
        """Several results as one, for comparing models."""
        if not results:
            raise MambalensError("There is no result to put together.")
        skipped = [result.skipped for result in results]
        facts = facts_together([result.facts for result in results])
        configs = [config for result in results for config in result.configs]
        unfinished = sum(result.unfinished for result in results)
        prompts = pd.concat([result.prompts for result in results], ignore_index=True)
        prompts = prompts.drop_duplicates(["model", "fact_id"], ignore_index=True)
        missing = pd.concat(skipped).drop_duplicates(ignore_index=True)
        checks = below_each_other([result.checks for result in results])
        return cls(_together([result.rows for result in results]), missing, facts, configs, unfinished, prompts, checks)

    def where(self, **values: Any) -> Self:
        """The part of the sweep whose columns have these values; a list means any of them.

        Raises:
            MambalensError: for a column that neither the table nor the facts have, or if nothing is left.
        """
        rows = self.rows
        for column, value in values.items():
            wanted = {str(v) for v in (value if isinstance(value, list | tuple | set) else [value])}
            rows = rows.only(_is_any_of(piece, wanted) for (piece,) in self._taken([column], rows))
        if not len(rows):
            raise MambalensError(f"No row of the sweep has {', '.join(f'{k}={v!r}' for k, v in values.items())}.")
        left = set(rows.first(["model"]).model)
        return self._with(rows, [config for config in self.configs if config.model in left])

    def roles(self) -> Self:
        """The part without sources of `each`: what is a mean over facts, where positions of prompts are not."""
        masks = (frame.position.to_numpy() < 0 for frame in self.rows.taken(["position"]))
        return self._with(self.rows.only(masks), self.configs)

    def _with(self, rows: pd.DataFrame | Rows, configs: list[RunConfig]) -> Self:
        """The same with other rows."""
        if isinstance(rows, pd.DataFrame):
            rows = rows.reset_index(drop=True)
        checks = self.checks[self.checks.model.isin([config.model for config in configs])].reset_index(drop=True)
        return type(self)(rows, self.skipped, self.facts, configs, self.unfinished, self.prompts, checks)

    def _taken(self, names: Sequence[str], rows: Rows | None = None) -> Iterator[list[pd.Series]]:
        """Columns of the table, or of the facts, for the rows of one piece after another."""
        rows = self.rows if rows is None else rows
        read = [name if name in rows.columns else "fact_id" for name in names]
        for frame in rows.taken(read):
            yield [column_of(name, frame, self.facts) for name in names]

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
        return self.summaries([metric], by, interval, seed)[metric]

    def groups(self) -> pd.DataFrame:
        """What a mean over facts keeps apart: the values of `runs.table.GROUP` that the sweep has, in its order."""
        return pd.DataFrame(self.rows.groups(GROUP).keys, columns=GROUP)

    def summaries(
        self, metrics: Iterable[str], by: Sequence[str] = (), interval: str = "bootstrap", seed: int = 0
    ) -> dict[str, pd.DataFrame]:
        """Several columns' `summary`, for which groups are looked for once; long tables show how far it is."""
        keys, groups = [*by, *GROUP], self._apart(by)
        found, draws = {}, Draws(seed)
        doing = f"means by {by[0]}" if by else "means"
        for metric in tqdm(list(metrics), doing, unit="column", disable=not self.rows.kept, leave=False):
            intervals = mean_intervals(groups.values(metric), interval, seed, draws)
            rows = [(*key, n, *three) for key, n, three in zip(groups.keys, groups.sizes, intervals, strict=True)]
            found[metric] = pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high"])
        return found

    def _apart(self, by: Sequence[str]) -> Groups:
        """Rows that a mean over facts keeps apart, by columns of the facts as well."""
        for name in by:
            if name not in self.facts.columns or name in self.rows.columns:
                return Groups.of(self.rows, self._taken([*by, *GROUP]))
        groups = self.rows.groups(GROUP)
        if not by:
            return groups
        facts = self.rows.groups(["fact_id"])
        asked = pd.DataFrame(facts.keys, columns=["fact_id"])
        columns = [column_of(name, asked, self.facts).tolist() for name in by]
        return groups.split(
            facts, [tuple(np.nan if pd.isna(one) else one for one in row) for row in zip(*columns, strict=True)]
        )

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
            MambalensError: if it cannot be written, holds a run of its own, or the rows of this result.
        """
        if Path(folder).resolve() in {
            piece.path.resolve().parents[1] for piece in self.rows.pieces if isinstance(piece, Kept)
        }:
            raise MambalensError(f"{str(folder)!r} keeps the rows of this result: choose another folder to save it in.")
        stored = Stored(self.rows.parts(), self.skipped, self.facts, self.prompts, self.configs, self.checks)
        return stored.save(folder, SWEEP)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run's folder, also while it is still being filled, or what `save` wrote.

        A folder with such folders in it gives them all as one. Parts that are damaged are left out with a warning;
        `unfinished` says how many blocks are missing.
        """
        found = folders_of(folder, SWEEP)
        held = rows_in(found, SWEEP) <= HELD
        results = [cls._load(path, held) for path in found]
        return results[0] if found == [Path(folder)] else cls.concat(results)

    @classmethod
    def _load(cls, folder: Path, held: bool) -> Self:
        stored = stored_in(folder, SWEEP, held)
        tables = [with_all_columns(table) for table in stored.tables]
        rows = pd.concat(tables, ignore_index=True) if held else Rows(map(Kept.of, stored.kept))
        skipped = with_unusable(stored.skipped, stored.configs)
        return cls(rows, skipped, stored.facts, stored.configs, stored.unfinished, stored.prompts, stored.checks)


def _together(rows: Sequence[Rows]) -> Rows:
    """Rows one below the other, in one table where all are held."""
    pieces = [piece for one in rows for piece in one.pieces]
    if all(isinstance(piece, Held) for piece in pieces):
        return Rows([Held(pd.concat([piece.frame() for piece in pieces], ignore_index=True))])
    return Rows(pieces)


def _is_any_of(column: pd.Series, wanted: set[str]) -> Bool[np.ndarray, " row"]:
    """Where a column's values are written like one of these."""
    if column.dtype == object:
        column = column.astype(str)  # 1 and True are one value to pandas, and two to whoever writes them
    numbers, different = pd.factorize(column, use_na_sentinel=False)
    return pd.Series(different).astype(str).isin(wanted).to_numpy(bool)[numbers]


def measured(configs: Sequence[RunConfig], columns: Iterable[str]) -> dict[str, str]:
    """The column of a measure that all runs of a table with these columns have, and what axes call it."""
    names = {config.measure for config in configs}
    if len(names) != 1 or "" in names or "measure" not in columns:
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
