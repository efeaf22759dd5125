"""What a sweep found: the table, what was left out, summaries with intervals, and the folder they are kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from mambalens.folder import (
    CONFIG,
    FACTS,
    PARTS,
    PROMPT,
    SAVED,
    SKIPPED,
    atomically,
    digest_of,
    is_run,
    read_config,
    read_parts,
    read_prompts,
    write_facts,
    write_part,
    write_prompts,
    writing,
)  # fmt: skip
from mambalens.hooks.errors import MambalensError, choose
from mambalens.settings import DETAILS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERVALS = ("bootstrap", "t", "sem")
METRICS = {
    "change_pct": "Change of the target's probability (%)",
    "prob": "Probability of the target",
    "hit": "Target still on top (share of facts)",
    "rank": "Rank of the target",
    "kl": "KL from the base (nats)",
}
"""Columns that can be summarized and drawn, and what axes call them."""
GROUP = ["model", "source", "target", "features", "path", "window_size", "window_start"]
RESAMPLES = 2000
_AT_ONCE = 100
LEVEL = 0.95


class SweepResult:
    """A finished sweep, or several put together.

    Attributes:
        table: one row per fact, source, features, path and window; columns in `work.COLUMNS`.
        skipped: fact_id, source ('' where the whole fact was left out) and reason.
        facts: the facts that were asked for, with all their columns.
        configs: what was run, one dict a model.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
        prompts: one row per model and fact: the prompt's tokens, as texts, and the subject's positions.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        configs: list[dict[str, Any]],
        unfinished: int = 0,
        prompts: pd.DataFrame | None = None,
    ) -> None:
        self.table, self.skipped, self.facts, self.configs = table, skipped, facts, configs
        self.unfinished = unfinished
        self.prompts = pd.DataFrame(columns=list(PROMPT)) if prompts is None else prompts

    def __repr__(self) -> str:
        facts = self.table.fact_id.nunique()
        left = f"; {self.unfinished} block{'s' * (self.unfinished > 1)} of facts to come" if self.unfinished else ""
        return f"<SweepResult: {', '.join(self.models)}; {facts} facts, {len(self.table)} rows{left}>"

    def _repr_html_(self) -> str:
        from mambalens.pages.notebook import result_html

        return result_html(self)

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(dict.fromkeys(config["model"] for config in self.configs))

    @property
    def n_layers(self) -> dict[str, int]:
        """Layers of each model."""
        return {config["model"]: config["n_layers"] for config in self.configs}

    @classmethod
    def concat(cls, results: Sequence[SweepResult]) -> SweepResult:
        """Several results as one, for comparing models."""
        if not results:
            raise MambalensError("There is no result to put together.")
        tables = [result.table for result in results]
        skipped = [result.skipped for result in results]
        facts = pd.concat([result.facts for result in results], ignore_index=True)
        facts = facts.drop_duplicates("fact_id", ignore_index=True)
        asked = pd.concat([result.facts[["fact_id", "prompt", "target"]] for result in results]).drop_duplicates()
        other = asked.fact_id[asked.fact_id.duplicated()]
        if len(other):
            raise MambalensError(
                f"Different facts have the id {other.iloc[0]!r} in these results: give the facts ids of their own."
            )
        configs = [config for result in results for config in result.configs]
        unfinished = sum(result.unfinished for result in results)
        prompts = pd.concat([result.prompts for result in results], ignore_index=True)
        prompts = prompts.drop_duplicates(["model", "fact_id"], ignore_index=True)
        table, missing = pd.concat(tables, ignore_index=True), pd.concat(skipped).drop_duplicates(ignore_index=True)
        return cls(table, missing, facts, configs, unfinished, prompts)

    def where(self, **values: Any) -> SweepResult:
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
        configs = [config for config in self.configs if config["model"] in set(table.model)]
        return self._with(table, configs)

    def roles(self) -> SweepResult:
        """The part without sources of `each`: what is a mean over facts, where positions of prompts are not."""
        table = self.table
        return self._with(table[~table.source.str.startswith("each:")], self.configs)

    def _with(self, table: pd.DataFrame, configs: list[dict[str, Any]]) -> SweepResult:
        """The same with other rows."""
        table = table.reset_index(drop=True)
        return SweepResult(table, self.skipped, self.facts, configs, self.unfinished, self.prompts)

    def column(self, name: str, table: pd.DataFrame | None = None) -> pd.Series:
        """A column of the table, or of the facts, for every row of the table."""
        table = self.table if table is None else table
        if name in table.columns:
            return table[name]
        if name not in self.facts.columns:
            raise MambalensError(f"{name!r} is no column of the facts: {choose(name, self.facts.columns)}.")
        return table.fact_id.map(self.facts.set_index("fact_id")[name])

    def summary(
        self, interval: str = "bootstrap", metric: str = "change_pct", by: Sequence[str] = (), seed: int = 0
    ) -> pd.DataFrame:
        """Means over facts with 95 % intervals, one row per model, source, features, path and window.

        Args:
            interval: 'bootstrap' (percentiles of 2,000 resamples of the facts, seeded), 't' (Student's t) or 'sem' (one
                standard error to each side).
            metric: a column of `METRICS`.
            by: columns of the facts to split by, such as 'wording' or 'relation'.

        Returns:
            The grouping columns, n (facts), mean, low, high; low and high are NaN for a single fact.
        """
        if interval not in INTERVALS:
            raise MambalensError(f"interval={interval!r} is not an interval: {choose(interval, INTERVALS)}.")
        if metric not in METRICS:
            raise MambalensError(f"metric={metric!r} is not a column to summarize: {choose(metric, METRICS)}.")
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
        summary = self.summary()
        keys = [name for name in GROUP if name != "window_start"]
        lowest = summary.assign(mean=summary["mean"].fillna(np.inf)).groupby(keys, sort=False)["mean"].idxmin()
        return summary.loc[lowest.to_numpy(int)].reset_index(drop=True)

    def plot(
        self,
        metric: str = "change_pct",
        x: str = "layer",
        rows: str | None = None,
        columns: str | None = None,
        **options: Any,
    ) -> Figure:
        """Information-flow curves; see `figures.flow`."""
        from mambalens.figures import flow

        return flow(self, metric, x, rows, columns, **options)

    def heatmap(self, fact_id: str, metric: str = "change_pct", **where: Any) -> Figure:
        """Every token of a fact's prompt as the source, by window; the sweep needs `each` among its sources.

        Args:
            fact_id: the fact.
            metric: a column of `METRICS`.
            where: which part, where the sweep has several: `model=`, `features=`, `path=`, `window_size=`.

        Raises:
            MambalensError: if the sweep has no such fact, no single tokens as sources, or several grids of them.
        """
        from mambalens.figures import heatmap

        part = self.where(fact_id=fact_id, **where)
        part = part._with(part.table[part.table.source.str.startswith("each:")], part.configs)
        if not len(part.table):
            raise MambalensError(
                f"The sweep has no single tokens of the fact {fact_id!r} as sources: sweep it with sources='each'."
            )
        several = [name for name in GROUP if name not in ("source", "window_start") and part.table[name].nunique() > 1]
        if several:
            raise MambalensError(
                f"One heatmap cannot show several values of {', '.join(several)}: keep one, for example "
                f"{several[0]}={part.table[several[0]].iloc[0]!r}."
            )
        prompts = part.prompts
        found = prompts[(prompts.model == part.table.model[0]) & (prompts.fact_id == fact_id)]
        if not len(found):
            raise MambalensError(f"The sweep was kept without the tokens of {fact_id!r}: run it again in its folder.")
        facts = part.facts[part.facts.fact_id == fact_id].reset_index(drop=True)
        part = SweepResult(part.table, part.skipped, facts, part.configs)
        return heatmap(part, list(found.tokens.iloc[0]), list(found.subject.iloc[0]), metric)

    def report(self, path: str | Path, title: str | None = None, details: int = DETAILS) -> Path:
        """Write one HTML page to look at the sweep with: curves, switches, facts and their heatmaps.

        The page needs no network. Heatmaps of single prompts are there where the sweep has `each` among its sources.

        Args:
            path: the .html file.
            title: a heading; by default the models.
            details: facts of each model whose own numbers go into the page; curves are means over all.

        Returns:
            The file.

        Raises:
            MambalensError: if it cannot be written, or sweeps that were put together contradict each other.
        """
        from mambalens.pages.report import write_report

        return write_report(self, path, title, details)

    def save(self, folder: str | Path) -> Path:
        """Write tables as parquet and what was run as JSON, in the format of a run's folder (`mambalens.folder`).

        Returns:
            The folder.

        Raises:
            MambalensError: if it cannot be written, or holds a run of its own.
        """
        folder = writable_folder(folder)
        if (folder / CONFIG).exists() and is_run(folder):
            raise MambalensError(
                f"{str(folder)!r} holds a run: a result is not written over it, choose another folder."
            )
        with writing(folder):
            (folder / PARTS).mkdir(exist_ok=True)
            write_part(folder / PARTS / "00000.parquet", self.table, self.skipped, SAVED)
            write_facts(folder, self.facts)
            write_prompts(folder, self.prompts)
            text = json.dumps({"configs": self.configs, "blocks": 1, "definition": None}, indent=1) + "\n"
            atomically(folder / CONFIG, lambda file: file.write_text(text))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SweepResult:
        """Read a run's folder, also while it is still being filled, or what `save` wrote.

        A folder with such folders in it gives them all as one. Parts that are damaged are left out with a warning;
        `unfinished` says how many blocks are missing.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise MambalensError(f"The folder {str(folder)!r} does not exist.")
        if not (folder / CONFIG).is_file():
            found = sorted(path.parent for path in folder.rglob(CONFIG))
            if not found:
                raise MambalensError(f"The folder {str(folder)!r} holds no sweep (no {CONFIG}).")
            return cls.concat([cls.load(path) for path in found])
        about = read_config(folder)
        parts, missing = read_parts(folder, digest_of(about.get("definition")), int(about.get("blocks", 1)))
        if not parts:
            raise MambalensError(f"The run in {str(folder)!r} has no finished block yet.")
        try:
            facts = pd.read_parquet(folder / FACTS)
        except (OSError, ValueError) as error:
            raise MambalensError(f"The facts of the run in {str(folder)!r} cannot be read ({error}).") from error
        table = pd.concat([table for table, _ in parts], ignore_index=True)
        skipped = pd.concat([skips for _, skips in parts], ignore_index=True)
        skipped = with_unusable(skipped, about["configs"])
        return cls(table, skipped, facts, about["configs"], missing, read_prompts(folder))


def with_unusable(skipped: pd.DataFrame, configs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What was left out, and the facts that could not be asked when known ones were chosen."""
    rows = [
        (fact_id, "", reason)
        for config in configs
        for answered in config.get("answered", [])
        for fact_id, reason in answered.get("unusable", [])
    ]
    return pd.concat([pd.DataFrame(rows, columns=list(SKIPPED)), skipped]).drop_duplicates(ignore_index=True)


