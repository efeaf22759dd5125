"""One page of one or several sweeps: everything in one file, nothing fetched when it is opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mambalens.defaults import ABLATION
from mambalens.facts.roles import pieces
from mambalens.figures.style import PATHS, main_path, style
from mambalens.hooks.errors import MambalensError
from mambalens.html.render import render
from mambalens.report.assets import left_out, packed, plain, rounded, tables, texts, write
from mambalens.runs.data import SweepData
from mambalens.runs.rows import Rows
from mambalens.runs.table import GROUP, SINGLE
from mambalens.system.progress import tqdm

SUBSET_VALUES = 12
"""A column of the facts with at most so many values splits the curves."""
SPARSE = 64
"""Knockouts that could be, for each that is: above, those that stand twice are not looked for in a list of all."""
DIMENSIONS = ("model", "source", "features", "path", "ablation", "target", "window_size")
"""What curves differ in."""
_SERIES = [name for name in GROUP if name != "window_start"]
_ROW = ["fact_id", *GROUP]
_SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    "p": "pentagon", "<": "triangle-left", ">": "triangle-right",
}  # fmt: skip


def write_report(result: SweepData, path: str | Path, title: str | None, details: int) -> Path:
    """Write the page; see `SweepResult.report`."""
    page = _page(_whole(result), title or f"Where answers come from: {', '.join(result.models)}", details)
    return write(path, page)


def _page(result: SweepData, title: str, details: int) -> str:
    roles = result.roles()
    series, groups = list(_series(roles)), roles.groups()
    firsts = result.rows.first(["model", "fact_id"], ["base_rank", "base_prob"])
    data = {
        "metrics": result.metrics,
        "single": SINGLE,
        "models": [{"name": name, "layers": layers} for name, layers in result.n_layers.items()],
        "series": series,
        "details": {
            model: _details(result, model, firsts.fact_id[firsts.model == model], details) for model in result.models
        },
        "styles": _styles(groups),
    }
    subsets = list(dict.fromkeys(name for one in series for name in one["curves"]))
    choices = {name: [str(value) for value in groups[name].unique()] for name in DIMENSIONS}
    path = main_path(result)
    words = {"main": path, **PATHS}
    return render(
        "report.html", title=title, data=plain(data), metrics=result.metrics, subsets=subsets, choices=choices,
        words={name: f"{name} ({word})" for name, word in words.items()},
        models=[_about(result, model, firsts[firsts.model == model]) for model in result.models],
        unfinished=result.unfinished, **left_out(result.skipped), **tables(), **texts("report.js"),
    )  # fmt: skip


def _whole(result: SweepData) -> SweepData:
    """The result without rows that several of its sweeps have.

    Raises:
        MambalensError: if they differ there, or models of one name have different numbers of layers.
    """
    layers: dict[str, int] = {}
    for config in result.configs:
        if layers.setdefault(config.model, config.n_layers) != config.n_layers:
            raise MambalensError(f"Two different models are called {config.model!r}: report them one by one.")
    rows = result.rows
    numbers = _numbers_of_knockouts(rows)
    if numbers is None:
        return result
    kept = pd.Series(numbers)
    again = kept.duplicated()
    twice = kept.duplicated(keep=False).to_numpy()
    spread = (
        rows.take(["prob"], "compare what stands twice")[twice].groupby(kept[twice].to_numpy()).prob.agg(["min", "max"])
    )
    if (spread["max"] - spread["min"] > 1e-5 * spread["max"]).any():
        model = rows.take(["model"]).model[twice].iloc[0]
        raise MambalensError(
            f"The sweeps have different numbers for the same knockouts of {model!r}: they are of different weights "
            "or precisions. Report them one by one."
        )
    ends = np.cumsum([piece.size for piece in rows.pieces])
    return result._with(rows.only(np.split(~again.to_numpy(), ends[:-1])), result.configs)


def _numbers_of_knockouts(rows: Rows) -> Int[np.ndarray, " row"] | None:
    """The same number for rows of the same fact and knockout; none where no two are."""
    facts, groups = rows.groups(["fact_id"]), rows.groups(GROUP)
    numbers = facts.numbers() * len(groups.keys) + groups.numbers()
    if (every := len(facts.keys) * len(groups.keys)) <= SPARSE * len(rows):
        seen = np.zeros(every, bool)
        seen[numbers] = True
        different = int(np.count_nonzero(seen))
    else:
        different = len(pd.unique(numbers))
    return numbers if different < len(numbers) else None


def _series(roles: SweepData) -> Iterator[dict[str, Any]]:
    """Curves of means with intervals, one for each value of `DIMENSIONS`, over all facts and over parts of them."""
    subsets = [(), *((column,) for column in _columns(roles))] if len(roles.rows) else []
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for by in subsets:
        for metric, summary in roles.summaries(roles.metrics, by=by).items():
            for found_key, curve in summary.groupby([*by, *_SERIES], sort=False):
                key: tuple[Any, ...] = found_key  # type: ignore[assignment]
                curve = curve.set_index("window_start").sort_index()
                subset = f"{by[0]}: {key[0]}" if by else "all facts"
                about = dict(zip(_SERIES, key[len(by) :], strict=True))
                series = found.setdefault(
                    key[len(by) :], about | {"window_size": int(about["window_size"]), "curves": {},
                                             "starts": curve.index.tolist()}
                )  # fmt: skip
                curve = curve.reindex(series["starts"])  # a part of the facts may have been swept in fewer windows
                of_subset = series["curves"].setdefault(subset, {"n": curve.n.fillna(0).astype(int).tolist()})
                of_subset[metric] = [rounded(curve[name]) for name in ("mean", "low", "high")]
    yield from found.values()


def _columns(result: SweepData) -> list[str]:
    """Columns of the facts that have several values, and few."""
    facts = result.facts[result.facts.fact_id.isin(set(result.rows.first(["fact_id"]).fact_id))]
    others = [name for name in facts.columns if name not in ("prompt", "subject", *result.rows.columns)]
    return [name for name in others if 1 < facts[name].nunique() <= SUBSET_VALUES and facts[name].notna().all()]


def _details(result: SweepData, model: str, every: pd.Series, most: int) -> dict[str, Any]:
    """Facts of one model with the numbers of every knockout, as arrays that the page reads when it needs them."""
    rows = _only(result.rows, "model", {model})
    masks = (frame.position.to_numpy() >= 0 for frame in rows.taken(["position"], "look for single tokens"))
    tokens = rows.only(masks)
    with_tokens = set(tokens.first(["fact_id"]).fact_id)
    ids = sorted(every, key=lambda fact_id: fact_id not in with_tokens)[:most]  # stable: those with heatmaps go first
    table = _only(rows, "fact_id", set(ids)).frame()
    single = table.position >= 0
    facts = result.facts.set_index("fact_id").loc[ids]
    base = table.drop_duplicates("fact_id").set_index("fact_id").loc[ids]
    columns = [name for name in facts.columns if name not in ("prompt", "subject", "target")]
    columns = [name for name in columns if facts[name].notna().any() and facts[name].astype(str).str.len().max() <= 30]
    prompts = result.prompts[result.prompts.model == model].set_index("fact_id")
    row = {fact_id: number for number, fact_id in enumerate(ids)}
    return {
        "left_out": len(every) - len(ids),
        "columns": columns,
        "facts": [
            {
                "id": fact_id,
                "pieces": pieces(fact["prompt"], fact["subject"]),
                "target": fact["target"],
                "columns": ["" if pd.isna(fact[name]) else str(fact[name]) for name in columns],
                "base_prob": rounded([base.base_prob[fact_id]])[0],
                "tokens": list(prompts.tokens[fact_id]) if fact_id in prompts.index else None,
                "subject": [int(i) for i in prompts.subject[fact_id]] if fact_id in prompts.index else [],
            }
            for fact_id, fact in zip(ids, facts.to_dict("records"), strict=True)
        ],
        "curves": [
            about | {"starts": starts, "top": _top(group, grids["change_pct"], row, starts),
                     "values": {metric: packed(grid) for metric, grid in grids.items()}}
            for about, group, starts, grids in _grids(table[~single], row, result.metrics, result.rows.kept)
        ],
        "tokens": list(_token_grids(table[single], row, prompts, result.metrics, result.rows.kept)),
    }  # fmt: skip


def _grids(
    table: pd.DataFrame, row: dict[str, int], metrics: Iterable[str], progress: bool
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, list[int], dict[str, Float[np.ndarray, "fact window"]]]]:
    """For every series: what it is, its rows, its windows, and for each metric the values."""
    series = table.groupby(_SERIES, sort=False)
    for key, group in tqdm(series, "curves of facts", unit="curve", disable=not progress, leave=False):
        starts = sorted(int(start) for start in group.window_start.unique())
        at = (group.fact_id.map(row).to_numpy(int), np.searchsorted(starts, group.window_start.to_numpy()))
        grids = {}
        for metric in metrics:
            grids[metric] = np.full((len(row), len(starts)), np.nan, "<f4")
            grids[metric][at] = group[metric].to_numpy(float)
        about: dict[str, Any] = dict(zip(_SERIES, key, strict=True))
        yield about | {"window_size": int(about["window_size"])}, group, starts, grids


def _top(
    group: pd.DataFrame, change: Float[np.ndarray, "fact window"], row: dict[str, int], starts: list[int]
) -> list[str]:
    """What each fact's prompt is answered with in the window that costs it most."""
    dearest = np.where(np.isnan(change), np.inf, change).argmin(1)
    wanted = group.window_start.to_numpy() == np.array(starts)[dearest][group.fact_id.map(row).to_numpy(int)]
    found = dict(zip(group.fact_id[wanted], group.top_token[wanted], strict=True))
    return [found.get(fact_id, "") for fact_id in row]


