"""Patches and traces as heatmaps: tokens or pieces of the prompt down, layers across."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mambalens.figures.framed import changing, frame
from mambalens.figures.one import of_one
from mambalens.figures.style import lines, plain, visible
from mambalens.hooks.errors import MambalensError, choose
from mambalens.runs.table import ROLE

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.interventions.data import CellData

SITE_NAMES = {
    "residual": "residual stream before the layer",
    "value": "values that positions hand on",
    "mixer": "token mixers' output",
    "mlp": "MLPs' output",
    "state": "state after the position",
}
"""What titles call the sites."""
CHANGES = ("moved", "effect")
"""Metrics that are zero where nothing changes."""
AGAINST = ("moved", "other_prob", "other_log_odds")
"""Metrics that rise as a fact loses its own answer: red, as losses are in every figure; gains are blue."""


def cells(
    data: CellData,
    fact_id: str | None = None,
    metric: str | None = None,
    model: str | None = None,
    site: str | None = None,
    title: str | None = None,
) -> Figure:
    """What patches or restored sites do, as a heatmap.

    Args:
        data: patches or traces.
        fact_id: one fact, drawn token by token; None: the mean over facts by pieces (or roles), or the only fact.
        metric: a column of `data.metrics`; the first by default.
        model, site: which, where there are several.
        title: a heading.

    Raises:
        MambalensError: if there is no such fact, model or site, or several and none was named.
    """
    name = data.check_metric(metric)
    table = of_one(data.table, "One heatmap cannot show", "the result", model=model, site=site)
    for column in ("window_size", *data.apart):
        if table[column].nunique() > 1:
            raise MambalensError(
                f"One heatmap cannot show several values of {column}: keep one, for example "
                f".where({column}={table[column].iloc[0]!r})."
            )
    facts = table.fact_id.unique()
    if fact_id is None and len(facts) == 1 and (table.position != ROLE).all():
        fact_id = str(facts[0])
    first = table.iloc[0]
    depth = data.n_layers[str(first.model)]
    centre = 0.0 if name in CHANGES else float(table[_before(table, name)].mean())
    if fact_id is None:
        summary = data.where(model=first.model, site=first.site).summary(name)
        grid = summary.pivot(index="piece", columns="window_start", values="mean").reindex(summary.piece.unique())
        counts = summary.groupby("piece", sort=False).n.max()
        labels = [f"{piece}  ({counts[piece]})" for piece in grid.index]
        bold: list[int] = []
        inside = summary[summary.window_start < depth]
        framed = changing(inside, grid) if name in CHANGES else []
        about = [f"means over {len(facts)} facts{_samples(table)}; in parentheses how many have the piece"]
        if framed:
            aside = f", layer {depth} aside" if summary.window_start.max() >= depth else ""
            about.append(f"framed, with its 95 % interval at the right: where a piece does most{aside}")
    else:
        table = table[(table.fact_id == fact_id) & (table.position != ROLE)]
        if not len(table):
            raise MambalensError(f"The result has no positions of the fact {fact_id!r}: {choose(fact_id, facts)}.")
        tokens, bold = data.tokens(fact_id)
        grid = table.groupby(["position", "window_start"])[name].mean().unstack("window_start")
        bold = [list(grid.index).index(position) for position in bold if position in grid.index]
        labels = [visible(tokens[position]) for position in grid.index]
        about, framed = [f"fact {fact_id}{_samples(table)}"], []
    values = grid.to_numpy(float)
    wide, high = max(0.3 * values.shape[1] + 4.6, 7.0), max(0.3 * values.shape[0] + 1.7, 3.4)
    wide += 1.4 if framed else 0.0
    figure, axis = plt.subplots(figsize=(wide, high), layout="constrained")
    axis.set_facecolor("#D0D0D0")
    reach = float(np.nanmax(np.abs(values - centre))) if np.isfinite(values).any() else 1.0
    norm = TwoSlopeNorm(centre, centre - (reach or 1.0), centre + (reach or 1.0))
    colours = "RdBu_r" if name in AGAINST else "RdBu"
    image = axis.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    for position in bold:
        axis.get_yticklabels()[position].set_fontweight("bold")
    frame(axis, framed)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    starts = list(grid.columns)
    axis.xaxis.set_major_formatter(
        lambda at, _: f"{starts[int(at)]}" if at == int(at) and 0 <= at < len(starts) else ""
    )
    size = int(first.window_size)
    behind = f" ({depth}: behind the last)" if depth in starts else ""
    axis.set_xlabel(f"Layer{behind}" if size == 1 else f"First layer of the window ({size} layers)")
    said = f"{first.model}: {SITE_NAMES[str(first.site)]}"
    said += f" restored, {_corrupted(str(first.corruption))}" if "corruption" in data.apart else " patched"
    heading = lines(plain(title or said), int(9 * wide))
    heading += [line for text in about for line in lines(plain(text), int(10 * wide))]
    axis.set_title("\n".join(heading), fontsize=9.5)
    label = data.metrics[name] + ("" if name in CHANGES else "; white: without a patch")
    figure.colorbar(image, ax=axis).set_label("\n".join(lines(label, int(11 * high))), fontsize=9)
    plt.close(figure)
    return figure


def _before(table: pd.DataFrame, name: str) -> str:
    """The column that has the same without a patch, or of the corrupted run."""
    return f"corrupted_{name}" if f"corrupted_{name}" in table else f"base_{name}"


def _samples(table: pd.DataFrame) -> str:
    """How many samples of the noise there are, where there are several."""
    count = table["sample"].nunique() if "sample" in table else 1
    return f" and {count} samples of the noise" if count > 1 else ""


def _corrupted(corruption: str) -> str:
    """What has been done to the subject: 'noise of 3 sd on the subject'."""
    noise = corruption.removeprefix("noise ")
    return "another subject in its place" if noise == corruption else f"noise of {noise} sd on the subject"