def writable_folder(folder: str | Path) -> Path:
    """The folder, made if need be; asked for before long work starts.

    Raises:
        MambalensError: if it cannot be made or written to.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".probe.{os.getpid()}").touch()
        (folder / f".probe.{os.getpid()}").unlink()
    return folder


def mean_intervals(groups: Sequence[np.ndarray], interval: str, seed: int = 0) -> list[tuple[float, float, float]]:
    """Mean, low and high of every group of values [n]; see `SweepResult.summary`.

    The bootstrap draws the same facts for all groups of one size: what `scipy.stats.bootstrap` draws for each, which
    the tests hold it against. The resamples' means of many groups are one matrix product.
    """
    by_size: dict[int, list[int]] = {}
    for number, values in enumerate(groups):
        by_size.setdefault(len(values), []).append(number)
    found = [(float("nan"),) * 3] * len(groups)
    for n, numbers in by_size.items():
        if n == 0:
            continue
        values = np.stack([groups[number] for number in numbers])  # [G, n]
        mean = values.mean(1)
        if n == 1:
            low = high = np.full(len(values), np.nan)
        else:
            error = values.std(1, ddof=1) / np.sqrt(n)
            if interval == "bootstrap":
                low, high = _percentiles(values, seed)
            else:
                reach = error * (1.0 if interval == "sem" else stats.t.ppf(0.5 + LEVEL / 2, n - 1))
                low, high = mean - reach, mean + reach
            low, high = np.where(error == 0.0, mean, low), np.where(error == 0.0, mean, high)
        for number, *three in zip(numbers, mean, low, high, strict=True):
            found[number] = tuple(float(value) for value in three)  # type: ignore[assignment]
    return found


def _percentiles(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Low and high of the means of bootstrap resamples of values [G, n]."""
    rng, (groups, n) = np.random.default_rng(seed), values.shape
    means = np.empty((groups, RESAMPLES))
    for begin in range(0, RESAMPLES, _AT_ONCE):
        drawn = rng.integers(0, n, (_AT_ONCE, n))
        drawn += n * np.arange(_AT_ONCE)[:, None]
        times = np.bincount(drawn.ravel(), minlength=_AT_ONCE * n).reshape(_AT_ONCE, n)  # how often each fact is drawn
        means[:, begin : begin + _AT_ONCE] = values @ times.T / n
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=1)
    return low, high