def _token_grids(
    table: pd.DataFrame, row: dict[str, int], prompts: pd.DataFrame, metrics: Iterable[str], progress: bool
) -> Iterator[dict[str, Any]]:
    """For all that curves differ in but model and source: values [tokens of all facts, windows], fact by fact."""
    names = [name for name in DIMENSIONS if name not in ("model", "source")]
    apart = table.groupby(names, sort=False)
    for key, group in tqdm(apart, "heatmaps of facts", unit="heatmap", disable=not progress, leave=False):
        starts = sorted(int(start) for start in group.window_start.unique())
        facts, position = group.fact_id.map(row).to_numpy(int), group.position.to_numpy(int)
        length = np.zeros(len(row), int)
        np.maximum.at(length, facts, position + 1)
        offset = np.concatenate([[0], length.cumsum()])
        at = (offset[facts] + position, np.searchsorted(starts, group.window_start.to_numpy()))
        of_metrics = {}
        for metric in metrics:
            grid = np.full((offset[-1], len(starts)), np.nan, "<f4")
            grid[at] = group[metric].to_numpy(float)
            of_metrics[metric] = packed(grid)
        about: dict[str, Any] = dict(zip(names, key, strict=True))
        yield about | {"window_size": int(about["window_size"]), "starts": starts, "offsets": offset.tolist(),
                       "values": of_metrics}  # fmt: skip


def _only(rows: Rows, column: str, values: set[str]) -> Rows:
    """Rows that have some of these values in a column."""
    masks = (frame[column].isin(values).to_numpy() for frame in rows.taken([column], f"look for rows by {column}"))
    return rows.only(masks)


def _about(result: SweepData, model: str, base: pd.DataFrame) -> dict[str, Any]:
    """What was run on a model; `base` has the first row of each of its facts."""
    configs = [config for config in result.configs if config.model == model]

    def words(values: Iterable[Any]) -> str:
        flat = [one for value in values for one in (value if isinstance(value, tuple) else [value])]
        texts = ["own lists" if isinstance(one, tuple) else str(one) for one in flat if one is not None]
        return ", ".join(dict.fromkeys(texts))

    return {
        "name": model,
        "layers": result.n_layers[model],
        "facts": len(base),
        "rows": len(_only(result.rows, "model", {model})),
        "right": int((base.base_rank == 1).sum()),
        "median": float(base.base_prob.median()),
        "answered": list(dict.fromkeys(known for config in configs for known in config.answered)),
        "settings": {
            name: text
            for name, values in (
                ("Facts from", [config.facts for config in configs]),
                ("Token mixers", [config.kinds for config in configs]),
                ("Sources", [config.sources for config in configs]),
                ("Target", [config.target for config in configs]),
                ("Window", [config.window for config in configs]),
                ("Features", [config.features for config in configs]),
                ("Paths", [config.paths for config in configs]),
                ("Only mixers", [config.mixers for config in configs]),
                ("Ablation", [config.ablation for config in configs if config.ablation != ABLATION]),
                ("Precision", [config.dtype for config in configs]),
                ("Measure", [config.measure or None for config in configs]),
            )
            if (text := words(values))
        },
    }  # fmt: skip


def _styles(groups: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour and symbol of every value that a line may stand for: the same as in figures."""
    styles = {}
    for name in DIMENSIONS:
        for index, value in enumerate(groups[name].unique()):
            colour, marker = style(str(value), index)
            styles[f"{name}={value}"] = {"color": colour, "symbol": _SYMBOLS[marker]}
    return styles
